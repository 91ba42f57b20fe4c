# SPDX-License-Identifier: BSD-3-Clause
"""QuantizedLinear and QuantizedEmbedding: what stands in the place of a layer whose weight stays quantised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks as check
from .._quantized import QuantizedWeight
from ..ops._moe_quantized_derivatives import linear_op
from ..ops._shared import autocast, fold


class QuantizedLinear(nn.Module):
    """``y = x w^T + b`` of a constant weight; x has a gradient, and b."""

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        check.tensor("x", x)
        (x,) = autocast(x)  # type: ignore[assignment]
        if x.dtype is torch.float64:
            raise TypeError("x: expected dtype float32, float16 or bfloat16 where weights are quantised, got float64")
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected shape [..., {self.in_features}], got {list(x.shape)}")
        rows = fold(x)
        offsets = torch.tensor([0, rows.shape[0]], device=x.device)
        if self.bias is None:
            y = linear_op(rows, *self.weight.stacked(), offsets, False)
        else:  # rounded once
            y = (linear_op(rows.float(), *self.weight.stacked(), offsets, False) + self.bias.float()).to(x.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class QuantizedEmbedding(nn.Module):
    """Rows of a constant table, which are dequantised as they are looked up."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight
        self.dtype = dtype
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, ids: Tensor) -> Tensor:
        w, rows = self.weight, ids.flatten()
        parts: dict[str, Any] = {"factor": w.factor} if "factor" in w._buffers else {}
        for name in ("codes", "scales", "zeros"):
            if (table := w._buffers.get(name)) is not None:
                parts[name] = F.embedding(rows if name == "codes" else rows // w.block[0], table)
        picked = QuantizedWeight(w.format, block=(1, w.block[1]), **parts)
        return picked.dequantize(self.dtype).reshape(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
