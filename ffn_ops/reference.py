# SPDX-License-Identifier: BSD-3-Clause
"""Plain PyTorch formulas of every operator, and the modules of the two guides as a user would write them.

Tests and benchmarks compare with this file. It calls no ffn_ops operator, and no operator falls back to it. Shapes use
the letters of ``ffn_ops/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._gate import Gate, as_gate

# With the activation's own parameters, by name.
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": torch.relu,
    "relu_squared": lambda z: torch.relu(z).square(),
    "star_relu": lambda z, scale, bias: scale * torch.relu(z).square() + bias,
    "leaky_relu": lambda z, slope: torch.where(z > 0, z, slope * z),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "swish": lambda z, beta: z * torch.sigmoid(beta * z),
    "silu_squared": lambda z: F.silu(z).square(),
    "xielu": lambda z, alpha_p, alpha_n, beta, eps: torch.where(
        z > 0, alpha_p * z * z + beta * z, (torch.expm1(z.clamp(max=eps)) - z) * alpha_n + beta * z
    ),
    "identity": lambda z: z,
    "situ": lambda z, gate_softcap, up_softcap: _softcap(z, gate_softcap) * torch.sigmoid(z),
    "swiglu_step": lambda z, cap: F.silu(z).clamp(max=cap),
}
# What these do to up.
UPS: dict[str, Callable[..., Tensor]] = {
    "situ": lambda u, gate_softcap, up_softcap: _softcap(u, up_softcap),
    "swiglu_step": lambda u, cap: u.clamp(-cap, cap),
}

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: torch.softmax(z, 1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": lambda z: torch.logaddexp(z, torch.zeros_like(z)).sqrt(),
}


def _softcap(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap)


def gated_act(gate: Tensor, up: Tensor | None = None, *, activation: str | Gate = "silu") -> Tensor:
    """``act(min(gate, limit)) * (clamp(up, -limit, limit) + up_shift)``, or ``act(gate)`` where ``up`` is None."""
    form = as_gate(activation, gated=up is not None)
    act, own, limit = ACTIVATIONS[form.activation], form.own, form.limit
    if up is None:
        return act(gate, **own)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if form.activation in UPS:
        up = UPS[form.activation](up, **own)
    return act(gate, **own) * (up + form.up_shift if form.up_shift else up)


def gated_linear(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    *,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    activation: str | Gate = "sigmoid",
) -> Tensor:
    """``act(x w_gate^T + b_gate) * (x w_up^T + b_up)``."""
    return gated_act(F.linear(x, w_gate, b_gate), F.linear(x, w_up, b_up), activation=activation)


def route_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` in float32, or in float64 where x is float64."""
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))


def ffn(
    x: Tensor,
    w_in: Tensor,
    w_down: Tensor,
    *,
    w_up: Tensor | None = None,
    gated: bool | None = None,
    b_in: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str | Gate = "silu",
    recompute: bool = False,
) -> Tensor:
    """``(act(x w_in^T + b_in) [* (x w_up^T + b_up)]) w_down^T + b_down``; of fused weights the gate's rows stand first,
    or alternate with those of up."""
    fused = bool(gated) and w_up is None
    form = as_gate(activation, gated=fused or w_up is not None, one_weight=fused)
    pre = F.linear(x, w_in, b_in)
    if w_up is not None:
        gate, up = pre, F.linear(x, w_up, b_up)
    elif fused:
        gate, up = (pre[..., ::2], pre[..., 1::2]) if form.interleaved else pre.chunk(2, -1)
    else:
        gate, up = pre, None
    return F.linear(gated_act(gate, up, activation=form.replace(interleaved=False)), w_down, b_down)


class FeedForward(nn.Module):
    """``dropout(w2(act(w1 x) * w3 x))``: the guides' SwiGLU block with its parenthesis corrected."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int = 0,
        multiple_of: int = 1,
        dropout: float = 0.0,
        activation: str | Gate = "silu",
        *,
        d_ff: int | None = None,
    ) -> None:
        super().__init__()
        hidden = d_ff or multiple_of * ((2 * hidden_dim // 3 + multiple_of - 1) // multiple_of)
        self.w1 = nn.Linear(dim, hidden)
        self.w2 = nn.Linear(hidden, dim)
        self.w3 = nn.Linear(dim, hidden)
        self.dropout = nn.Dropout(dropout)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(gated_act(self.w1(x), self.w3(x), activation=self.activation)))


class PlainFFN(nn.Module):
    """``linear2(act(linear1 x))``: the guides' ReLUFFN, GELUFFN and Swish FFN."""

    def __init__(self, d_model: int, d_ff: int, activation: str | Gate = "relu") -> None:
        super().__init__()
        self.linear1 = nn.Linear(d_model, d_ff)
        self.linear2 = nn.Linear(d_ff, d_model)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(gated_act(self.linear1(x), activation=self.activation))


class GLU(nn.Module):
    """``linear_value(x) * sigmoid(linear_gate(x))``."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.linear_value = nn.Linear(d_in, d_out)
        self.linear_gate = nn.Linear(d_in, d_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_value(x) * torch.sigmoid(self.linear_gate(x))


class GatedFFN(nn.Module):
    """``sum_g value_g(x) * sigmoid(gate_g(x))``, optionally projected back to ``d_model``."""

    def __init__(self, d_model: int, d_ff: int, num_gates: int = 4, *, out_proj: bool = False) -> None:
        super().__init__()
        self.value_layers = nn.ModuleList([nn.Linear(d_model, d_ff) for _ in range(num_gates)])
        self.gate_layers = nn.ModuleList([nn.Linear(d_model, d_ff) for _ in range(num_gates)])
        self.out_proj = nn.Linear(d_ff, d_model) if out_proj else None

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor | None = None
        for value, gate in zip(self.value_layers, self.gate_layers, strict=True):
            gated = value(x) * torch.sigmoid(gate(x))
            output = gated if output is None else output + gated
        assert output is not None
        return output if self.out_proj is None else self.out_proj(output)


def top_k(
    logits: Tensor,
    k: int,
    *,
    ids: Tensor | None = None,
    score: str = "softmax",
    renormalize: bool = False,
    by_logits: bool = False,
    softcap: float | None = None,
    bias: Tensor | None = None,
    shared: int = 0,
    num_groups: int = 1,
    top_groups: int = 1,
    group_best: int = 2,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Ids and weights ``[T, k + shared]``; ties go to the lowest index, NaN ranks last. ``ids``: chosen already."""
    z = logits if logits.dtype is torch.float64 else logits.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if ids is None:
        ids = _chosen(z, k, score, by_logits, bias, shared, num_groups, top_groups, group_best)
    after = by_logits and score == "softmax"
    weights = SCORES[score](z.gather(1, ids)) if after else SCORES[score](z).gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return ids, weights * scale


def _chosen(
    z: Tensor, k: int, score: str, by_logits: bool, bias: Tensor | None, shared: int, num_groups: int, top_groups: int,
    group_best: int,
) -> Tensor:  # fmt: skip
    experts = z.shape[1] - shared
    choice = (z if by_logits or (bias is None and num_groups == 1) else SCORES[score](z)).detach()[:, :experts]
    choice = choice if bias is None else choice + bias
    order = _ranked(choice)
    if num_groups > 1:
        groups = choice.view(len(z), num_groups, -1)
        best = _ranked(groups.flatten(0, 1))[:, : min(group_best, groups.shape[2])]
        group_scores = groups.flatten(0, 1).gather(1, best).sum(1).view(len(z), num_groups)
        chosen = _ranked(group_scores)[:, :top_groups]
        outside = torch.ones(len(z), num_groups, dtype=torch.bool).scatter(1, chosen, False)
        outside = outside.repeat_interleave(groups.shape[2], 1)
        if len(z):
            order = torch.stack([row[~out[row]][:k] for row, out in zip(order, outside, strict=True)])
    return torch.cat((order[:, :k], torch.arange(experts, z.shape[1]).expand(len(z), shared)), 1)


def _ranked(values: Tensor) -> Tensor:
    """Indices of each row from the best to the worst."""
    smallest = torch.where(values.isnan(), torch.full_like(values, -torch.inf), values)
    order = torch.sort(smallest, dim=1, descending=True, stable=True).indices
    worst = values.isnan().gather(1, order)  # NaN ranks after -inf
    return order.gather(1, torch.sort(worst.int(), dim=1, stable=True).indices)


def moe(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_down: Tensor,
    *,
    gated: bool = False,
    b_in: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str | Gate = "gelu",
) -> Tensor:
    """``y[t] = sum over k of weights[t, k] * expert ids[t, k] (x[t])``, expert by expert; ids >= E are skipped."""
    y = torch.zeros(x.shape[0], w_down.shape[1], dtype=x.dtype)
    for e in range(w_in.shape[0]):
        tokens, slots = torch.where(ids == e)
        out = ffn(
            x[tokens], w_in[e], w_down[e], gated=gated, activation=activation,
            b_in=None if b_in is None else b_in[e], b_down=None if b_down is None else b_down[e],
        )  # fmt: skip
        y = y.index_add(0, tokens, (out * weights[tokens, slots].unsqueeze(1)).to(x.dtype))
    return y


class MoEFFN(nn.Module):
    """The guides' mixture of experts: softmax, top-k without renormalisation, a loop over the experts."""

    def __init__(self, d_model: int, d_ff: int, num_experts: int = 8, top_k: int = 2) -> None:
        super().__init__()
        self.router = nn.Linear(d_model, num_experts)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(d_model, d_ff), nn.GELU(), nn.Linear(d_ff, d_model)) for _ in range(num_experts)]
        )
        self.top_k = top_k

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, ids = torch.softmax(self.router(rows), -1).topk(self.top_k, -1)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            if tokens.numel():
                y = y.index_add(0, tokens, expert(rows[tokens]) * weights[tokens, slots].unsqueeze(1))
        return y.view_as(x)
