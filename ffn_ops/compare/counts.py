"""Parameters, active parameters and FLOPs at the guides' sizes, counted from the modules, beside the guides' claims."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ffn_ops import reference

from .architectures import ARCHITECTURES, Claim, count_parameters, flops_per_token
from .settings import LayerSize

MOE_CLAIM = Claim(16.8, 8.0, 8.0)
MOE_EXPERTS, MOE_TOP_K = 8, 2


@dataclass(frozen=True)
class CountRow:
    name: str
    counted: str
    d_ff: int
    parameters: int
    active_parameters: int
    flops_per_token: float
    multiple: float
    claim: Claim
    verdict: str


def _verdict(parameters: int, multiple: float, claim: Claim) -> str:
    """Compare at the claim's own precision: one decimal of a million, one decimal of a multiple."""
    parts = []
    if claim.parameters_millions is not None:
        agrees = round(parameters / 1e6, 1) == claim.parameters_millions
        parts.append(f"{claim.parameters_millions}M " + ("agrees" if agrees else "differs"))
    for value in dict.fromkeys(v for v in (claim.lookup_multiple, claim.growth_multiple) if v is not None):
        parts.append(f"{value:.1f}x " + ("agrees" if round(multiple, 1) == value else "differs"))
    return ", ".join(parts) if parts else "no claim"


def _row(name: str, counted: str, layer: nn.Module, size: LayerSize, d_ff: int, unit: int, claim: Claim) -> CountRow:
    parameters = count_parameters(layer)
    multiple = parameters / unit
    flops = flops_per_token(layer, size.d_model)
    verdict = _verdict(parameters, multiple, claim)
    return CountRow(name, counted, d_ff, parameters, parameters, flops, multiple, claim, verdict)


def count(size: LayerSize) -> list[CountRow]:
    """One row per architecture, then the readings of the guides that explain their diverging multiples.

    Built on the meta device: nothing is allocated, the flop counter needs shapes alone.
    """
    d_model, d_ff = size.d_model, size.d_ff
    rows: list[CountRow] = []
    with torch.device("meta"):
        unit = count_parameters(ARCHITECTURES[0].eager(d_model, d_ff))
        for a in ARCHITECTURES:
            layer = a.eager(d_model, d_ff)
            row = _row(a.name, f"{a.formula}, with biases", layer, size, d_ff, unit, a.claim)
            rows.append(CountRow(**{**row.__dict__, "active_parameters": a.active_parameters(layer)}))
        third = reference.FeedForward(d_model, d_ff, 1, 0.0)
        name, counted = "SwiGLU, 2/3 width", "the guide's hidden = 2/3 d_ff 'to keep the parameter count'"
        rows.append(_row(name, counted, third, size, third.w1.out_features, unit, Claim(None, 1.0)))
        name, counted = "GLU layer alone", "linear_value and linear_gate as in the guide's code; gives width d_ff"
        rows.append(_row(name, counted, reference.GLU(d_model, d_ff), size, d_ff, unit, Claim(3.2, 2.0, 1.5)))
        name, counted = "Gated-FFN, no projection", "4 value and 4 gate layers as in the guide's code; gives width d_ff"
        rows.append(_row(name, counted, reference.GatedFFN(d_model, d_ff), size, d_ff, unit, Claim(9.5, 4.0, 4.5)))
        rows.append(_moe(size, unit))
    return rows


def _moe(size: LayerSize, unit: int) -> CountRow:
    """The guide's MoE from its parts; it has no entry in the list of architectures yet and is not trained here."""
    expert = reference.PlainFFN(size.d_model, size.d_ff, "gelu")
    router = nn.Linear(size.d_model, MOE_EXPERTS)
    each, routing = count_parameters(expert), count_parameters(router)
    parameters, active = MOE_EXPERTS * each + routing, MOE_TOP_K * each + routing
    flops = MOE_TOP_K * flops_per_token(expert, size.d_model) + flops_per_token(router, size.d_model)
    counted = f"{MOE_EXPERTS} GELU FFN experts (top {MOE_TOP_K} active) and the router; counted only, not run"
    verdict = _verdict(parameters, parameters / unit, MOE_CLAIM)
    return CountRow("MoE FFN", counted, size.d_ff, parameters, active, flops, parameters / unit, MOE_CLAIM, verdict)
