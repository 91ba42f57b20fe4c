# SPDX-License-Identifier: BSD-3-Clause
"""The linear children of a replaced layer: which of them are no more than weights, dense or quantised, and their
products. layer.py decides what a call does with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._adapters import is_adapted, pairs_of
from .._quantized.foreign import read
from ..modules import PLAIN_TENSORS, is_plain_linear, is_unhooked, quantized
from ..ops._quantized_linear import quantized_linear

LINEARS: set[Any] = set()  # subclasses of nn.Linear whose forward is that of nn.Linear
_OF_LINEARS = vars(nn.Linear(1, 1, device="meta")).keys()
_TRACES_DICTS = torch.__version__ >= "2.15"  # dynamo of 2.11 does not: its graphs call such layers


def _is_conv1d(layer: Any) -> bool:
    """transformers' layer of GPT-2: a Linear whose weight is [in, out]. Recognised by name, without importing it."""
    cls = type(layer)
    return (
        cls.__name__ == "Conv1D"
        and cls.__module__ == "transformers.pytorch_utils"
        and type(layer._parameters.get("weight")) in PLAIN_TENSORS
        and is_unhooked(layer)
    )


def is_plain(layer: Any) -> bool:
    """True if weight and bias define everything that a call does."""
    return is_plain_linear(layer) or _is_conv1d(layer) or (type(layer) in LINEARS and has_only_weights(layer))


def has_only_weights(layer: Any) -> bool:
    """True if only its class distinguishes it from an nn.Linear."""
    weight = layer._parameters.get("weight")
    return (
        (_TRACES_DICTS or not torch.compiler.is_compiling())
        and layer.__dict__.keys() == _OF_LINEARS
        and layer._parameters.keys() == {"weight", "bias"}
        and not layer._buffers
        and not layer._modules
        and type(weight) in PLAIN_TENSORS
        and weight.layout is torch.strided
        and is_unhooked(layer)
    )


Held = tuple[Any, Tensor | None]  # a weight, quantised or not, and a bias


def on_quantized(layers: list[Any], x: Tensor, cast: bool) -> list[Held] | None:
    """Weights and biases of children that are all on quantised weights, where an operator takes them with this x."""
    if x.dtype is torch.float64 or x.device.type == "cuda":
        return None
    held: Any = quantized(*layers)
    if held is None or cast:
        return held  # type: ignore[no-any-return]
    # other libraries' biases that are buffers have the dtype of their kernels
    held = [(w, b if b is None or isinstance(b, nn.Parameter) else b.to(x.dtype)) for w, b in held]
    return held if all(b is None or b.dtype is x.dtype for _, b in held) else None


def product(layer: Any, x: Tensor, cast: bool) -> Tensor:
    """Calls a child, or the operator that is its product with a quantised weight."""
    held = on_quantized([layer], x, cast) if type(x) in PLAIN_TENSORS else None
    return layer(x) if held is None else quantized_linear(x, *held[0])  # type: ignore[no-any-return]


def weights(layer: Any) -> Held:
    parameters = layer._parameters
    weight = parameters["weight"]
    return (weight if isinstance(layer, nn.Linear) else weight.t()), parameters["bias"]


def of_dtype(layers: list[Any], dtype: torch.dtype) -> bool:
    """True if weights have another dtype: the forward may cast between its children, so it must run itself."""
    for layer in layers:
        weight = layer._parameters.get("weight")
        if weight is not None and weight.dtype is not dtype:
            return False
    return True


def why_called(module: Any) -> str:
    if is_adapted(module) and pairs_of(module) is None:
        return "peft's Linear, and not plain LoRA"
    found = read(module)
    if isinstance(found, str):
        return f"quantised otherwise than the operators take it: {found}"
    if not isinstance(module, nn.Linear) and not _is_conv1d(module):
        return f"{type(module).__module__.split('.')[0]}'s {type(module).__name__}"
    if not is_unhooked(module):
        return "hooks, or a forward set on the instance"
    weight = module._parameters.get("weight")
    if type(weight) not in PLAIN_TENSORS:
        return "its weight is computed" if weight is None else f"its weight is a {type(weight).__name__}"
    if weight.layout is not torch.strided:
        return f"its weight is {weight.layout}"
    return f"a {type(module).__name__}"
