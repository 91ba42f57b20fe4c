# SPDX-License-Identifier: BSD-3-Clause
"""Derivatives of mixtures of experts beyond backward: double backward and forward mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._library import differentiable, vmap_by_loop
from ._gated_act import act_tangent, gated_act_op
from ._rows import combine_op, dispatch_op, linear_op
from ._shared import backward_tangents, double_backward, given, not_asked_for, plus


class Rows:
    """Moves data between tokens, rows and experts of one call, and splits pre-activations into gate and up."""

    def __init__(
        self,
        gated: bool,
        interleaved: bool,
        x: Tensor,
        token: Tensor | None,
        offsets: Tensor | None,
        row: Tensor | None,
        slots: Tensor | None,
    ) -> None:
        self.gated, self.interleaved = gated, interleaved
        offsets = all_rows(x) if offsets is None else offsets
        self.token, self.offsets, self.route = token, offsets, (offsets, row, slots)
        self.ones = x.new_ones((x if token is None else token).shape[0], 1)

    def gather(self, t: Tensor) -> Tensor:
        return t if self.token is None else dispatch_op(t, self.token, None, *self.route)  # type: ignore[no-any-return]

    def scatter(self, rows: Tensor, weight: Tensor | None = None) -> Tensor:
        return rows if self.token is None else combine_op(rows, self.token, weight, *self.route)  # type: ignore[no-any-return]

    def spread(self, per_expert: Tensor) -> Tensor:
        return linear_op(self.ones, per_expert.unsqueeze(2), self.offsets)  # type: ignore[no-any-return]

    def product(self, rows: Tensor, weights: Sequence[Tensor | None]) -> Tensor:
        """With one weight, or side by side with those of gate and up."""
        parts = [linear_op(rows, w, self.offsets) for w in weights if w is not None]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def linear(self, rows: Tensor, weights: Sequence[Tensor | None], b: Tensor | None) -> Tensor:
        z = self.product(rows, weights)
        return z if b is None else z + self.spread(b)

    def linear_tangent(
        self,
        rows: Tensor,
        weights: Sequence[Tensor | None],
        rows_t: Tensor | None,
        weights_t: Sequence[Tensor | None],
        b_t: Tensor | None,
    ) -> Tensor | None:
        total = None if rows_t is None else self.product(rows_t, weights)
        if any(w_t is not None for w_t in weights_t):
            pairs = zip(weights, weights_t, strict=True)
            by_w = [torch.zeros_like(w) if w_t is None and w is not None else w_t for w, w_t in pairs]
            total = plus(total, self.product(rows, by_w))
        return plus(total, None if b_t is None else self.spread(b_t))

    def halves(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.gated:
            return z, None
        return (z[:, ::2], z[:, 1::2]) if self.interleaved else tuple(z.chunk(2, 1))  # type: ignore[return-value]


def all_rows(rows: Tensor) -> Tensor:
    """The offsets of one expert, which takes every row."""
    return torch.tensor([0, rows.shape[0]], device=rows.device)


def differentiable_experts(name: str, places: Sequence[int], along: Callable[..., Any]) -> tuple[Any, Any]:
    """The operator of a mixture and its backward, differentiable to second order; both can be mapped by vmap.

    ``places`` are those of the differentiable tensors among the arguments, the last tensor last; options and whether to
    save follow. Backward takes d_y, all tensors, gate and up, the options and which gradients are needed.
    ``along(options, routed, inputs, directions)`` is the tangent of the output.
    """
    tensors, backward_name = places[-1] + 1, f"{name}_backward"

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.options = inputs[tensors:-1]
        _y, gate, up = output
        ctx.mark_non_differentiable(gate, up)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:tensors], gate, up)

    def backward(ctx: Any, d_y: Tensor | None, _gate: Any, _up: Any) -> Any:
        result: list[Any] = [None] * tensors
        if d_y is None:
            return tuple(result)
        needs = [ctx.needs_input_grad[place] for place in places]
        grads = backward_op(d_y, *ctx.saved_tensors, *ctx.options, needs)
        for place, grad, need in zip(places, grads, needs, strict=True):
            result[place] = grad if need else None
        return tuple(result)

    def tangent(ctx: Any, *tangents: Any) -> Any:
        inputs, directions = ([each[place] for place in places] for each in (ctx.saved_tensors, tangents))
        return along(ctx.options, ctx.saved_tensors[:6], inputs, directions), None, None

    def backward_setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.options, ctx.needs = inputs[tensors + 3 : -1], inputs[-1]
        not_asked_for(ctx, output)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[: tensors + 3])

    def second(ctx: Any, *grads: Tensor | None) -> Any:
        d_y, *saved = ctx.saved_tensors
        directions = [given(grad) for grad in grads]

        def tangent_of(inputs: Sequence[Any]) -> Tensor:
            return along(ctx.options, saved[:6], inputs, directions)  # type: ignore[no-any-return]

        needs = [ctx.needs_input_grad[1 + place] for place in places]
        by_d_y, by = double_backward(ctx, tangent_of, d_y, [saved[place] for place in places], directions, needs)
        result: list[Tensor | None] = [None] * tensors
        for place, t in zip(places, by, strict=True):
            result[place] = t
        return by_d_y, *result

    def backward_tangent(ctx: Any, *tangents: Any) -> Any:
        def again(d: Tensor) -> Any:
            return backward_op(d, *ctx.saved_tensors[1:], *ctx.options, ctx.needs)

        return backward_tangents(ctx, tangents, again, second, [1 + place for place in places])

    backward_op = differentiable(backward_name, backward_setup, second, backward_tangent)
    op = differentiable(name, setup, backward, tangent)
    for each in (name, backward_name):
        vmap_by_loop(each)
    return op, backward_op


# Places of x, weight, w_in, w_down, b_in and b_down among the arguments of moe.
PLACES = (0, 2, 6, 7, 8, 9)


def moe_along(options: Sequence[Any], routed: Sequence[Any], inputs: Sequence[Any], directions: Sequence[Any]) -> Any:
    """The tangent of the output. Row by row, with z the pre-activations, h = act(z), o = h w_down^T + b_down and y the
    sum of s o: y_t is the sum of s o_t + s_t o. The saved z are constants to autograd, so they are computed again."""
    x, weight, w_in, w_down, b_in, b_down = inputs
    x_t, s_t, w_in_t, w_down_t, b_in_t, b_down_t = directions
    _x, token, _weight, offsets, row, slots = routed
    gated, interleaved, *form = options
    rows = Rows(gated, interleaved, x, token, offsets, row, slots)
    x_rows = rows.gather(x)
    gate, up = rows.halves(rows.linear(x_rows, (w_in,), b_in))
    z_t = rows.linear_tangent(x_rows, (w_in,), None if x_t is None else rows.gather(x_t), (w_in_t,), b_in_t)
    h_t = None if z_t is None else act_tangent(gate, up, form, *rows.halves(z_t))
    h = gated_act_op(gate, up, *form)
    o_t = rows.linear_tangent(h, (w_down,), h_t, (w_down_t,), b_down_t)
    y_t = None if o_t is None else rows.scatter(o_t, weight)
    if s_t is not None:
        y_t = plus(y_t, rows.scatter(rows.linear(h, (w_down,), b_down), s_t))
    return y_t
