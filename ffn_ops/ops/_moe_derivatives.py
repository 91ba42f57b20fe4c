"""Derivatives of mixtures of experts beyond backward: double backward and forward mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._gated_act import act_tangent, gated_act_backward, gated_act_double_backward, gated_act_op
from ._rows import combine_op, dispatch_op, linear_op, outer_op
from ._shared import given, plus


class _Rows:
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

    def total(self, rows: Tensor) -> Tensor:
        return outer_op(rows, self.ones, self.offsets).squeeze(2)  # type: ignore[no-any-return]

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

    def joined(self, by_gate: Tensor, by_up: Tensor | None) -> Tensor:
        if by_up is None or not self.gated:
            return by_gate
        if not self.interleaved:
            return torch.cat((by_gate, by_up), 1)
        return torch.stack((by_gate, by_up), 2).view(by_gate.shape[0], 2 * by_gate.shape[1])


def _dots(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1, keepdim=True)


def moe_tangent(ctx: Any, *tangents: Any) -> Any:
    """Row by row, with z the pre-activations, h = act(z), o = h w_down^T + b_down and y the sum of s o:
    y_t is the sum of s o_t + s_t o. The saved pre-activations are constants to other levels, so they are not used."""
    x, token, weight, offsets, row, slots, w_in, w_down, b_in, b_down, _gate, _up = ctx.saved_tensors
    x_t, _, s_t, _, _, _, w_in_t, w_down_t, b_in_t, b_down_t = tangents[:10]
    rows = _Rows(ctx, x, token, offsets, row, slots)
    x_rows = rows.gather(x)
    gate, up = rows.halves(rows.linear(x_rows, w_in, b_in))
    z_t = rows.linear_tangent(x_rows, w_in, None if x_t is None else rows.gather(x_t), w_in_t, b_in_t)
    h_t = None if z_t is None else act_tangent(gate, up, ctx.form, *rows.halves(z_t))
    h = gated_act_op(gate, up, *ctx.form)
    o_t = rows.linear_tangent(h, w_down, h_t, w_down_t, b_down_t)
    y_t = None if o_t is None else rows.scatter(o_t, weight)
    if s_t is not None:
        y_t = plus(y_t, rows.scatter(rows.linear(h, w_down, b_down), s_t))
    return y_t, None, None


def moe_double_backward(ctx: Any, *grads: Tensor | None) -> Any:
    """Differentiates the backward, with the pre-activations as functions of x, weights and biases.

    Row by row, with g the gradient of the output, a = g w_down, z the pre-activations, h = act(z), s the weight:
    d_z = act'(s a, z), d_s = <a, h> + <g, b_down>, d_w_in = d_z^T x, d_w_down = s g^T h, d_b_down = s g and
    d_x = d_z w_in. ``v_t`` is the cotangent of v where v is one of these gradients.
    """
    d_y, x, token, weight, offsets, row, slot_offsets, w_in, w_down, b_in, b_down, gate, up = ctx.saved_tensors
    dd_x, dd_s, dd_w_in, dd_w_down, dd_b_in, dd_b_down = (given(g) for g in grads)
    act = ctx.form
    rows = _Rows(ctx, x, token, offsets, row, slot_offsets)
    transposed = w_down.transpose(1, 2)

    s = rows.ones if weight is None else weight.unsqueeze(1).to(x.dtype)
    g, x_rows = rows.gather(d_y), rows.gather(x)
    if gate.dim() == 1:  # not saved
        gate, up_ = rows.halves(rows.linear(x_rows, w_in, b_in))
    else:
        up_ = up if ctx.gated else None
    h = gated_act_op(gate, up_, *act)
    a = linear_op(g, transposed, offsets)
    d_z = rows.joined(*gated_act_backward(s * a, gate, up_, *act, [True, True]))

    z_t = torch.zeros_like(d_z)  # the cotangent of d_z
    x_t = None if dd_x is None else rows.gather(dd_x)
    if x_t is not None:
        z_t = z_t + linear_op(x_t, w_in, offsets)
    if dd_w_in is not None:
        z_t = z_t + linear_op(x_rows, dd_w_in, offsets)
    if dd_b_in is not None:
        z_t = z_t + rows.spread(dd_b_in)
    by_d, by_gate, by_up = gated_act_double_backward(*rows.halves(z_t), s * a, gate, up_, *act)
    by_z = rows.joined(by_gate, by_up)
    by_a, by_s, by_g = s * by_d, _dots(by_d, a), torch.zeros_like(g)
    d_h = torch.zeros_like(h)  # what reaches h from d_s and d_w_down
    by_b_down = None
    if dd_s is not None:
        s_t = dd_s.unsqueeze(1).to(x.dtype)
        by_a = by_a + s_t * h
        d_h = d_h + s_t * a
        if b_down is not None:
            by_g = by_g + s_t * rows.spread(b_down)
            by_b_down = rows.total(s_t * g)
    if dd_w_down is not None:
        a_t = linear_op(g, dd_w_down.transpose(1, 2), offsets)
        by_s = by_s + _dots(a_t, h)
        d_h = d_h + s * a_t
        by_g = by_g + s * linear_op(h, dd_w_down, offsets)
    if dd_b_down is not None:
        b_t = rows.spread(dd_b_down)
        by_s = by_s + _dots(g, b_t)
        by_g = by_g + s * b_t
    by_z = by_z + rows.joined(*gated_act_backward(d_h, gate, up_, *act, [True, True]))
    by_g = by_g + linear_op(by_a, w_down, offsets)
    by_w_in = outer_op(by_z, x_rows, offsets)
    by_x = linear_op(by_z, w_in.transpose(1, 2), offsets)
    if x_t is not None:
        by_w_in = by_w_in + outer_op(d_z, x_t, offsets)
    if dd_w_in is not None:
        by_x = by_x + linear_op(d_z, dd_w_in.transpose(1, 2), offsets)
    return (
        rows.scatter(by_g),
        rows.scatter(by_x),
        None,
        None if weight is None else by_s.squeeze(1).to(weight.dtype),
        *(None,) * 3,
        by_w_in,
        outer_op(g, by_a, offsets),
        rows.total(by_z) if b_in is not None else None,
        by_b_down,
        *(None,) * 9,
    )
