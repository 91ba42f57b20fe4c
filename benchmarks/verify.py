"""The rule that decides whether a result may be timed. It is the tests' own, tests/tolerance.py:

root-mean-square error against float64 within 1.5 times eager's, the worst number within twice that, one rounding free.

Eager's own error in 16 bits comes from ``rounded_linear``, which rounds where eager rounds and multiplies in float32:
native 16-bit backward takes 20 s for one step on a CPU without 16-bit arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

RATIO = 1.5
WORST = 2 * RATIO


class WrongResultError(ValueError):
    """A provider's output or gradient is outside the rule; it is not timed."""


@dataclass(frozen=True)
class Limit:
    """The allowed errors of one tensor: largest and root-mean-square."""

    largest: float
    rms: float


def errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and root-mean-square difference from the float64 ``exact``; infinite where ``actual`` is not finite."""
    return sizes(actual.detach().to(torch.float64, copy=True).sub_(exact))


def sizes(t: Tensor) -> tuple[float, float]:
    """Largest absolute value and root of the mean square; infinite where ``t`` is not finite."""
    rms = float(torch.linalg.vector_norm(t)) / math.sqrt(max(1, t.numel()))
    return (float(torch.linalg.vector_norm(t, math.inf)), rms) if math.isfinite(rms) else (math.inf, math.inf)


def limit(eager: Tensor, exact: Tensor) -> Limit:
    """The allowed error, given eager's."""
    largest, rms = errors(eager, exact)
    rounding = torch.finfo(eager.dtype).eps / 2
    size, size_rms = sizes(exact)
    return Limit(WORST * largest + 2 * rounding * size, RATIO * rms + rounding * size_rms)


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


class _RoundedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias = bias is not None
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        (d_y,) = grads
        wide = d_y.float()
        d_x, d_weight = wide @ weight.float(), wide.t() @ x.float()
        return d_x.to(x.dtype), d_weight.to(x.dtype), wide.sum(0).to(x.dtype) if ctx.bias else None


def rounded_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of a 16-bit dtype and its gradients with float32 sums and one rounding each."""
    y: Tensor = _RoundedLinear.apply(x, weight, bias)
    return y
