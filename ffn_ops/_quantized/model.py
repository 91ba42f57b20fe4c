# SPDX-License-Identifier: BSD-3-Clause
"""quantize_: the experts of a model, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import _checks as check
from .._replace import ReplaceEntry, ReplaceReport
from ..moe_ffn import MoEFFN
from .quantize import MADE, quantize


@torch.no_grad()
def quantize_(model: nn.Module, format: str, *, group: int | tuple[int, int] | None = None) -> ReplaceReport:
    """Replaces the weights of a model's experts by :class:`ffn_ops.QuantizedWeight`, in place, layer by layer.

    It takes :class:`ffn_ops.MoEFFN` without an ``expert_mesh``, and transformers' experts that run with
    ``experts_implementation="ffn_ops"``. Dense layers, routers and shared experts keep their weights. Values that came
    from an MXFP4 checkpoint, as transformers dequantises gpt-oss on a CPU, are found again exactly. ``save_pretrained``
    of a transformers model writes the quantised weights, for ``from_pretrained`` of the transformers integration.

    Args:
        model: a module that is, or holds, such experts.
        format, group: see :func:`ffn_ops.quantize`.

    Returns:
        A :class:`ffn_ops.ReplaceReport` with a line for each module of experts: "quantised", with the bytes before and
        after and the relative error, or "left" for the reason in ``why``.

    Raises:
        TypeError, ValueError: with the argument, what was expected and what came. An error of one layer leaves that
            layer as it was.

    Example:
        >>> layer = ffn_ops.MoEFFN(64, 128, num_experts=4, top_k=2)
        >>> ffn_ops.quantize_(layer, "mxfp4").paths("quantised")
        ['']
        >>> layer.w_in
        QuantizedWeight(mxfp4, [4, 128, 64], 0.0 of 0.1 MB in bfloat16)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    check.choice("format", format, MADE)
    entries = []
    for path, module in list(model.named_modules()):
        names = _weights(module)
        if not names:
            continue
        layer, why = type(module).__name__, _left(module, names)
        if why:
            entries.append(ReplaceEntry(path, layer, "left", "", why))
            continue
        made, before, errors = {}, 0, []
        for name in names:
            w = getattr(module, name)
            turned = getattr(module, "is_transposed", False)
            made[name], error = quantize(w.transpose(1, 2) if turned else w, format, group=group, return_error=True)
            before += w.nbytes
            errors.append(error.relative)
        for name, quantized in made.items():
            delattr(module, name)
            setattr(module, name, quantized)
        after = sum(w.nbytes for w in made.values())
        text = f"{format}, {after * 1e-6:.1f} of {before * 1e-6:.1f} MB, relative error {max(errors):.2g}"
        entries.append(ReplaceEntry(path, layer, "quantised", text))
    if any(entry.status == "quantised" for entry in entries):
        from ..integrations.transformers import save_as_kept

        save_as_kept(model)
    return ReplaceReport(tuple(entries))


def _weights(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, MoEFFN):
        return ("w_in", "w_down")
    from ..integrations.transformers import _declared  # imports torch._dynamo, which takes a second

    if _declared(module):
        return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    return ()


def _left(module: Any, names: tuple[str, ...]) -> str:
    from ..integrations.transformers import NAME

    implementation = NAME if isinstance(module, MoEFFN) else getattr(module.config, "_experts_implementation", None)
    if implementation != NAME:
        return f"experts_implementation is {implementation!r}"
    if getattr(module, "expert_mesh", None) is not None:
        return "experts on several ranks"
    if any(type(getattr(module, name, None)) is not nn.Parameter for name in names):
        return "its weights are not plain parameters"
    return ""
