# SPDX-License-Identifier: BSD-3-Clause
"""Run by test_memory.py under guard_allocator.cpp: every operator, form, dtype and instruction set at ragged sizes.

With an argument it makes an error that must be caught: `write` or `read` after a tensor, `gap` in the padding.
"""

from __future__ import annotations

import ctypes
import sys

import torch
from problems import DTYPES, FORMS, Problem, results
from test_quantized import GGUF, GROUPED, random_weight
from torch import Tensor

import ffn_ops

SIZES = [{"T": 13, "D": 21, "F": 19, "O": 11}, {"T": 3, "D": 7, "F": 37, "O": 33}, {"T": 70, "D": 261, "F": 40, "O": 9}]


def at_the_edge(t: Tensor) -> Tensor:
    """A copy that ends directly before a page that faults."""
    line = 64 // t.element_size()
    whole = t.new_zeros((t.numel() + line - 1) // line * line)
    return whole[whole.numel() - t.numel() :].view(t.shape).copy_(t)


def main() -> None:
    for name in torch.ops.ffn_ops._isas().split():
        torch.ops.ffn_ops._use_isa(name)
        for dtype in DTYPES:
            for form in FORMS:
                for size in SIZES:
                    problem = Problem(form, **size)
                    tensors, d_y = problem.draw(dtype=dtype)
                    edge = {n: at_the_edge(t) for n, t in tensors.items()}
                    for result in results(problem.ours, edge, at_the_edge(d_y)).values():
                        assert torch.isfinite(result).all(), f"{name} {dtype} {problem}: uninitialised memory"
        for format in (*GROUPED, *GGUF):
            quantised(format)
    print(ctypes.CDLL(None).guarded_blocks())


def quantised(format: str) -> None:
    """Codes that end before such a page, in every kernel, forward and backward."""
    g = torch.Generator().manual_seed(0)
    F = {"fp8": 75, "int8": 75}.get(format, 256 if format in GGUF else 96)
    w_in, w_down = (random_weight(format, shape, g) for shape in ((2, 2 * F, 256), (2, 67, F)))
    for w in (w_in, w_down):
        for part, t in list(w._buffers.items()):
            w._buffers[part] = at_the_edge(t)
    for T in (1, 9, 40):
        x = torch.randn(T, 256, generator=g, requires_grad=True)
        routing = ffn_ops.routing.top_k(torch.randn(T, 2, generator=g), k=2)
        ffn_ops.moe(x, routing, w_in, w_down, gated=True).sum().backward()
        assert torch.isfinite(x.grad).all(), f"{format} {T}: uninitialised memory"
    w_in.dequantize()


def misbehave(how: str) -> None:
    t = torch.zeros(16 if how != "gap" else 13)
    end = t.data_ptr() + t.numel() * t.element_size()
    if how == "read":
        ctypes.string_at(end, 1)
    else:
        ctypes.memset(end, 0, 1)
    del t


if __name__ == "__main__":
    torch.set_num_threads(2)
    misbehave(sys.argv[1]) if sys.argv[1:] else main()
