# SPDX-License-Identifier: BSD-3-Clause
"""THE list of mixtures of experts that are trained, each at the dense baseline's active FLOPs per token, and the
records of their routing. A mixture has several times the baseline's parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import ffn_ops
from ffn_ops import Routing, routing

from .architectures import EXPERTS, LAYERS, Layer, expert_units

BALANCE, JITTER = 0.01, 0.01  # Switch Transformers' weights of the load-balancing loss and of the router's noise
BIAS_RATE = 0.01  # ten times DeepSeek-V3's, as there are so few steps
Routed = tuple[Routing, Tensor]  # what one layer chose, and its logits


@dataclass(frozen=True)
class Mixture(Layer):
    """``experts_per_token`` is exact or, for Expert Choice, the mean. ``balance`` weighs the load-balancing loss."""

    experts_per_token: int
    balance: float = 0.0
    leaks: bool = False  # a byte's output depends on later bytes, so its loss means nothing
    after_step: Callable[[ffn_ops.MoEFFN, Routing, Tensor], None] | None = None  # what moves a bias

    def width(self, d_ff: int) -> int:
        """Each expert's ``d_ff``, so that all experts of a token together are as wide as the dense layer."""
        return max(1, d_ff // self.experts_per_token)


def _mixture(
    key: str,
    name: str,
    formula: str,
    per_token: int,
    router: Callable[..., Routing] | None,
    balance: float = 0.0,
    jitter: float = 0.0,
    leaks: bool = False,
) -> Mixture:
    def fused(d_model: int, d_ff: int) -> ffn_ops.MoEFFN:
        return ffn_ops.MoEFFN(d_model, d_ff, EXPERTS, per_token, router=router, router_jitter=jitter)

    return Mixture(key, name, formula, fused, expert_units, per_token, balance, leaks)


def _biased(
    key: str, name: str, formula: str, after_step: Callable[[ffn_ops.MoEFFN, Routing, Tensor], None]
) -> Mixture:
    """Top-2 of sigmoid scores and a bias, renormalised: DeepSeek-V3's."""

    def fused(d_model: int, d_ff: int) -> ffn_ops.MoEFFN:
        return ffn_ops.MoEFFN(d_model, d_ff, EXPERTS, 2, router=routing.BiasedTopK(EXPERTS, 2))

    return Mixture(key, name, formula, fused, expert_units, 2, after_step=after_step)


def _step_bias(layer: ffn_ops.MoEFFN, chosen: Routing, _logits: Tensor) -> None:
    layer.choose.update(chosen, BIAS_RATE)  # type: ignore[union-attr,operator]


def _solve_bias(layer: ffn_ops.MoEFFN, _chosen: Routing, logits: Tensor) -> None:
    layer.choose.solve(logits)  # type: ignore[union-attr,operator]


CAPACITY_FACTOR, EXPERT_CHOICE_FACTOR = 1.25, 2
MIXTURES: tuple[Mixture, ...] = (
    _mixture(
        "switch",
        "Switch top-1",
        f"1 of {EXPERTS} by softmax; capacity factor {CAPACITY_FACTOR}, balancing loss {BALANCE}, jitter {JITTER}",
        1,
        functools.partial(routing.switch, capacity_factor=CAPACITY_FACTOR),
        BALANCE,
        JITTER,
    ),
    _mixture(
        "top2",
        "MoE top-2",
        f"2 of {EXPERTS} by softmax, the guide's router; no capacity, balancing loss {BALANCE}",
        2,
        None,
        BALANCE,
    ),
    _mixture(
        "expert_choice",
        "Expert Choice (leaks)",
        f"each of {EXPERTS} experts takes its best bytes of the batch; capacity factor {EXPERT_CHOICE_FACTOR}",
        EXPERT_CHOICE_FACTOR,
        functools.partial(routing.expert_choice, capacity_factor=float(EXPERT_CHOICE_FACTOR), causal=False),
        leaks=True,
    ),
    _mixture(
        "base",
        "BASE",
        f"1 of {EXPERTS}: in training the best assignment with equal loads, else the highest logit; weight sigmoid",
        1,
        routing.base,
    ),
    _biased(
        "biased",
        "Bias by steps",
        f"2 of {EXPERTS} by sigmoid and a bias, which moves by {BIAS_RATE} against each step's load; weights sum to 1",
        _step_bias,
    ),
    _biased(
        "quantile",
        "Bias by quantiles",
        f"2 of {EXPERTS} by sigmoid and a bias, solved for by quantiles after each step; weights sum to 1",
        _solve_bias,
    ),
)
CAUSAL_MIXTURES = tuple(m for m in MIXTURES if not m.leaks)
NAMES = {layer.key: layer.name for layer in (*LAYERS, *MIXTURES)}


@dataclass(frozen=True)
class Load:
    """How evenly a routing, or the mean of several, loads the experts. Entropy and maximum are after dropping."""

    entropy: float  # divided by log E: 1 is uniform
    max_over_mean: float
    dropped: float  # share of the rows that chose an expert
    unreached: float  # share of the tokens that no expert computes


@dataclass(frozen=True)
class LayerLoad(Load):
    shares: list[float]  # of each expert in the rows that chose one, before dropping


def layer_load(chosen: Routing) -> LayerLoad:
    found = chosen.statistics()
    wanted = chosen.counts.double()
    reached = torch.zeros(chosen.slot_offsets.shape[0] - 1, dtype=torch.bool, device=wanted.device)
    reached[chosen.token[: int(chosen.offsets[-1])]] = True
    shares = wanted / wanted.sum().clamp(min=1)
    return LayerLoad(
        entropy=round(found.load_entropy.item(), 5),
        max_over_mean=round(found.max_over_mean.item(), 5),
        dropped=round(found.dropped_fraction.item(), 5),
        unreached=round(1 - reached.double().mean().item(), 5),
        shares=[round(share, 5) for share in shares.tolist()],
    )


def balancing_loss(routed: list[Routed]) -> Tensor:
    """The sum over the layers."""
    return torch.stack([routing.load_balancing_loss(logits, chosen) for chosen, logits in routed]).sum()
