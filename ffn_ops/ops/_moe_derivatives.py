# SPDX-License-Identifier: BSD-3-Clause
"""Derivatives of mixtures of experts beyond backward: double backward and forward mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ._gated_act import act_tangent, gated_act_op
from ._rows import combine_op, dispatch_op, linear_op
from ._shared import double_backward, given, plus


class Rows:
    """Moves data between tokens, rows and experts of one call, and splits pre-activations into gate and up."""

    def __init__(
        self, ctx: Any, x: Tensor, token: Tensor | None, offsets: Tensor, row: Tensor | None, slots: Tensor | None
    ) -> None:
        self.gated, self.interleaved = ctx.gated, ctx.interleaved
        self.token, self.offsets, self.route = token, offsets, (offsets, row, slots)
        self.ones = x.new_ones((x if token is None else token).shape[0], 1)

    def gather(self, t: Tensor) -> Tensor:
        return t if self.token is None else dispatch_op(t, self.token, None, *self.route)  # type: ignore[no-any-return]

    def scatter(self, rows: Tensor, weight: Tensor | None = None) -> Tensor:
        return rows if self.token is None else combine_op(rows, self.token, weight, *self.route)  # type: ignore[no-any-return]

    def spread(self, per_expert: Tensor) -> Tensor:
        return linear_op(self.ones, per_expert.unsqueeze(2), self.offsets)  # type: ignore[no-any-return]

    def linear(self, rows: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        z = linear_op(rows, w, self.offsets)
        return z if b is None else z + self.spread(b)  # type: ignore[no-any-return]

    def linear_tangent(
        self, rows: Tensor, w: Tensor, rows_t: Tensor | None, w_t: Tensor | None, b_t: Tensor | None
    ) -> Tensor | None:
        total = None if rows_t is None else linear_op(rows_t, w, self.offsets)
        total = plus(total, None if w_t is None else linear_op(rows, w_t, self.offsets))
        return plus(total, None if b_t is None else self.spread(b_t))

    def halves(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.gated:
            return z, None
        return (z[:, ::2], z[:, 1::2]) if self.interleaved else tuple(z.chunk(2, 1))  # type: ignore[return-value]


def moe_tangent(ctx: Any, *tangents: Any) -> Any:
    inputs = [ctx.saved_tensors[place] for place in PLACES]
    directions = [tangents[place] for place in PLACES]
    return _along(ctx, ctx.saved_tensors[:6], inputs, directions), None, None


def moe_double_backward(ctx: Any, *grads: Tensor | None) -> Any:
    d_y, *saved = ctx.saved_tensors
    directions = [given(grad) for grad in grads]

    def along(inputs: Sequence[Any]) -> Tensor:
        return _along(ctx, saved[:6], inputs, directions)  # type: ignore[no-any-return]

    needs = [ctx.needs_input_grad[1 + place] for place in PLACES]
    by_d_y, by = double_backward(ctx, along, d_y, [saved[place] for place in PLACES], directions, needs)
    result: list[Tensor | None] = [None] * (1 + PLACES[-1])
    for place, t in zip(PLACES, by, strict=True):
        result[place] = t
    return by_d_y, *result


# Places of x, weight, w_in, w_down, b_in and b_down among the arguments of moe.
PLACES = (0, 2, 6, 7, 8, 9)


def _along(ctx: Any, routed: Sequence[Any], inputs: Sequence[Any], directions: Sequence[Any]) -> Any:
    """The tangent of the output. Row by row, with z the pre-activations, h = act(z), o = h w_down^T + b_down and y the
    sum of s o: y_t is the sum of s o_t + s_t o. The saved z are constants to autograd, so they are computed again."""
    x, weight, w_in, w_down, b_in, b_down = inputs
    x_t, s_t, w_in_t, w_down_t, b_in_t, b_down_t = directions
    _x, token, _weight, offsets, row, slots = routed
    rows = Rows(ctx, x, token, offsets, row, slots)
    x_rows = rows.gather(x)
    gate, up = rows.halves(rows.linear(x_rows, w_in, b_in))
    z_t = rows.linear_tangent(x_rows, w_in, None if x_t is None else rows.gather(x_t), w_in_t, b_in_t)
    h_t = None if z_t is None else act_tangent(gate, up, ctx.form, *rows.halves(z_t))
    h = gated_act_op(gate, up, *ctx.form)
    o_t = rows.linear_tangent(h, w_down, h_t, w_down_t, b_down_t)
    y_t = None if o_t is None else rows.scatter(o_t, weight)
    if s_t is not None:
        y_t = plus(y_t, rows.scatter(rows.linear(h, w_down, b_down), s_t))
    return y_t
