# SPDX-License-Identifier: BSD-3-Clause
"""Derivatives of moe_quantized and quantized_linear: autograd to second order, forward mode. Quantised weights are
constants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._library import differentiable, vmap_by_loop
from .._quantized.formats import has_up
from ._gated_act import act_tangent, gated_act_op
from ._moe_derivatives import Rows
from ._moe_lora import LowRank
from ._shared import backward_tangents, double_backward, given, not_asked_for, plus

# Places among the arguments of moe_quantized.
_W_IN, _FORMATS, _B_IN = 6, 9, 10
_TENSORS = 16  # the biases and the adapters are the last ones
_PLACES = (0, 2, *range(_B_IN, _TENSORS))  # what has a gradient


def _linear_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _rows, w, ctx.format, offsets, ctx.transposed = inputs
    ctx.save_for_backward(*w, offsets)


def _linear_again(ctx: Any, rows: Tensor, transposed: bool) -> Any:
    *w, offsets = ctx.saved_tensors
    return linear_op(rows, w, ctx.format, offsets, transposed)


def _linear_backward(ctx: Any, d: Tensor) -> Any:
    d_rows = _linear_again(ctx, d, not ctx.transposed) if ctx.needs_input_grad[0] else None
    return d_rows, None, None, None, None


def _linear_tangent(ctx: Any, *tangents: Any) -> Any:
    return _linear_again(ctx, tangents[0], ctx.transposed)


linear_op = differentiable("quantized_linear", _linear_setup, _linear_backward, _linear_tangent)


def _save(ctx: Any, inputs: Any, *more: Tensor) -> None:
    """``inputs`` are those of moe_quantized up to the adapters."""
    weights = inputs[_W_IN:_FORMATS]
    ctx.counts, ctx.formats = [len(w) for w in weights], inputs[_FORMATS]
    ctx.save_for_backward(*inputs[:_W_IN], *inputs[_B_IN:], *(t for w in weights for t in w), *more)


def _saved(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    """The inputs again, and what was saved behind them."""
    saved = list(ctx.saved_tensors)
    weights, at = [], _W_IN + _TENSORS - _B_IN
    for count in ctx.counts:
        weights.append(saved[at : at + count])
        at += count
    return [*saved[:_W_IN], *weights, ctx.formats, *saved[_W_IN : _W_IN + _TENSORS - _B_IN]], saved[at:]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.gated, ctx.interleaved, activation, params, scale, _save_them = inputs
    ctx.form, ctx.scale = (activation, params), scale
    _y, gate, up = output
    ctx.mark_non_differentiable(gate, up)
    ctx.set_materialize_grads(False)
    _save(ctx, tensors, gate, up)


def _backward(ctx: Any, d_y: Tensor | None, _gate: Any, _up: Any) -> Any:
    result: list[Any] = [None] * (_TENSORS + 6)
    if d_y is None:
        return tuple(result)
    inputs, pre = _saved(ctx)
    needs = [bool(ctx.needs_input_grad[place]) for place in _PLACES]
    grads = moe_backward_op(d_y, *inputs, *pre, ctx.gated, ctx.interleaved, *ctx.form, ctx.scale, needs)
    for place, grad, need in zip(_PLACES, grads, needs, strict=True):
        result[place] = grad if need else None
    return tuple(result)


def _backward_setup(ctx: Any, inputs: Any, output: Any) -> None:
    d_y, *tensors, gate, up, ctx.gated, ctx.interleaved, activation, params, ctx.scale, ctx.needs = inputs
    not_asked_for(ctx, output)
    ctx.form = (activation, params)
    ctx.set_materialize_grads(False)
    _save(ctx, tensors, gate, up, d_y)


def _double_backward(ctx: Any, *grads: Tensor | None) -> Any:
    inputs, (*_pre, d_y) = _saved(ctx)
    directions = [given(grad) for grad in grads]

    def along(values: Sequence[Any]) -> Tensor:
        return _along(ctx, inputs, values, directions)  # type: ignore[no-any-return]

    needs = [ctx.needs_input_grad[1 + place] for place in _PLACES]
    by_d_y, by = double_backward(ctx, along, d_y, [inputs[place] for place in _PLACES], directions, needs)
    result: list[Any] = [None] * _TENSORS
    for place, t in zip(_PLACES, by, strict=True):
        result[place] = t
    return by_d_y, *result


def _backward_tangent(ctx: Any, *tangents: Any) -> Any:
    inputs, (gate, up, _d_y) = _saved(ctx)

    def again(d: Tensor) -> Any:
        form = (ctx.gated, ctx.interleaved, *ctx.form, ctx.scale)
        return moe_backward_op(d, *inputs, gate, up, *form, ctx.needs)

    return backward_tangents(ctx, tangents, again, _double_backward, [1 + place for place in _PLACES])


def _tangent(ctx: Any, *tangents: Any) -> Any:
    inputs, _pre = _saved(ctx)
    values, directions = ([each[place] for place in _PLACES] for each in (inputs, tangents))
    return _along(ctx, inputs, values, directions), None, None


class _Layer:
    """The steps of the operator, one after the other; ``inputs`` are those that have gradients."""

    def __init__(
        self, rows: Rows, weights: Sequence[Any], formats: str, inputs: Sequence[Any], form: Any, scale: float
    ) -> None:
        x, _weight, b_in, self.b_down, a_in, lora_b_in, a_down, lora_b_down = inputs
        self.rows, self.names = rows, formats.split(",")
        self.in_and_up, self.down = weights[: 2 if has_up(formats) else 1], weights[2]
        pairs = ((a_in, lora_b_in), (a_down, lora_b_down))
        self.first, self.second = (LowRank(rows.offsets, *pair, scale) for pair in pairs)
        self.x_rows = rows.gather(x)
        z = plus(self._biased(self.into(self.x_rows), b_in), self.first(self.x_rows))
        self.gate, self.up = rows.halves(z)  # type: ignore[arg-type]
        self.h = gated_act_op(self.gate, self.up, *form)

    def _biased(self, z: Tensor, b: Tensor | None) -> Tensor:
        return z if b is None else z + self.rows.spread(b)  # type: ignore[no-any-return]

    def _product(self, t: Tensor, w: Any, name: str) -> Tensor:
        return linear_op(t, w, name, self.rows.offsets, False)  # type: ignore[no-any-return]

    def into(self, t: Tensor) -> Tensor:
        parts = [self._product(t, w, name) for w, name in zip(self.in_and_up, self.names[:-1], strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def out_of(self, t: Tensor) -> Tensor:
        return self._product(t, self.down, self.names[-1])

    def out(self) -> Tensor:
        return plus(self._biased(self.out_of(self.h), self.b_down), self.second(self.h))  # type: ignore[return-value]


def _along(ctx: Any, inputs: Sequence[Any], values: Sequence[Any], directions: Sequence[Any]) -> Any:
    """The tangent of the output, see ``_moe_derivatives.moe_along``; weights are constants."""
    x, weight, *_biases_and_pairs = values
    x_t, s_t, b_in_t, b_down_t, a_in_t, lora_b_in_t, a_down_t, lora_b_down_t = directions
    _x, token, _weight, offsets, row, slots, *weights, formats = inputs[:_B_IN]
    rows = Rows(ctx.gated, ctx.interleaved, x, token, offsets, row, slots)
    layer = _Layer(rows, weights, formats, values, ctx.form, ctx.scale)
    x_rows_t = None if x_t is None else rows.gather(x_t)
    z_t = None if x_rows_t is None else layer.into(x_rows_t)
    z_t = plus(z_t, None if b_in_t is None else rows.spread(b_in_t))
    z_t = plus(z_t, layer.first.tangent(layer.x_rows, x_rows_t, a_in_t, lora_b_in_t))
    h_t = None if z_t is None else act_tangent(layer.gate, layer.up, ctx.form, *rows.halves(z_t))
    o_t = None if h_t is None else layer.out_of(h_t)
    o_t = plus(o_t, None if b_down_t is None else rows.spread(b_down_t))
    o_t = plus(o_t, layer.second.tangent(layer.h, h_t, a_down_t, lora_b_down_t))
    y_t = None if o_t is None else rows.scatter(o_t, weight)
    return y_t if s_t is None else plus(y_t, rows.scatter(layer.out(), s_t))


moe_backward_op = differentiable("moe_quantized_backward", _backward_setup, _double_backward, _backward_tangent)
moe_op = differentiable("moe_quantized", _setup, _backward, _tangent)

for _name in ("quantized_linear", "moe_quantized", "moe_quantized_backward", "dequantize"):
    vmap_by_loop(_name)
