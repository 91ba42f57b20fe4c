# SPDX-License-Identifier: BSD-3-Clause
"""Quantised checkpoints that transformers loads: of each method the names of a weight's tensors and how to read them.
Nothing here imports transformers."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._quantized import QuantizedWeight

Parts = dict[str, Tensor]
OWN = "ffn_ops"  # as `save_pretrained` writes it


# Options of `from_pretrained`.
HUB = (
    "cache_dir", "code_revision", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
    "trust_remote_code",
)  # fmt: skip
ASIDE = ("attn_implementation", "dtype", "experts_implementation", "torch_dtype")  # of the model, not of its config
REFUSED = ("distributed_config", "quantization_config", "tp_plan", "tp_size")


class Method(NamedTuple):
    """How a ``quant_method`` stores weights."""

    names: dict[str, tuple[str, ...]]  # of a parameter: the names of its tensors in the checkpoint
    read: Callable[[Parts, dict[str, Any]], Any]  # one weight from these; a Tensor where it is not quantised
    check: Callable[[dict[str, Any]], None]  # of the settings, before any work
    renames: tuple[tuple[str, str], ...] = ()
    joined: tuple[str, ...] = ()  # parameters whose tensors are gate and up
    own_names: bool = False  # tensors have the names of the model's parameters


def settings_of(config: Any) -> dict[str, Any]:
    """The quantisation of a model's config, checked.

    Raises:
        ValueError: if there is none, or one that cannot be kept.
    """
    found = getattr(config, "quantization_config", None)
    found = found or getattr(config.get_text_config(decoder=True), "quantization_config", None)
    settings = found if isinstance(found, dict) or found is None else found.to_dict()
    known = ", ".join(METHODS)
    if settings is None:
        raise ValueError(f"quantization_config: expected a quant_method, one of {known}, in the config, got None")
    method = settings.get("quant_method")
    method = getattr(method, "value", method)
    if method not in METHODS:
        raise ValueError(f"quant_method: expected one of {known}, got {method!r}")
    METHODS[method].check(settings)
    return {**settings, "quant_method": method}


def named(model_class: Any, name: Any) -> None:
    if not callable(getattr(model_class, "from_pretrained", None)):
        raise TypeError(f"model_class: expected a class of transformers' models, got {type(model_class).__name__}")
    if not isinstance(name, (str, os.PathLike)):
        raise TypeError(f"name: expected a path or a name on the hub, got {type(name).__name__}")


def on_cpu(device_map: Any) -> None:
    places = device_map.values() if isinstance(device_map, dict) else () if device_map is None else (device_map,)
    places = (*places, torch.get_default_device())
    if any(str(place) not in ("cpu", "cpu:0") for place in places):
        raise ValueError(f"device_map: expected the CPU, the only device for quantised weights, got {device_map!r}")


def _anything(settings: dict[str, Any]) -> None:
    pass


def _has(settings: dict[str, Any], **wanted: tuple[Any, ...]) -> None:
    """Where settings say something of these, it must be one of the values that can be kept."""
    for name, values in wanted.items():
        if settings.get(name) not in (None, *values):
            known = " or ".join(map(repr, values))
            raise ValueError(f"{name}: expected {known} of a quantised checkpoint, got {settings[name]!r}")


def _check_gptq(settings: dict[str, Any]) -> None:
    _has(settings, bits=(4,), desc_act=(False,), checkpoint_format=("gptq", "gptq_v2"), pack_dtype=("int32",))


def _check_awq(settings: dict[str, Any]) -> None:
    _has(settings, bits=(4,), w_bit=(4,), version=("gemm", "GEMM"))


_BITS = {
    "pack-quantized": (4, "int"), "mxfp4-pack-quantized": (4, "float"), "int-quantized": (8, "int"),
    "float-quantized": (8, "float"), "nvfp4-pack-quantized": (4, "float"),
}  # fmt: skip


def _check_compressed_tensors(settings: dict[str, Any]) -> None:
    _has(settings, quantization_status=("compressed",))
    for group in settings["config_groups"].values():
        weights, format = group.get("weights") or {}, str(group.get("format") or settings.get("format"))
        _has({"format": format}, format=tuple(_BITS))
        bits, kind = _BITS[format]
        _has(weights, num_bits=(bits,), type=(kind,), actorder=("weight", "static", False))
        if bits == 8:
            _has(weights, symmetric=(True,))


def _read_mxfp4(parts: Parts, settings: dict[str, Any]) -> Any:
    (blocks,) = (t for name, t in parts.items() if name.endswith("_blocks"))
    (scales,) = (t for name, t in parts.items() if name.endswith("_scales"))
    return QuantizedWeight.from_mxfp4(blocks, scales)


def _read_fp8(parts: Parts, settings: dict[str, Any]) -> Any:
    weight, scale = parts["weight"], parts.get("weight_scale_inv")
    if scale is None:
        return weight
    if weight.dtype in (torch.int8, torch.uint8):  # two fp4 codes in a byte
        return QuantizedWeight.from_mxfp4(weight, scale)
    block = settings.get("weight_block_size")
    one = "tensor" if scale.numel() == 1 else "row"
    return QuantizedWeight.from_fp8(weight, scale, one if block is None else (int(block[0]), int(block[1])))


def _read_gptq(parts: Parts, settings: dict[str, Any]) -> Any:
    if "qweight" not in parts:
        return parts["weight"]
    version = 2 if settings.get("checkpoint_format") == "gptq_v2" else 1
    size = settings.get("group_size")
    group = size if isinstance(size, int) and size > 0 else None
    held = parts["qweight"], parts["qzeros"], parts["scales"], parts.get("g_idx")
    return QuantizedWeight.from_gptq(*held, version=version, group=group)


def _read_awq(parts: Parts, settings: dict[str, Any]) -> Any:
    return QuantizedWeight.from_awq(**parts) if "qweight" in parts else parts["weight"]


def _read_compressed_tensors(parts: Parts, settings: dict[str, Any]) -> Any:
    scale = parts.get("weight_scale")
    if scale is None:
        return parts["weight"]
    if (divisor := parts.get("weight_global_scale")) is not None:  # of all scales of the tensor
        return QuantizedWeight.from_nvfp4(parts["weight_packed"], scale, 1 / divisor)
    if "weight_packed" in parts and parts["weight_packed"].dtype is torch.uint8:
        return QuantizedWeight.from_mxfp4(parts["weight_packed"], scale)
    if "weight_packed" in parts:
        return QuantizedWeight.from_compressed_tensors(parts["weight_packed"], scale, parts.get("weight_zero_point"))
    weight = parts["weight"]
    if weight.dtype is torch.int8:
        return QuantizedWeight.from_int8(weight, scale.expand(weight.shape[0]) if scale.numel() == 1 else scale)
    if scale.numel() in (1, weight.shape[0]):
        return QuantizedWeight.from_fp8(weight, scale, "tensor" if scale.numel() == 1 else "row")
    groups = settings["config_groups"].values()
    block = next(
        (each["weights"]["block_structure"] for each in groups if each["weights"].get("block_structure")), None
    )
    return QuantizedWeight.from_fp8(weight, scale, tuple(block or (128, 128)))  # type: ignore[arg-type]


def _read_own(parts: Parts, settings: dict[str, Any]) -> Any:
    format, _, block = settings["format"].partition(":")
    rows, _, columns = block.partition("x")
    return QuantizedWeight(format, block=(int(rows), int(columns)), **parts)  # type: ignore[arg-type]


METHODS = {
    "mxfp4": Method(
        {name: (f"{name}_blocks", f"{name}_scales") for name in ("gate_up_proj", "down_proj")}, _read_mxfp4, _anything
    ),
    "fp8": Method(
        {"weight": ("weight", "weight_scale_inv", "activation_scale")},
        _read_fp8,
        _anything,
        # As transformers renames DeepSeek-V4's and Mistral's scales.
        ((r"^(.+)\.scale", r"\1.weight_scale_inv"), (r"\.qscale_weight", ".weight_scale_inv")),
    ),
    "gptq": Method({"weight": ("weight", "qweight", "qzeros", "scales", "g_idx")}, _read_gptq, _check_gptq),
    "awq": Method({"weight": ("weight", "qweight", "qzeros", "scales")}, _read_awq, _check_awq),
    "compressed-tensors": Method(
        {
            "weight": (
                "weight",
                "weight_packed",
                "weight_scale",
                "weight_zero_point",
                "weight_shape",
                "input_scale",
                "weight_global_scale",
                "input_global_scale",
            )
        },
        _read_compressed_tensors,
        _check_compressed_tensors,
    ),
    "gguf": Method(
        {"gate_up_proj": ("gate_up_proj.0.weight", "gate_up_proj.1.weight"), "down_proj": ("down_proj",)}
        | {"weight": ("weight",)},
        lambda parts, settings: next(iter(parts.values())),
        _anything,
        joined=("gate_up_proj",),
        own_names=True,
    ),
    OWN: Method({"": (r"\.codes", r"\.scales", r"\.zeros", r"\.factor")}, _read_own, _anything, own_names=True),
}


def stacked(branches: Sequence[Sequence[QuantizedWeight]]) -> QuantizedWeight:
    """One weight ``[E, N, K]`` of the E weights of each branch, whose rows follow each other: those of gate, then up.

    Blocks of scales may end inside of N where a branch ends: 448 rows in blocks of 128. Then blocks are cut into pieces
    of as many rows as divide all of it, 64 here, and the scales are written once for each piece.
    """
    branches = [[each for w in branch for each in _experts(w)] for branch in branches]
    first = branches[0][0]
    for each in (w for branch in branches for w in branch):
        if (each.format, each.block, each.shape[-1]) != (first.format, first.block, first.shape[-1]):
            raise ValueError(f"weight: expected {_form(first)} as the first expert has, got {_form(each)}")
    counts = [len(branch) for branch in branches]
    if len(set(counts)) > 1:
        raise ValueError(f"weight: expected as many experts of gate as of up, got {counts}")
    rows = first.block[0]
    inner = [branch[0].shape[0] for branch in branches[:-1]]
    cut = math.gcd(rows, *inner) if any(each % rows for each in inner) else rows
    made = {}
    for name, t in first.named_parts().items():
        if name == "factor":
            made[name] = torch.stack([w.parts[-1] for w in branches[0]])
            continue
        finer = rows // cut if name in ("scales", "zeros") else 1
        high = [_height(getattr(branch[0], name), finer, branch[0].shape[0], cut) for branch in branches]
        made[name] = out = t.new_empty(counts[0], sum(high), *t.shape[1:])
        for e, experts in enumerate(zip(*branches, strict=True)):
            for w, place in zip(experts, out[e].split(high), strict=True):
                part = getattr(w, name)
                place.copy_(part if finer == 1 else part.repeat_interleave(finer, 0)[: len(place)])
    return QuantizedWeight(first.format, block=(cut, first.block[1]), **made)


def why_apart(branches: Sequence[Sequence[QuantizedWeight]]) -> str | None:
    """Why gate and up of an expert cannot become one weight."""
    factors = [[each.named_parts().get("factor") for w in branch for each in _experts(w)] for branch in branches]
    pairs = [pair for other in factors[1:] for pair in zip(factors[0], other, strict=False)]
    apart = any(a is not None and b is not None and not torch.equal(a, b) for a, b in pairs)
    return "gate and up of an expert have different factors" if apart else None


def _experts(w: QuantizedWeight) -> Sequence[QuantizedWeight]:
    if w.dim() == 2:
        return (w,)
    parts = {name: t.unbind() for name, t in w.named_parts().items()}
    return [
        QuantizedWeight(w.format, block=w.block, **{name: each[e] for name, each in parts.items()})
        for e in range(w.shape[0])
    ]


def _height(t: Tensor, finer: int, rows: int, cut: int) -> int:
    return t.shape[0] if finer == 1 else -(-rows // cut)


def _form(w: QuantizedWeight) -> str:
    return f"{w.stacked()[1]} with {w.shape[-1]} columns"
