"""ffn: public function, fakes, autograd to second order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _checks as check
from .._library import differentiable, fake, vmap_by_loop
from ._gated_act import act_tangent, gated_act, gated_act_backward, gated_act_double_backward, gated_act_op
from ._shared import (
    NAMES,
    autocast,
    backward_tangents,
    dense,
    fold,
    given,
    linear_cotangent,
    needs_grad,
    not_asked_for,
    prefers_torch,
    split,
)


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
    activation: str = "silu",
    beta: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
    recompute: bool = False,
) -> Tensor:
    """``(act(x w_in^T + b_in) * (x w_up^T + b_up)) w_down^T + b_down``, or without the gate: the whole FFN in one op.

    Args:
        x: ``[..., D]``; float64, float32, float16 or bfloat16.
        w_in: ``[F, D]``, the gate's weight where ``w_up`` is given and the one input weight of a plain FFN; with
            ``gated=True`` and no ``w_up``, ``[2F, D]``, gate rows first.
        w_down: ``[D_out, F]``.
        w_up: ``[F, D]``: makes the FFN gated.
        gated: None means True if ``w_up`` is given.
        b_in, b_up, b_down: biases of the same widths as their weights' rows, or None.
        activation, beta, limit, up_shift: see :func:`gated_act`.
        recompute: save only x for backward, and compute the pre-activations again there. Same bits, less memory.

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
    check.tensor("x", x)
    x, w_in, w_up, w_down, b_in, b_up, b_down = autocast(x, w_in, w_up, w_down, b_in, b_up, b_down)  # type: ignore[assignment]
    if gated is not None:
        check.flag("gated", gated)
        if w_up is not None and not gated:
            raise ValueError("gated: expected None or True where w_up is given, got False")
    check.flag("recompute", recompute)
    gated = bool(gated) or w_up is not None
    if x.dim() < 1:
        raise ValueError(f"x: expected shape [..., D], got {list(x.shape)}")
    check.number("beta", beta)
    check.gate_limit(limit, up_shift, gated)
    form = (activation, float(beta), None if limit is None else float(limit), float(up_shift))
    by_torch = prefers_torch(x)
    if by_torch or torch.compiler.is_compiling():
        _check_ffn(x, w_in, w_up, w_down, b_in, b_up, b_down, gated, activation)
    if by_torch:
        return _ffn_by_torch(x, w_in, w_up, w_down, b_in, b_up, b_down, gated, form)
    refused: Exception | None = None
    try:
        grad = needs_grad(x, w_in, w_down, w_up, b_in, b_up, b_down)
        save = grad and not recompute
        args = (w_in, w_up, w_down, b_in, b_up, b_down, gated, *form, save)
        y = _ffn(fold(x), *args, grad=grad)[0]
    except Exception as error:
        refused = error
    if refused is not None:  # the operator checks as strictly, before any work; these checks find the message
        try:
            _check_ffn(x, w_in, w_up, w_down, b_in, b_up, b_down, gated, activation)
            raise refused
        finally:  # breaks the cycle of error, traceback and frame, which would keep the tensors alive
            del refused
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
    form: tuple[str, float, float | None, float],
) -> Tensor:
    activation, beta, limit, up_shift = form
    pre = F.linear(x, w_in, b_in)
    up = None
    if w_up is not None:
        up = F.linear(x, w_up, b_up)
    elif gated:
        pre, up = pre.chunk(2, -1)
    h = gated_act(pre, up, activation=activation, beta=beta, limit=limit, up_shift=up_shift)
    return F.linear(h, w_down, b_down)


def _check_ffn(
    x: Tensor,
    w_in: Tensor,
    w_up: Tensor | None,
    w_down: Tensor,
    b_in: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    gated: bool,
    activation: str,
) -> tuple[Any, Any]:
    """Returns F and the width of the output."""
    check.tensor("w_in", w_in, ("2F" if gated and w_up is None else "F", x.shape[-1]), like=x)
    rows = w_in.shape[0]
    features = rows
    if w_up is not None:
        check.tensor("w_up", w_up, (rows, x.shape[-1]), like=x)
    elif gated:
        if rows % 2:
            raise ValueError(f"w_in: expected an even number of rows, gate rows first, got {list(w_in.shape)}")
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
    check.activation(activation, NAMES)
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
    activation: str,
    beta: float,
    limit: float | None,
    up_shift: float,
    save: bool,
) -> Any:
    check.tensor("x", x, ("T", "D"))
    gated = gated or w_up is not None
    check.gate_limit(limit, up_shift, gated)
    features, out = _check_ffn(x, w_in, w_up, w_down, b_in, b_up, b_down, gated, activation)
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
    activation: str,
    beta: float,
    limit: float | None,
    up_shift: float,
    needs: list[bool],
) -> Any:
    check.tensor("x", x, ("T", "D"))
    gated = gated or w_up is not None
    features, out = _check_ffn(x, w_in, w_up, w_down, b_in, b_up, None, gated, activation)
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
    x, w_in, w_up, w_down, b_in, b_up, _b_down, ctx.gated, *ctx.form, _save = inputs
    _y, gate, up = output
    ctx.mark_non_differentiable(gate, up)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w_in, w_up, w_down, b_in, b_up, gate, up)


def _ffn_backward_formula(ctx: Any, d_y: Tensor | None, _gate: Any, _up: Any) -> Any:
    if d_y is None:
        return (None,) * 13
    x, w_in, w_up, w_down, b_in, b_up, gate, up = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:7])
    grads = _ffn_backward(d_y, x, w_in, w_up, w_down, b_in, b_up, gate, up, ctx.gated, *ctx.form, needs)
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 6)


def _ffn_backward_setup(ctx: Any, inputs: Any, output: Any) -> None:
    d_y, x, w_in, w_up, w_down, b_in, b_up, gate, up, ctx.gated, *ctx.form, ctx.needs = inputs
    not_asked_for(ctx, output)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(d_y, x, w_in, w_up, w_down, b_in, b_up, gate, up)


def _ffn_double_backward(ctx: Any, *grads: Tensor | None) -> Any:
    """Differentiates the backward, with gate and up as functions of x, weights and biases."""
    d_y, x, w_in, w_up, w_down, b_in, b_up, gate, up = ctx.saved_tensors
    dd_x, dd_w_in, dd_w_up, dd_w_down, dd_b_in, dd_b_up, dd_b_down = (given(g) for g in grads)
    fused = ctx.gated and w_up is None
    features = w_down.shape[1]
    w_g, w_u = split(w_in, features) if fused else (w_in, w_up)
    if fused:
        dd_w_in, dd_w_up = split(dd_w_in, features)
        dd_b_in, dd_b_up = split(dd_b_in, features)
    if gate.dim() == 1:  # not saved
        b_g, b_u = split(b_in, features) if fused else (b_in, b_up)
        gate = F.linear(x, w_g, b_g)
        up = None if w_u is None else F.linear(x, w_u, b_u)
    elif w_u is None:
        up = None
    act = ctx.form

    d_h = d_y @ w_down
    d_g, d_u = gated_act_backward(d_h, gate, up, *act, [True, True])
    dd_g = linear_cotangent(x, w_g, dd_x, dd_w_in, dd_b_in)
    dd_u = None if w_u is None else linear_cotangent(x, w_u, dd_x, dd_w_up, dd_b_up)
    by_d_h, by_g, by_u = gated_act_double_backward(dd_g, dd_u, d_h, gate, up, *act)
    by_d_y = by_d_h @ w_down.t()
    if dd_w_down is not None:  # d_w_down = d_y^T h
        by_d_y = by_d_y + gated_act_op(gate, up, *act) @ dd_w_down.t()
        more_g, more_u = gated_act_backward(d_y @ dd_w_down, gate, up, *act, [True, True])
        by_g = by_g + more_g
        by_u = by_u if w_u is None else by_u + more_u
    if dd_b_down is not None:
        by_d_y = by_d_y + dd_b_down

    def by_linear(by_z: Tensor, d_z: Tensor, weight: Tensor, dd_w: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        by_x, by_w = by_z @ weight, by_z.t() @ x
        if dd_w is not None:
            by_x = by_x + d_z @ dd_w
        if dd_x is not None:
            by_w = by_w + d_z.t() @ dd_x
        return by_x, by_w, by_z.sum(0)

    by_x, by_w_in, by_b_in = by_linear(by_g, d_g, w_g, dd_w_in)
    by_w_up = by_b_up = None
    if w_u is not None:
        by_x_up, by_w_up, by_b_up = by_linear(by_u, d_u, w_u, dd_w_up)
        by_x = by_x + by_x_up
        if fused:
            by_w_in, by_w_up = torch.cat((by_w_in, by_w_up)), None
            by_b_in, by_b_up = torch.cat((by_b_in, by_b_up)), None
    return (
        by_d_y,
        by_x,
        by_w_in,
        by_w_up,
        d_y.t() @ by_d_h,
        by_b_in if b_in is not None else None,
        by_b_up if b_up is not None else None,
        *(None,) * 8,
    )


def _ffn_backward_tangent(ctx: Any, *tangents: Any) -> Any:
    def again(d: Tensor) -> Any:
        return _ffn_backward(d, *ctx.saved_tensors[1:], ctx.gated, *ctx.form, ctx.needs)

    return backward_tangents(ctx, tangents, again, _ffn_double_backward, (1, 2, 3, 4, 5, 6, None))


def _ffn_tangent(ctx: Any, *tangents: Any) -> Any:
    x, w_in, w_up, w_down, b_in, b_up, _gate, _up = ctx.saved_tensors
    x_t, w_in_t, w_up_t, w_down_t, b_in_t, b_up_t, b_down_t = tangents[:7]
    fused = ctx.gated and w_up is None
    features = w_down.shape[1]
    w_g, w_u = split(w_in, features) if fused else (w_in, w_up)
    b_g, b_u = split(b_in, features) if fused else (b_in, b_up)
    gate = F.linear(x, w_g, b_g)  # the saved one is a constant to other levels
    up = None if w_u is None else F.linear(x, w_u, b_u)
    if fused:
        (w_in_t, w_up_t), (b_in_t, b_up_t) = split(w_in_t, features), split(b_in_t, features)
    gate_t = linear_cotangent(x, w_g, x_t, w_in_t, b_in_t)
    up_t = None if w_u is None else linear_cotangent(x, w_u, x_t, w_up_t, b_up_t)
    h_t = act_tangent(gate, up, ctx.form, gate_t, up_t)
    h = h_t if w_down_t is None else gated_act_op(gate, up, *ctx.form)
    return linear_cotangent(h, w_down, h_t, w_down_t, b_down_t), None, None


_ffn_backward = differentiable("ffn_backward", _ffn_backward_setup, _ffn_double_backward, _ffn_backward_tangent)
_ffn = differentiable("ffn", _ffn_setup, _ffn_backward_formula, _ffn_tangent)


for _name in ("ffn", "ffn_backward"):
    vmap_by_loop(_name)
