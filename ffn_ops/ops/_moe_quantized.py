# SPDX-License-Identifier: BSD-3-Clause
"""moe_quantized: ffn, moe and gated_linear on quantised weights, which are constants; fakes, autograd to second order.

A dense layer is a mixture of one expert, which takes every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks as check
from .._gate import Gate, as_gate, check_gate
from .._library import differentiable, fake, vmap_by_loop
from .._quantized import QuantizedWeight
from .._quantized.formats import check_groups, columns
from ._gated_act import act_tangent, gated_act_op
from ._moe_derivatives import Rows
from ._rows import check_routing
from ._shared import autocast, backward_tangents, dense, double_backward, fold, given, needs_grad, not_asked_for, plus

if TYPE_CHECKING:
    from ..routing import Routing


def quantized_moe(
    x: Tensor,
    routing: Routing | None,
    offsets: Tensor | None,
    w_in: Any,
    w_down: Any,
    gated: bool,
    b_in: Tensor | None,
    b_down: Tensor | None,
    activation: str | Gate,
    recompute: bool,
) -> Tensor:
    """:func:`ffn_ops.moe` and, without a routing, :func:`ffn_ops.moe_experts`."""
    name = "x" if routing is not None else "rows"
    check.tensor(name, x, None if routing is not None else ("R", "D"))
    x, b_in, b_down = autocast(x, b_in, b_down)  # type: ignore[assignment]
    if routing is not None:
        check_routing(x, routing)
        token, weight, offsets, row, slot_offsets = routing[:5]
        weight = weight.to(torch.float32)
        routed: Any = (token, weight, offsets, row, slot_offsets)
    else:
        check.indices("offsets", offsets)
        check.device("offsets", offsets, x, "rows")  # type: ignore[arg-type]
        routed = (None, None, offsets, None, None)
    check.flag("gated", gated)
    gate = as_gate(activation, gated=gated, one_weight=gated)
    return _call(name, x, routed, w_in, None, w_down, b_in, b_down, gated, gate, recompute, experts=True)


def quantized_ffn(
    x: Tensor,
    w_in: Any,
    w_up: Any,
    w_down: Any,
    gated: bool,
    b_in: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    gate: Gate,
    recompute: bool,
) -> Tensor:
    """:func:`ffn_ops.ffn`."""
    for each, b in (("b_in", b_in), ("b_up", b_up), ("b_down", b_down)):
        if b is not None:
            check.tensor(each, b)
    x, b_in, b_up, b_down = autocast(x, b_in, b_up, b_down)  # type: ignore[assignment]
    if b_up is not None and w_up is None:
        raise ValueError("b_up: expected None where w_up is None (b_in holds both halves), got a tensor")
    if w_up is not None and (b_in is not None or b_up is not None):
        rows = w_in.shape[0]
        for each, b in (("b_in", b_in), ("b_up", b_up)):
            if b is not None:
                check.tensor(each, b, (rows,), like=x)
        b_in = torch.cat([x.new_zeros(rows) if b is None else b for b in (b_in, b_up)])
    b_in, b_down = (None if b is None else b.unsqueeze(0) for b in (b_in, b_down))
    routed = (None, None, None, None, None)
    return _call("x", x, routed, w_in, w_up, w_down, b_in, b_down, gated, gate, recompute, experts=False)


def quantized_gated_linear(x: Tensor, w_gate: Any, w_up: Any, b_gate: Any, b_up: Any, gate: Gate) -> Tensor:
    """:func:`ffn_ops.gated_linear`: the products, and then the gate; branches are added in their order."""
    biases = [*b_gate, *b_up]
    if len(w_up) != len(w_gate):
        raise ValueError(f"w_up: expected as many weights as w_gate has ({len(w_gate)}), got {len(w_up)}")
    for name, given_biases in (("b_gate", b_gate), ("b_up", b_up)):
        if given_biases and len(given_biases) != len(w_gate):
            raise ValueError(f"{name}: expected none or one for each weight ({len(w_gate)}), got {len(given_biases)}")
    _check_weights("x", x, {"w_gate": w_gate[0], "w_up": w_up[0]}, experts=False)
    rows = fold(x)
    offsets = _all_rows(rows)
    total: Tensor | None = None
    for i, (gate_weight, up_weight) in enumerate(zip(w_gate, w_up, strict=True)):
        _check_weights("x", x, {"w_gate": gate_weight, "w_up": up_weight}, experts=False)
        z = []
        for name, w, b in (("gate", gate_weight, biases[: len(b_gate)]), ("up", up_weight, biases[len(b_gate) :])):
            if w.shape != w_gate[0].shape or w.shape[1] != x.shape[-1]:
                expected = [w_gate[0].shape[0], x.shape[-1]]
                raise ValueError(f"w_{name}: expected shape {expected}, got {list(w.shape)}")
            if b:
                check.tensor(f"b_{name}", b[i], (w.shape[0],), like=x)
            product = linear_op(rows, *w.stacked(), offsets, False)
            z.append(product + b[i] if b else product)
        h = gated_act_op(z[0], z[1], gate.activation, list(gate.params))
        total = plus(total, h)
    return total.reshape(*x.shape[:-1], total.shape[-1])  # type: ignore[union-attr]


def _all_rows(rows: Tensor) -> Tensor:
    return torch.arange(2, device=rows.device) * rows.shape[0]  # made where it is used: nothing waits for a GPU


def _check_weights(name: str, x: Tensor, weights: dict[str, Any], experts: bool) -> None:
    check.tensor(name, x)
    check.leading(name, x)
    if x.dtype is torch.float64:
        raise TypeError(f"{name}: expected dtype float32, float16 or bfloat16 where weights are quantised, got float64")
    for each, w in weights.items():
        if not isinstance(w, QuantizedWeight):
            raise TypeError(f"{each}: expected a QuantizedWeight as the other weights are, got {type(w).__name__}")
        if w.dim() != (3 if experts else 2):
            shape = "[E, N, K]" if experts else "[N, K]"
            raise ValueError(f"{each}: expected a quantised weight of shape {shape}, got {list(w.shape)}")
        check.device(each, w.codes, x, name)
        check_groups(each, w.codes, w.format, w.block)


def _call(
    name: str, x: Tensor, routed: Any, w_in: Any, w_up: Any, w_down: Any, b_in: Any, b_down: Any, gated: bool,
    gate: Gate, recompute: bool, experts: bool,
) -> Tensor:  # fmt: skip
    check.flag("recompute", recompute)
    weights = {"w_in": w_in, "w_down": w_down} if w_up is None else {"w_in": w_in, "w_up": w_up, "w_down": w_down}
    _check_weights(name, x, weights, experts)
    stacked = [w.stacked() for w in weights.values()]
    formats = ",".join(format for _, format in stacked)
    parts = (stacked[0][0], [] if w_up is None else stacked[1][0], stacked[-1][0])
    rows = fold(x)
    _check_shapes(rows, routed[2], *parts, formats, b_in, b_down, gated)
    grad = needs_grad(x, routed[1], b_in, b_down)
    form = (gated, gate.interleaved, gate.activation, gate.params)
    y = moe_op(rows, *routed, *parts, formats, b_in, b_down, *form, grad and not recompute, grad=grad)[0]
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], w_down.shape[-2])  # type: ignore[no-any-return]


def _shape(parts: Sequence[Tensor], format: str) -> tuple[Any, Any, Any]:
    codes = parts[0]
    return codes.shape[0], codes.shape[1], columns(format.split(":")[0], codes)


def _check_shapes(
    x: Tensor, offsets: Tensor | None, w_in: Any, w_up: Any, w_down: Any, formats: str, b_in: Any, b_down: Any,
    gated: bool,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Returns E, F and the width of the output."""
    names = formats.split(",")
    experts, rows, width = _shape(w_in, names[0])
    if width != x.shape[-1] or (offsets is not None and experts != offsets.shape[0] - 1):
        count = experts if offsets is None else offsets.shape[0] - 1
        raise ValueError(
            f"w_in: expected a quantised weight of shape [{count}, {'2F' if gated else 'F'}, {x.shape[-1]}], got"
            f" {[experts, rows, width]}"
        )
    one_weight = gated and not w_up
    if one_weight and rows % 2:
        raise ValueError(f"w_in: expected an even number of rows, of gate and up, got {[experts, rows, width]}")
    features = rows // 2 if one_weight else rows
    for name, parts, format, shape in (
        ("w_up", w_up, names[1], (experts, features, width)),
        ("w_down", w_down, names[-1], (experts, None, features)),
    ):
        if parts:
            actual = _shape(parts, format)
            if any(want is not None and want != have for want, have in zip(shape, actual, strict=True)):
                wanted = ", ".join("D_out" if each is None else str(each) for each in shape)
                raise ValueError(f"{name}: expected a quantised weight of shape [{wanted}], got {list(actual)}")
    out = w_down[0].shape[1]
    if b_in is not None:
        check.tensor("b_in", b_in, (experts, 2 * features if gated else features), like=x)
    if b_down is not None:
        check.tensor("b_down", b_down, (experts, out), like=x)
    return experts, features, out


# ---- fakes ----------------------------------------------------------------------------------------------------------


@fake("dequantize")
def _(w: list[Tensor], format: str, dtype: str) -> Tensor:
    return w[0].new_empty(_shape(w, format), dtype=getattr(torch, dtype))


@fake("quantized_linear")
def _(rows: Tensor, w: list[Tensor], format: str, offsets: Tensor, transposed: bool) -> Tensor:
    _experts, out, width = _shape(w, format)
    check.tensor("rows", rows, ("R", out if transposed else width))
    return dense(rows, rows.shape[0], width if transposed else out)


def _num_rows(x: Tensor, token: Tensor | None) -> Any:
    return x.shape[0] if token is None else token.shape[0]


@fake("moe_quantized")
def _(
    x: Tensor, token: Tensor | None, weight: Tensor | None, offsets: Tensor | None, row: Tensor | None,
    slot_offsets: Tensor | None, w_in: Any, w_up: Any, w_down: Any, formats: str, b_in: Tensor | None,
    b_down: Tensor | None, gated: bool, interleaved: bool, activation: str, params: list[float], save: bool,
) -> Any:  # fmt: skip
    check.tensor("x", x, ("T", "D"))
    check_gate(activation, params, gated=gated, interleaved=interleaved, one_weight=gated and not w_up)
    _experts, features, out = _check_shapes(x, offsets, w_in, w_up, w_down, formats, b_in, b_down, gated)
    rows = _num_rows(x, token)
    gate = dense(x, rows, features) if save else dense(x, 0)
    return dense(x, x.shape[0], out), gate, dense(x, rows, features) if save and gated else dense(x, 0)


@fake("moe_quantized_backward")
def _(
    d_y: Tensor, x: Tensor, token: Tensor | None, weight: Tensor | None, offsets: Tensor | None, row: Tensor | None,
    slot_offsets: Tensor | None, w_in: Any, w_up: Any, w_down: Any, formats: str, b_in: Tensor | None,
    b_down: Tensor | None, gate: Tensor, up: Tensor, gated: bool, interleaved: bool, activation: str,
    params: list[float], needs: list[bool],
) -> Any:  # fmt: skip
    experts, features, out = _check_shapes(x, offsets, w_in, w_up, w_down, formats, b_in, b_down, gated)
    check.tensor("d_y", d_y, (x.shape[0], out), like=x)
    need_x, need_weight, need_b_in, need_b_down = needs
    d_weight = x.new_empty((token.shape[0],), dtype=torch.float32) if need_weight and token is not None else dense(x, 0)
    d_b_in = dense(x, experts, 2 * features if gated else features) if need_b_in else dense(x, 0)
    d_b_down = dense(x, experts, out) if need_b_down else dense(x, 0)
    return dense(x, *x.shape) if need_x else dense(x, 0), d_weight, d_b_in, d_b_down


# ---- autograd -------------------------------------------------------------------------------------------------------

# Places among the arguments of moe_quantized.
_W_IN, _W_UP, _W_DOWN, _FORMATS, _B_IN, _B_DOWN = range(6, 12)
_PLACES = (0, 2, _B_IN, _B_DOWN)  # what has a gradient


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
    """``inputs`` are those of moe_quantized up to the biases."""
    weights = inputs[_W_IN:_FORMATS]
    ctx.counts, ctx.formats = [len(w) for w in weights], inputs[_FORMATS]
    ctx.save_for_backward(*inputs[:_W_IN], *inputs[_B_IN:], *(t for w in weights for t in w), *more)


def _saved(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    """The inputs again, and what was saved behind them."""
    saved = list(ctx.saved_tensors)
    weights, at = [], _W_IN + 2
    for count in ctx.counts:
        weights.append(saved[at : at + count])
        at += count
    return [*saved[:_W_IN], *weights, ctx.formats, *saved[_W_IN : _W_IN + 2]], saved[at:]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.gated, ctx.interleaved, activation, params, _save_them = inputs
    ctx.form = (activation, params)
    _y, gate, up = output
    ctx.mark_non_differentiable(gate, up)
    ctx.set_materialize_grads(False)
    _save(ctx, tensors, gate, up)


def _backward(ctx: Any, d_y: Tensor | None, _gate: Any, _up: Any) -> Any:
    result: list[Any] = [None] * 17
    if d_y is None:
        return tuple(result)
    inputs, pre = _saved(ctx)
    needs = [bool(ctx.needs_input_grad[place]) for place in _PLACES]
    grads = moe_backward_op(d_y, *inputs, *pre, ctx.gated, ctx.interleaved, *ctx.form, needs)
    for place, grad, need in zip(_PLACES, grads, needs, strict=True):
        result[place] = grad if need else None
    return tuple(result)


def _backward_setup(ctx: Any, inputs: Any, output: Any) -> None:
    d_y, *tensors, gate, up, ctx.gated, ctx.interleaved, activation, params, ctx.needs = inputs
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
    result: list[Any] = [None] * (1 + _B_DOWN)
    for place, t in zip(_PLACES, by, strict=True):
        result[place] = t
    return by_d_y, *result


def _backward_tangent(ctx: Any, *tangents: Any) -> Any:
    inputs, (gate, up, _d_y) = _saved(ctx)

    def again(d: Tensor) -> Any:
        return moe_backward_op(d, *inputs, gate, up, ctx.gated, ctx.interleaved, *ctx.form, ctx.needs)

    return backward_tangents(ctx, tangents, again, _double_backward, [1 + place for place in _PLACES])


def _tangent(ctx: Any, *tangents: Any) -> Any:
    inputs, _pre = _saved(ctx)
    values, directions = ([each[place] for place in _PLACES] for each in (inputs, tangents))
    return _along(ctx, inputs, values, directions), None, None


def _along(ctx: Any, inputs: Sequence[Any], values: Sequence[Any], directions: Sequence[Any]) -> Any:
    """The tangent of the output, see ``_moe_derivatives.moe_along``; weights are constants."""
    x, weight, b_in, b_down = values
    x_t, s_t, b_in_t, b_down_t = directions
    _x, token, _weight, offsets, row, slots, w_in, w_up, w_down, formats, _b_in, _b_down = inputs
    names = formats.split(",")
    offsets = _all_rows(x) if offsets is None else offsets
    rows = Rows(ctx.gated, ctx.interleaved, x, token, offsets, row, slots)

    def linear(t: Tensor, w: Any, name: str, b: Tensor | None) -> Tensor:
        z = linear_op(t, w, name, offsets, False)
        return z if b is None else z + rows.spread(b)  # type: ignore[no-any-return]

    def pre(t: Tensor, b: Tensor | None) -> Tensor:
        if not w_up:
            return linear(t, w_in, names[0], b)
        z = torch.cat((linear(t, w_in, names[0], None), linear(t, w_up, names[1], None)), 1)
        return z if b is None else z + rows.spread(b)

    x_rows = rows.gather(x)
    gate, up = rows.halves(pre(x_rows, b_in))
    z_t = None if x_t is None else pre(rows.gather(x_t), None)
    z_t = plus(z_t, None if b_in_t is None else rows.spread(b_in_t))
    h_t = None if z_t is None else act_tangent(gate, up, ctx.form, *rows.halves(z_t))
    h = gated_act_op(gate, up, *ctx.form)
    o_t = None if h_t is None else linear(h_t, w_down, names[-1], None)
    o_t = plus(o_t, None if b_down_t is None else rows.spread(b_down_t))
    y_t = None if o_t is None else rows.scatter(o_t, weight)
    if s_t is not None:
        y_t = plus(y_t, rows.scatter(linear(h, w_down, names[-1], b_down), s_t))
    return y_t


moe_backward_op = differentiable("moe_quantized_backward", _backward_setup, _double_backward, _backward_tangent)
moe_op = differentiable("moe_quantized", _setup, _backward, _tangent)

for _name in ("quantized_linear", "moe_quantized", "moe_quantized_backward", "dequantize"):
    vmap_by_loop(_name)
