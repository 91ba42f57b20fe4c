# SPDX-License-Identifier: BSD-3-Clause
"""ffn: public function, fakes, autograd to second order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _checks as check
from .._gate import Gate, as_gate, check_gate
from .._library import differentiable, fake, is_transformed, vmap_by_loop
from .._quantized import QuantizedWeight
from ._gated_act import act_tangent, gated_act, gated_act_op
from ._moe_lora import adapters, unchecked
from ._moe_lora import operator as with_pairs
from ._moe_quantized import quantized_ffn
from ._shared import (
    autocast,
    backward_tangents,
    both_biases,
    checked,
    dense,
    double_backward,
    fold,
    given,
    halves,
    linear_cotangent,
    needs_grad,
    not_asked_for,
    prefers_torch,
)

if TYPE_CHECKING:
    from .._lora import Lora


def ffn(
    x: Tensor,
    w_in: Tensor | QuantizedWeight,
    w_down: Tensor | QuantizedWeight,
    *,
    w_up: Tensor | QuantizedWeight | None = None,
    gated: bool | None = None,
    b_in: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str | Gate = "silu",
    recompute: bool = False,
    lora: Lora | None = None,
) -> Tensor:
    """``(act(x w_in^T + b_in) * (x w_up^T + b_up)) w_down^T + b_down``, or without the gate: the whole FFN in one op.

    Args:
        x: ``[..., D]``; float64, float32, float16 or bfloat16.
        w_in: ``[F, D]``, the gate's weight where ``w_up`` is given and the one input weight of a plain FFN; with
            ``gated=True`` and no ``w_up``, ``[2F, D]``, gate rows first, or alternating with those of up where the
            gate is ``interleaved``.
        w_down: ``[D_out, F]``. Either all weights or none are a :class:`ffn_ops.QuantizedWeight`.
        w_up: ``[F, D]``: makes the FFN gated.
        gated: None means True if ``w_up`` is given.
        b_in, b_up, b_down: biases of the same widths as their weights' rows, or None.
        activation: a name or a :class:`ffn_ops.Gate`.
        recompute: save only x for backward, and compute the pre-activations again there. Same bits, less memory.
        lora: low-rank additions to the weights, see :class:`ffn_ops.Lora`. Nothing more is saved for backward.

    Returns:
        ``[..., D_out]``. Saved for backward: x and the pre-activations (``[T, F]``, two if gated).

    Raises:
        TypeError, ValueError: with the argument, what was expected and what came.

    Source:
        Vaswani et al., Attention Is All You Need (2017), equation 2; Shazeer, GLU Variants Improve Transformer (2020),
        equation 6.

    Example:
        >>> x, w_gate, w_up, w_down = torch.randn(4, 8), torch.randn(16, 8), torch.randn(16, 8), torch.randn(8, 16)
        >>> ffn_ops.ffn(x, w_gate, w_down, w_up=w_up).shape  # SwiGLU
        torch.Size([4, 8])
        >>> y = ffn_ops.ffn(x, w_gate, w_down, activation="relu")  # no gate
        >>> torch.testing.assert_close(y, torch.relu(x @ w_gate.T) @ w_down.T)
    """
    return ffn_then_dropout(x, w_in, w_down, w_up, gated, b_in, b_up, b_down, activation, recompute, lora, 0.0)


def ffn_then_dropout(
    x: Tensor, w_in: Tensor | QuantizedWeight, w_down: Tensor | QuantizedWeight, w_up: Tensor | QuantizedWeight | None,
    gated: bool | None, b_in: Tensor | None, b_up: Tensor | None, b_down: Tensor | None, activation: str | Gate,
    recompute: bool, lora: Lora | None, p: float,
) -> Tensor:  # fmt: skip
    """``F.dropout(ffn(x), p)`` with the same random numbers, 0 <= p < 1. A small training step feels every node of the
    graph, so on a CPU it is one."""
    check.first("x", x)
    if gated is not None:
        check.flag("gated", gated)
        if w_up is not None and not gated:
            raise ValueError("gated: expected None or True where w_up is given, got False")
    check.flag("recompute", recompute)
    gated = bool(gated) or w_up is not None
    gate = as_gate(activation, gated=gated, one_weight=gated and w_up is None)
    if isinstance(w_in, QuantizedWeight) or isinstance(w_up, QuantizedWeight) or isinstance(w_down, QuantizedWeight):
        y = quantized_ffn(x, w_in, w_up, w_down, gated, b_in, b_up, b_down, gate, recompute, lora)
        return F.dropout(y, p) if p else y
    x, w_in, w_up, w_down, b_in, b_up, b_down = autocast(x, w_in, w_up, w_down, b_in, b_up, b_down)  # type: ignore[assignment]
    left = p  # of the dropout, behind what is computed here

    def operator() -> Tensor:
        nonlocal left
        grad = needs_grad(x, w_in, w_down, w_up, b_in, b_up, b_down)
        form = (gated, gate.interleaved, gate.activation, gate.params, grad and not recompute)
        args = (w_in, w_up, w_down, b_in, b_up, b_down, *form)
        more = x.dim() != 2 if p == 0 else x.is_cpu
        if more and grad and torch._C._get_tracing_state() is None and not is_transformed():
            left = 0.0
            return _OneNode.apply(x, *args, None, p)[0]  # type: ignore[no-any-return]
        return _ffn(fold(x), *args, grad=grad)[0]  # type: ignore[no-any-return]

    if lora is not None:
        y = _with_adapters(x, w_in, w_up, w_down, b_in, b_up, b_down, gated, gate, recompute, lora)
    elif prefers_torch(x):
        _check_ffn(x, w_in, w_up, w_down, b_in, b_up, b_down, gated)
        y = _ffn_by_torch(x, w_in, w_up, w_down, b_in, b_up, b_down, gated, gate)
    else:
        y = checked(operator, lambda: _check_ffn(x, w_in, w_up, w_down, b_in, b_up, b_down, gated))
        y = y if x.dim() == y.dim() else y.reshape(*x.shape[:-1], w_down.shape[0])
    return F.dropout(y, left) if left else y


def _with_adapters(
    x: Tensor, w_in: Tensor, w_up: Tensor | None, w_down: Tensor, b_in: Tensor | None, b_up: Tensor | None,
    b_down: Tensor | None, gated: bool, gate: Gate, recompute: bool, lora: Lora,
) -> Tensor:  # fmt: skip
    """A mixture of one expert, which takes every row."""
    two = w_up is not None

    def check_arguments() -> Any:
        features, out = _check_ffn(x, w_in, w_up, w_down, b_in, b_up, b_down, gated)
        return adapters(lora, x, None, 2 * features if gated else features, features, out, two=two)

    if prefers_torch(x):
        pairs = check_arguments()
        return _ffn_by_torch(x, w_in, w_up, w_down, b_in, b_up, b_down, gated, gate, (*pairs, lora.scale))

    def operator() -> Tensor:
        bias = both_biases(x, b_in, b_up, w_in.shape[0]) if two else b_in
        tensors = [None if t is None else t.unsqueeze(0) for t in (w_in, w_up, w_down, bias, b_down)]
        form = (gated, gate.interleaved, gate.activation, gate.params)
        pairs = unchecked(lora, x, None, two=two)
        return with_pairs(fold(x), (None,) * 5, (*tensors, *pairs), form, lora.scale, recompute)

    y = checked(operator, check_arguments)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], w_down.shape[0])  # type: ignore[no-any-return]


def _ffn_by_torch(
    x: Tensor,
    w_in: Tensor,
    w_up: Tensor | None,
    w_down: Tensor,
    b_in: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    gated: bool,
    gate: Gate,
    lora: Sequence[Any] = (None, None, None, None, 1.0),
) -> Tensor:
    *pairs, scale = lora
    a_in, lora_b_in, a_down, lora_b_down = (None if t is None else t[0] for t in pairs)

    def low_rank(rows: Tensor, a: Tensor | None, b: Any) -> Tensor | None:
        if a is None:
            return None
        with torch.autocast(rows.device.type, enabled=False):  # which would round between a and b
            return (F.linear(F.linear(rows.to(a.dtype), a), b) * scale).to(rows.dtype)

    pre = F.linear(x, w_in, b_in)
    up = None
    by_pair = low_rank(x, a_in, lora_b_in)
    if w_up is not None:
        up = F.linear(x, w_up, b_up)
        if by_pair is not None:
            pre, up = (z + part for z, part in zip((pre, up), by_pair.chunk(2, -1), strict=True))
    else:
        pre = pre if by_pair is None else pre + by_pair
        if gated:
            pre, up = (pre[..., ::2], pre[..., 1::2]) if gate.interleaved else pre.chunk(2, -1)
    h = gated_act(pre, up, activation=gate.replace(interleaved=False) if gate.interleaved else gate)
    y = F.linear(h, w_down, b_down)
    by_pair = low_rank(h, a_down, lora_b_down)
    return y if by_pair is None else y + by_pair


def _check_ffn(
    x: Tensor,
    w_in: Tensor,
    w_up: Tensor | None,
    w_down: Tensor,
    b_in: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    gated: bool,
) -> tuple[Any, Any]:
    """Returns F and the width of the output."""
    check.leading("x", x)
    check.tensor("w_in", w_in, ("2F" if gated and w_up is None else "F", x.shape[-1]), like=x)
    rows = w_in.shape[0]
    features = rows
    if w_up is not None:
        check.tensor("w_up", w_up, (rows, x.shape[-1]), like=x)
    elif gated:
        if rows % 2:
            raise ValueError(f"w_in: expected an even number of rows, of gate and up, got {list(w_in.shape)}")
        features = rows // 2
    check.tensor("w_down", w_down, ("D_out", features), like=x)
    if b_in is not None:
        check.tensor("b_in", b_in, (rows,), like=x)
    if b_up is not None:
        if w_up is None:
            raise ValueError("b_up: expected None where w_up is None (b_in holds both halves), got a tensor")
        check.tensor("b_up", b_up, (features,), like=x)
    if b_down is not None:
        check.tensor("b_down", b_down, (w_down.shape[0],), like=x)
    return features, w_down.shape[0]


@fake("ffn")
def _(
    x: Tensor,
    w_in: Tensor,
    w_up: Tensor | None,
    w_down: Tensor,
    b_in: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    gated: bool,
    interleaved: bool,
    activation: str,
    params: list[float],
    save: bool,
) -> Any:
    check.tensor("x", x, ("T", "D"))
    gated = gated or w_up is not None
    check_gate(activation, params, gated=gated, interleaved=interleaved, one_weight=gated and w_up is None)
    features, out = _check_ffn(x, w_in, w_up, w_down, b_in, b_up, b_down, gated)
    gate = dense(x, x.shape[0], features) if save else dense(x, 0)
    up = dense(x, x.shape[0], features) if save and gated else dense(x, 0)
    return dense(x, x.shape[0], out), gate, up


@fake("ffn_backward")
def _(
    d_y: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_up: Tensor | None,
    w_down: Tensor,
    b_in: Tensor | None,
    b_up: Tensor | None,
    gate: Tensor,
    up: Tensor,
    gated: bool,
    interleaved: bool,
    activation: str,
    params: list[float],
    needs: list[bool],
) -> Any:
    check.tensor("x", x, ("T", "D"))
    gated = gated or w_up is not None
    check_gate(activation, params, gated=gated, interleaved=interleaved, one_weight=gated and w_up is None)
    features, out = _check_ffn(x, w_in, w_up, w_down, b_in, b_up, None, gated)
    check.tensor("d_y", d_y, (x.shape[0], out), like=x)
    in_shape = tuple(w_in.shape)
    shapes: tuple[Any, ...] = (
        tuple(x.shape),
        in_shape,
        (features, x.shape[1]) if w_up is not None else None,
        (out, features),
        (in_shape[0],),
        (features,) if w_up is not None else None,
        (out,),
    )
    return tuple(
        dense(x, *shape) if need and shape is not None else dense(x, 0)
        for shape, need in zip(shapes, needs, strict=True)
    )


def _ffn_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, w_in, w_up, w_down, b_in, b_up, _b_down, ctx.gated, ctx.interleaved, *ctx.form, _save = inputs
    _y, gate, up = output
    ctx.mark_non_differentiable(gate, up)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w_in, w_up, w_down, b_in, b_up, gate, up)


def _ffn_backward_formula(ctx: Any, d_y: Tensor | None, _gate: Any = None, _up: Any = None) -> Any:
    if d_y is None:
        return (None,) * 12
    x, w_in, w_up, w_down, b_in, b_up, gate, up, *noise = ctx.saved_tensors
    if noise:
        d_y = d_y * noise[0]
    shape = x.shape
    if len(shape) != 2:  # by numbers of their own: is_grads_batched=True knows reshape, not flatten
        rows = math.prod(shape[:-1])
        x, d_y = x.reshape(rows, shape[-1]), d_y.reshape(rows, d_y.shape[-1])
    needs = list(ctx.needs_input_grad[:7])
    grads = _ffn_backward(
        d_y, x, w_in, w_up, w_down, b_in, b_up, gate, up, ctx.gated, ctx.interleaved, *ctx.form, needs
    )
    if len(shape) != 2 and needs[0]:
        grads = (grads[0].view(shape), *grads[1:])
    if False not in needs:
        return grads
    return tuple([grad if need else None for grad, need in zip(grads, needs, strict=True)])


def _ffn_backward_setup(ctx: Any, inputs: Any, output: Any) -> None:
    d_y, x, w_in, w_up, w_down, b_in, b_up, gate, up, ctx.gated, ctx.interleaved, *ctx.form, ctx.needs = inputs
    not_asked_for(ctx, output)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(d_y, x, w_in, w_up, w_down, b_in, b_up, gate, up)


def _ffn_double_backward(ctx: Any, *grads: Tensor | None) -> Any:
    d_y, *inputs = ctx.saved_tensors[:7]
    directions = [given(grad) for grad in grads]

    def along(inputs: Sequence[Any]) -> Tensor:
        return _along(ctx, inputs, directions)

    by_d_y, by = double_backward(ctx, along, d_y, inputs, directions, ctx.needs_input_grad[1:7])
    return by_d_y, *by


def _ffn_backward_tangent(ctx: Any, *tangents: Any) -> Any:
    def again(d: Tensor) -> Any:
        return _ffn_backward(d, *ctx.saved_tensors[1:], ctx.gated, ctx.interleaved, *ctx.form, ctx.needs)

    return backward_tangents(ctx, tangents, again, _ffn_double_backward, (1, 2, 3, 4, 5, 6, None))


def _ffn_tangent(ctx: Any, *tangents: Any) -> Any:
    return _along(ctx, ctx.saved_tensors[:6], tangents[:7]), None, None


def _along(ctx: Any, inputs: Sequence[Any], directions: Sequence[Any]) -> Tensor:
    """The tangent of the output. It computes the pre-activations again: the saved ones are constants to autograd."""
    x, w_in, w_up, w_down, b_in, b_up = inputs
    x_t, w_in_t, w_up_t, w_down_t, b_in_t, b_up_t, b_down_t = directions
    if ctx.gated and w_up is None:
        (w_in, w_up), (b_in, b_up) = (halves(t, ctx.interleaved) for t in (w_in, b_in))
        (w_in_t, w_up_t), (b_in_t, b_up_t) = (halves(t, ctx.interleaved) for t in (w_in_t, b_in_t))
    gate = F.linear(x, w_in, b_in)
    up = None if w_up is None else F.linear(x, w_up, b_up)
    gate_t = linear_cotangent(x, w_in, x_t, w_in_t, b_in_t)
    up_t = None if w_up is None else linear_cotangent(x, w_up, x_t, w_up_t, b_up_t)
    h_t = act_tangent(gate, up, ctx.form, gate_t, up_t)
    h = h_t if w_down_t is None else gated_act_op(gate, up, *ctx.form)
    return linear_cotangent(h, w_down, h_t, w_down_t, b_down_t)


_ffn_backward = differentiable("ffn_backward", _ffn_backward_setup, _ffn_double_backward, _ffn_backward_tangent)
_ffn = differentiable("ffn", _ffn_setup, _ffn_backward_formula, _ffn_tangent)


_Ffn: Any = _ffn.function  # type: ignore[attr-defined]


class _OneNode(_Ffn):  # type: ignore[misc]
    """Folds leading dimensions and drops elements too, which would each be a node of the graph."""

    @staticmethod
    def forward(ctx: Any, x: Any, *rest: Any) -> Any:
        *rest, p = rest  # type: ignore[assignment]
        y = _Ffn.forward(ctx, fold(x), *rest)[0]
        ctx.asks = ctx.asks or not x.is_leaf  # of the folded x nothing is known
        if x.dim() != 2:
            # Not a view, which autograd would not let anyone change in place.
            y = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])
        noise: tuple[Tensor, ...] = ()
        if p:  # as torch.dropout draws and scales it
            noise = (torch.empty_like(y).bernoulli_(1 - p).div_(1 - p),)
            y.mul_(noise[0])
        ctx.save_for_backward(x, *ctx.to_save[1:], *noise)
        return (y,)


for _name in ("ffn", "ffn_backward"):
    vmap_by_loop(_name)
