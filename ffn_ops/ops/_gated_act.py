# SPDX-License-Identifier: BSD-3-Clause
"""gated_act: public function, fakes, autograd to second order."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import _checks as check
from .._gate import Gate, as_gate, check_gate
from .._library import differentiable, fake, vmap_by_loop
from ._shared import backward_tangents, checked, dense, fold, not_asked_for, plus, third_order, third_setup


def gated_act(gate: Tensor, up: Tensor | None = None, *, activation: str | Gate = "silu") -> Tensor:
    """``act(gate) * up``, or ``act(gate)`` where ``up`` is None, in one pass over memory.

    Args:
        gate: any shape; float64, float32, float16 or bfloat16. DTensors are computed shard by shard.
        up: same shape, dtype and device as ``gate``.
        activation: a name or a :class:`ffn_ops.Gate`, which may limit both and shift ``up``.

    Returns:
        A tensor like ``gate``. Arithmetic is float32 (float64 for float64), rounded once.

    Raises:
        TypeError, ValueError: with the argument, what was expected and what came.

    Source:
        Shazeer, GLU Variants Improve Transformer (2020), equations 5 and 6 without their products.

    Example:
        >>> gate, up = torch.randn(4, 8), torch.randn(4, 8)
        >>> y = ffn_ops.gated_act(gate, up, activation="gelu")
        >>> torch.testing.assert_close(y, nn.functional.gelu(gate) * up)
    """
    if check.is_dtensor(gate):
        return on_shards(functools.partial(gated_act, activation=activation), gate, up)
    check.first("gate", gate)
    kind = as_gate(activation, gated=up is not None)
    form = (kind.activation, kind.params)
    if gate.dim() == 2:
        return checked(lambda: gated_act_op(gate, up, *form), lambda: _check_shapes(gate, up))  # type: ignore[no-any-return]
    _check_shapes(gate, up)  # the operator sees no leading dimensions
    shape = gate.shape
    if gate.dim() < 2:
        gate = gate.reshape(1, -1)
        up = None if up is None else up.reshape(1, -1)
    else:
        gate = fold(gate)
        up = None if up is None else fold(up)
    return gated_act_op(gate, up, *form).reshape(shape)  # type: ignore[no-any-return]


def _check_shapes(gate: Tensor, up: Tensor | None) -> None:
    check.tensor("gate", gate)
    if up is not None:
        check.tensor("up", up, gate.shape, like=gate)


def on_shards(function: Callable[..., Tensor], gate: Any, up: Any) -> Tensor:
    """Applies an element-wise ``function`` to DTensors, with any placements that hold whole elements."""
    from torch.distributed.tensor import DTensor, Replicate

    if up is not None and (not isinstance(up, DTensor) or up.device_mesh != gate.device_mesh):
        found = up.device_mesh if isinstance(up, DTensor) else type(up).__name__
        raise TypeError(f"up: expected a DTensor on {gate.device_mesh} as gate is, got {found}")
    if up is not None and up.shape != gate.shape:
        raise ValueError(f"up: expected shape {list(gate.shape)}, got {list(up.shape)}")
    placements = [Replicate() if p.is_partial() else p for p in gate.placements]
    parts = [t if t is None else t.redistribute(placements=placements).to_local() for t in (gate, up)]
    out = function(*parts)
    return DTensor.from_local(out, gate.device_mesh, placements, shape=gate.shape, stride=_dense_stride(gate))


def _dense_stride(t: Tensor) -> tuple[int, ...]:
    return tuple(math.prod(t.shape[i + 1 :]) for i in range(t.dim()))


def _check_gated_act(
    gate: Tensor, up: Tensor | None, activation: str, params: list[float], **others: Tensor | None
) -> None:
    check.tensor("gate", gate, ("rows", "columns"))
    for name, value in {"up": up, **others}.items():
        if value is not None:
            check.tensor(name, value, gate.shape, like=gate)
    check_gate(activation, params, gated=up is not None)


@fake("gated_act")
def _(gate: Tensor, up: Tensor | None, activation: str, params: list[float]) -> Tensor:
    _check_gated_act(gate, up, activation, params)
    return dense(gate, *gate.shape)


@fake("gated_act_backward")
def _(
    d_out: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    params: list[float],
    needs: list[bool],
) -> Any:
    _check_gated_act(gate, up, activation, params, d_out=d_out)
    return (
        dense(gate, *gate.shape) if needs[0] else dense(gate, 0),
        dense(gate, *gate.shape) if needs[1] and up is not None else dense(gate, 0),
    )


@fake("gated_act_double_backward")
def _(
    dd_gate: Tensor | None,
    dd_up: Tensor | None,
    d_out: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    params: list[float],
) -> Any:
    _check_gated_act(gate, up, activation, params, d_out=d_out, dd_gate=dd_gate, dd_up=dd_up)
    none = dense(gate, 0)
    return dense(gate, *gate.shape), dense(gate, *gate.shape), none if up is None else dense(gate, *gate.shape)


def _gated_act_setup(ctx: Any, inputs: Any, output: Any) -> None:
    gate, up, *ctx.form = inputs
    ctx.save_for_backward(gate, up)


def _gated_act_backward_formula(ctx: Any, d_out: Tensor) -> Any:
    gate, up = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1]]
    d_gate, d_up = gated_act_backward(d_out, gate, up, *ctx.form, needs)
    return d_gate if needs[0] else None, d_up if needs[1] else None, *(None,) * 2


def _gated_act_backward_setup(ctx: Any, inputs: Any, output: Any) -> None:
    d_out, gate, up, *ctx.form, ctx.needs = inputs
    not_asked_for(ctx, output)
    ctx.save_for_backward(d_out, gate, up)
    ctx.set_materialize_grads(False)


def _gated_act_double_backward_formula(ctx: Any, dd_gate: Tensor | None, dd_up: Tensor | None) -> Any:
    d_out, gate, up = ctx.saved_tensors
    if up is None or (dd_up is not None and dd_up.numel() == 0 and gate.numel() != 0):
        dd_up = None
    if dd_gate is not None and dd_gate.numel() == 0 and gate.numel() != 0:
        dd_gate = None
    if dd_gate is None and dd_up is None:
        return (None,) * 6
    by_d, by_gate, by_up = gated_act_double_backward(dd_gate, dd_up, d_out, gate, up, *ctx.form)
    return by_d, by_gate, None if up is None else by_up, *(None,) * 3


def _gated_act_backward_tangent(ctx: Any, *tangents: Any) -> Any:
    def again(d: Tensor) -> Any:
        return gated_act_backward(d, *ctx.saved_tensors[1:], *ctx.form, ctx.needs)

    return backward_tangents(ctx, tangents, again, _gated_act_double_backward_formula, (1, 2))


def act_tangent(gate: Tensor, up: Tensor | None, form: Any, gate_t: Tensor | None, up_t: Tensor | None) -> Any:
    """``act'(gate) * up * gate_t + act(gate) * up_t``, or None if both tangents are None."""
    by_gate = by_up = None
    if gate_t is not None:
        by_gate = gated_act_backward(gate_t, gate, up, *form, [True, False])[0]
    if up_t is not None:
        by_up = gated_act_backward(up_t, gate, up, *form, [False, True])[1]
    return plus(by_gate, by_up)


def _gated_act_tangent(ctx: Any, gate_t: Tensor | None, up_t: Tensor | None, *_: Any) -> Any:
    gate, up = ctx.saved_tensors
    return act_tangent(gate, up, ctx.form, gate_t, up_t)


gated_act_double_backward = differentiable("gated_act_double_backward", third_setup, third_order, third_order)
gated_act_backward = differentiable(
    "gated_act_backward",
    _gated_act_backward_setup,
    _gated_act_double_backward_formula,
    _gated_act_backward_tangent,
)
gated_act_op = differentiable("gated_act", _gated_act_setup, _gated_act_backward_formula, _gated_act_tangent)

for _name in ("gated_act", "gated_act_backward", "gated_act_double_backward"):
    vmap_by_loop(_name)
