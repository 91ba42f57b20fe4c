"""THE list of architectures. An entry here (MoE joins so) appears in every table, plot and training run.

Holds what an architecture is: its fused and its plain PyTorch layer, its units, the guides' claims about it. Not how
anything is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ffn_ops
from ffn_ops import modules, reference

Build = Callable[[int, int], nn.Module]
Units = Callable[[nn.Module, Tensor], Tensor]
FLOP_TOKENS = 64


def count_parameters(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())


@dataclass(frozen=True)
class Claim:
    """What the guides say at d_model 512, d_ff 2048; a multiple is of the ReLU FFN's parameters."""

    parameters_millions: float | None = None
    lookup_multiple: float | None = None
    growth_multiple: float | None = None


@dataclass(frozen=True)
class Architecture:
    """``fused`` and ``eager`` take (d_model, d_ff) and give layers with the same state-dict keys.

    ``units`` gives every unit's activation output [T, U] for the layer's input [T, D]: a unit whose output stays at
    zero switches its hidden column off, whatever ``up`` holds.
    """

    key: str
    name: str
    formula: str
    fused: Build
    eager: Build
    units: Units
    claim: Claim = Claim()
    active_parameters: Callable[[nn.Module], int] = count_parameters


def _units(gate_layers: Callable[[nn.Module], list[nn.Module]], activation: str) -> Units:
    def units(layer: nn.Module, x_TD: Tensor) -> Tensor:
        gates = [ffn_ops.gated_act(gate(x_TD), activation=activation) for gate in gate_layers(layer)]
        return torch.cat(gates, -1)

    return units


def _guide_width(d_ff: int) -> int:
    """``hidden_dim`` that makes the guide's FeedForward (multiple_of 1) ``d_ff`` wide: 2 * hidden_dim // 3 == d_ff."""
    return (3 * d_ff + 1) // 2


def _plain(key: str, name: str, formula: str, fused: Build, claim: Claim) -> Architecture:
    return Architecture(
        key,
        name,
        formula,
        fused,
        lambda d_model, d_ff: reference.PlainFFN(d_model, d_ff, key),
        _units(lambda layer: [layer.get_submodule("linear1")], key),
        claim,
    )


def _gated(key: str, name: str, formula: str, activation: str, claim: Claim) -> Architecture:
    return Architecture(
        key,
        name,
        formula,
        lambda d_model, d_ff: modules.FeedForward(d_model, _guide_width(d_ff), 1, 0.0, activation=activation),
        lambda d_model, d_ff: reference.FeedForward(d_model, _guide_width(d_ff), 1, 0.0, activation=activation),
        _units(lambda layer: [layer.get_submodule("w1")], activation),
        claim,
    )


ARCHITECTURES: tuple[Architecture, ...] = (
    _plain("relu", "ReLU FFN", "W2 relu(W1 x)", modules.ReLUFFN, Claim(2.1, 1.0, 1.0)),
    _plain("gelu", "GELU FFN", "W2 gelu(W1 x)", modules.GELUFFN, Claim(2.1, 1.0, 1.0)),
    _plain("silu", "Swish FFN", "W2 swish(W1 x)", modules.SwishFFN, Claim()),
    _gated("glu", "GLU FFN", "W2 (sigmoid(W1 x) * W3 x)", "sigmoid", Claim(3.2, 2.0, 1.5)),
    _gated("geglu", "GeGLU", "W2 (gelu(W1 x) * W3 x)", "gelu", Claim()),
    _gated("swiglu", "SwiGLU", "W2 (swish(W1 x) * W3 x)", "silu", Claim()),
    Architecture(
        "gated_ffn",
        "Gated-FFN",
        "Wo sum_g sigmoid(Gg x) * Vg x, 4 gates",
        lambda d_model, d_ff: modules.GatedFFN(d_model, d_ff, out_proj=True),
        lambda d_model, d_ff: reference.GatedFFN(d_model, d_ff, out_proj=True),
        _units(lambda layer: list(layer.get_submodule("gate_layers").children()), "sigmoid"),
        Claim(9.5, 4.0, 4.5),
    ),
)
BASELINE = "gelu"
BY_KEY = {a.key: a for a in ARCHITECTURES}


def flops_per_token(layer: nn.Module, d_model: int) -> float:
    """Forward FLOPs of the matrix products per token (2 per multiply-add), counted by torch's flop counter."""
    x = torch.zeros(FLOP_TOKENS, d_model, device=next(layer.parameters()).device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    return int(counter.get_total_flops()) / FLOP_TOKENS


def width_for_budget(architecture: Architecture, d_model: int, parameters: int) -> int:
    """The ``d_ff`` whose parameter count is nearest to ``parameters``; the count is affine in ``d_ff``."""
    with torch.device("meta"):
        one, two = (count_parameters(architecture.eager(d_model, d_ff)) for d_ff in (1, 2))
    return max(1, round((parameters - one) / (two - one)) + 1)


def disagreement(fused: nn.Module, eager: nn.Module) -> list[str]:
    """State-dict keys or shapes in which the two layers of one entry differ; empty where weights can be exchanged."""
    a = {k: tuple(v.shape) for k, v in fused.state_dict().items()}
    b = {k: tuple(v.shape) for k, v in eager.state_dict().items()}
    return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))
