# SPDX-License-Identifier: BSD-3-Clause
"""Gate: which activation stands between two linear layers, and its numbers. Values are computed elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from . import _checks as check
from . import _library  # noqa: F401  (loads the operators)


class _Kind(NamedTuple):
    """An activation of csrc/common/activations.h: its own parameters, as (default, must be positive), of which the
    first ``learned`` may be tensors with gradients."""

    has_up: bool
    learned: int
    own: dict[str, tuple[float, bool]]


_KINDS = {
    name: _Kind(
        kind["has_up"],
        kind["learned"],
        {each: (float(value), positive) for each, (value, positive) in kind["own"].items()},
    )
    for name, kind in json.loads(torch.ops.ffn_ops._gates()).items()
}
NAMES = tuple(_KINDS)
LEARNED = {name: kind.learned for name, kind in _KINDS.items() if kind.learned}


class Gate:
    """``act(min(gate, limit)) * (clamp(up, -limit, limit) + up_shift)``; without a gate ``act(x)``.

    Every ``activation=`` takes a name or a ``Gate``. A ``Gate`` does not change, compares and hashes by value, pickles,
    and prints as the call that makes it.

    Args:
        activation: one of :func:`ffn_ops.activations`, or a gate that models use: ``"quick_gelu"`` (CLIP),
            ``"swiglu_oai"`` (gpt-oss), ``"clamped_silu"`` (DeepSeek-V4). The numbers of such a gate are defaults, which
            the arguments replace.
        limit: a positive number, or None for none. Gate and up at the limit and beyond get no gradient, as from
            ``torch.clamp``. Only where something is gated, as is ``up_shift``.
        up_shift: what is added to ``up``; None stands for 0.
        interleaved: whether the rows of a weight that holds gate and up alternate, gate first. Else the gate's rows
            stand before those of up. Only where there is such a weight.
        own: the activation's own parameters. ``beta`` (1) of ``swish``: ``z * sigmoid(beta * z)``. ``gate_softcap`` (4)
            and ``up_softcap`` (25) of ``situ``: ``a * tanh(gate / a) * sigmoid(gate) * b * tanh(up / b)``. ``cap`` (7)
            of ``swiglu_step``: ``min(silu(gate), cap) * clamp(up, -cap, cap)``. These two take no limit and no shift.
            ``star_relu`` has ``scale`` and ``bias``, ``leaky_relu`` has ``slope`` (0.01), ``xielu`` has ``alpha_p``,
            ``alpha_n``, ``beta`` and ``eps``: :func:`learned_act` has their formulas, and takes tensors that learn.

    Raises:
        TypeError, ValueError: name of the argument, what was expected and what came.

    Source:
        Shazeer, GLU Variants Improve Transformer (2020); the limit and the shift: gpt-oss-120b & gpt-oss-20b Model Card
        (2025). ``situ`` is Kimi K3's and Inkling 2's gate, ``swiglu_step`` that of Step-3.7.

    Example:
        >>> ffn_ops.Gate("swiglu_oai")
        Gate('swish', beta=1.702, limit=7.0, up_shift=1.0)
        >>> ffn_ops.Gate("clamped_silu", limit=7.0) == ffn_ops.Gate("silu", limit=7.0)
        True
    """

    activation: str
    limit: float | None
    up_shift: float
    interleaved: bool
    params: tuple[float, ...]  # as operators take them: limit or 0, up_shift, own parameters in their order

    def __init__(
        self,
        activation: str,
        *,
        limit: float | None = None,
        up_shift: float | None = None,
        interleaved: bool = False,
        **own: float,
    ) -> None:
        if isinstance(activation, str) and activation in MODEL_GATES:
            named = MODEL_GATES[activation]
            activation, own = named.activation, {**named.own, **own}
            limit = named.limit if limit is None else limit
            up_shift = named.up_shift if up_shift is None else up_shift
        check.choice("activation", activation, (*NAMES, *MODEL_GATES))
        kind = _KINDS[activation]
        up_shift = 0.0 if up_shift is None else up_shift
        check.number("up_shift", up_shift)
        if limit is not None:
            _check_positive("limit", limit)
        check.flag("interleaved", interleaved)
        for name, value in own.items():
            if name not in kind.own:
                known = f"one of {', '.join(kind.own)}" if kind.own else "none"
                raise TypeError(f"{name}: expected a parameter of {activation}, {known}, got {name}={value!r}")
            _check_positive(name, value) if kind.own[name][1] else check.number(name, value)
        if kind.has_up and not (limit is None and up_shift == 0):
            raise ValueError(
                f"limit, up_shift: expected None and 0 of {activation}, which bounds gate and up by"
                f" {', '.join(kind.own)}, got {limit} and {up_shift}"
            )
        values = [float(own.get(name, default)) for name, (default, _) in kind.own.items()]
        object.__setattr__(self, "activation", activation)
        object.__setattr__(self, "limit", None if limit is None else float(limit))
        object.__setattr__(self, "up_shift", float(up_shift))
        object.__setattr__(self, "interleaved", interleaved)
        object.__setattr__(self, "params", (0.0 if limit is None else float(limit), float(up_shift), *values))

    @property
    def own(self) -> dict[str, float]:
        """The activation's own parameters."""
        return dict(zip(_KINDS[self.activation].own, self.params[2:], strict=True))

    def replace(self, **changes: Any) -> Gate:
        """The same gate but for ``changes``, arguments of :class:`Gate`."""
        return Gate(**{"activation": self.activation, **self._options(), **changes})

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"limit": self.limit, "up_shift": self.up_shift, "interleaved": self.interleaved}
        return {**self.own, **options}

    def _texts(self) -> list[str]:
        defaults = {"limit": None, "up_shift": 0.0, "interleaved": False}
        return [f"{n}={v!r}" for n, v in self._options().items() if n not in defaults or v != defaults[n]]

    def __repr__(self) -> str:
        return f"Gate({', '.join([repr(self.activation), *self._texts()])})"

    def __str__(self) -> str:
        """As reports name it."""
        return self.activation + (f"({', '.join(self._texts())})" if self._texts() else "")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Gate) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return self.activation, self.params, self.interleaved

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name}: a Gate does not change, make another one by Gate.replace({name}=...)")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{name}: a Gate does not change")

    def __fx_create_arg__(self, tracer: Any) -> Any:
        """In a graph of torch.fx's symbolic_trace the call that makes it."""
        return tracer.create_node("call_function", Gate, (self.activation,), self._options())


def _check_positive(name: str, value: Any) -> None:
    check.number(name, value)
    if value <= 0:
        raise ValueError(f"{name}: expected a positive number, got {value}")


MODEL_GATES: dict[str, Gate] = {}  # while its own gates are made
MODEL_GATES = {
    "quick_gelu": Gate("swish", beta=1.702),
    "swiglu_oai": Gate("swish", beta=1.702, limit=7.0, up_shift=1.0),
    "clamped_silu": Gate("silu", limit=10.0),
}
_BY_NAME = {name: Gate(name) for name in (*NAMES, *MODEL_GATES)}

Gate.__module__ = "ffn_ops"
pytree.register_constant(Gate)  # torch.compile and torch.export take it as they take a string
torch.serialization.add_safe_globals([Gate])  # as strings are


def activations() -> tuple[str, ...]:
    """Returns the names of all activations. :class:`Gate` has their parameters, and the gates of models.

    Example:
        >>> "silu" in ffn_ops.activations()
        True
    """
    return NAMES


def own_names(activation: str) -> tuple[str, ...]:
    """The activation's own parameters, in the order in which operators take them."""
    return tuple(_KINDS[activation].own)


def as_gate(activation: str | Gate, *, gated: bool, one_weight: bool = False) -> Gate:
    """The gate that ``activation=`` stands for; ``one_weight``: it holds the rows of gate and up.

    Raises: TypeError, ValueError.
    """
    gate = activation if isinstance(activation, Gate) else _named(activation)
    if not gated and not (gate.limit is None and gate.up_shift == 0):
        got = f"{gate.limit} and {gate.up_shift}"
        raise ValueError(f"limit, up_shift: expected None and 0 where nothing is gated, got {got}")
    if gate.interleaved and not one_weight:
        where = "gate and up have a tensor each" if gated else "nothing is gated"
        raise ValueError(f"interleaved: expected False where {where}, got True")
    return gate


def _named(activation: str) -> Gate:
    if not isinstance(activation, str) or activation not in _BY_NAME:
        check.choice("activation", activation, tuple(_BY_NAME))  # raises
    return _BY_NAME[activation]


def gate_from(activation: str, params: Sequence[float], interleaved: bool = False) -> Gate:
    """The gate that an operator was given. Raises: TypeError, ValueError."""
    check.choice("activation", activation, NAMES)
    own = _KINDS[activation].own
    if len(params) != 2 + len(own):
        raise ValueError(f"params: expected {2 + len(own)} numbers of {activation}, got {len(params)}")
    names: dict[str, Any] = dict(zip(own, params[2:], strict=True))
    return Gate(activation, limit=params[0] or None, up_shift=params[1], interleaved=interleaved, **names)


def check_gate(
    activation: str, params: Sequence[float], *, gated: bool, interleaved: bool = False, one_weight: bool = False
) -> None:
    """What fake operators check of their arguments: as :func:`as_gate`."""
    as_gate(gate_from(activation, params, interleaved), gated=gated, one_weight=one_weight)
