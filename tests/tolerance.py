# SPDX-License-Identifier: BSD-3-Clause
"""The rule of ``ffn_ops/_accuracy.py`` for tests. Small results are drawn several times and pooled, because two errors
of 17 numbers each differ by more than 1.5 by chance.

float64 has no wider type in torch: there products and sums of the reference are done in extended precision, and eager's
error is its float32 error, scaled by the ratio of the epsilons: the same algorithm on the same numbers. On a GPU it is
not the same: cuBLAS sums float32 in other ways than float64, and its own products in float64 miss that rule by a hair;
twice is allowed there.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from device import DEVICE
from problems import Problem, results
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ffn_ops._accuracy import PLENTY, RATIO, WORST, allowed

ENOUGH = 100  # numbers; their root mean square scatters by 7 %. PLENTY judge a result above the bound
MOST_DRAWS = 128


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
    with Extended() if d_y.dtype is torch.float64 else nullcontext():
        return results(problem.plain, {name: t.double() for name, t in tensors.items()}, d_y.double())


class Extended(TorchDispatchMode):
    """Products and sums in NumPy's longest float, rounded once: torch's own float64 sums err by more or less from one
    instruction set to another (MKL held to AVX2: up to six times our error)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        kwargs = kwargs or {}
        if func in (aten.mm.default, aten.bmm.default):
            return self._rounded(self._long(args[0]) @ self._long(args[1]), args[0])
        if func is aten.addmm.default and not kwargs:
            return self._rounded(self._long(args[0]) + self._long(args[1]) @ self._long(args[2]), args[1])
        if func is aten.sum.dim_IntList and args[0].dtype is torch.float64:
            keep = args[2] if len(args) > 2 else False
            return self._rounded(
                self._long(args[0]).sum(tuple(args[1] or range(args[0].dim())), keepdims=keep), args[0]
            )
        assert func not in (aten.baddbmm.default, aten.addmv.default, aten.mv.default), func
        return func(*args, **kwargs)

    @staticmethod
    def _long(t: Tensor) -> Any:
        return t.detach().cpu().numpy().astype(np.longdouble)

    @staticmethod
    def _rounded(value: Any, like: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(value, np.float64)).to(like.device)


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
        if all(e.count >= (ENOUGH if e.passes() else PLENTY) or e.count == 0 for e in sums.values()):
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
        self.dtype = dtype
        self.ratio, self.worst = RATIO, WORST
        if dtype is torch.float64:  # element by element the reference errs as eager does, independently of us
            factor = 1 if DEVICE == "cpu" else 2
            self.ratio, self.worst = math.hypot(factor * RATIO, 1), math.hypot(factor * WORST, 1)
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

    def passes(self) -> bool:
        return all(error <= limit for error, limit, *_ in self._judged())

    def _judged(self) -> list[tuple[float, float, float, float]]:
        """Of the root mean square and of the worst number: error, limit, eager's error, size."""
        rms = (self.squares / max(1, self.count)).sqrt().tolist()
        largest = self.largest.tolist()
        limit = allowed((largest[1], rms[1]), (largest[2], rms[2]), self.dtype, self.ratio, self.worst)
        return [(found[0], bound, *found[1:]) for found, bound in ((rms, limit.rms), (largest, limit.largest))]

    def check(self, name: str) -> None:
        for what, (error, limit, eager, size) in zip(("error", "worst error"), self._judged(), strict=True):
            found = f"{name}: {what} {error:.3g}, allowed {limit:.3g} (eager {eager:.3g}, values {size:.3g})"
            assert error <= limit, found
