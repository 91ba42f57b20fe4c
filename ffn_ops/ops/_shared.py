# SPDX-License-Identifier: BSD-3-Clause
"""What the operators' files share: folding of leading dimensions, autocast, pieces of derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.eager_transforms import enable_inplace_requires_grad

from .._library import GRADS_BATCHED, ContextWith


def checked(operator: Callable[[], Any], check_arguments: Callable[[], object]) -> Any:
    """Calls ``operator()``, which checks its arguments before any work. If it refuses, ``check_arguments()`` raises the
    TypeError or ValueError: it says the same, and also what an operator cannot see, such as that an argument is no
    tensor.

    A right call is checked once, in C++. torch.compile shows its users only errors from outside of operators, so there
    the order is the other one.
    """
    if torch.compiler.is_compiling():
        check_arguments()
        return operator()
    refused: Exception
    try:
        return operator()
    except Exception as error:
        refused = error
    try:  # outside of the handler, so that the one error does not hold the other
        check_arguments()
        raise refused
    finally:  # breaks the cycle of error, traceback and frame, which would keep the tensors alive
        del refused


def fold(x: Tensor) -> Tensor:
    if x.dim() == 2:
        return x
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)  # reshape(-1, ...) fails on a last dimension of 0


def autocast(x: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Casts what torch's own matrix product casts under autocast. The checks look at everything else."""
    if not torch._C._is_any_autocast_enabled():
        return (x, *tensors)
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype is torch.float64:
        return (x, *tensors)
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in _CAST_FROM else t for t in (x, *tensors))


_CAST_FROM = (torch.float32, torch.float16, torch.bfloat16)


def halves(rows: Tensor | None, interleaved: bool) -> tuple[Any, Any]:
    """Those of gate and of up."""
    if rows is None:
        return None, None
    return (rows[::2], rows[1::2]) if interleaved else (rows[: len(rows) // 2], rows[len(rows) // 2 :])


def both_biases(x: Tensor, b_in: Tensor | None, b_up: Tensor | None, rows: Any) -> Tensor | None:
    """Those of gate and of up as one, zeros for a missing one; None if both are missing."""
    if b_in is None and b_up is None:
        return None
    return torch.cat([x.new_zeros(rows) if b is None else b for b in (b_in, b_up)])


def arithmetic(t: Tensor) -> torch.dtype:
    """The dtype of a tensor's arithmetic and of its routing weights."""
    return torch.float64 if t.dtype is torch.float64 else torch.float32


def needs_grad(*tensors: Tensor | None) -> bool:
    """True also if another level of torch.func may need it, and while torch.jit.trace checks its graph without
    gradients, which must give the same graph."""
    if torch.is_grad_enabled() or torch._C._get_tracing_state() is not None:
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
        return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    return False


def dense(like: Tensor, *shape: Any) -> Tensor:
    return like.new_empty(shape)


def as_stored(w: Tensor) -> Tensor:
    """Allocates a dense tensor, in the order of the weight if that is transposed."""
    if w.stride(1) == 1 and w.stride(2) != 1:
        return dense(w, w.shape[0], w.shape[2], w.shape[1]).transpose(1, 2)
    return dense(w, *w.shape)


def prefers_torch(x: Tensor) -> bool:
    """True for 16-bit layers on a CPU with AMX: torch's own products are much faster there; our gate runs between
    them."""
    return x.element_size() == 2 and x.device.type == "cpu" and _HAS_AMX


_HAS_AMX: bool = torch.ops.ffn_ops._has_amx()


def given(grad: Tensor | None) -> Tensor | None:
    """The cotangent of a gradient that was not asked for is empty, which means None."""
    return None if grad is None or grad.numel() == 0 else grad


def linear_cotangent(
    x: Tensor, weight: Tensor, dd_x: Tensor | None, dd_w: Tensor | None, dd_b: Tensor | None
) -> Tensor:
    """Of d_z, where d_x = d_z w, d_w = d_z^T x and d_b = sum over tokens of d_z; the same is the tangent of
    z = x w^T + b, from those of x, w and b."""
    total = x.new_zeros(x.shape[0], weight.shape[0])
    if dd_x is not None:
        total = total + dd_x @ weight.t()
    if dd_w is not None:
        total = total + x @ dd_w.t()
    return total if dd_b is None else total + dd_b


def double_backward(
    ctx: Any,
    along: Callable[[Sequence[Any]], Tensor],
    d: Tensor,
    inputs: Sequence[Tensor | None],
    directions: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Differentiates the gradients of <d, f(inputs)>, f an operator: gives the derivatives by d and by each input.

    The cotangents of those gradients, ``directions``, are a direction in the space of the inputs, and ``along(inputs)``
    is the tangent of f in it. The derivative by d is that tangent. Those by the inputs are the gradient of
    <d, tangent>, as Hessians are symmetric: autograd finds it, through the functions of which ``along`` consists.
    """
    places = [i for i, (t, need) in enumerate(zip(inputs, needs, strict=True)) if need and t is not None]
    if all(t is None for t in directions):
        return None, [None] * len(inputs)
    if not places:
        return along(inputs), [None] * len(inputs)

    def of_needed(*needed: Tensor) -> Tensor:
        values = dict(zip(places, needed, strict=True))
        return along([values.get(i, t) for i, t in enumerate(inputs)])

    needed: list[Any] = [inputs[place] for place in places]
    grads: Sequence[Any] = [None] * len(needed)
    batched = torch._C._dispatch_tls_is_dispatch_key_included(GRADS_BATCHED)
    if not getattr(ctx, "in_forward_mode", False) and (batched or torch._C._are_functorch_transforms_active()):
        # In reach of vmap, which torch.autograd.grad refuses; and saved tensors may be those of a level that has ended.
        tangent, pull = torch.func.vjp(of_needed, *needed)  # type: ignore[misc]
        grads = pull(d, retain_graph=False)
    else:  # torch.func.vjp fails within forward mode and under hooks on saved tensors, and takes small layers longer
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad(), enable_inplace_requires_grad(True):
            needed = [t.view_as(t) for t in needed]  # one input may be a function of another
            needed = [t if t.requires_grad else t.requires_grad_() for t in needed]
            tangent = of_needed(*needed)
            if tangent.requires_grad:
                grads = torch.autograd.grad(tangent, needed, d, create_graph=create_graph, allow_unused=True)
        tangent = tangent if create_graph else tangent.detach()
    found = dict(zip(places, grads, strict=True))
    return tangent, [found.get(i) for i in range(len(inputs))]


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def backward_tangents(
    ctx: Any,
    tangents: Sequence[Any],
    again: Callable[[Tensor], Sequence[Tensor]],
    second: Callable[..., Any],
    places: Sequence[int | None],
) -> tuple[Tensor | None, ...]:
    """Forward mode of a backward operator, whose first input is the gradient d and whose gradients are those of the
    inputs at ``places``.

    They are the gradient of <d, f>: linear in d, so that ``again`` computes them of d's tangent; and the Hessian of
    <d, f> is symmetric, so that its product with the tangents is what ``second``, the backward's backward, gives them.
    """
    given = [None if place is None else tangents[place] for place in places]
    of_d: Sequence[Tensor | None] = [None] * len(places) if tangents[0] is None else again(tangents[0])
    by: Sequence[Any] = ()
    if any(t is not None for t in given):
        by = second(ContextWith(ctx, needs_input_grad=[True] * len(tangents), in_forward_mode=True), *given)
    result: list[Tensor | None] = []
    zeros: Sequence[Tensor] = ()
    for i, (place, need) in enumerate(zip(places, ctx.needs, strict=True)):
        t = plus(of_d[i], by[place] if by and place is not None else None) if need else None
        if need and t is None:  # torch expects zeros there
            zeros = zeros or again(torch.zeros_like(ctx.saved_tensors[0]))
            t = zeros[i]
        result.append(t)
    return tuple(result)


def not_asked_for(ctx: Any, output: Sequence[Tensor]) -> None:
    """Empty gradients of a backward operator have no derivative."""
    ctx.mark_non_differentiable(*(t for t, need in zip(output, ctx.needs, strict=True) if not need))


def third_setup(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def third_order(ctx: Any, *grads: Any) -> Any:
    """Without it torch would only warn, and drop the third derivative."""
    raise NotImplementedError("ffn_ops: third derivatives are not implemented; first and second derivatives are")
