"""The one rule of accuracy: our error against float64 is at most 1.5 times that of eager torch on the same numbers.

Error is the root of the mean square over a tensor, so that one bound holds for 10 and for a million numbers; the worst
single number may be off by twice that again. One rounding of the result is free: eager is exact now and then. Small
results are drawn several times and pooled, because two errors of 17 numbers each differ by more than 1.5 by chance.

float64 has no reference in torch; there eager's error is its float32 error, scaled by the ratio of the epsilons: the
same algorithm on the same numbers. On a GPU it is not the same: cuBLAS sums float32 in other ways than float64, and its
own products in float64 miss that rule by a hair; twice is allowed there.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable

import torch
from device import DEVICE
from problems import Problem, results
from torch import Tensor

RATIO = 1.5
WORST = 2 * RATIO
ENOUGH = 100  # numbers; their root mean square scatters by 7 %
MOST_DRAWS = 32


@functools.lru_cache(maxsize=2 * MOST_DRAWS)
def _known(problem: Problem, dtype: torch.dtype, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The float64 results and eager's errors, the same for every instruction set."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for these sizes waking a second thread costs more than it brings
    try:
        return _computed(problem, dtype, *problem.draw(seed, dtype))
    finally:
        torch.set_num_threads(threads)


def _computed(
    problem: Problem, dtype: torch.dtype, tensors: dict[str, Tensor], d_y: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    exact = _wide(problem, tensors, d_y)
    if dtype is torch.float64:
        tensors, d_y = {name: t.float() for name, t in tensors.items()}, d_y.float()
        scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        target = _wide(problem, tensors, d_y)
    else:
        scale, target = 1.0, exact
    eager = results(problem.plain, tensors, d_y)
    return exact, {name: scale * (t.double() - target[name]) for name, t in eager.items()}


def _wide(problem: Problem, tensors: dict[str, Tensor], d_y: Tensor) -> dict[str, Tensor]:
    return results(problem.plain, {name: t.double() for name, t in tensors.items()}, d_y.double())


def assert_accurate(
    problem: Problem,
    dtype: torch.dtype,
    *,
    ours: Callable[..., Tensor] | None = None,
) -> None:
    """Compares the output and all gradients; ``ours`` stands in for the operator."""
    sums: dict[str, _Errors] = defaultdict(lambda: _Errors(dtype))
    for seed in range(MOST_DRAWS):
        exact, eager_error = _known(problem, dtype, seed)
        actual = results(ours or problem.ours, *problem.draw(seed, dtype))
        for name, value in exact.items():
            assert actual[name].shape == value.shape and actual[name].dtype is dtype, name
            sums[name].add(actual[name].double(), value, eager_error[name])
        if all(e.count >= ENOUGH or e.count == 0 for e in sums.values()):
            break
    for name, errors in sums.items():
        errors.check(name)


def assert_error_like_eagers(actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """The same rule for one result that is at hand in all three forms."""
    errors = _Errors(actual.dtype)
    errors.add(actual.detach().double(), exact.detach(), eager.detach().double() - exact.detach())
    errors.check("result")


class _Errors:
    """Running errors of one named result."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.rounding = torch.finfo(dtype).eps / 2
        self.ratio, self.worst = RATIO, WORST
        if dtype is torch.float64:  # the reference has eager's error too
            factor = 1 if DEVICE == "cpu" else 2
            self.ratio, self.worst = factor * RATIO + 1, factor * WORST + 1
        self.count = 0
        self.squares = torch.zeros(3, dtype=torch.float64)  # ours, eager, reference
        self.largest = torch.zeros(3, dtype=torch.float64)

    def add(self, actual: Tensor, exact: Tensor, eager_error: Tensor) -> None:
        if exact.numel() == 0:
            return
        self.count += exact.numel()
        for i, t in enumerate((actual - exact, eager_error, exact)):
            assert torch.isfinite(t).all()
            self.squares[i] += t.square().sum()
            self.largest[i] = max(self.largest[i], t.abs().max())

    def check(self, name: str) -> None:
        error, eager, size = (self.squares / max(1, self.count)).sqrt().tolist()
        limit = self.ratio * eager + self.rounding * size
        assert error <= limit, f"{name}: error {error:.3g}, allowed {limit:.3g} (eager {eager:.3g}, values {size:.3g})"
        error, eager, size = self.largest.tolist()
        limit = self.worst * eager + 2 * self.rounding * size
        assert error <= limit, f"{name}: worst error {error:.3g}, allowed {limit:.3g} (eager {eager:.3g})"
