# SPDX-License-Identifier: BSD-3-Clause
"""THE lists of layers: ``ARCHITECTURES`` are counted, timed and trained at equal parameters; ``LAYERS`` adds the
guides' mixture of experts, which is counted and timed at their size and trained in the variants of ``mixtures.py``.

An architecture has a fused and a plain PyTorch layer, units, and the guides' claims about it. This file measures
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import ffn_ops
from ffn_ops import modules, reference

Build = Callable[[int, int], nn.Module]
Units = Callable[[nn.Module, Tensor], Tensor]
FLOP_TOKENS = 64
EXPERTS, TOP_K = 8, 2  # the defaults of the guides' MoEFFN


def count_parameters(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())


@dataclass(frozen=True)
class Claim:
    """The guides' claims at d_model 512, d_ff 2048; a multiple is relative to the ReLU FFN's parameters."""

    parameters_millions: float | None = None
    lookup_multiple: float | None = None
    growth_multiple: float | None = None


@dataclass(frozen=True)
class Layer:
    """A layer that can be trained. ``fused`` takes (d_model, d_ff).

    ``units`` returns every unit's activation output [T, U] for the layer's input [T, D]. A unit whose output stays zero
    switches off its hidden column, whatever ``up`` holds.
    """

    key: str
    name: str
    formula: str
    fused: Build
    units: Units


@dataclass(frozen=True)
class Architecture(Layer):
    """``eager`` takes (d_model, d_ff) too and gives a layer that computes the same from the same ``state``."""

    eager: Build
    claim: Claim = Claim()
    active_parameters: Callable[[nn.Module], int] = count_parameters
    data_dependent: bool = False  # shapes inside ``eager`` depend on data: unsuitable for torch.compile and meta


def _units(gate_layers: Callable[[nn.Module], list[nn.Module]], activation: str) -> Units:
    def units(layer: nn.Module, x_TD: Tensor) -> Tensor:
        gates = [ffn_ops.gated_act(gate(x_TD), activation=activation) for gate in gate_layers(layer)]
        return torch.cat(gates, -1)

    return units


def _plain(key: str, name: str, formula: str, fused: Build, claim: Claim) -> Architecture:
    return Architecture(
        key,
        name,
        formula,
        fused,
        _units(lambda layer: [layer.get_submodule("linear1")], key),
        lambda d_model, d_ff: reference.PlainFFN(d_model, d_ff, key),
        claim,
    )


def _gated(key: str, name: str, formula: str, activation: str, claim: Claim) -> Architecture:
    return Architecture(
        key,
        name,
        formula,
        lambda d_model, d_ff: modules.FeedForward(d_model, d_ff=d_ff, activation=activation),
        _units(lambda layer: [layer.get_submodule("w1")], activation),
        lambda d_model, d_ff: reference.FeedForward(d_model, d_ff=d_ff, activation=activation),
        claim,
    )


def expert_units(layer: nn.Module, x_TD: Tensor) -> Tensor:
    """[C, E * F]: the units of each expert on the tokens that it computes, then zeros; C is the largest load.

    A unit of an expert without tokens therefore counts as dead.
    """
    assert isinstance(layer, ffn_ops.MoEFFN)
    routing = layer.route(layer.logits(x_TD))
    computed = routing.token[: int(routing.offsets[-1])]
    outputs = []
    for e, tokens in enumerate(computed.split(routing.offsets.diff().tolist())):
        bias = None if layer.b_in is None else layer.b_in[e]
        hidden = F.linear(x_TD[tokens], layer.w_in[e], bias)
        outputs.append(ffn_ops.gated_act(hidden, activation=layer.activation))
    return nn.utils.rnn.pad_sequence(outputs).flatten(1)


def active_parameters(layer: nn.Module, per_token: float = TOP_K, experts: int = EXPERTS) -> int:
    """Active parameters of a mixture: the router's, and those of the experts of one token."""
    router = count_parameters(layer.get_submodule("router"))
    return router + round((count_parameters(layer) - router) * per_token / experts)


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
        _units(lambda layer: list(layer.get_submodule("gate_layers").children()), "sigmoid"),
        lambda d_model, d_ff: reference.GatedFFN(d_model, d_ff, out_proj=True),
        Claim(9.5, 4.0, 4.5),
    ),
)
MOE = Architecture(
    "moe",
    "MoE FFN",
    f"sum of p_e * GELU FFN_e(x) over the {TOP_K} largest p = softmax(router x), {EXPERTS} experts",
    lambda d_model, d_ff: ffn_ops.MoEFFN(d_model, d_ff, EXPERTS, TOP_K),
    expert_units,
    lambda d_model, d_ff: reference.MoEFFN(d_model, d_ff, EXPERTS, TOP_K),
    Claim(16.8, 8.0, 8.0),
    active_parameters,
    data_dependent=True,
)
LAYERS = (*ARCHITECTURES, MOE)
BASELINE = "gelu"
BY_KEY = {a.key: a for a in LAYERS}


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


def state(layer: nn.Module) -> dict[str, Tensor]:
    """The weights under the guides' keys: ``MoEFFN`` stacks its experts, and loads the guides' keys too."""
    return layer.document_state_dict() if isinstance(layer, ffn_ops.MoEFFN) else layer.state_dict()


def disagreement(fused: nn.Module, eager: nn.Module) -> list[str]:
    """State keys or shapes in which the two layers of an entry differ; empty if they can exchange weights."""
    a = {k: tuple(v.shape) for k, v in state(fused).items()}
    b = {k: tuple(v.shape) for k, v in state(eager).items()}
    return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))
