# SPDX-License-Identifier: BSD-3-Clause
"""quantize_: the feed-forward layers and experts of a model, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from .._replace import ReplaceEntry, ReplaceReport, replace_report
from .._replace.children import is_plain, weights, why_called
from .._replace.layer import plan_of
from .._replace.probe import original_class
from .._replace.recognise import OURS, linear_children
from ..expert_parallel import shard
from ..moe_ffn import MoEFFN
from .linear import QuantizedLinear
from .quantize import MADE, quantize


@torch.no_grad()
def quantize_(model: nn.Module, format: str, *, group: int | tuple[int, int] | None = None) -> ReplaceReport:
    """Replaces the weights of a model's feed-forward layers and experts by :class:`ffn_ops.QuantizedWeight`, in place.

    It takes :class:`ffn_ops.MoEFFN` (with an ``expert_mesh`` every rank quantises its own experts), transformers'
    experts that run with ``experts_implementation="ffn_ops"``, this package's dense layers, and layers that
    :func:`ffn_ops.replace` has replaced. Linear layers of dense ones become :class:`ffn_ops.QuantizedLinear`, with the
    same bias. Routers keep their weights. A parameter that layers share becomes one weight that they share.
    Values that came from an MXFP4 checkpoint, as transformers dequantises
    gpt-oss on a CPU, are found again exactly. ``save_pretrained`` of a transformers model writes the quantised weights,
    for ``from_pretrained`` of the transformers integration.

    Args:
        model: a module that is, or holds, such layers.
        format, group: see :func:`ffn_ops.quantize`.

    Returns:
        A :class:`ffn_ops.ReplaceReport` with a line for each such layer: "quantised", with the bytes before and
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
    replaceable = replace_report(model).paths("replaceable")
    made_of: Made = {}
    entries = []
    for path, module in list(model.named_modules()):
        names, linears = _weights(module), _linears(module)
        if path in replaceable:
            why: str | None = "it does not run on an operator: replace(model) first"
        elif names:
            why = _left(module, names)
        elif linears:
            why = _dense_left(module, linears)
        else:
            continue
        layer = original_class(module).__name__
        if why:
            entries.append(ReplaceEntry(path, layer, "left", "", why))
        else:
            of = (format, group, made_of)
            said = _experts(module, names, *of) if names else _dense(module, linears, *of)
            entries.append(ReplaceEntry(path, layer, "quantised", f"{format}, {said}"))
    if any(entry.status == "quantised" for entry in entries):
        from ..integrations.transformers import save_as_kept

        save_as_kept(model)
    return ReplaceReport(tuple(entries))


Made = dict[Any, tuple[Any, Any]]  # by a parameter's id and w's strides: the parameter, and what was made of it


def _quantized(w: Any, of: Any, format: str, group: Any, made_of: Made) -> Any:
    """The weight and its error. A parameter that several layers share becomes one weight that they share. w has the
    values of the parameter ``of``, perhaps transposed."""
    key = id(of), w.stride()
    if key not in made_of:
        made_of[key] = of, quantize(w, format, group=group, return_error=True)
    return made_of[key][1]


def _experts(module: Any, names: tuple[str, ...], format: str, group: Any, made_of: Made) -> str:
    turned, mesh = getattr(module, "is_transposed", False), getattr(module, "expert_mesh", None)
    owns = [getattr(module, name) for name in names]
    dense = owns
    if mesh is not None:
        dense = [w.to_local() for w in dense]
    made = [
        _quantized(w.transpose(1, 2) if turned else w, own, format, group, made_of)
        for own, w in zip(owns, dense, strict=True)
    ]
    for name, (w, _error) in zip(names, made, strict=True):
        delattr(module, name)
        setattr(module, name, w if mesh is None else shard(w, module.num_experts, mesh))
    return _said(dense, made)


def _dense(module: nn.Module, paths: list[str], format: str, group: Any, made_of: Made) -> str:
    linears = [module.get_submodule(path) for path in paths]
    held = [weights(linear) for linear in linears]
    owns = [linear._parameters["weight"] for linear in linears]
    made = [_quantized(w, own, format, group, made_of) for own, (w, _bias) in zip(owns, held, strict=True)]
    for path, (w, _error), (_w, bias) in zip(paths, made, held, strict=True):
        parent, _, name = path.rpartition(".")
        layer = QuantizedLinear(w, bias).train(module.training)
        module.get_submodule(parent)._modules[name] = layer  # a replaced layer would look at itself again
    return _said([w for w, _bias in held], made)


def _said(dense: list[Any], made: list[Any]) -> str:
    before, after = (sum(w.nbytes for w in ws) * 1e-6 for ws in (dense, [w for w, _error in made]))
    error = max(error.relative for _w, error in made)
    return f"{after:.1f} of {before:.1f} MB, relative error {error:.2g}"


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
    held = [getattr(module, name, None) for name in names]
    if getattr(module, "expert_mesh", None) is not None:
        held = [w.to_local() if check.is_dtensor(w) else None for w in held]  # type: ignore[union-attr]
    if any(type(w) not in (nn.Parameter, Tensor) for w in held):
        return "its weights are not plain parameters"
    return ""


def _linears(module: nn.Module) -> list[str]:
    """Paths of the linear layers of a dense layer that runs on an operator."""
    plan = plan_of(module)
    if plan:
        return list(dict.fromkeys(plan.form.linears))
    return list(linear_children(module, 1 << 16)) if isinstance(module, OURS) else []


def _dense_left(module: nn.Module, paths: list[str]) -> str:
    plan = plan_of(module)
    if plan and plan.form.reads_weights:
        return "its own forward reads weights"
    for path in paths:
        linear = module.get_submodule(path)
        if not is_plain(linear) or type(linear._parameters["weight"]) is not nn.Parameter:
            return f"{path} is called ({why_called(linear)})"
    return ""
