# SPDX-License-Identifier: BSD-3-Clause
"""route_linear: a router's logits. Public function, fakes, autograd to second order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._library import differentiable, fake, vmap_by_loop
from ._shared import (
    arithmetic,
    backward_tangents,
    checked,
    fold,
    given,
    linear_cotangent,
    needs_grad,
    not_asked_for,
    plus,
)


def route_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``, the logits of a router, in float32 from tensors of any dtype (float64 for float64).

    A token's logits have the same bits alone and in every batch, so its experts do not depend on other tokens.
    Autocast changes nothing.

    Args:
        x: ``[..., D]``; float64, float32, float16 or bfloat16. On a CPU no float32 copy is made.
        weight: ``[E, D]``, of x's dtype or float32 (float64 where x is float64).
        bias: ``[E]``, of weight's dtype, or None.

    Returns:
        ``[..., E]``, not rounded to x's dtype. Gradients come in the dtypes of x, weight and bias.

    Raises:
        TypeError, ValueError: with the argument, what was expected and what came.

    Source:
        Shazeer et al., Outrageously Large Neural Networks (2017), section 2.1; in float32: Fedus, Zoph, Shazeer,
        Switch Transformers (2021), section 2.4.

    Example:
        >>> x = torch.randn(5, 8, dtype=torch.bfloat16)
        >>> ffn_ops.route_linear(x, torch.ones(4, 8, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    check.first("x", x)
    z = checked(
        lambda: _route_linear(fold(x), weight, bias, grad=needs_grad(x, weight, bias)),
        lambda: _check_route_linear(x, weight, bias),
    )
    return z if x.dim() == 2 else z.reshape(*x.shape[:-1], z.shape[-1])  # type: ignore[no-any-return]


def _check_route_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check.leading("x", x)
    check.tensor("weight", weight)
    if weight.dtype not in (x.dtype, arithmetic(x)):
        wanted = " or ".join(dict.fromkeys(check.dtype_name(dtype) for dtype in (x.dtype, arithmetic(x))))
        raise TypeError(f"weight: expected dtype {wanted}, got {check.dtype_name(weight.dtype)}")
    check.tensor("weight", weight, ("E", x.shape[-1]))
    check.device("weight", weight, x)
    if bias is not None:
        check.tensor("bias", bias, (weight.shape[0],))
        if bias.dtype is not weight.dtype:
            wanted, got = check.dtype_name(weight.dtype), check.dtype_name(bias.dtype)
            raise TypeError(f"bias: expected dtype {wanted} as weight has, got {got}")
        check.device("bias", bias, x)


@fake("route_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check.tensor("x", x, ("T", "D"))
    _check_route_linear(x, weight, bias)
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=arithmetic(x))


@fake("route_linear_backward")
def _(d_logits: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> Any:
    check.tensor("x", x, ("T", "D"))
    _check_route_linear(x, weight, None)
    check.tensor("d_logits", d_logits, (x.shape[0], weight.shape[0]))
    check.device("d_logits", d_logits, x)
    likes = ((x, x.shape), (weight, weight.shape), (weight, weight.shape[:1]))
    return tuple(like.new_empty(shape if need else (0,)) for (like, shape), need in zip(likes, needs, strict=True))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias = inputs
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight)


def _backward_formula(ctx: Any, d_logits: Tensor | None) -> Any:
    if d_logits is None:
        return None, None, None
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    grads = _route_linear_backward(d_logits, *ctx.saved_tensors, needs)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _tangent(ctx: Any, x_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None) -> Any:
    x, weight = ctx.saved_tensors
    by_x = None if x_t is None else _route_linear(x_t, weight, None)
    by_weight = None if weight_t is None else _route_linear(x, weight_t, None)
    by_bias = None if bias_t is None else bias_t.to(arithmetic(x)).expand(x.shape[0], -1)
    return plus(plus(by_x, by_weight), by_bias)


def _backward_setup(ctx: Any, inputs: Any, output: Any) -> None:
    d_logits, x, weight, ctx.needs = inputs
    not_asked_for(ctx, output)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(d_logits, x, weight)


def _double_backward(ctx: Any, *grads: Tensor | None) -> Any:
    """The three gradients are linear in d_logits, and in weight or x."""
    d, x, weight = ctx.saved_tensors
    wide = d.dtype
    dd_x, dd_w, dd_b = (None if given(grad) is None else grad.to(wide) for grad in grads)  # type: ignore[union-attr]
    by_d = linear_cotangent(x.to(wide), weight.to(wide), dd_x, dd_w, dd_b)
    by_x = torch.zeros_like(x) if dd_w is None else (d @ dd_w).to(x.dtype)
    by_w = torch.zeros_like(weight) if dd_x is None else (d.t() @ dd_x).to(weight.dtype)
    return by_d, by_x, by_w, None


def _backward_tangent(ctx: Any, *tangents: Any) -> Any:
    _d, x, weight = ctx.saved_tensors
    return backward_tangents(
        ctx, tangents, lambda d: _route_linear_backward(d, x, weight, ctx.needs), _double_backward, (1, 2, None)
    )


_route_linear_backward = differentiable("route_linear_backward", _backward_setup, _double_backward, _backward_tangent)
_route_linear = differentiable("route_linear", _setup, _backward_formula, _tangent)

for _name in ("route_linear", "route_linear_backward"):
    vmap_by_loop(_name)
