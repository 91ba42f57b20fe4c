# SPDX-License-Identifier: BSD-3-Clause
"""Moves of rows between tokens and experts: dispatch, combine, row products, and products per expert. The gradient of
each is made of the others, so all can be differentiated to any order.

The five index tensors of a routing come in the order token, weight, offsets, row, slot_offsets everywhere.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import _checks as check
from .._library import differentiable, fake, vmap_by_loop
from ._shared import arithmetic, autocast, checked, dense, fold, plus

if TYPE_CHECKING:
    from ..routing import Routing


def moe_dispatch(x: Tensor, routing: Routing) -> Tensor:
    """Rows sorted by expert: ``rows[r] = x[token[r]]``, zeros for dropped rows.

    Args:
        x: ``[..., D]`` with T tokens; float64, float32, float16 or bfloat16.
        routing: of these T tokens.

    Returns:
        ``[R, D]``, for code that puts a collective between the parts of :func:`moe`. ``moe`` itself does not write
        these rows.

    Raises:
        TypeError, ValueError: with the argument, what was expected and what came.

    Source:
        GShard, Lepikhin et al. (2020), algorithm 1, without its one-hot products.

    Example:
        >>> x = torch.randn(5, 8)
        >>> routing = ffn_ops.routing.top_k(torch.randn(5, 4), k=2)
        >>> torch.equal(ffn_ops.moe_dispatch(x, routing), x[routing.token])
        True
    """
    check.first("x", x)
    (x,) = autocast(x)  # type: ignore[assignment]
    check.is_routing(routing)
    return checked(  # type: ignore[no-any-return]
        lambda: dispatch_op(fold(x), routing.token, None, routing.offsets, routing.row, routing.slot_offsets),
        lambda: check_routing(x, routing),
    )


def moe_combine(rows: Tensor, routing: Routing) -> Tensor:
    """``y[t] = sum over the rows r of token t of weight[r] * rows[r]``; tokens without rows give zeros.

    Args:
        rows: ``[R, D]`` as :func:`moe_dispatch` sorts them. Dropped rows are not read.
        routing: gives the weights, which get a gradient.

    Returns:
        ``[T, D]``, summed in the order of each token's slots, in float32 (float64 for float64), rounded once.

    Raises:
        TypeError, ValueError: with the argument, what was expected and what came.

    Source:
        Shazeer et al., Outrageously Large Neural Networks (2017), equation 1.

    Example:
        >>> x = torch.randn(5, 8)
        >>> routing = ffn_ops.routing.top_k(torch.randn(5, 4), k=2, renormalize=True)  # weights of a token sum to 1
        >>> torch.testing.assert_close(ffn_ops.moe_combine(ffn_ops.moe_dispatch(x, routing), routing), x)
    """
    check.first("rows", rows)
    (rows,) = autocast(rows)  # type: ignore[assignment]
    check.is_routing(routing)

    def operator() -> Tensor:
        weight = routing_weight(rows, routing)
        return combine_op(rows, routing.token, weight, routing.offsets, routing.row, routing.slot_offsets)  # type: ignore[no-any-return]

    def check_arguments() -> None:
        check.tensor("rows", rows)
        check.routing(routing, rows, "rows")
        check.tensor("rows", rows, (routing.token.shape[0], "D"))

    return checked(operator, check_arguments)  # type: ignore[no-any-return]


def routing_weight(x: Tensor, routing: Routing) -> Tensor:
    """In the dtype of x's arithmetic."""
    weight = routing.weight
    if weight.dtype is not arithmetic(x) and weight.dtype in check.DTYPES:
        return weight.to(arithmetic(x))
    return weight


def check_routing(x: Tensor, routing: Routing) -> None:
    check.leading("x", x)
    check.routing(routing, x)
    tokens = routing.slot_offsets.shape[0] - 1
    if math.prod(x.shape[:-1]) != tokens:
        raise ValueError(f"x: expected shape [..., D] with {tokens} tokens as the routing has, got {list(x.shape)}")


def check_weights(
    x: Tensor,
    experts: Any,
    w_in: Tensor,
    w_down: Tensor,
    b_in: Tensor | None,
    b_down: Tensor | None,
    gated: bool,
    *,
    may_be_none: bool = False,
    w_up: Tensor | None = None,
) -> tuple[Any, Any]:
    """Returns F and the width of the output. ``may_be_none``: a rank may have no expert."""
    one_weight = gated and w_up is None
    check.tensor("w_in", w_in, (experts, "2F" if one_weight else "F", x.shape[-1]), like=x)
    if experts < 1 and not may_be_none:
        raise ValueError(f"w_in: expected at least one expert, got {list(w_in.shape)}")
    rows = w_in.shape[1]
    if one_weight and rows % 2:
        raise ValueError(f"w_in: expected an even number of rows, of gate and up, got {list(w_in.shape)}")
    features = rows // 2 if one_weight else rows
    if w_up is not None:
        check.tensor("w_up", w_up, (experts, features, x.shape[-1]), like=x)
    check.tensor("w_down", w_down, (experts, "D_out", features), like=x)
    if b_in is not None:
        check.tensor("b_in", b_in, (experts, 2 * features if gated else features), like=x)
    if b_down is not None:
        check.tensor("b_down", b_down, (experts, w_down.shape[1]), like=x)
    return features, w_down.shape[1]


# ---- dispatch, combine, row products --------------------------------------------------------------------------------


def _check_rows(name: str, t: Tensor, token: Tensor, weight: Tensor | None, row: Tensor, tokens: Any) -> None:
    check.tensor(name, t, (tokens, "D"))
    check.indices("token", token)
    check.indices("row", row, (token.shape[0],))
    if weight is not None:
        check.tensor("weight", weight, (token.shape[0],))
        if weight.dtype is not arithmetic(t):
            wanted, got = check.dtype_name(arithmetic(t)), check.dtype_name(weight.dtype)
            raise TypeError(f"weight: expected dtype {wanted}, got {got}")


@fake("moe_dispatch")
def _(x: Tensor, token: Tensor, weight: Any, offsets: Tensor, row: Tensor, slot_offsets: Tensor) -> Tensor:
    _check_rows("x", x, token, weight, row, slot_offsets.shape[0] - 1)
    return dense(x, token.shape[0], x.shape[1])


@fake("moe_combine")
def _(rows: Tensor, token: Tensor, weight: Any, offsets: Tensor, row: Tensor, slot_offsets: Tensor) -> Tensor:
    _check_rows("rows", rows, token, weight, row, token.shape[0])
    return dense(rows, slot_offsets.shape[0] - 1, rows.shape[1])


@fake("moe_row_dots")
def _(a: Tensor, rows: Tensor, token: Tensor, offsets: Tensor, row: Tensor, slot_offsets: Tensor) -> Tensor:
    _check_rows("a", a, token, None, row, slot_offsets.shape[0] - 1)
    check.tensor("rows", rows, (token.shape[0], a.shape[1]), like=a)
    return a.new_empty((token.shape[0],), dtype=arithmetic(a))


def _move_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _routed_setup(ctx: Any, inputs: Any, output: Any) -> None:
    """Saves values only if the weights need a gradient, else nothing but the routing."""
    values, token, weight, *rest = inputs
    ctx.save_for_backward(None if weight is None else values, token, weight, *rest)


def _dispatch_backward(ctx: Any, d_rows: Tensor) -> Any:
    x, token, weight, offsets, row, slot_offsets = ctx.saved_tensors
    d_x = combine_op(d_rows, token, weight, offsets, row, slot_offsets) if ctx.needs_input_grad[0] else None
    d_weight = row_dots_op(x, d_rows, token, offsets, row, slot_offsets) if ctx.needs_input_grad[2] else None
    return d_x, None, d_weight, None, None, None


def _combine_backward(ctx: Any, d_y: Tensor) -> Any:
    rows, token, weight, offsets, row, slot_offsets = ctx.saved_tensors
    d_rows = dispatch_op(d_y, token, weight, offsets, row, slot_offsets) if ctx.needs_input_grad[0] else None
    d_weight = row_dots_op(d_y, rows, token, offsets, row, slot_offsets) if ctx.needs_input_grad[2] else None
    return d_rows, None, d_weight, None, None, None


def _row_dots_backward(ctx: Any, d: Tensor) -> Any:
    a, rows, token, offsets, row, slot_offsets = ctx.saved_tensors
    d_a = combine_op(rows, token, d, offsets, row, slot_offsets) if ctx.needs_input_grad[0] else None
    d_rows = dispatch_op(a, token, d, offsets, row, slot_offsets) if ctx.needs_input_grad[1] else None
    return d_a, d_rows, None, None, None, None


def _dispatch_tangent(ctx: Any, *tangents: Any) -> Any:
    return _routed_tangent(dispatch_op, ctx.saved_tensors, *tangents)


def _combine_tangent(ctx: Any, *tangents: Any) -> Any:
    return _routed_tangent(combine_op, ctx.saved_tensors, *tangents)


def _routed_tangent(op: Any, saved: Any, values_t: Tensor | None, _token: Any, weight_t: Tensor | None, *_: Any) -> Any:
    """Both are linear in values and in weights."""
    values, token, weight, *rest = saved
    by_values = None if values_t is None else op(values_t, token, weight, *rest)
    return plus(by_values, None if weight_t is None else op(values, token, weight_t, *rest))


def _product_tangent(op: Any, saved: Any, a_t: Tensor | None, b_t: Tensor | None) -> Any:
    a, b, *rest = saved
    return plus(None if a_t is None else op(a_t, b, *rest), None if b_t is None else op(a, b_t, *rest))


def _row_dots_tangent(ctx: Any, *tangents: Any) -> Any:
    return _product_tangent(row_dots_op, ctx.saved_tensors, *tangents[:2])


dispatch_op = differentiable("moe_dispatch", _routed_setup, _dispatch_backward, _dispatch_tangent)
combine_op = differentiable("moe_combine", _routed_setup, _combine_backward, _combine_tangent)
row_dots_op = differentiable("moe_row_dots", _move_setup, _row_dots_backward, _row_dots_tangent)


# ---- products per expert --------------------------------------------------------------------------------------------


@fake("moe_linear")
def _(rows: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    check.tensor("rows", rows, ("R", "K"))
    check.tensor("w", w, (offsets.shape[0] - 1, "N", rows.shape[1]), like=rows)
    return dense(rows, rows.shape[0], w.shape[1])


@fake("moe_outer")
def _(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    check.tensor("a", a, ("R", "M"))
    check.tensor("b", b, (a.shape[0], "N"), like=a)
    return dense(a, offsets.shape[0] - 1, a.shape[1], b.shape[1])


def _linear_backward(ctx: Any, d: Tensor) -> Any:
    rows, w, offsets = ctx.saved_tensors
    d_rows = linear_op(d, w.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
    return d_rows, outer_op(d, rows, offsets) if ctx.needs_input_grad[1] else None, None


def _outer_backward(ctx: Any, d: Tensor) -> Any:
    a, b, offsets = ctx.saved_tensors
    d_a = linear_op(b, d, offsets) if ctx.needs_input_grad[0] else None
    return d_a, linear_op(a, d.transpose(1, 2), offsets) if ctx.needs_input_grad[1] else None, None


def _linear_tangent(ctx: Any, *tangents: Any) -> Any:
    return _product_tangent(linear_op, ctx.saved_tensors, *tangents[:2])


def _outer_tangent(ctx: Any, *tangents: Any) -> Any:
    return _product_tangent(outer_op, ctx.saved_tensors, *tangents[:2])


linear_op = differentiable("moe_linear", _move_setup, _linear_backward, _linear_tangent)
outer_op = differentiable("moe_outer", _move_setup, _outer_backward, _outer_tangent)

for _name in ("moe_dispatch", "moe_combine", "moe_row_dots", "moe_linear", "moe_outer"):
    vmap_by_loop(_name)
