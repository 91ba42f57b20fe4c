# SPDX-License-Identifier: BSD-3-Clause
"""Run under compute-sanitizer by ``python -m ffn_ops verify``: operators in their forms at ragged sizes, forward and
backward, and every router. Arguments: ``cuda``; ``few``: float32 and bfloat16 at one
size, for the tools that are slow."""

from __future__ import annotations

import sys

import torch

if "cuda" in sys.argv[1:]:
    torch.set_default_device("cuda")  # before the tests' modules look for it

from device import DEVICE
from problems import DTYPES, FORMS, Problem, results
from routes import ROUTERS

SIZES = [
    {"T": 150, "D": 70, "F": 133, "O": 40},
    {"T": 3, "D": 7, "F": 37, "O": 33},
    {"T": 13, "D": 261, "F": 19, "O": 9},
]


def main(few: bool) -> None:
    dtypes = (torch.float32, torch.bfloat16) if few else DTYPES
    for dtype in dtypes:
        for form in FORMS:
            for size in SIZES[:1] if few else SIZES:
                problem = Problem(form, **size)
                tensors, d_y = problem.draw(dtype=dtype)
                for name, result in results(problem.ours, tensors, d_y).items():
                    assert torch.isfinite(result).all(), f"{dtype} {problem} {name}: uninitialised memory"
    for router in ROUTERS.values():
        logits = torch.randn(70, 6, requires_grad=True)
        router(logits).weight.sum().backward()
    print(f"{len(dtypes) * len(FORMS)} forms and {len(ROUTERS)} routers on {DEVICE}")


if __name__ == "__main__":
    main("few" in sys.argv[1:])
