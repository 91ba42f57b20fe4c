# SPDX-License-Identifier: BSD-3-Clause
"""QuantizedLinear: a linear layer on a quantised weight, as a child of feed-forward layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import _checks as check
from ..ops._quantized_linear import quantized_linear
from .foreign import read
from .weight import QuantizedWeight


class QuantizedLinear(nn.Module):
    """``x W^T + bias`` with a :class:`ffn_ops.QuantizedWeight`, in the place of an ``nn.Linear``.

    As a child of this package's layers, and of layers that :func:`ffn_ops.replace` has replaced, it is a part of their
    one operator; called by itself it is one too. Only the bias is a parameter. Runs on a CPU.

    Args:
        weight: of shape ``[N, K]``.
        bias: ``[N]``, a parameter (kept as it is) or a tensor (made one); None.

    Shapes: x ``[..., K]`` to ``[..., N]``; float32, float16 or bfloat16. State: ``weight.codes``, ``weight.scales``
        and what else the format has, and ``bias``.

    Raises:
        TypeError, ValueError: with the argument, what was expected and what came.

    Example:
        >>> layer = ffn_ops.FeedForward(dim=64, d_ff=96)
        >>> layer.w2 = ffn_ops.QuantizedLinear(ffn_ops.quantize(layer.w2.weight, "int8"), layer.w2.bias)
        >>> layer.w2
        QuantizedLinear(
          in_features=96, out_features=64, bias=True
          (weight): QuantizedWeight(int8, [64, 96], 0.0 of 0.0 MB in bfloat16)
        )
        >>> layer(torch.randn(4, 64)).shape
        torch.Size([4, 64])
    """

    weight: QuantizedWeight
    bias: nn.Parameter | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        if not isinstance(weight, QuantizedWeight):
            raise TypeError(f"weight: expected a QuantizedWeight, got {type(weight).__name__}")
        if weight.dim() != 2:
            raise ValueError(f"weight: expected a quantised weight of shape [N, K], got {list(weight.shape)}")
        if bias is not None:
            check.tensor("bias", bias, (weight.shape[0],))
            if not bias.is_meta:  # as while a checkpoint is being loaded
                check.device("bias", bias, weight.codes, "weight")
        self.out_features, self.in_features = (int(each) for each in weight.shape)
        self.weight = weight
        self.register_parameter("bias", bias if bias is None or type(bias) is nn.Parameter else nn.Parameter(bias))

    __prepare_scriptable__ = check.refuse_script

    def forward(self, x: Tensor) -> Tensor:
        return quantized_linear(x, self.weight, self.bias)

    def reset_parameters(self) -> None:
        raise TypeError("weight: expected a parameter to draw again, got QuantizedWeight")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def weight_of(layer: Any) -> tuple[QuantizedWeight, Tensor | None] | None:
    """Weight and bias of a linear layer on a quantised weight, ours or another library's; None for another layer."""
    if type(layer) is QuantizedLinear:
        weight = layer._modules.get("weight")
        return (weight, layer._parameters.get("bias")) if type(weight) is QuantizedWeight else None
    found = read(layer)
    if not isinstance(found, QuantizedWeight):
        return None
    bias = layer._parameters.get("bias")
    return found, layer._buffers.get("bias") if bias is None else bias
