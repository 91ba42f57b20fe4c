# SPDX-License-Identifier: BSD-3-Clause
"""Run by test_memory.py under guard_allocator.cpp: every operator, form, dtype and instruction set at ragged sizes.

With arguments it makes errors that must be caught, `write` or `read` after a tensor, `gap` in the padding, each in a
child, and prints which signals ended them.
"""

from __future__ import annotations

import ctypes
import os
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
        again = name == "avx512_bf16"  # the kernels of avx512, but for products in bfloat16
        for dtype in DTYPES if not again else [torch.bfloat16]:
            for form in FORMS:
                for size in SIZES:
                    problem = Problem(form, **size)
                    tensors, d_y = problem.draw(dtype=dtype)
                    edge = {n: at_the_edge(t) for n, t in tensors.items()}
                    for result in results(problem.ours, edge, at_the_edge(d_y)).values():
                        assert torch.isfinite(result).all(), f"{name} {dtype} {problem}: uninitialised memory"
        for format in (*GROUPED, *GGUF) if not again else ():
            quantised(format)
    misfits(4)
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


def misfits(rounds: int) -> tuple[int, int]:
    """Raw operators on parts of wrong sizes, types and names: an error before any work, or a result. How many."""
    g = torch.Generator().manual_seed(1)
    library, counts = torch.ops.ffn_ops, [0, 0]
    draw = lambda most: int(torch.randint(most, (), generator=g))  # noqa: E731
    for format in (*GROUPED, *GGUF):
        for _ in range(rounds):
            w = random_weight(format, (2, 8, 256), g)
            parts, name = w.stacked()
            at, how = draw(len(parts)), draw(8)
            if how < 3:
                shape = list(parts[at].shape)
                shape[draw(len(shape)) if shape else 0] = draw(300) if how else 0
                parts[at] = parts[at].new_zeros(shape)
            elif how == 3:
                parts = parts[:-1] if draw(2) else [*parts, parts[0]]
            elif how == 4:
                parts[at] = parts[at].to((torch.float64, torch.int32, torch.int8)[draw(3)])
            elif how == 5:
                name = f"{format}:" + ("0x1", "1x0", "-1x4", "x", "1x", "9999999999999999999x1", "3x5", "")[draw(8)]
            elif how == 6:
                parts[at] = parts[at].transpose(0, -1)
            parts = [at_the_edge(t) if t.is_contiguous() else t for t in parts]
            x, offsets = torch.randn(5, 256, generator=g), torch.tensor([0, 2, 5])
            routed = (None, None, offsets, None, None)
            down = at_the_edge(torch.zeros(2, 3, 8, dtype=torch.uint8)), at_the_edge(torch.ones(2, 3, 1))
            form = (False, False, "silu", [], 1.0, False)
            for call in (
                lambda p=parts, n=name: library.dequantize(p, n, "float32"),
                lambda p=parts, n=name, t=x, o=offsets: library.quantized_linear(t, p, n, o, False),
                lambda p=parts, n=name, t=x, r=routed, d=down, f=form: library.moe_quantized(
                    t, *r, p, [], list(d), f"{n},int8:1x8", None, None, *([None] * 4), *f
                ),
            ):
                try:
                    call()
                    counts[1] += 1
                except (RuntimeError, TypeError, ValueError):
                    counts[0] += 1
    return counts[0], counts[1]


def misbehave(how: str) -> None:
    t = torch.zeros(16 if how != "gap" else 13)
    end = t.data_ptr() + t.numel() * t.element_size()
    if how == "read":
        ctypes.string_at(end, 1)
    else:
        ctypes.memset(end, 0, 1)
    del t


def ended_by(how: str) -> int:
    child = os.fork()
    if child == 0:
        misbehave(how)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return status & 0x7F


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(*map(ended_by, sys.argv[1:])) if sys.argv[1:] else main()
