# SPDX-License-Identifier: BSD-3-Clause
"""PEFT's plain LoRA on the children of a dense layer, read for the operator. It holds no product, and imports no PEFT:
a child that is anything else is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from ._gate import Gate
from ._lora import Lora
from .modules import is_idle, is_plain_linear, is_unhooked, quantized

Pair = tuple[Tensor, Tensor, float]


def is_adapted(child: Any) -> bool:
    """True for the layer that PEFT puts around a linear one, whatever it does."""
    cls = type(child)
    return cls.__name__ == "Linear" and cls.__module__ == "peft.tuners.lora.layer"


def pairs_of(child: Any) -> list[Pair] | None:
    """a, b and scale of each adapter that a call of PEFT's layer adds; None where it does anything else."""
    modules = child._modules
    if not is_unhooked(child) or (child.disable_adapters and child.merged):  # it would unmerge first
        return None
    if child.disable_adapters or child.merged:
        return []
    pairs = []
    for name in child.active_adapters:
        if name not in modules["lora_A"]._modules:
            continue
        a, b = (modules[each]._modules[name] for each in ("lora_A", "lora_B"))
        dropout = modules["lora_dropout"]._modules[name]
        plain = all(is_plain_linear(factor) and factor.bias is None for factor in (a, b)) and is_idle(dropout)
        if name in child.lora_variant or not plain:
            return None
        pairs.append((a.weight, b.weight, float(child.scaling[name])))
    return pairs


def unwrapped(child: Any, is_plain: Callable[[Any], bool] = is_plain_linear) -> tuple[Any, list[Pair]] | None:
    """The linear layer of a child, and its adapters; None if it must be called."""
    if is_plain(child):
        return child, []
    if not is_adapted(child):
        return None
    base, pairs = child._modules["base_layer"], pairs_of(child)
    return None if pairs is None or not is_plain(base) else (base, pairs)


def read_all(
    dtype: torch.dtype, children: list[Any], is_plain: Callable[[Any], bool] = is_plain_linear
) -> tuple[list[Any], Lora | None] | None:
    """The linear layers of gate, of up where there is one, and of down, and their adapters beside an x of ``dtype``;
    None if one of them must be called."""
    read = [unwrapped(each, is_plain) for each in children]
    if any(each is None for each in read):
        return None
    places = ("in", "up", "down") if len(read) == 3 else ("in", "down")
    pairs = {place: each[1] for place, each in zip(places, read, strict=True)}  # type: ignore[index]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    every = [pair for each in pairs.values() for pair in each]
    if any(a.dtype is not b.dtype or a.dtype not in (dtype, wide) for a, b, _ in every):
        return None
    linears = [each[0] for each in read]  # type: ignore[index]
    if not every:
        return linears, None
    alone = all(len(each) <= 1 for each in pairs.values()) and len({scale for *_, scale in every}) == 1
    factors: dict[str, Any] = {}
    for place, each in pairs.items():
        if alone and each:
            factors |= {f"a_{place}": each[0][0], f"b_{place}": each[0][1]}
        elif each:  # ranks side by side, each b times its scale
            factors[f"a_{place}"] = torch.cat([a for a, _, _ in each])
            factors[f"b_{place}"] = torch.cat([b * scale for _, b, scale in each], 1)
    return linears, Lora(**factors, scale=every[0][2] if alone else 1.0)


def fused_ffn(
    x: Tensor, gate: nn.Module, up: nn.Module | None, down: nn.Module, activation: str | Gate, recompute: bool
) -> Tensor | None:
    """The layer of these children as one operator, where PEFT's plain LoRA is all that is on them, or where all are on
    quantised weights; None if one of them must be called."""
    children = [gate, down] if up is None else [gate, up, down]
    read = read_all(x.dtype, children) if isinstance(x, Tensor) else None
    held: list[Any] | None
    if read is None:
        held, lora = quantized(*children), None
    else:
        held, lora = [(each._parameters["weight"], each._parameters["bias"]) for each in read[0]], read[1]
    if held is None:
        return None
    (w_in, b_in), *middle, (w_down, b_down) = held
    w_up, b_up = middle[0] if middle else (None, None)
    return ops.ffn(
        x, w_in, w_down, w_up=w_up, b_in=b_in, b_up=b_up, b_down=b_down,
        activation=activation, recompute=recompute, lora=lora,
    )  # fmt: skip
