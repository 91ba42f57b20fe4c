# SPDX-License-Identifier: BSD-3-Clause
"""Run by test_memory.py under guard_allocator.cpp: every operator, form, dtype and instruction set at ragged sizes.

With an argument it makes an error that must be caught: `write` or `read` after a tensor, `gap` in the padding.
"""

from __future__ import annotations

import ctypes
import sys

import torch
from problems import DTYPES, FORMS, Problem, results
from torch import Tensor

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
    print(ctypes.CDLL(None).guarded_blocks())


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
