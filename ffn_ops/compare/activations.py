# SPDX-License-Identifier: BSD-3-Clause
"""Activation functions, their derivatives by autograd, Swish over beta, and what each costs alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ffn_ops
from ffn_ops import Gate, reference

from .._timing import Timed
from .layers import interleaved
from .settings import Settings

LIMIT, POINTS = 6.0, 241
BETAS = (0.0, 0.5, 1.0, 2.0, 10.0)
LARGE_BETA = 100.0


@dataclass(frozen=True)
class Curve:
    label: str
    value: list[float]
    slope: list[float]


@dataclass(frozen=True)
class SwishLimits:
    """Largest distances on the plotted range."""

    beta_0_to_half_x: float
    beta_1_to_silu: float
    large_beta_to_relu: float
    large_beta: float


@dataclass(frozen=True)
class Activations:
    x: list[float]
    curves: list[Curve]
    swish: list[Curve]
    limits: SwishLimits
    gelu_tanh_to_gelu: float
    times: dict[str, dict[str, Timed]]  # activation -> provider -> forward and backward


def _value_and_slope(activation: Gate, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    value = ffn_ops.gated_act(leaf, activation=activation)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), slope


def _curve(label: str, activation: Gate, x: Tensor) -> Curve:
    value, slope = _value_and_slope(activation, x)
    return Curve(label, _rounded(value), _rounded(slope))


def _rounded(values: Tensor) -> list[float]:
    return [round(v, 6) for v in values.tolist()]


def _distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def _step(act: Callable[..., Tensor], activation: str, x: Tensor) -> Callable[[], object]:
    leaf, dy = x.clone().requires_grad_(), torch.ones_like(x)
    return lambda: torch.autograd.grad(act(leaf, activation=activation), leaf, dy)


def measure(settings: Settings) -> Activations:
    device = torch.device(settings.device)
    names = [name for name in ffn_ops.activations() if not Gate(name).own]
    x = torch.linspace(-LIMIT, LIMIT, POINTS, dtype=torch.float64)
    curves = [_curve(name, Gate(name), x) for name in names]
    swish = [_curve(f"beta = {beta:g}", Gate("swish", beta=beta), x) for beta in BETAS]

    def act(activation: str, **own: Any) -> Tensor:
        return ffn_ops.gated_act(x, activation=Gate(activation, **own))

    limits = SwishLimits(
        _distance(act("swish", beta=0.0), x / 2),
        _distance(act("swish", beta=1.0), act("silu")),
        _distance(act("swish", beta=LARGE_BETA), act("relu")),
        LARGE_BETA,
    )
    hidden = torch.randn(settings.layer.tokens, settings.layer.d_ff, generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(device)
    providers = {"eager": reference.gated_act, "fused": ffn_ops.gated_act}
    timed = [name for name in names if name != "identity"]
    calls = {(n, p): _step(provider, n, hidden) for n in timed for p, provider in providers.items()}
    found = interleaved(calls, settings.repeats, device, lambda: None)
    times = {name: {p: found[name, p] for p in providers} for name in timed}
    gelu = _distance(act("gelu_tanh"), act("gelu"))
    return Activations(_rounded(x), curves, swish, limits, gelu, times)
