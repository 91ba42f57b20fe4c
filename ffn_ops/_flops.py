# SPDX-License-Identifier: BSD-3-Clause
"""FLOP formulas for torch.utils.flop_counter: 2 M N K for a product, as torch counts. Activations are not counted.

Each argument is the shape of the operator's argument of that name; the letters are those of ``ffn_ops/__init__.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import _library  # noqa: F401  (loads the operators)
from ._quantized.formats import FORMATS, has_up

_OPS = torch.ops.ffn_ops


def _in_width(w_in: Any, w_up: Any) -> int:
    """Rows of all input weights: F, or 2F where gated."""
    return int(w_in[0]) + (0 if w_up is None else int(w_up[0]))


@register_flop_formula(_OPS.ffn)  # type: ignore[untyped-decorator]
def ffn_flops(x: Any, w_in: Any, w_up: Any, w_down: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    T, D = x
    O, F = w_down
    return 2 * T * (D * _in_width(w_in, w_up) + F * O)  # type: ignore[no-any-return]


@register_flop_formula(_OPS.ffn_backward)  # type: ignore[untyped-decorator]
def ffn_backward_flops(
    d_y: Any, x: Any, w_in: Any, w_up: Any, w_down: Any, b_in: Any, b_up: Any, gate: Any, up: Any, gated: bool,
    interleaved: bool, activation: str, params: Any, needs: Any, *, out_shape: Any = None, **_: Any
) -> int:  # fmt: skip
    T, D = x
    O, F = w_down
    need_x, need_in, need_up, need_down, need_b_in, need_b_up, _need_b_down = needs
    rows = _in_width(w_in, w_up)
    hidden = need_x or need_in or need_up or need_b_in or need_b_up
    total = 0
    if len(gate) == 1 and (hidden or need_down):  # the pre-activations were not saved
        total += D * rows
    total += F * O * (bool(hidden) + bool(need_down))
    total += D * rows * bool(need_x)
    total += D * w_in[0] * bool(need_in)
    total += D * w_up[0] * bool(need_up) if w_up is not None else 0
    return 2 * T * total  # type: ignore[no-any-return]


@register_flop_formula(_OPS.gated_linear)  # type: ignore[untyped-decorator]
def gated_linear_flops(x: Any, w_gate: Any, w_up: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    T, D = x
    return 2 * T * D * sum(w[0] for w in (*w_gate, *w_up))  # type: ignore[no-any-return]


@register_flop_formula(_OPS.gated_linear_backward)  # type: ignore[untyped-decorator]
def gated_linear_backward_flops(
    d_y: Any, x: Any, w_gate: Any, w_up: Any, *rest: Any, out_shape: Any = None, **_: Any
) -> int:
    T, D = x
    need_x, need_gate, need_up, *_biases = rest[-1]
    gates, ups = (sum(w[0] for w in weights) for weights in (w_gate, w_up))
    width = (gates + ups) * bool(need_x) + gates * bool(need_gate) + ups * bool(need_up)
    return 2 * T * D * width  # type: ignore[no-any-return]


@register_flop_formula(_OPS.moe)  # type: ignore[untyped-decorator]
def moe_flops(
    x: Any, token: Any, weight: Any, offsets: Any, row: Any, slot_offsets: Any, w_in: Any, w_down: Any, *_: Any,
    out_shape: Any = None, **__: Any
) -> int:  # fmt: skip
    """Counts all R rows, an upper bound: shapes do not say how many rows are dropped."""
    R = x[0] if token is None else token[0]
    return 2 * R * (x[1] * w_in[1] + w_down[1] * w_down[2])  # type: ignore[no-any-return]


@register_flop_formula(_OPS.moe_backward)  # type: ignore[untyped-decorator]
def moe_backward_flops(
    d_y: Any, x: Any, token: Any, weight: Any, offsets: Any, row: Any, slot_offsets: Any, w_in: Any, w_down: Any,
    b_in: Any, b_down: Any, gate: Any, *rest: Any, out_shape: Any = None, **_: Any
) -> int:  # fmt: skip
    R = x[0] if token is None else token[0]
    need_x, need_weight, need_in, need_down, need_b_in, _need_b_down = rest[-1]
    up, down = x[1] * w_in[1], w_down[1] * w_down[2]
    hidden = need_x or need_weight or need_in or need_b_in
    total = up * (bool(need_x) + bool(need_in)) + down * (bool(hidden) + bool(need_down))
    if len(gate) == 1 and (hidden or need_down):  # the pre-activations were not saved
        total += up
    return 2 * R * total  # type: ignore[no-any-return]


def _pair(R: int, a: Any, b: Any) -> int:
    """Of rows times a^T and of that times b^T."""
    return 0 if a is None else 2 * R * a[1] * (a[2] + b[1])


def _in_and_up(w_in: Any, w_up: Any) -> Any:
    return w_in if w_up is None else (w_in[0], w_in[1] + w_up[1], w_in[2])


@register_flop_formula(_OPS.moe_lora)  # type: ignore[untyped-decorator]
def moe_lora_flops(
    x: Any, token: Any, weight: Any, offsets: Any, row: Any, slot_offsets: Any, w_in: Any, w_up: Any, w_down: Any,
    b_in: Any, b_down: Any, a_in: Any, lora_b_in: Any, a_down: Any, lora_b_down: Any, *_: Any, out_shape: Any = None,
    **__: Any
) -> int:  # fmt: skip
    R = x[0] if token is None else token[0]
    base: int = moe_flops(x, token, weight, offsets, row, slot_offsets, _in_and_up(w_in, w_up), w_down)
    return base + _pair(R, a_in, lora_b_in) + _pair(R, a_down, lora_b_down)


@register_flop_formula(_OPS.moe_lora_backward)  # type: ignore[untyped-decorator]
def moe_lora_backward_flops(
    d_y: Any, x: Any, token: Any, weight: Any, offsets: Any, row: Any, slot_offsets: Any, w_in: Any, w_up: Any,
    w_down: Any, b_in: Any, b_down: Any, a_in: Any, lora_b_in: Any, a_down: Any, lora_b_down: Any, gate: Any,
    *rest: Any, out_shape: Any = None, **_: Any
) -> int:  # fmt: skip
    """Counts a pair twice where anything is asked for: the way back, and the gradients of its two factors."""
    R = x[0] if token is None else token[0]
    need_x, need_weight, need_in, need_up, *needs = rest[-1]
    # What reaches x reaches a_in and b_in.
    needs = [need_x or any(needs[3:5]), need_weight, need_in or need_up, *needs[:3]]
    base: int = moe_backward_flops(
        d_y, x, token, weight, offsets, row, slot_offsets, _in_and_up(w_in, w_up), w_down, b_in, b_down, gate, needs
    )
    return base + 2 * (_pair(R, a_in, lora_b_in) + _pair(R, a_down, lora_b_down))


@register_flop_formula(_OPS.moe_linear)  # type: ignore[untyped-decorator]
def moe_linear_flops(rows: Any, w: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * rows[0] * w[1] * w[2]  # type: ignore[no-any-return]


@register_flop_formula(_OPS.moe_outer)  # type: ignore[untyped-decorator]
def moe_outer_flops(a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]  # type: ignore[no-any-return]


def _quantized_widths(w_in: Any, w_up: Any, w_down: Any, formats: str) -> tuple[int, int]:
    """Multiplications of a row by the input weights, and by w_down."""
    names = [name.split(":")[0] for name in formats.split(",")]
    weights = (w_in, w_up, w_down) if has_up(formats) else (w_in, w_down)
    rows = [(parts[0], name) for parts, name in zip(weights, names, strict=True)]
    *up, down = [codes[1] * (codes[2] // FORMATS[name].block_bytes * FORMATS[name].block) for codes, name in rows]
    return sum(up), down


@register_flop_formula(_OPS.moe_quantized)  # type: ignore[untyped-decorator]
def moe_quantized_flops(
    x: Any, token: Any, weight: Any, offsets: Any, row: Any, slot_offsets: Any, w_in: Any, w_up: Any, w_down: Any,
    formats: str, b_in: Any, b_down: Any, a_in: Any, lora_b_in: Any, a_down: Any, lora_b_down: Any, *_: Any,
    out_shape: Any = None, **__: Any
) -> int:  # fmt: skip
    R = x[0] if token is None else token[0]
    base = 2 * R * sum(_quantized_widths(w_in, w_up, w_down, formats))
    return base + _pair(R, a_in, lora_b_in) + _pair(R, a_down, lora_b_down)  # type: ignore[no-any-return]


@register_flop_formula(_OPS.moe_quantized_backward)  # type: ignore[untyped-decorator]
def moe_quantized_backward_flops(
    d_y: Any, x: Any, token: Any, weight: Any, offsets: Any, row: Any, slot_offsets: Any, w_in: Any, w_up: Any,
    w_down: Any, formats: str, b_in: Any, b_down: Any, a_in: Any, lora_b_in: Any, a_down: Any, lora_b_down: Any,
    gate: Any, *rest: Any, out_shape: Any = None, **_: Any
) -> int:  # fmt: skip
    R = x[0] if token is None else token[0]
    need_x, need_weight, need_b_in, _need_b_down, *need_pairs = rest[-1]
    up, down = _quantized_widths(w_in, w_up, w_down, formats)
    hidden = need_x or need_weight or need_b_in or any(need_pairs[:2])
    again = len(gate) == 1 and bool(hidden or any(need_pairs))  # the pre-activations were not saved
    base = 2 * R * (up * (bool(need_x) + again) + down * bool(hidden))
    return base + 2 * (_pair(R, a_in, lora_b_in) + _pair(R, a_down, lora_b_down))  # type: ignore[no-any-return]


@register_flop_formula(_OPS.quantized_linear)  # type: ignore[untyped-decorator]
def quantized_linear_flops(rows: Any, w: Any, format: str, *_: Any, out_shape: Any = None, **__: Any) -> int:
    codes, kind = w[0], FORMATS[format.split(":")[0]]
    return 2 * rows[0] * codes[1] * (codes[2] // kind.block_bytes * kind.block)  # type: ignore[no-any-return]


@register_flop_formula(_OPS.route_linear)  # type: ignore[untyped-decorator]
def route_linear_flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * x[0] * x[1] * weight[0]  # type: ignore[no-any-return]


@register_flop_formula(_OPS.route_linear_backward)  # type: ignore[untyped-decorator]
def route_linear_backward_flops(
    d_logits: Any, x: Any, weight: Any, needs: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return 2 * x[0] * x[1] * weight[0] * (bool(needs[0]) + bool(needs[1]))  # type: ignore[no-any-return]
