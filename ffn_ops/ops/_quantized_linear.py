# SPDX-License-Identifier: BSD-3-Clause
"""One linear layer on a quantised weight, by the operator quantized_linear; its fake and autograd are in
_moe_quantized.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _checks as check
from ._moe_quantized import _all_rows, _check_weights, linear_op
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
    y = linear_op(rows, *weight.stacked(), _all_rows(rows), False)
    y = y if bias is None else y + bias
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], features)  # type: ignore[no-any-return]
