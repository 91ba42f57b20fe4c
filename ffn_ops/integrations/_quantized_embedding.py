# SPDX-License-Identifier: BSD-3-Clause
"""QuantizedEmbedding: what stands in the place of an embedding whose table stays quantised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._quantized import QuantizedWeight


class QuantizedEmbedding(nn.Module):
    """Rows of a constant table, which are dequantised as they are looked up."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight
        self.dtype = dtype
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, ids: Tensor) -> Tensor:
        w, rows = self.weight, ids.flatten()
        parts: dict[str, Any] = {}
        for name, table in w.named_parts().items():
            if name == "factor":
                parts[name] = table
            else:
                parts[name] = F.embedding(rows if name == "codes" else rows // w.block[0], table)
        picked = QuantizedWeight(w.format, block=(1, w.block[1]), **parts)
        return picked.dequantize(self.dtype).reshape(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
