# SPDX-License-Identifier: BSD-3-Clause
"""learned_act: an activation whose own parameters learn. Public function, fakes, autograd to second order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._gate import LEARNED, own_names
from .._library import differentiable, fake, vmap_by_loop
from ._shared import arithmetic, backward_tangents, dense, fold, given, not_asked_for, plus, third_order, third_setup


def learned_act(x: Tensor, own: Tensor, *, activation: str) -> Tensor:
    """``act(x)`` in one pass over memory, the activation's own parameters a tensor, which gets its gradient.

    - ``"xielu"`` has alpha_p, alpha_n, beta and eps: ``alpha_p * x**2 + beta * x`` above 0, else
      ``alpha_n * (expm1(min(x, eps)) - x) + beta * x``, whose slope at eps is that of larger x.
    - ``"star_relu"`` has scale and bias: ``scale * relu(x)**2 + bias``.
    - ``"leaky_relu"`` has slope: ``x`` above 0, else ``slope * x``.

    Backward needs x alone, and adds the gradients of the parameters in one order. No call waits for a GPU.

    Args:
        x: any shape; float64, float32, float16 or bfloat16.
        own: ``[P]``, the parameters in the order above, of x's dtype or float32 (float64 where x is float64). The
            gradient of eps is 0.
        activation: one of the three names.

    Returns:
        A tensor like ``x``. Arithmetic is float32 (float64 for float64), rounded once.

    Raises:
        TypeError, ValueError: with the argument, what was expected and what came.

    Source:
        Huang and Schlag, Deriving Activation Functions Using Integration (2024), as in Apertus, whose layers keep
        parameters of which softplus makes alpha_p and alpha_n - beta; Yu et al., MetaFormer Baselines for Vision
        (2022); He et al., Delving Deep into Rectifiers (2015), equation 1.

    Example:
        >>> x, slope = torch.tensor([-2.0, 3.0]), torch.tensor([0.25], requires_grad=True)
        >>> ffn_ops.learned_act(x, slope, activation="leaky_relu").sum().backward()
        >>> slope.grad
        tensor([-2.])
    """
    check.tensor("x", x)
    check.choice("activation", activation, tuple(LEARNED))
    check.tensor("own", own, (len(own_names(activation)),))
    if own.dtype not in (x.dtype, arithmetic(x)):
        wanted = " or ".join(sorted({str(dtype).removeprefix("torch.") for dtype in (x.dtype, arithmetic(x))}))
        raise TypeError(f"own: expected dtype {wanted}, got {str(own.dtype).removeprefix('torch.')}")
    check.device("own", own, x)
    own = own.to(arithmetic(x))
    if x.dim() == 2:
        return _learned_act(x, own, activation)  # type: ignore[no-any-return]
    rows = x.reshape(1, -1) if x.dim() < 2 else fold(x)
    return _learned_act(rows, own, activation).reshape(x.shape)  # type: ignore[no-any-return]


def _check_learned_act(x: Tensor, own: Tensor, activation: str, **others: Tensor) -> None:
    check.tensor("x", x, ("rows", "columns"))
    check.choice("activation", activation, tuple(LEARNED))
    check.tensor("own", own)
    if own.dtype is not arithmetic(x):
        wanted, got = (str(dtype).removeprefix("torch.") for dtype in (arithmetic(x), own.dtype))
        raise TypeError(f"own: expected dtype {wanted}, got {got}")
    check.device("own", own, x)
    check.tensor("own", own, (len(own_names(activation)),))
    for name, value in others.items():
        check.tensor(name, value, x.shape, like=x)


@fake("learned_act")
def _(x: Tensor, own: Tensor, activation: str) -> Tensor:
    _check_learned_act(x, own, activation)
    return dense(x, *x.shape)


@fake("learned_act_backward")
def _(d_out: Tensor, x: Tensor, own: Tensor, activation: str, needs: list[bool]) -> Any:
    _check_learned_act(x, own, activation, d_out=d_out)
    return dense(x, *x.shape) if needs[0] else dense(x, 0), dense(own, *own.shape) if needs[1] else dense(own, 0)


@fake("learned_act_double_backward")
def _(dd_x: Tensor, d_out: Tensor, x: Tensor, own: Tensor, activation: str) -> Any:
    _check_learned_act(x, own, activation, d_out=d_out, dd_x=dd_x)
    return dense(x, *x.shape), dense(x, *x.shape), dense(own, *own.shape)


def _ends(own: Tensor, direction: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Value and slope are linear in what may be learned: between these parameters their difference is their derivative
    in a direction."""
    count = LEARNED[activation]
    rest = own[count:]
    return torch.cat([direction[:count], rest]), torch.cat([torch.zeros_like(own[:count]), rest])


def _by_own(x: Tensor, own: Tensor, direction: Tensor | None, activation: str) -> Tensor | None:
    if direction is None:
        return None
    end, origin = _ends(own, direction, activation)
    return _learned_act(x, end, activation) - _learned_act(x, origin, activation)  # type: ignore[no-any-return]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, own, ctx.activation = inputs
    ctx.save_for_backward(x, own)


def _backward_formula(ctx: Any, d_out: Tensor) -> Any:
    needs = [bool(need) for need in ctx.needs_input_grad[:2]]
    d_x, d_own = _learned_act_backward(d_out, *ctx.saved_tensors, ctx.activation, needs)
    return d_x if needs[0] else None, d_own if needs[1] else None, None


def _tangent(ctx: Any, x_t: Tensor | None, own_t: Tensor | None, *_: Any) -> Any:
    x, own = ctx.saved_tensors
    by_x = None
    if x_t is not None:
        by_x = _learned_act_backward(x_t, x, own, ctx.activation, [True, False])[0]
    return plus(by_x, _by_own(x, own, own_t, ctx.activation))


def _backward_setup(ctx: Any, inputs: Any, output: Any) -> None:
    d_out, x, own, ctx.activation, ctx.needs = inputs
    not_asked_for(ctx, output)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(d_out, x, own)


def _double_backward(ctx: Any, dd_x: Tensor | None, dd_own: Tensor | None) -> Any:
    d, x, own = ctx.saved_tensors
    by_d = by_x = by_own = None
    if ctx.needs[0] and dd_x is not None:
        by_d, by_x, by_own = _learned_act_double_backward(dd_x, d, x, own, ctx.activation)
    dd_own = given(dd_own)
    if dd_own is not None:
        by_d = plus(by_d, _by_own(x, own, dd_own, ctx.activation))
        end, origin = (
            _learned_act_backward(d, x, at, ctx.activation, [True, False])[0]
            for at in _ends(own, dd_own, ctx.activation)
        )
        by_x = plus(by_x, end - origin)
    return by_d, by_x, by_own, None, None


def _backward_tangent(ctx: Any, *tangents: Any) -> Any:
    def again(d: Tensor) -> Any:
        return _learned_act_backward(d, *ctx.saved_tensors[1:], ctx.activation, ctx.needs)

    return backward_tangents(ctx, tangents, again, _double_backward, (1, 2))


_learned_act_double_backward = differentiable("learned_act_double_backward", third_setup, third_order, third_order)
_learned_act_backward = differentiable("learned_act_backward", _backward_setup, _double_backward, _backward_tangent)
_learned_act = differentiable("learned_act", _setup, _backward_formula, _tangent)

for _name in ("learned_act", "learned_act_backward", "learned_act_double_backward"):
    vmap_by_loop(_name)
