# SPDX-License-Identifier: BSD-3-Clause
"""moe: public functions, fakes, autograd to second order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import _checks as check
from .._gate import Gate, as_gate, check_gate
from .._library import fake
from .._quantized import QuantizedWeight
from ._moe_derivatives import PLACES, differentiable_experts, moe_along
from ._moe_lora import adapters as check_adapters
from ._moe_lora import run as with_lora
from ._moe_quantized import quantized_moe
from ._rows import check_routing, check_weights, routing_weight
from ._shared import (
    arithmetic,
    as_stored,
    autocast,
    checked,
    dense,
    fold,
    needs_grad,
)

if TYPE_CHECKING:
    from .._lora import Lora
    from ..routing import Routing


def moe(
    x: Tensor,
    routing: Routing,
    w_in: Tensor | QuantizedWeight,
    w_down: Tensor | QuantizedWeight,
    *,
    gated: bool = False,
    b_in: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str | Gate = "gelu",
    recompute: bool = False,
    lora: Lora | None = None,
) -> Tensor:
    """``y[t] = sum over the rows r of token t of weight[r] * expert(x[t])``: a mixture of experts in one operator.

    The expert of a row is ``act(x w_in^T + b_in) w_down^T + b_down``, or gated ``(act(gate) * up) w_down^T + b_down``.
    Rows are gathered while they are packed and combined per token; nothing of shape ``[R, D]`` outlives the call.

    Args:
        x: ``[..., D]`` with T tokens; float64, float32, float16 or bfloat16.
        routing: which expert computes which token, see :mod:`ffn_ops.routing`. Its weights get a gradient. They are
            float32 (float64 for float64), even under autocast; 16-bit weights, as casts of arguments leave them, are
            widened.
        w_in: ``[E, F, D]``; gated ``[E, 2F, D]``, gate rows first, or alternating with those of up where the gate is
            ``interleaved``, as are those of ``b_in`` then.
        w_down: ``[E, D_out, F]``. Either both weights or none are a :class:`ffn_ops.QuantizedWeight`. Weights may have
            any strides. The gradient of a transposed dense tensor is stored in
            that tensor's order.
        gated: whether ``w_in`` holds gate and up weights.
        b_in, b_down: ``[E, F]`` (gated ``[E, 2F]``) and ``[E, D_out]``, or None.
        activation: a name or a :class:`ffn_ops.Gate`.
        recompute: save only x and the routing for backward. Same bits, less memory.
        lora: low-rank additions to ``w_in`` and ``w_down``, see :class:`ffn_ops.Lora`. Nothing more is saved for
            backward. On the CPU it is one operator; on a GPU one after the other of :func:`moe_dispatch`, products
            and :func:`moe_combine` writes its rows.

    Returns:
        ``[..., D_out]``, zeros for a token whose rows are all dropped. Saved for backward: x, the pre-activations
        (``[R, F]``, two if gated) and the routing.

    Raises:
        TypeError, ValueError: with the argument, what was expected and what came.

    Source:
        Shazeer et al., Outrageously Large Neural Networks (2017), equation 1; the gradient of the weight as <dA', A>:
        SonicMoE (2025).

    Example:
        >>> x, w_in, w_down = torch.randn(5, 8), torch.randn(4, 16, 8), torch.randn(4, 8, 16)  # E 4, F 16
        >>> routing = ffn_ops.routing.top_k(torch.randn(5, 4), k=2)
        >>> ffn_ops.moe(x, routing, w_in, w_down).shape
        torch.Size([5, 8])
    """
    if isinstance(w_in, QuantizedWeight) or isinstance(w_down, QuantizedWeight):
        check.is_routing(routing)
        return quantized_moe(x, routing, None, w_in, w_down, gated, b_in, b_down, activation, recompute, lora)
    check.first("x", x)
    x, w_in, w_down, b_in, b_down = autocast(x, w_in, w_down, b_in, b_down)  # type: ignore[assignment]
    check.is_routing(routing)
    form = expert_form(activation, gated, recompute)

    def operator() -> Tensor:
        token, _, offsets, row, slot_offsets = routing[:5]
        weight = routing_weight(x, routing)
        if lora is not None:
            routed = (token, weight, offsets, row, slot_offsets)
            return with_lora(fold(x), routed, (w_in, w_down, b_in, b_down), lora, form, recompute)
        grad = needs_grad(x, weight, w_in, w_down, b_in, b_down)
        experts = (w_in, w_down, b_in, b_down, *form, grad and not recompute)
        return moe_op(fold(x), token, weight, offsets, row, slot_offsets, *experts, grad=grad)[0]  # type: ignore[no-any-return]

    def check_arguments() -> None:
        check_routing(x, routing)
        check_weights(x, routing.offsets.shape[0] - 1, w_in, w_down, b_in, b_down, gated)
        if lora is not None:
            check_adapters(lora, x, w_in.shape[0], w_in.shape[1], w_down.shape[2], w_down.shape[1])

    y = checked(operator, check_arguments)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], w_down.shape[1])  # type: ignore[no-any-return]


def moe_experts(
    rows: Tensor,
    offsets: Tensor,
    w_in: Tensor | QuantizedWeight,
    w_down: Tensor | QuantizedWeight,
    *,
    gated: bool = False,
    b_in: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str | Gate = "gelu",
    recompute: bool = False,
    lora: Lora | None = None,
) -> Tensor:
    """The experts of :func:`moe` on sorted rows: expert e computes rows ``offsets[e]`` to ``offsets[e + 1]``.

    Args:
        rows: ``[R, D]``, from :func:`moe_dispatch` or from a collective.
        offsets: ``[E + 1]`` int64, starting at 0, non-decreasing. Rows from ``offsets[E]`` on are not read.
        w_in, w_down, gated, b_in, b_down, activation, recompute, lora: see :func:`moe`.

    Returns:
        ``[R, D_out]``, zeros from ``offsets[E]`` on.

    Raises:
        TypeError, ValueError: with the argument, what was expected and what came.

    Source:
        See :func:`moe`.

    Example:
        >>> x, w_in, w_down = torch.randn(5, 8), torch.randn(4, 16, 8), torch.randn(4, 8, 16)
        >>> routing = ffn_ops.routing.top_k(torch.randn(5, 4), k=2)
        >>> rows = ffn_ops.moe_experts(ffn_ops.moe_dispatch(x, routing), routing.offsets, w_in, w_down)
        >>> torch.testing.assert_close(ffn_ops.moe_combine(rows, routing), ffn_ops.moe(x, routing, w_in, w_down))
    """
    if isinstance(w_in, QuantizedWeight) or isinstance(w_down, QuantizedWeight):
        return quantized_moe(rows, None, offsets, w_in, w_down, gated, b_in, b_down, activation, recompute, lora)
    check.first("rows", rows)
    rows, w_in, w_down, b_in, b_down = autocast(rows, w_in, w_down, b_in, b_down)  # type: ignore[assignment]
    form = expert_form(activation, gated, recompute)

    def operator() -> Tensor:
        if lora is not None:
            routed = (None, None, offsets, None, None)
            return with_lora(rows, routed, (w_in, w_down, b_in, b_down), lora, form, recompute)
        grad = needs_grad(rows, w_in, w_down, b_in, b_down)
        experts = (w_in, w_down, b_in, b_down, *form, grad and not recompute)
        return moe_op(rows, None, None, offsets, None, None, *experts, grad=grad)[0]  # type: ignore[no-any-return]

    def check_arguments() -> None:
        check.tensor("rows", rows, ("R", "D"))
        check.indices("offsets", offsets)
        check.device("offsets", offsets, rows, "rows")
        check_weights(rows, offsets.shape[0] - 1, w_in, w_down, b_in, b_down, gated)
        if lora is not None:
            check_adapters(lora, rows, w_in.shape[0], w_in.shape[1], w_down.shape[2], w_down.shape[1])

    return checked(operator, check_arguments)  # type: ignore[no-any-return]


def expert_form(activation: str | Gate, gated: bool, recompute: bool) -> tuple[bool, bool, str, tuple[float, ...]]:
    """Checks the options and returns those that say what an expert computes, as the operator takes them."""
    check.flag("gated", gated)
    check.flag("recompute", recompute)
    gate = as_gate(activation, gated=gated, one_weight=gated)
    return gated, gate.interleaved, gate.activation, gate.params


def _num_rows(x: Tensor, token: Tensor | None) -> Any:
    return x.shape[0] if token is None else token.shape[0]


@fake("moe")
def _(
    x: Tensor,
    token: Tensor | None,
    weight: Tensor | None,
    offsets: Tensor,
    row: Tensor | None,
    slot_offsets: Tensor | None,
    w_in: Tensor,
    w_down: Tensor,
    b_in: Tensor | None,
    b_down: Tensor | None,
    gated: bool,
    interleaved: bool,
    activation: str,
    params: list[float],
    save: bool,
) -> Any:
    check.tensor("x", x, ("T", "D"))
    check_gate(activation, params, gated=gated, interleaved=interleaved, one_weight=gated)
    features, out = check_weights(x, offsets.shape[0] - 1, w_in, w_down, b_in, b_down, gated)
    rows = _num_rows(x, token)
    gate = dense(x, rows, features) if save else dense(x, 0)
    up = dense(x, rows, features) if save and gated else dense(x, 0)
    return dense(x, x.shape[0], out), gate, up


@fake("moe_backward")
def _(
    d_y: Tensor,
    x: Tensor,
    token: Tensor | None,
    weight: Tensor | None,
    offsets: Tensor,
    row: Tensor | None,
    slot_offsets: Tensor | None,
    w_in: Tensor,
    w_down: Tensor,
    b_in: Tensor | None,
    b_down: Tensor | None,
    gate: Tensor,
    up: Tensor,
    gated: bool,
    interleaved: bool,
    activation: str,
    params: list[float],
    needs: list[bool],
) -> Any:
    check.tensor("x", x, ("T", "D"))
    check_gate(activation, params, gated=gated, interleaved=interleaved, one_weight=gated)
    _features, out = check_weights(x, offsets.shape[0] - 1, w_in, w_down, b_in, b_down, gated)
    check.tensor("d_y", d_y, (x.shape[0], out), like=x)
    experts = w_in.shape[0]
    shapes = (x.shape, None, None, None, w_in.shape[:2], (experts, out))
    grads = [dense(x, *s) if need and s is not None else dense(x, 0) for s, need in zip(shapes, needs, strict=True)]
    for place, w in ((2, w_in), (3, w_down)):
        if needs[place]:
            grads[place] = as_stored(w)
    if needs[1] and token is not None:
        grads[1] = x.new_empty((token.shape[0],), dtype=arithmetic(x))
    return tuple(grads)


moe_op, moe_backward_op = differentiable_experts("moe", PLACES, moe_along)
