# SPDX-License-Identifier: BSD-3-Clause
"""The one rule of accuracy, for tests, benchmarks and ``compare``: error against float64 within 1.5 times that of eager
PyTorch on the same numbers.

Error is the root of the mean square over a tensor, so that one bound holds for 10 and for a million numbers; the worst
single number may be off by twice that again. One rounding of the result is free: eager is exact now and then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RATIO = 1.5
WORST = 2 * RATIO
PLENTY = 1000  # numbers: the errors of fewer differ by more than the rule allows by chance


class WrongResultError(ValueError):
    """An output or gradient is outside the rule."""


@dataclass(frozen=True)
class Limit:
    """The allowed errors of one tensor: largest and root-mean-square."""

    largest: float
    rms: float


def sizes(t: Tensor) -> tuple[float, float]:
    """Largest absolute value and root of the mean square; infinite where ``t`` is not finite."""
    rms = float(torch.linalg.vector_norm(t)) / math.sqrt(max(1, t.numel()))
    return (float(torch.linalg.vector_norm(t, math.inf)), rms) if math.isfinite(rms) else (math.inf, math.inf)


def errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and root-mean-square difference from the float64 ``exact``; infinite where ``actual`` is not finite."""
    return sizes(actual.detach().to(torch.float64, copy=True).sub_(exact))


def allowed(
    eager: tuple[float, float],
    exact: tuple[float, float],
    dtype: torch.dtype,
    ratio: float = RATIO,
    worst: float = WORST,
) -> Limit:
    """The rule: ``eager`` are the sizes of eager's error, ``exact`` those of the result."""
    rounding = torch.finfo(dtype).eps / 2
    return Limit(worst * eager[0] + 2 * rounding * exact[0], ratio * eager[1] + rounding * exact[1])


def limit(eager: Tensor, exact: Tensor) -> Limit:
    """What a right result may be off by, given eager's."""
    return allowed(errors(eager, exact), sizes(exact), eager.dtype)


def worst(
    names: Sequence[str],
    actual: Sequence[Tensor],
    exact: Sequence[Tensor],
    limits: Sequence[Limit],
    slack: float = 1.0,
) -> float:
    """The largest quotient of error and limit.

    Raises:
        WrongResultError: it is above ``slack``, or a shape differs; names the tensor.
    """
    if len(actual) != len(exact):
        raise WrongResultError(f"expected {len(exact)} tensors ({', '.join(names)}), got {len(actual)}")
    most = 0.0
    for name, ours, right, allowed in zip(names, actual, exact, limits, strict=True):
        if ours.shape != right.shape:
            raise WrongResultError(f"{name}: expected shape {list(right.shape)}, got {list(ours.shape)}")
        largest, rms = errors(ours, right)
        for kind, error, bound in (("largest", largest, allowed.largest), ("rms", rms, allowed.rms)):
            if not error <= slack * bound:
                raise WrongResultError(f"{name}: {kind} error {error:.3g}, allowed {slack * bound:.3g}")
            most = max(most, error / bound if bound else 0.0)
    return most
