# SPDX-License-Identifier: BSD-3-Clause
"""One linear layer on a quantised weight, by the operator quantized_linear, whose fake and autograd are in
_moe_quantized.py; and the check of a rank's quantised experts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _checks as check
from ._moe_derivatives import all_rows
from ._moe_quantized import _check_shapes, _check_weights
from ._moe_quantized_derivatives import linear_op
from ._shared import autocast, fold


def quantized_linear(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """``x W^T + bias`` for x ``[..., K]`` and a quantised weight ``[N, K]``."""
    check.tensor("x", x)
    if bias is not None:
        check.tensor("bias", bias)
    x, bias = autocast(x, bias)  # type: ignore[assignment]
    _check_weights("x", x, {"weight": weight}, experts=False)
    features, width = weight.shape
    if x.shape[-1] != width:
        raise ValueError(f"x: expected shape [..., {width}], got {list(x.shape)}")
    if bias is not None:
        check.tensor("bias", bias, (features,), like=x)
    rows = fold(x)
    held, offsets = weight.stacked(), all_rows(rows)
    if bias is None:
        y = linear_op(rows, *held, offsets, False)
    else:  # rounded once
        y = (linear_op(rows.float(), *held, offsets, False) + bias.float()).to(x.dtype)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], features)  # type: ignore[no-any-return]


def check_quantized(
    x: Tensor, offsets: Tensor, w_in: Any, w_down: Any, b_in: Tensor | None, b_down: Tensor | None, gated: bool
) -> None:
    """Of :func:`ffn_ops.expert_parallel.moe`: the rank may have no expert."""
    _check_weights("x", x, {"w_in": w_in, "w_down": w_down}, experts=True)
    (first, name), (last, other) = w_in.stacked(), w_down.stacked()
    _check_shapes(fold(x), offsets, first, [], last, f"{name},{other}", b_in, b_down, gated)
