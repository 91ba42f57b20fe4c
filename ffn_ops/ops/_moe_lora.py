# SPDX-License-Identifier: BSD-3-Clause
"""moe with low-rank additions to its weights: fakes, autograd to second order. The public functions are in _moe.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _checks as check
from .._gate import check_gate
from .._library import fake
from .._lora import Lora, check_lora, check_pair, pair
from ._gated_act import act_tangent, gated_act_op
from ._moe_derivatives import Rows, differentiable_experts
from ._rows import check_weights, linear_op
from ._shared import (
    arithmetic,
    as_stored,
    autocast,
    dense,
    needs_grad,
    plus,
)

# Places of x, weight, w_in, w_up, w_down, b_in, b_down and the adapters among the arguments of moe_lora.
PLACES = (0, 2, 6, 7, 8, 9, 10, 11, 12, 13, 14)
_TENSORS = 15


def adapters(
    lora: Lora, x: Tensor, experts: int | None, hidden: Any, features: Any, out: Any, *, two: bool = False
) -> tuple[Any, ...]:
    """Those of w_in and of w_down as the operators take them, checked. ``two``: gate and up are two weights, with a
    pair each; ``experts``: None in a dense layer."""
    lora = check_lora(lora)
    if lora.a_up is not None and not two:
        raise ValueError("lora: expected a_up and b_up None without a w_up, got tensors; b_in has the rows of w_in")
    pairs, width = _cast_factors(lora, x), x.shape[-1]
    first = check_pair("in", pairs[0], pairs[1], features if two else hidden, width, x, experts)
    up = check_pair("up", pairs[2], pairs[3], features, width, x, experts)
    down = check_pair("down", pairs[4], pairs[5], out, features, x, experts)
    return *(_both(*first, *up) if two else first), *down


def unchecked(lora: Lora, x: Tensor, experts: int | None, *, two: bool = False) -> tuple[Any, ...]:
    """The same without checks, for a call under ``checked``: ``adapters`` then says in full what was refused."""
    a_in, b_in, a_up, b_up, a_down, b_down = _cast_factors(lora, x)
    first = pair(a_in, b_in, experts)
    if two:
        second = pair(a_up, b_up, experts)
        if b_in is not None and b_up is not None and len(b_in) != len(b_up):
            raise ValueError  # side by side, the operator could not tell
        first = _both(*first, *second)
    elif a_up is not None:
        raise ValueError
    return *first, *pair(a_down, b_down, experts)


def _cast_factors(lora: Lora, x: Tensor) -> list[Any]:
    factors = (lora.a_in, lora.b_in, lora.a_up, lora.b_up, lora.a_down, lora.b_down)
    cast = autocast(x, *factors)[1:]  # float32 ones stay: nothing between a and b is rounded
    return [f if f is None or f.dtype is torch.float32 else c for f, c in zip(factors, cast, strict=True)]


def _both(a_in: Tensor | None, b_in: Tensor | None, a_up: Tensor | None, b_up: Tensor | None) -> Any:
    """The pairs of gate and up as one pair of both: ranks side by side, and zeros where they do not meet."""
    gate_rank, up_rank = (0 if a is None else a.shape[1] for a in (a_in, a_up))
    if b_in is None:
        if b_up is None:
            return None, None
        return a_up, F.pad(b_up, (0, 0, b_up.shape[1], 0))
    if b_up is None:
        return a_in, F.pad(b_in, (0, 0, 0, b_in.shape[1]))
    return torch.cat((a_in, a_up), 1), torch.cat((F.pad(b_in, (0, up_rank)), F.pad(b_up, (gate_rank, 0))), 1)  # type: ignore[arg-type]


def run(
    x: Tensor, routed: Sequence[Any], experts: Sequence[Any], lora: Lora, form: Sequence[Any], recompute: bool
) -> Tensor:
    """``routed``: token, weight, offsets, row and slot_offsets. ``experts``: w_in, w_down, b_in and b_down."""
    w_in, w_down, *biases = experts
    pairs = unchecked(lora, x, w_in.shape[0])
    return operator(x, routed, (w_in, None, w_down, *biases, *pairs), form, lora.scale, recompute)


def operator(
    x: Tensor, routed: Sequence[Any], tensors: Sequence[Any], form: Sequence[Any], scale: float, recompute: bool
) -> Tensor:
    """``tensors``: w_in, w_up, w_down, biases and pairs."""
    grad = needs_grad(x, routed[1], *tensors)
    return _moe_lora(x, *routed, *tensors, *form, scale, grad and not recompute, grad=grad)[0]  # type: ignore[no-any-return]


def check_pairs(pairs: Sequence[Any], x: Tensor, experts: Any, hidden: Any, features: Any, out: Any) -> None:
    check_pair("in", pairs[0], pairs[1], hidden, x.shape[-1], x, experts)
    check_pair("down", pairs[2], pairs[3], out, features, x, experts)


def factor_as_stored(factor: Tensor) -> Tensor:
    """Allocates its gradient: as PEFT stores b, with the experts last, where the factor is."""
    experts, rows, cols = factor.shape
    if experts > 1 and factor.stride(0) == 1 and factor.stride(2) == experts and factor.stride(1) == cols * experts:
        return dense(factor, rows, cols, experts).permute(2, 0, 1)
    return as_stored(factor)


def _fake_sizes(args: Sequence[Any], form: Sequence[Any]) -> Any:
    x, _token, _weight, offsets, _row, _slots, w_in, w_up, w_down, b_in, b_down, *pairs = args
    gated, interleaved, activation, params = form
    check.tensor("x", x, ("T", "D"))
    check_gate(activation, params, gated=gated, interleaved=interleaved, one_weight=gated and w_up is None)
    experts = 1 if offsets is None else offsets.shape[0] - 1
    features, out = check_weights(x, experts, w_in, w_down, b_in, b_down, gated, w_up=w_up)
    check_pairs(pairs, x, experts, 2 * features if gated else features, features, out)
    return features, out


@fake("moe_lora")
def _(*args: Any) -> Any:
    x, token = args[:2]
    *form, _scale, save = args[_TENSORS:]
    features, out = _fake_sizes(args[:_TENSORS], form)
    rows = (x if token is None else token).shape[0]
    gate = dense(x, rows, features) if save else dense(x, 0)
    up = dense(x, rows, features) if save and form[0] else dense(x, 0)
    return dense(x, x.shape[0], out), gate, up


@fake("moe_lora_backward")
def _(d_y: Tensor, *args: Any) -> Any:
    inputs, form, needs = args[:_TENSORS], args[_TENSORS + 2 : _TENSORS + 6], args[-1]
    x, token, w_in = inputs[0], inputs[1], inputs[6]
    features, out = _fake_sizes(inputs, form)
    check.tensor("d_y", d_y, (x.shape[0], out), like=x)
    grads = []
    for place, need in zip(PLACES, needs, strict=True):
        t = inputs[place]
        if not need or (t is None and place in (7, 11, 12, 13, 14)) or (place == 2 and token is None):
            grads.append(dense(x, 0))
        elif place in (9, 10):
            hidden = 2 * features if form[0] else features
            grads.append(dense(x, w_in.shape[0], hidden if place == 9 else out))
        elif place == 2:
            grads.append(x.new_empty((token.shape[0],), dtype=arithmetic(x)))
        else:
            grads.append(dense(x, *x.shape) if place == 0 else as_stored(t) if place < 9 else factor_as_stored(t))
    return tuple(grads)


class LowRank:
    """``scale * (rows a^T) b^T`` of each row, and its tangent."""

    def __init__(self, offsets: Tensor, a: Tensor | None, b: Tensor | None, scale: float) -> None:
        self.offsets, self.a, self.b, self.scale = offsets, a, b, scale

    def __call__(self, rows: Tensor | None, a: Tensor | None = None, b: Tensor | None = None) -> Tensor | None:
        """With the pair's own factors where none are given."""
        a, b = self.a if a is None else a, self.b if b is None else b
        if rows is None or a is None or b is None:
            return None
        wide = rows.to(a.dtype)
        return (linear_op(linear_op(wide, a, self.offsets), b, self.offsets) * self.scale).to(rows.dtype)  # type: ignore[no-any-return]

    def tangent(self, rows: Tensor, rows_t: Tensor | None, a_t: Tensor | None, b_t: Tensor | None) -> Tensor | None:
        total = self(rows_t)
        total = plus(total, None if a_t is None else self(rows, a=a_t))
        return plus(total, None if b_t is None else self(rows, b=b_t))


def _forward_parts(rows: Rows, inputs: Sequence[Any], form: Any, scale: float) -> Any:
    x, _weight, w_in, w_up, w_down, b_in, b_down, a_in, lora_b_in, a_down, lora_b_down = inputs
    first, second = (LowRank(rows.offsets, *pair, scale) for pair in ((a_in, lora_b_in), (a_down, lora_b_down)))
    x_rows = rows.gather(x)
    gate, up = rows.halves(plus(rows.linear(x_rows, (w_in, w_up), b_in), first(x_rows)))  # type: ignore[arg-type]
    h = gated_act_op(gate, up, *form)
    return x_rows, gate, up, h, lambda: plus(rows.linear(h, (w_down,), b_down), second(h)), first, second


def _along(options: Sequence[Any], routed: Sequence[Any], inputs: Sequence[Any], directions: Sequence[Any]) -> Any:
    """The tangent of the output, see that of moe."""
    x, weight, w_in, w_up, w_down = inputs[:5]
    x_t, s_t, w_in_t, w_up_t, w_down_t, b_in_t, b_down_t, a_in_t, lora_b_in_t, a_down_t, lora_b_down_t = directions
    gated, interleaved, *form, scale = options
    rows = Rows(gated, interleaved, x, routed[1], *routed[3:])
    x_rows, gate, up, h, out, first, second = _forward_parts(rows, inputs, form, scale)
    x_rows_t = None if x_t is None else rows.gather(x_t)
    z_t = rows.linear_tangent(x_rows, (w_in, w_up), x_rows_t, (w_in_t, w_up_t), b_in_t)
    z_t = plus(z_t, first.tangent(x_rows, x_rows_t, a_in_t, lora_b_in_t))
    h_t = None if z_t is None else act_tangent(gate, up, form, *rows.halves(z_t))
    o_t = rows.linear_tangent(h, (w_down,), h_t, (w_down_t,), b_down_t)
    o_t = plus(o_t, second.tangent(h, h_t, a_down_t, lora_b_down_t))
    y_t = None if o_t is None else rows.scatter(o_t, weight)
    return y_t if s_t is None else plus(y_t, rows.scatter(out(), s_t))


_moe_lora, _ = differentiable_experts("moe_lora", PLACES, _along)
