# SPDX-License-Identifier: BSD-3-Clause
"""Parameters, active parameters and FLOPs at the guides' sizes, counted from the modules, beside the guides' claims."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ffn_ops import reference

from .architectures import (
    ARCHITECTURES,
    BASELINE,
    BY_KEY,
    LAYERS,
    Claim,
    active_parameters,
    count_parameters,
    flops_per_token,
)
from .mixtures import MIXTURES
from .settings import LayerSize, ModelSize


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


def _row(name: str, counted: str, layer: nn.Module, d_model: int, d_ff: int, unit: int, claim: Claim) -> CountRow:
    parameters = count_parameters(layer)
    multiple = parameters / unit
    flops = flops_per_token(layer, d_model)
    verdict = _verdict(parameters, multiple, claim)
    return CountRow(name, counted, d_ff, parameters, parameters, flops, multiple, claim, verdict)


def count(size: LayerSize) -> list[CountRow]:
    """One row per architecture, then the interpretations that explain the guides' differing multiples.

    Layers are on the meta device, because the flop counter needs only shapes. A layer whose shapes depend on data is
    built and run.
    """
    d_model, d_ff = size.d_model, size.d_ff
    rows: list[CountRow] = []
    with torch.device("meta"):
        unit = count_parameters(ARCHITECTURES[0].eager(d_model, d_ff))
        for a in LAYERS:
            with torch.device("cpu" if a.data_dependent else "meta"):
                layer = a.eager(d_model, d_ff)
            row = _row(a.name, f"{a.formula}, with biases", layer, d_model, d_ff, unit, a.claim)
            rows.append(CountRow(**{**row.__dict__, "active_parameters": a.active_parameters(layer)}))
        third = reference.FeedForward(d_model, d_ff, 1, 0.0)
        name, counted = "SwiGLU, 2/3 width", "the guide's hidden = 2/3 d_ff 'to keep the parameter count'"
        rows.append(_row(name, counted, third, d_model, third.w1.out_features, unit, Claim(None, 1.0)))
        name, counted = "GLU layer alone", "linear_value and linear_gate as in the guide's code; gives width d_ff"
        rows.append(_row(name, counted, reference.GLU(d_model, d_ff), d_model, d_ff, unit, Claim(3.2, 2.0, 1.5)))
        name, counted = "Gated-FFN, no projection", "4 value and 4 gate layers as in the guide's code; gives width d_ff"
        rows.append(_row(name, counted, reference.GatedFFN(d_model, d_ff), d_model, d_ff, unit, Claim(9.5, 4.0, 4.5)))
    return rows


def count_mixtures(size: ModelSize) -> list[CountRow]:
    """One feed-forward layer of the language model: the dense baseline, then every mixture at its equal active FLOPs.

    A mixture's FLOPs count all rows, including dropped ones: an upper bound.
    """
    baseline = BY_KEY[BASELINE]
    dense = baseline.fused(size.d_model, size.d_ff)
    unit = count_parameters(dense)
    rows = [_row(baseline.name, baseline.formula, dense, size.d_model, size.d_ff, unit, Claim())]
    for m in MIXTURES:
        d_ff = m.width(size.d_ff)
        layer = m.fused(size.d_model, d_ff)
        row = _row(m.name, m.formula, layer, size.d_model, d_ff, unit, Claim())
        active = active_parameters(layer, m.experts_per_token)
        rows.append(CountRow(**{**row.__dict__, "active_parameters": active}))
    return rows
