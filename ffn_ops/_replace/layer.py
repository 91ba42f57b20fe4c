# SPDX-License-Identifier: BSD-3-Clause
"""The plan of a recognised layer, and what a call of it does.

Every call checks what other code may have changed (adapters, hooks, quantised weights, training, dropout, the
activation), and then fuses less or runs the layer's own forward. ``state`` reports which.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import _checks as check
from .. import ops
from .._adapters import is_adapted, pairs_of, read_all
from .._library import CUDA_ABSENT
from .._quantized.foreign import why_untraced
from ..modules import PLAIN_TENSORS, is_idle, is_plain_linear, is_unhooked, quantized
from ..reference import gated_act
from .children import is_plain, of_dtype, on_quantized, product, weights, why_called
from .form import BY_TORCH, Form
from .learned import hidden_of
from .part import Part
from .whole import whole_ffn

PLAN = "_ffn_ops_plan"  # attribute of an instance; None: restored; False: changed, and no longer recognised
CALLS = "_ffn_ops_calls"  # attribute of an instance: its Calls since it was replaced
Path = tuple[str, ...]
_DEVICES = ("cpu", "meta") if CUDA_ABSENT else ("cpu", "meta", "cuda")
_SCALARS = (bool, int, float, str, type(None), types.FunctionType, types.BuiltinFunctionType)


@dataclass(frozen=True)
class Guard:
    """The state, at recognition, of a module whose own forward is bypassed."""

    path: Path
    cls: Any
    children: int
    scalars: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Plan:
    form: Form
    arguments: tuple[str, ...]  # forward's parameters: one tensor first
    idle: dict[str, Any]  # further parameters, with the value that has no effect
    ranks: tuple[int, ...]  # numbers of dimensions for which the form holds
    widths: tuple[int, ...]  # and input widths
    dtypes: tuple[torch.dtype, ...]
    eval_only: str  # what forward does differently in training, or nothing
    children: int
    guards: tuple[Guard, ...]
    gates: tuple[Path, ...]
    ups: tuple[Path, ...]
    down: Path | None
    learned: Path | None
    head: tuple[Path | tuple[int, ...], ...]
    dropout: Path | None
    tail: tuple[Path, ...]
    direct: tuple[str, str | None, str] | None  # names of gate, up and down, if the layer has nothing else
    part: Part | None  # of a layer that does more


def plan(
    layer: nn.Module,
    form: Form,
    arguments: tuple[str, ...],
    idle: dict[str, Any],
    ranks: tuple[int, ...],
    widths: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    eval_only: str,
    part: Part | None = None,
) -> Plan:
    def path(text: str) -> Path:
        return tuple(text.split(".")) if text else ()

    def paths(texts: tuple[str, ...]) -> tuple[Path, ...]:
        return tuple([path(text) for text in texts])

    direct = None
    if form.down is not None and len(form.gates) == 1 and form.halves != "up first" and not form.head:
        direct = (form.gates[0], form.ups[0] if form.ups else None, form.down)
    if "." in "".join(form.linears) or form.learned is not None:
        direct = None
    # Modules whose forward ran, and modules that only hold others.
    holders = {p[:i] for p in paths(form.linears) for i in range(1, len(p))}
    bypassed = set()
    if form.learned is not None:
        act = layer.get_submodule(form.learned)
        bypassed = {path(below) for below, _ in act.named_modules(prefix=form.learned)}
    stepped_over = sorted({*paths(form.run), *holders, *bypassed})
    return Plan(
        form, arguments, idle, ranks, widths, dtypes, eval_only, len(layer._modules),
        tuple([_guard(layer, p) for p in stepped_over]),
        paths(form.gates), paths(form.ups), None if form.down is None else path(form.down),
        None if form.learned is None else path(form.learned),
        tuple([path(step) if isinstance(step, str) else step for step in form.head]),
        None if form.dropout is None else path(form.dropout), paths(form.tail), direct, part,
    )  # fmt: skip


def _guard(layer: nn.Module, path: Path) -> Guard:
    module = child(layer, path)
    assert module is not None
    return Guard(path, type(module), len(module._modules), tuple(_scalars(module)))


def _scalars(module: nn.Module) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in vars(module).items() if k != "training" and k[0] != "_" and isinstance(v, _SCALARS)]


def plan_of(module: nn.Module) -> Any:
    """The plan of a replaced layer, or False; None of others, also of one around it that hands attributes on, as PEFT's
    and torch.compile's do."""
    return vars(module).get(PLAN)


def child(module: nn.Module, path: Path) -> Any:
    for name in path:
        module = module._modules.get(name)  # type: ignore[assignment]
        if module is None:
            return None
    return module


def changed(layer: nn.Module, plan: Plan) -> str | None:
    """The reason why children that would be bypassed must be called, or None."""
    if len(layer._modules) != plan.children:
        return "it has other children than before"
    for guard in plan.guards:
        module = child(layer, guard.path)
        if module is None or type(module) is not guard.cls or len(module._modules) != guard.children:
            return f"{'.'.join(guard.path)} is another module than before"
        if not is_unhooked(module):
            return f"{'.'.join(guard.path)} has hooks"
        for name, value in guard.scalars:
            now = module.__dict__.get(name)
            if now is not value and now != value:
                return f"{'.'.join(guard.path)}.{name} is not what it was"
    return None


def _fits(layer: nn.Module, plan: Plan, x: Any) -> bool:
    return (
        type(x) in PLAIN_TENSORS
        and x.layout is torch.strided
        and not x.is_nested
        and x.dim() in plan.ranks
        and x.shape[-1] in plan.widths
        and x.dtype in plan.dtypes
        and x.device.type in _DEVICES
        and not (plan.eval_only and layer.training)
        and not _has_any_global_hook()
        and changed(layer, plan) is None
    )


def _is_torchs(form: Form) -> bool:
    """True without a gate, if torch has the activation as one operator, which alone is faster than ours."""
    return not form.ups and form.halves is None and form.gate.activation in BY_TORCH


def fused(layer: nn.Module, plan: Plan, x: Tensor) -> Tensor | None:
    """The layer's result, with as much fused as is correct; None if its own forward must run."""
    if not _fits(layer, plan, x):
        return None
    device = x.device.type
    cast = torch._C._is_any_autocast_enabled() and device != "meta" and torch.is_autocast_enabled(device)
    if cast and torch.get_autocast_dtype(device) not in plan.dtypes:
        return None
    value = _direct(layer, plan, x, cast) if plan.direct is not None else None
    if value is None:
        value = _by_parts(layer, plan, x, cast)
        if value is None:
            return None
    for path in plan.tail:
        value = child(layer, path)(value) if path else value + x
    return value


def _direct(layer: nn.Module, plan: Plan, x: Tensor, cast: bool) -> Tensor | None:
    """The usual case, short because small layers feel every step: plain nn.Linear children, no dropout between."""
    gate_name, up_name, down_name = plan.direct  # type: ignore[misc]
    modules: Any = layer._modules
    gate, down = modules.get(gate_name), modules.get(down_name)
    if not (is_plain_linear(gate) and is_plain_linear(down)):
        return None
    if plan.dropout is not None and not is_idle(child(layer, plan.dropout)):
        return None
    form, dtype = plan.form, x.dtype
    first, last = gate._parameters, down._parameters
    w_in, w_down = first["weight"], last["weight"]
    w_up = b_up = None
    if up_name is not None:
        up = modules.get(up_name)
        if not is_plain_linear(up):
            return None
        w_up, b_up = up._parameters["weight"], up._parameters["bias"]
    if not cast and not (w_in.dtype is dtype is w_down.dtype and (w_up is None or w_up.dtype is dtype)):
        return None
    return ops.ffn(
        x, w_in, w_down, w_up=w_up, b_in=first["bias"], b_up=b_up, b_down=last["bias"],
        gated=True if form.halves is not None else None, activation=form.gate,
    )  # fmt: skip


def _by_parts(layer: nn.Module, plan: Plan, x: Tensor, cast: bool) -> Tensor | None:
    """The general case: computes all but the tail. None if the layer's own forward must run."""
    gates = [child(layer, path) for path in plan.gates]
    ups = [child(layer, path) for path in plan.ups]
    down = None if plan.down is None else child(layer, plan.down)
    linears = [*gates, *ups, down] if plan.down is not None else [*gates, *ups]
    if any(linear is None for linear in linears):
        return None
    plain = all(is_plain(linear) for linear in linears)
    if plan.form.reads_weights and not plain:
        return None
    dropout = None if plan.dropout is None else child(layer, plan.dropout)
    if dropout is not None and is_idle(dropout):
        dropout = None
    one = down is not None and dropout is None and len(gates) == 1 and plan.learned is None
    lora = None
    if one and not plain and (read := read_all(x.dtype, linears, is_plain)) is not None:
        linears, lora = read
        plain, gates, ups, down = True, linears[:1], linears[1:-1], linears[-1]
    if plain and not cast and not of_dtype(linears, x.dtype):
        return None
    held = [weights(linear) for linear in linears] if plain else on_quantized(linears, x, cast)
    whole = one and held is not None
    if not plain and plan.form.halves == "up first":
        whole = False  # rows of codes and scales are not cut
    if not whole and (_is_torchs(plan.form) or (dropout is not None and plan.form.early)):
        return None
    value = x
    for step in plan.head:
        value = value.reshape(-1, *step) if type(step[0]) is int else child(layer, step)(value)  # type: ignore[arg-type]
    if whole:
        value = whole_ffn(plan.form, value, held, lora)  # type: ignore[arg-type]
    elif plan.learned is not None:
        first = gates[0] if is_plain(gates[0]) else partial(product, gates[0], cast=cast)
        hidden = hidden_of(child(layer, plan.learned), plan.form.gate.activation, first, value, cast)
        if hidden is None:
            return None
        value = hidden if dropout is None else dropout(hidden)
        value = value if down is None else product(down, value, cast)
    else:
        value = _hidden(plan.form, value, gates, ups, cast)
        if dropout is not None:
            value = dropout(value)
        if down is not None:
            value = product(down, value, cast)
    return value


def _hidden(form: Form, x: Tensor, gates: list[Any], ups: list[Any], cast: bool) -> Tensor:
    """Computes the input of ``down``: by one operator, or by calling the children as forward does and one operator."""
    if form.halves is not None and is_plain(gates[0]):
        return _halves(form, x, *weights(gates[0]))
    if ups and all(is_plain(layer) for layer in (*gates, *ups)):
        gate_weights, up_weights = [weights(g) for g in gates], [weights(u) for u in ups]
        b_gate = [b for _, b in gate_weights if b is not None]
        b_up = [b for _, b in up_weights if b is not None]
        if len(b_gate) in (0, len(gates)) and len(b_up) in (0, len(ups)):
            w_gate, w_up = [w for w, _ in gate_weights], [w for w, _ in up_weights]
            return ops.gated_linear(x, w_gate, w_up, b_gate=b_gate, b_up=b_up, activation=form.gate)
    total: Tensor | None = None
    up: Tensor | None
    for i, gate in enumerate(gates):
        if ups and form.up_called_first:  # adapters with dropout draw random numbers in the order of the calls
            up = product(ups[i], x, cast)
            value = product(gate, x, cast)
        else:
            value = product(gate, x, cast)
            up = product(ups[i], x, cast) if ups else None
        if form.halves is not None:
            value, up = value.chunk(2, -1)
            if form.halves == "up first":
                value, up = up, value
        hidden = _between(value, up, form)
        total = hidden if total is None else total + hidden
    assert total is not None
    return total


def _halves(form: Form, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    w_gate, w_up = weight.chunk(2)
    b_gate, b_up = (None, None) if bias is None else bias.chunk(2)
    if form.halves == "up first":
        w_gate, b_gate, w_up, b_up = w_up, b_up, w_gate, b_gate
    return ops.gated_linear(x, w_gate, w_up, b_gate=b_gate, b_up=b_up, activation=form.gate)


def _between(gate: Tensor, up: Tensor | None, form: Form) -> Tensor:
    both = [gate] if up is None else [gate, up]
    if all(type(t) in PLAIN_TENSORS and t.dtype is gate.dtype and t.dtype in check.DTYPES for t in both):
        return ops.gated_act(gate, up, activation=form.gate)
    return gated_act(gate, up, activation=form.gate)  # such as a DTensor: uses torch's own operators


def state(layer: nn.Module, plan: Plan) -> tuple[bool, str]:
    """Returns whether everything recognised is fused at present, and if not, what is fused and why."""
    if reason := changed(layer, plan):
        return False, f"its own forward runs: {reason}"
    if _has_any_global_hook():
        return False, "its own forward runs: there are global module hooks"
    if plan.eval_only and layer.training:
        return False, f"its own forward runs: in training {plan.eval_only}"
    parts = [(path, child(layer, path)) for path in (*plan.gates, *plan.ups, *((plan.down,) if plan.down else ()))]
    if gone := [path for path, module in parts if module is None]:
        return False, f"its own forward runs: {'.'.join(gone[0])} is gone"
    first = next(layer.parameters(), None)
    if first is not None and first.device.type not in _DEVICES:
        why = CUDA_ABSENT if first.device.type == "cuda" else "no kernels for it"
        return False, f"its own forward runs on {first.device.type}: {why}"
    inside = len(plan.gates) == 1 and plan.down is not None and plan.learned is None and not plan.form.reads_weights
    inside = inside and not (plan.dropout and not is_idle(child(layer, plan.dropout)))
    read = read_all(first.dtype, [module for _, module in parts], is_plain) if inside and first is not None else None
    adapted = [".".join(path) for path, module in parts if is_adapted(module) and pairs_of(module)]
    if read is not None:
        parts = [(path, base) for (path, _), base in zip(parts, read[0], strict=True)]
    others = [(path, module) for path, module in parts if not is_plain(module)]
    turned: list[str] = []
    if others == parts and quantized(*[module for _, module in parts]):
        turned = [f"{'.'.join(path)} ({why})" for path, module in parts if (why := why_untraced(module))]
        others = []
    called = [f"{'.'.join(path)} is called ({why_called(module)})" for path, module in others]
    if called and plan.form.reads_weights:
        return False, f"its own forward runs, because it reads weights: {'; '.join(called)}"
    if not called and is_plain(parts[0][1]) and not of_dtype([m for _, m in parts], parts[0][1].weight.dtype):
        return False, "its own forward runs outside autocast: weights of several dtypes"
    if plan.dropout and not is_idle(child(layer, plan.dropout)):
        called.append(f"{'.'.join(plan.dropout)} is called (p > 0 in training)")
    notes = "; ".join(called)
    if plan.form.early and plan.dropout and not is_idle(child(layer, plan.dropout)):
        return False, f"its own forward runs: {notes}, before the activation"
    if called and _is_torchs(plan.form):
        return False, f"its own forward runs, with torch's {plan.form.gate.activation}: {notes}"
    if adapted and not called:
        notes = f"with peft's LoRA on {', '.join(adapted)}"
    if turned:
        notes = f"in torch.compile the linear layers are called: {', '.join(turned)}"
    if plan.eval_only:
        notes = "; ".join(filter(None, [notes, f"in training its own forward runs: {plan.eval_only}"]))
    return not called, notes
