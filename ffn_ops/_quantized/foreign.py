# SPDX-License-Identifier: BSD-3-Clause
"""Other libraries' linear layers as quantised weights: which of their classes hold which format. By name, without an
import of them. What their layers do with activations is no part of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .formats import BYTE, FLOATS
from .weight import QuantizedWeight, of_graph

_PLAIN = (nn.Parameter, Tensor)


class UnfitError(Exception):
    """The layer holds something that is no format of the table."""


def _zeros(w: Any) -> None:
    if w.zero_point is not None and bool(w.zero_point.any()):
        raise UnfitError("zero points other than 0")


def _without(w: Any, *names: str) -> None:
    if any(getattr(w, name, None) is not None for name in names):
        raise UnfitError("its input is quantised or scaled too")


def _torchao_int8(layer: Any) -> QuantizedWeight:
    w = layer._parameters["weight"]
    _without(w, "act_quant_kwargs", "act_pre_scale", "activation_quantization")
    _zeros(w)
    return QuantizedWeight("int8", w.qdata.view(torch.uint8), w.scale, block=tuple(w.block_size))


def _torchao_fp8(layer: Any) -> QuantizedWeight:
    w = layer._parameters["weight"]
    _without(w, "act_quant_kwargs", "act_pre_scale")
    if w.qdata.dtype is not torch.float8_e4m3fn:
        raise UnfitError(f"values of {w.qdata.dtype}")
    return QuantizedWeight("fp8", w.qdata.view(torch.uint8), w.scale.float(), block=tuple(w.block_size))


def _transformers_fp8(layer: Any) -> QuantizedWeight:
    parameters = layer._parameters
    weight, scale = parameters["weight"], parameters["weight_scale_inv"]
    if weight.dtype is torch.int8:
        return QuantizedWeight.from_mxfp4(weight, scale)
    if weight.dtype is not torch.float8_e4m3fn:
        raise UnfitError(f"values of {weight.dtype}")
    block = layer.block_size
    return QuantizedWeight.from_fp8(weight, scale, "tensor" if block is None else (int(block[0]), int(block[1])))


def _bits(layer: Any, name: str) -> None:
    if getattr(layer, name, None) != 4:
        raise UnfitError(f"{getattr(layer, name, None)} bits")
    if getattr(layer, "adapter", None) is not None:
        raise UnfitError("an adapter of its own")


def _awq(layer: Any) -> QuantizedWeight:
    _bits(layer, "w_bit" if hasattr(layer, "w_bit") else "bits")
    return QuantizedWeight.from_awq(layer.qweight, layer.qzeros, layer.scales)


def _gptq(layer: Any) -> QuantizedWeight:
    _bits(layer, "bits")
    stored = getattr(layer, "qzero_format", None)  # gptqmodel turns zeros of version 1 into those of version 2
    version = stored() if callable(stored) else 1
    group = layer.group_size if layer.group_size > 0 else layer.in_features
    held = layer.qweight, layer.qzeros, layer.scales, layer.g_idx
    return QuantizedWeight.from_gptq(*held, version=version, group=group)


def _compressed(layer: Any) -> QuantizedWeight:
    """compressed-tensors' compressed layers, of whose weights its own forward knows nothing before they are dense."""
    scheme, held = layer.quantization_scheme, layer._parameters
    if scheme.input_activations is not None or scheme.output_activations is not None:
        raise UnfitError("its input is quantised or scaled too")
    format = getattr(scheme.format, "value", scheme.format)
    packed, scale = held.get("weight_packed"), held.get("weight_scale")
    if format == "pack-quantized" and packed is not None:
        bits = scheme.weights.num_bits
        if held.get("weight_g_idx") is not None:
            raise UnfitError("activation ordering")
        if packed.shape[-1] * 32 != layer.in_features * bits:
            raise UnfitError("padded words")
        if bits == 8 and held.get("weight_zero_point") is None:
            return QuantizedWeight.from_int8((packed.view(torch.uint8) ^ 128).view(torch.int8), scale)
        _bits(scheme.weights, "num_bits")
        return QuantizedWeight.from_compressed_tensors(packed, scale, held.get("weight_zero_point"))
    if format == "nvfp4-pack-quantized" and packed is not None:
        return QuantizedWeight.from_nvfp4(packed, scale, 1 / held["weight_global_scale"])
    if format == "mxfp4-pack-quantized" and packed is not None:
        return QuantizedWeight.from_mxfp4(packed, scale)
    if format in ("int-quantized", "naive-quantized") and getattr(held.get("weight"), "dtype", None) is torch.int8:
        zero = held.get("weight_zero_point")
        if zero is not None and bool(zero.any()):
            raise UnfitError("zero points other than 0")
        return QuantizedWeight.from_int8(held["weight"], scale)
    raise UnfitError(f"format {format!r}")


# (top package, class) of a weight in an nn.Linear, and of a layer.
_TENSORS: dict[tuple[str, str], Callable[[Any], QuantizedWeight]] = {
    ("torchao", "Int8Tensor"): _torchao_int8,
    ("torchao", "IntxUnpackedToInt8Tensor"): _torchao_int8,
    ("torchao", "Float8Tensor"): _torchao_fp8,
}
_LAYERS: dict[tuple[str, str], Callable[[Any], QuantizedWeight]] = {
    ("transformers", "FP8Linear"): _transformers_fp8,
    ("awq", "WQLinear_GEMM"): _awq,
    ("gptqmodel", "AwqTorchLinear"): _awq,
    ("gptqmodel", "AwqTorchQuantLinear"): _awq,
    ("gptqmodel", "TorchLinear"): _gptq,
    ("gptqmodel", "TorchQuantLinear"): _gptq,
    ("auto_gptq", "QuantLinear"): _gptq,
}
_COMPRESSED = "compressed_tensors.quantization.lifecycle.forward"


def is_compressed(layer: Any) -> bool:
    """True, of a layer without hooks, if compressed-tensors has set its forward, which takes only dense weights."""
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    forward = layer.__dict__.get("forward")
    made = getattr(getattr(forward, "__func__", None), "__globals__", {})
    return made.get("__name__") == _COMPRESSED and forward.__self__ is layer and "quantization_scheme" in layer.__dict__


def _reader(layer: Any) -> Callable[[Any], QuantizedWeight] | None:
    kind = type(layer)
    if kind is nn.Linear:
        if "quantization_scheme" in layer.__dict__:
            return _compressed if getattr(layer.quantization_status, "value", "") == "compressed" else None
        kind = type(layer._parameters.get("weight"))
        return None if kind in _PLAIN else _TENSORS.get((kind.__module__.partition(".")[0], kind.__name__))
    return _LAYERS.get((kind.__module__.partition(".")[0], kind.__name__))


_kept: WeakKeyDictionary[nn.Module, tuple[list[Tensor], list[Any], QuantizedWeight | str]] = WeakKeyDictionary()


def read(layer: Any) -> QuantizedWeight | str | None:
    """The layer's weight; why it is no format of the table; None for a class that is not known.

    Bytes that are used as they lie stay the layer's own. Those that are turned, of AWQ and GPTQ, are turned once, and
    again after the layer's tensors were replaced or written to.
    """
    return _traced(layer) if torch.compiler.is_compiling() else _read(layer)


def _read(layer: Any) -> QuantizedWeight | str | None:
    reader = _reader(layer)
    if reader is None:
        return None
    tensors = _tensors(layer)
    facts = [(t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.device) for t in tensors]
    kept = _kept.get(layer)
    if kept is not None and kept[1] == facts and all(a is b for a, b in zip(kept[0], tensors, strict=True)):
        return kept[2]
    found: QuantizedWeight | str
    try:
        with torch.no_grad():
            found = reader(layer)
        if tuple(found.shape) != (layer.out_features, layer.in_features):
            found = f"shape {list(found.shape)}"
    except (UnfitError, TypeError, ValueError, AttributeError, KeyError) as error:
        found = str(error)
    _kept[layer] = tensors, facts, found
    return found


def _tensors(layer: Any) -> list[Tensor]:
    return list(_named(layer).values())


def _named(layer: Any) -> dict[str, Tensor]:
    """The layer's own tensors, and those inside of subclasses, such as "weight.qdata"."""
    found: dict[str, Tensor] = {}
    for name, t in (*layer._parameters.items(), *layer._buffers.items()):
        if type(t) in _PLAIN:
            found[name] = t
        elif t is not None:
            found |= {f"{name}.{each}": getattr(t, each) for each in t.__tensor_flatten__()[0]}
    return found


# ---- in torch.compile -----------------------------------------------------------------------------------------------

_HAS_CONSTANTS = torch.__version__ >= "2.15"  # those of a module: in 2.11 dynamo refuses, so the children are called
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*FLOATS, *BYTE)}


def _place(layer: Any) -> str:
    """Where all tensors of the layer's weight lie among its own: "fp8:1x64|weight,uint8,8,64|scale,float32,8,1"; else
    nothing. It is text because dynamo takes text for a constant."""
    found = _read(layer)
    if not isinstance(found, QuantizedWeight):
        return ""
    own = {t.data_ptr(): name for name, t in _named(layer).items() if t.is_contiguous()}
    parts = [(own.get(t.data_ptr()), str(t.dtype).removeprefix("torch."), *t.shape) for t in found.parts]
    held = all(name is not None for name, *_ in parts)
    return "|".join([found.stacked()[1], *(",".join(map(str, each)) for each in parts)]) if held else ""


# A constant of the layer, while its class, and shapes and dtypes of its tensors stay: what
# torch.compiler.assume_constant_result says, which would import the compiler with the package.
vars(_place)["_dynamo_marked_constant"] = True


def why_untraced(layer: Any) -> str:
    """Why a compiled call calls a layer that another library has quantised, or nothing."""
    if not isinstance(_read(layer), QuantizedWeight):
        return ""
    if not _HAS_CONSTANTS:
        return "torch is older than 2.15"
    return "" if _place(layer) else "its bytes are turned"  # a graph would keep those of one moment


def _traced(layer: Any) -> QuantizedWeight | None:
    """The layer's weight on the tensors that it has when the graph runs."""
    place = _place(layer) if _HAS_CONSTANTS and torch.compiler.is_dynamo_compiling() else ""
    if not place:
        return None
    form, *places = place.split("|")
    parts = []
    for each in places:
        name, dtype, *shape = each.split(",")
        outer, _, inner = name.partition(".")
        t: Any = layer._parameters[outer] if outer in layer._parameters else layer._buffers[outer]
        t = getattr(t, inner) if inner else t
        parts.append(t.detach().view(_DTYPES[dtype]).reshape([int(size) for size in shape]))
    format, _, block = form.partition(":")
    rows, _, columns = block.partition("x")
    return of_graph(format, (int(rows), int(columns)), parts)
