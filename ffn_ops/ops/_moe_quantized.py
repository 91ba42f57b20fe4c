# SPDX-License-Identifier: BSD-3-Clause
"""moe_quantized: ffn, moe and gated_linear on quantised weights, which are constants, with adapters or without; fakes.

A dense layer is a mixture of one expert, which takes every row. Derivatives are in _moe_quantized_derivatives.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks as check
from .._gate import Gate, as_gate, check_gate
from .._library import fake
from .._quantized import QuantizedWeight
from .._quantized.formats import check_groups, columns, has_up
from ._gated_act import gated_act_op
from ._moe_derivatives import all_rows
from ._moe_lora import adapters, check_pairs, factor_as_stored
from ._moe_quantized_derivatives import linear_op, moe_op
from ._rows import check_routing
from ._shared import autocast, both_biases, dense, fold, needs_grad, plus

if TYPE_CHECKING:
    from .._lora import Lora
    from ..routing import Routing


def quantized_moe(
    x: Tensor,
    routing: Routing | None,
    offsets: Tensor | None,
    w_in: Any,
    w_down: Any,
    gated: bool,
    b_in: Tensor | None,
    b_down: Tensor | None,
    activation: str | Gate,
    recompute: bool,
    lora: Lora | None,
) -> Tensor:
    """:func:`ffn_ops.moe` and, without a routing, :func:`ffn_ops.moe_experts`."""
    name = "x" if routing is not None else "rows"
    check.tensor(name, x, None if routing is not None else ("R", "D"))
    x, b_in, b_down = autocast(x, b_in, b_down)  # type: ignore[assignment]
    if routing is not None:
        check_routing(x, routing)
        token, weight, offsets, row, slot_offsets = routing[:5]
        weight = weight.to(torch.float32)
        routed: Any = (token, weight, offsets, row, slot_offsets)
    else:
        check.indices("offsets", offsets)
        check.device("offsets", offsets, x, "rows")  # type: ignore[arg-type]
        routed = (None, None, offsets, None, None)
    check.flag("gated", gated)
    gate = as_gate(activation, gated=gated, one_weight=gated)
    return _call(name, x, routed, w_in, None, w_down, b_in, b_down, gated, gate, recompute, lora, experts=True)


def quantized_ffn(
    x: Tensor,
    w_in: Any,
    w_up: Any,
    w_down: Any,
    gated: bool,
    b_in: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    gate: Gate,
    recompute: bool,
    lora: Lora | None,
) -> Tensor:
    """:func:`ffn_ops.ffn`."""
    for each, b in (("b_in", b_in), ("b_up", b_up), ("b_down", b_down)):
        if b is not None:
            check.tensor(each, b)
    x, b_in, b_up, b_down = autocast(x, b_in, b_up, b_down)  # type: ignore[assignment]
    if b_up is not None and w_up is None:
        raise ValueError("b_up: expected None where w_up is None (b_in holds both halves), got a tensor")
    if w_up is not None and (b_in is not None or b_up is not None):
        rows = w_in.shape[0]
        for each, b in (("b_in", b_in), ("b_up", b_up)):
            if b is not None:
                check.tensor(each, b, (rows,), like=x)
        b_in = both_biases(x, b_in, b_up, rows)
    b_in, b_down = (None if b is None else b.unsqueeze(0) for b in (b_in, b_down))
    routed = (None, None, None, None, None)
    return _call("x", x, routed, w_in, w_up, w_down, b_in, b_down, gated, gate, recompute, lora, experts=False)


def quantized_gated_linear(x: Tensor, w_gate: Any, w_up: Any, b_gate: Any, b_up: Any, gate: Gate) -> Tensor:
    """:func:`ffn_ops.gated_linear`: the products, and then the gate; branches are added in their order."""
    _check_branches(x, w_gate, w_up, b_gate, b_up)
    rows = fold(x).float()  # what the dense operator has on its accumulators: rounded once, at the end
    offsets = all_rows(rows)

    def product(w: Any, biases: Any, i: int) -> Tensor:
        z = linear_op(rows, *w.stacked(), offsets, False)
        return z + biases[i].float() if biases else z  # type: ignore[no-any-return]

    total: Tensor | None = None
    for i, (gate_weight, up_weight) in enumerate(zip(w_gate, w_up, strict=True)):
        z = product(gate_weight, b_gate, i), product(up_weight, b_up, i)
        total = plus(total, gated_act_op(*z, gate.activation, list(gate.params)))
    return total.to(x.dtype).reshape(*x.shape[:-1], total.shape[-1])  # type: ignore[union-attr]


def _check_branches(x: Tensor, w_gate: Any, w_up: Any, b_gate: Any, b_up: Any) -> None:
    if len(w_up) != len(w_gate):
        raise ValueError(f"w_up: expected as many weights as w_gate has ({len(w_gate)}), got {len(w_up)}")
    for name, biases in (("b_gate", b_gate), ("b_up", b_up)):
        if biases and len(biases) != len(w_gate):
            raise ValueError(f"{name}: expected none or one for each weight ({len(w_gate)}), got {len(biases)}")
    for name, weights, biases in (("gate", w_gate, b_gate), ("up", w_up, b_up)):
        for w in weights:
            _check_weights("x", x, {f"w_{name}": w}, experts=False)
            expected = [w_gate[0].shape[0], x.shape[-1]]
            if list(w.shape) != expected:
                raise ValueError(f"w_{name}: expected shape {expected}, got {list(w.shape)}")
        for b in biases:
            check.tensor(f"b_{name}", b, (w_gate[0].shape[0],), like=x)


def _check_weights(name: str, x: Tensor, weights: dict[str, Any], experts: bool) -> None:
    check.tensor(name, x)
    check.leading(name, x)
    if x.dtype is torch.float64:
        raise TypeError(f"{name}: expected dtype float32, float16 or bfloat16 where weights are quantised, got float64")
    for each, w in weights.items():
        if not isinstance(w, QuantizedWeight):
            raise TypeError(f"{each}: expected a QuantizedWeight as the other weights are, got {type(w).__name__}")
        if w.dim() != (3 if experts else 2):
            shape = "[E, N, K]" if experts else "[N, K]"
            raise ValueError(f"{each}: expected a quantised weight of shape {shape}, got {list(w.shape)}")
        check._strided(each, w.codes)
        check.device(each, w.codes, x, name)
        check_groups(each, w.codes, w.format, w.block)


def _call(
    name: str, x: Tensor, routed: Any, w_in: Any, w_up: Any, w_down: Any, b_in: Any, b_down: Any, gated: bool,
    gate: Gate, recompute: bool, lora: Lora | None, experts: bool,
) -> Tensor:  # fmt: skip
    check.flag("recompute", recompute)
    weights = {"w_in": w_in, "w_down": w_down} if w_up is None else {"w_in": w_in, "w_up": w_up, "w_down": w_down}
    _check_weights(name, x, weights, experts)
    stacked = [w.stacked() for w in weights.values()]
    formats = ",".join(format for _, format in stacked)
    parts = (stacked[0][0], [] if w_up is None else stacked[1][0], stacked[-1][0])
    rows = fold(x)
    count, features, out = _check_shapes(rows, routed[2], *parts, formats, b_in, b_down, gated)
    pairs: tuple[Any, ...] = (None,) * 4
    if lora is not None:
        hidden = 2 * features if gated else features
        pairs = adapters(lora, x, count if experts else None, hidden, features, out, two=w_up is not None)
    if w_up is None and torch.compiler.is_exporting():  # AOTInductor's packages do not take an empty list
        parts = (parts[0], parts[2], parts[2])
    tensors = (*parts, formats, b_in, b_down, *pairs)
    form, scale = (gated, gate.interleaved, gate.activation, gate.params), 1.0 if lora is None else lora.scale
    grad = needs_grad(x, routed[1], b_in, b_down, *pairs)
    y = moe_op(rows, *routed, *tensors, *form, scale, grad and not recompute, grad=grad)[0]
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], w_down.shape[-2])  # type: ignore[no-any-return]


def _shape(parts: Sequence[Tensor], format: str) -> tuple[Any, Any, Any]:
    codes = parts[0]
    return codes.shape[0], codes.shape[1], columns(format.split(":")[0], codes)


def _check_shapes(
    x: Tensor, offsets: Tensor | None, w_in: Any, w_up: Any, w_down: Any, formats: str, b_in: Any, b_down: Any,
    gated: bool,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Returns E, F and the width of the output."""
    names = formats.split(",")
    experts, rows, width = _shape(w_in, names[0])
    if width != x.shape[-1] or (offsets is not None and experts != offsets.shape[0] - 1):
        count = experts if offsets is None else offsets.shape[0] - 1
        raise ValueError(
            f"w_in: expected a quantised weight of shape [{count}, {'2F' if gated else 'F'}, {x.shape[-1]}], got"
            f" {[experts, rows, width]}"
        )
    two = has_up(formats)
    one_weight = gated and not two
    if one_weight and rows % 2:
        raise ValueError(f"w_in: expected an even number of rows, of gate and up, got {[experts, rows, width]}")
    features = rows // 2 if one_weight else rows
    for name, parts, format, shape in (
        ("w_up", w_up if two else None, names[1], (experts, features, width)),
        ("w_down", w_down, names[-1], (experts, None, features)),
    ):
        if parts is not None:
            actual = _shape(parts, format)
            if any(want is not None and want != have for want, have in zip(shape, actual, strict=True)):
                wanted = ", ".join("D_out" if each is None else str(each) for each in shape)
                raise ValueError(f"{name}: expected a quantised weight of shape [{wanted}], got {list(actual)}")
    out = w_down[0].shape[1]
    if b_in is not None:
        check.tensor("b_in", b_in, (experts, 2 * features if gated else features), like=x)
    if b_down is not None:
        check.tensor("b_down", b_down, (experts, out), like=x)
    return experts, features, out


# ---- fakes ----------------------------------------------------------------------------------------------------------


@fake("dequantize")
def _(w: list[Tensor], format: str, dtype: str) -> Tensor:
    return w[0].new_empty(_shape(w, format), dtype=getattr(torch, dtype))


@fake("quantized_linear")
def _(rows: Tensor, w: list[Tensor], format: str, offsets: Tensor, transposed: bool) -> Tensor:
    _experts, out, width = _shape(w, format)
    check.tensor("rows", rows, ("R", out if transposed else width))
    return dense(rows, rows.shape[0], width if transposed else out)


def _num_rows(x: Tensor, token: Tensor | None) -> Any:
    return x.shape[0] if token is None else token.shape[0]


@fake("moe_quantized")
def _(
    x: Tensor, token: Tensor | None, weight: Tensor | None, offsets: Tensor | None, row: Tensor | None,
    slot_offsets: Tensor | None, w_in: Any, w_up: Any, w_down: Any, formats: str, b_in: Tensor | None,
    b_down: Tensor | None, a_in: Any, lora_b_in: Any, a_down: Any, lora_b_down: Any, gated: bool, interleaved: bool,
    activation: str, params: list[float], scale: float, save: bool,
) -> Any:  # fmt: skip
    check.tensor("x", x, ("T", "D"))
    check_gate(activation, params, gated=gated, interleaved=interleaved, one_weight=gated and not has_up(formats))
    experts, features, out = _check_shapes(x, offsets, w_in, w_up, w_down, formats, b_in, b_down, gated)
    pairs = (a_in, lora_b_in, a_down, lora_b_down)
    check_pairs(pairs, x, experts, 2 * features if gated else features, features, out)
    rows = _num_rows(x, token)
    gate = dense(x, rows, features) if save else dense(x, 0)
    return dense(x, x.shape[0], out), gate, dense(x, rows, features) if save and gated else dense(x, 0)


@fake("moe_quantized_backward")
def _(
    d_y: Tensor, x: Tensor, token: Tensor | None, weight: Tensor | None, offsets: Tensor | None, row: Tensor | None,
    slot_offsets: Tensor | None, w_in: Any, w_up: Any, w_down: Any, formats: str, b_in: Tensor | None,
    b_down: Tensor | None, a_in: Any, lora_b_in: Any, a_down: Any, lora_b_down: Any, gate: Tensor, up: Tensor,
    gated: bool, interleaved: bool, activation: str, params: list[float], scale: float, needs: list[bool],
) -> Any:  # fmt: skip
    experts, features, out = _check_shapes(x, offsets, w_in, w_up, w_down, formats, b_in, b_down, gated)
    check.tensor("d_y", d_y, (x.shape[0], out), like=x)
    need_x, need_weight, need_b_in, need_b_down, *need_pairs = needs
    d_weight = x.new_empty((token.shape[0],), dtype=torch.float32) if need_weight and token is not None else dense(x, 0)
    d_b_in = dense(x, experts, 2 * features if gated else features) if need_b_in else dense(x, 0)
    d_b_down = dense(x, experts, out) if need_b_down else dense(x, 0)
    pairs = zip((a_in, lora_b_in, a_down, lora_b_down), need_pairs, strict=True)
    d_pairs = [factor_as_stored(t) if need and t is not None else dense(x, 0) for t, need in pairs]
    return dense(x, *x.shape) if need_x else dense(x, 0), d_weight, d_b_in, d_b_down, *d_pairs
