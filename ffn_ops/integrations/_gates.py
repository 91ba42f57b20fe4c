# SPDX-License-Identifier: BSD-3-Clause
"""Finds which gate a transformers experts module computes, by calling it, because names of classes prove nothing.

A :class:`ffn_ops.Gate` with numbers that the module holds is accepted where it gives the module's own values on a grid
that covers signs, saturation and both sides of every limit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import _disable_current_modes

from .._gate import LEARNED, MODEL_GATES, NAMES, Gate, gate_from
from ..reference import UPS, gated_act

# Parameters that the operator reads. A module with more parameters computes something else.
READ = frozenset(f"{name}{kind}" for name in ("gate_up_proj", "up_proj", "down_proj") for kind in ("", "_bias"))
# torch's prune and weight_norm split a parameter into such parts, and set an attribute of its name before each call.
PARTS = ("orig", "mask", "g", "v")
# Large enough for float32 inside a module's gate; gelu and its tanh form differ by 5e-4.
TOLERANCE = 2e-6
_POINTS = (0.0, 1e-3, 0.17, 0.4, 0.9, 1.3, 2.1, 3.3, 6.0, 11.0, 30.0, 300.0, 1e4, 1e6)
_known: dict[Any, Gate | None] = {}


def gate_of(experts: Any) -> Gate:
    """Returns the gate of a module with transformers' ``use_experts_implementation``.

    Raises:
        ValueError: if the gate has another form, or the module has parameters that the operator does not read.
    """
    activation, params = _form_of(experts)
    return gate_from(activation, params, experts.has_gate and not experts.is_concatenated)


@torch.compiler.assume_constant_result  # tracing uses the cached gate, and looks again for another module
def _form_of(experts: Any) -> tuple[str, tuple[float, ...]]:
    for name in (*experts._parameters, *experts._buffers):
        whole, _, part = name.rpartition("_")
        if name not in READ and not (part in PARTS and whole in READ and whole not in experts._parameters):
            raise ValueError(
                f"{type(experts).__name__}: expected no parameters besides those of the experts, got {name}"
            )
    # peft adds the parametrisation again in each call, which makes a new class.
    parametrized = "parametrizations" in experts._modules
    cls = parametrize.type_before_parametrizations(experts) if parametrized else type(experts)
    return _looked_up(experts, cls, getattr(experts, "act_fn", None))


def act_gate(act: Any, gated: bool) -> Gate:
    """Returns the gate ``act(gate) * up``, or without ``gated`` the activation ``act(x)``, of a module that computes it
    in its own forward.

    Raises:
        ValueError: if ``act`` is another function than those of the operators.
    """
    activation, params = _form_with(act, gated)
    return gate_from(activation, params, False)


@torch.compiler.assume_constant_result
def _form_with(act: Any, gated: bool) -> tuple[str, tuple[float, ...]]:
    function = SimpleNamespace(
        has_gate=gated,
        is_concatenated=True,
        act_fn=act,
        _apply_gate=lambda z: act(z.chunk(2, -1)[0]) * z.chunk(2, -1)[1],
    )
    return _looked_up(function, type(act), act)


def _looked_up(experts: Any, cls: type, act: Any) -> tuple[str, tuple[float, ...]]:
    held = tuple(map(_settings, act.modules())) if isinstance(act, nn.Module) else act
    key = (cls, _settings(experts), type(act), held)
    if key not in _known:
        _known[key] = _recognise(experts, act)
    gate = _known[key]
    if gate is None:
        form = "_apply_gate" if experts.has_gate else "act_fn"
        raise ValueError(
            f"{cls.__name__}.{form}: expected act(min(gate, limit)) * (clamp(up, -limit, limit) + up_shift)"
            f" with act one of {', '.join(NAMES)} and numbers that the module holds, got another function;"
            " use another experts_implementation for this model"
        )
    return gate.activation, gate.params


def _settings(module: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((name, value) for name, value in vars(module).items() if type(value) in (bool, int, float, str))


def _recognise(experts: Any, act: Any) -> Gate | None:
    if isinstance(act, nn.Module) and next(iter(act.state_dict()), None) is not None:
        return None  # it learns, so its function will change
    # Computes eagerly on the CPU, even while a model is traced, exported or built on another device.
    with _disable_current_modes(), torch.no_grad():
        held = [experts, *(act.modules() if isinstance(act, nn.Module) else ())]
        values = [v for module in held for _, v in _settings(module) if type(v) in (int, float)]
        numbers = sorted({float(v) for v in values if 0 < v < math.inf})
        gate, up = _grid(numbers)
        if experts.has_gate:
            pair = (gate, up) if experts.is_concatenated else (gate.unsqueeze(-1), up.unsqueeze(-1))
            function: Callable[[Tensor], Tensor] = experts._apply_gate
            together = torch.cat(pair, -1).flatten(-2) if not experts.is_concatenated else torch.cat(pair, -1)
            candidates = _gated_candidates(numbers)
        else:
            function, together, candidates = act, gate, _candidates(numbers)
        try:
            actual = function(together).double()
        except Exception:
            return None  # not a function of gate and up alone
        for candidate in candidates:
            if _agrees(candidate, gate, up if experts.has_gate else None, actual):
                return candidate
    return None


def _grid(numbers: list[float]) -> tuple[Tensor, Tensor]:
    """All pairs of a gate and an up value, ``[1, N * N]`` each."""
    points = {*_POINTS, *(factor * number for number in numbers for factor in (0.5, 0.99, 1.01, 3.0))}
    signed = torch.tensor(sorted({*points, *(-p for p in points)}), dtype=torch.float64, device="cpu")
    gate, up = torch.meshgrid(signed, signed, indexing="ij")
    return gate.reshape(1, -1), up.reshape(1, -1)


def _candidates(numbers: list[float]) -> Iterator[Gate]:
    """Every activation, its own parameters the defaults, those that models use or numbers that the module holds. Of
    those that usually learn only the defaults: four parameters would make thousands of candidates."""
    for name in NAMES:
        if name in LEARNED:
            yield Gate(name)
            continue
        known = [gate.own for gate in (Gate(name), *MODEL_GATES.values()) if gate.activation == name]
        for values in itertools.product(*(sorted({k[each] for k in known} | set(numbers)) for each in known[0])):
            own: dict[str, Any] = dict(zip(known[0], values, strict=True))
            yield Gate(name, **own)


def _gated_candidates(numbers: list[float]) -> Iterator[Gate]:
    """The plain ones first."""
    for limit, shift in itertools.product((None, *numbers), (0.0, 1.0)):
        for plain in _candidates(numbers):
            if plain.activation not in UPS or (limit is None and shift == 0):
                yield plain.replace(limit=limit, up_shift=shift)


def _agrees(candidate: Gate, gate: Tensor, up: Tensor | None, actual: Tensor) -> bool:
    if actual.shape != gate.shape:
        return False
    scale = torch.ones(()) if up is None else 1 + up.abs()
    return _close(actual, gated_act(gate, up, activation=candidate), scale)


def _close(actual: Tensor, expected: Tensor, scale: Tensor) -> bool:
    return bool(((actual - expected).abs() <= TOLERANCE * (expected.abs() + scale)).all())
