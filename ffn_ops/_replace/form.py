"""What a traced layer computes, as a Form: which children are gate, up and down, which activation, and what surrounds
them.

A form is accepted only if it explains every call of a child and every value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..reference import ACTIVATIONS
from .probe import Event, ProbeError, Trace

ADD_INPUT = ""  # a step after the layer: the residual connection


@dataclass(frozen=True)
class Form:
    """``tail(down(dropout(act(gate x) * up x)))``. Paths are relative to the layer."""

    gates: tuple[str, ...]  # of a plain FFN its first layer; several where branches are summed
    ups: tuple[str, ...]  # none: plain
    down: str | None
    halves: str | None  # gate and up are the rows of one layer: "gate first" or "up first"
    up_called_first: bool
    activation: str
    beta: float
    limit: float | None
    up_shift: float
    head: tuple[str | tuple[int, ...], ...]  # steps before the layer: children, ``reshape(-1, *sizes)``
    dropout: str | None  # between activation and down
    tail: tuple[str, ...]  # steps after the layer: children, and ADD_INPUT
    run: tuple[str, ...]  # modules whose own forward is bypassed
    reads_weights: bool

    @property
    def act(self) -> dict[str, Any]:
        """The gate's arguments for the operators."""
        return {"activation": self.activation, "beta": self.beta, "limit": self.limit, "up_shift": self.up_shift}

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.gates, *self.ups, *(() if self.down is None else (self.down,)))

    @property
    def _act(self) -> str:
        return f"swish(beta={self.beta:g})" if self.activation == "swish" else self.activation

    def _gate(self, gate: str, up: str) -> str:
        if self.limit is not None:
            gate, up = f"min({gate}, {self.limit:g})", f"clamp({up}, {self.limit:g})"
        return f"{self._act}({gate}) * {f'({up} + {self.up_shift:g})' if self.up_shift else up}"

    def __str__(self) -> str:
        inner = "x"
        for step in self.head:
            inner = f"{step}({inner})" if isinstance(step, str) else f"{inner}.view{(-1, *step)}"
        if self.halves is not None:
            text = f"{self._gate('gate', 'up')} of {self.gates[0]}({inner}), {self.halves}"
        elif self.ups:
            pairs = zip(self.gates, self.ups, strict=True)
            text = " + ".join([self._gate(f"{gate}({inner})", f"{up}({inner})") for gate, up in pairs])
        else:
            text = f"{self._act}({self.gates[0]}({inner}))"
        for path in (self.dropout, self.down, *self.tail):
            if path is not None:
                text = f"{text} + x" if path == ADD_INPUT else f"{path}({text})"
        return text


_Act = tuple[str, float, float | None, float]  # name, beta, limit, up_shift


@dataclass(frozen=True)
class _Found:
    gates: tuple[int, ...]
    ups: tuple[int, ...]
    act: _Act


def explain(trace: Trace, known: Form | None = None) -> Form:
    """Returns the form of a trace. ``known`` is the expected form; it decides where rounding would allow several
    activations, or where a reshape does nothing.

    Raises: ProbeError, with the reason.
    """
    events = list(trace.events)
    x = trace.x
    head: list[str | tuple[int, ...]] = []
    while events:
        given = events[0].input
        if known and tuple(x.shape[1:]) in known.head[len(head) : len(head) + 1]:
            head.append(tuple(x.shape[1:]))
        if not _same(given, x):
            if given.dim() < 2 or given.shape[0] == 0 or not _same(given.reshape(-1), x.reshape(-1)):
                break
            head.append(tuple(given.shape[1:]))
            x = given
        if events[0].kind == "linear":
            break
        if events[0].kind == "other":
            raise ProbeError(f"{events[0].path}, the first step, may change the shape")
        head.append(events[0].path)
        x = events.pop(0).output
    first = []
    while events and events[0].kind == "linear" and _same(events[0].input, x):
        first.append(events.pop(0))
    if not first:
        raise ProbeError("no linear child is called with the layer's input")
    dropout = None
    if len(events) > 1 and events[0].kind == "dropout" and events[1].kind == "linear":
        dropout = events.pop(0)
        if not _same(events[0].input, dropout.output):
            raise ProbeError(f"{events[0].path} is not called with the output of {dropout.path}")
    down = events.pop(0) if events and events[0].kind == "linear" else None
    # The output of the activation and the gate is the input of the next child.
    following = dropout or down or (events[0] if events else None)
    hidden = trace.y if following is None else following.input
    halves = None
    act = None if known is None else _act_of(known)
    gates: tuple[str, ...]
    ups: tuple[str, ...] = ()
    if len(first) == 1 and hidden.shape[-1] * 2 == first[0].output.shape[-1]:
        both = first[0].output.double().chunk(2, -1)
        found = _activation(hidden, both, act)
        halves = "gate first" if found.gates == (0,) else "up first"
        gates = (first[0].path,)
    else:
        found = _activation(hidden, [event.output.double() for event in first], act)
        gates = tuple([first[i].path for i in found.gates])
        ups = tuple([first[i].path for i in found.ups])
    if down is None and not (ups and len(gates) >= 1):
        if any(event.kind == "linear" for event in events):
            raise ProbeError(
                f"{events[0].path}, a norm or an activation with parameters, is between its linear children"
            )
        raise ProbeError("an activation follows one linear child, and there is no second one")
    paths = [event.path for event in first] + ([down.path] if down else [])
    if len(set(paths)) != len(paths):
        raise ProbeError("it calls a child twice")
    return Form(
        gates, ups, None if down is None else down.path, halves, bool(ups) and found.ups[0] < found.gates[0],
        *found.act, tuple(head), None if dropout is None else dropout.path,
        _tail(trace, events, hidden if down is None else down.output), tuple([path for path in trace.run if path]),
        trace.reads_weights,
    )  # fmt: skip


def explain_between(first: Event, last: Event, run: Sequence[str], known: Form | None) -> Form:
    """Returns the form of ``last(act(first(x)))`` in a layer that does more around them. Raises: ProbeError."""
    if first.output.shape != last.input.shape:
        raise ProbeError(f"{last.path} is called with another shape than {first.path} returns")
    found = _activation(last.input, [first.output.double()], _act_of(known) if known else None)
    return Form((first.path,), (), last.path, None, False, *found.act, (), None, (), tuple(run), False)


def _act_of(form: Form) -> _Act:
    return form.activation, form.beta, form.limit, form.up_shift


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype is b.dtype and torch.equal(a, b)


def _tail(trace: Trace, events: Sequence[Event], value: Tensor) -> tuple[str, ...]:
    steps = []
    added = False
    for event in events:
        if not _same(event.input, value):
            if added or value.shape != trace.x.shape or not _same(event.input, value + trace.x):
                if event.kind == "linear":
                    raise ProbeError(f"{event.path} is an additional linear layer")
                raise ProbeError(f"{event.path} is not called with the previous result")
            steps.append(ADD_INPUT)
            added = True
        steps.append(event.path)
        value = event.output
    if not _same(trace.y, value):
        if added or value.shape != trace.x.shape or not _same(trace.y, value + trace.x):
            raise ProbeError("it does not return the output of its last child")
        steps.append(ADD_INPUT)
    return tuple(steps)


def _activation(hidden: Tensor, outputs: Sequence[Tensor], known: _Act | None) -> _Found:
    """Finds which linear children's outputs are gates and ups, and which activation makes ``hidden`` of them."""
    n = len(outputs)
    if any(output.shape != hidden.shape for output in outputs):
        raise ProbeError("what follows its first linear children has another shape than their output")
    pairings: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    if n == 1:
        pairings = [((0,), ())]
    elif n % 2 == 0:
        half = n // 2
        firsts, seconds = tuple(range(half)), tuple(range(half, n))
        evens, odds = tuple(range(0, n, 2)), tuple(range(1, n, 2))
        pairings = [(firsts, seconds), (seconds, firsts), (evens, odds), (odds, evens)]
    for gates, ups in pairings:
        pairs: list[tuple[Tensor, Tensor | None]] = [(outputs[0], None)]
        if ups:
            pairs = [(outputs[g], outputs[u]) for g, u in zip(gates, ups, strict=True)]
        for act in [known] if known else _candidates(hidden, pairs):
            if _fits(hidden, pairs, act):
                return _Found(gates, ups, act)
    raise ProbeError("no activation of the operators matches what it computes between its linear children")


def _candidates(hidden: Tensor, pairs: Sequence[tuple[Tensor, Tensor | None]]) -> Iterator[_Act]:
    named = [(name, 1.0) for name in ACTIVATIONS if name != "swish"]
    yield from [(name, beta, None, 0.0) for name, beta in named]
    if len(pairs) > 1:
        return
    ((gate, up),) = pairs
    for shift in (0.0,) if up is None else (0.0, 1.0):
        near = torch.ones_like(gate, dtype=torch.bool) if up is None else (up.abs() < 0.5) & (gate < 0.5)
        beta = _beta(hidden[near], gate[near], None if up is None else up[near] + shift)
        acts = [*named, *([] if beta is None else [("swish", beta)])]
        yield from [(*act, None, shift) for act in (acts if shift else acts[len(named) :])]
        if up is None:
            return
        for name, beta in acts:  # where up is far from zero it is at its limit
            value = ACTIVATIONS[name](gate, beta)
            far = (up.abs() >= 25) & (gate < 0.5) & (value.abs() > 0.02)
            if far.any():
                limit = float(f"{((hidden.double() / value)[far] - shift).abs().median().item():.6g}")
                if 0.5 <= limit <= 25:
                    yield name, beta, limit, shift


def _fits(hidden: Tensor, pairs: Sequence[tuple[Tensor, Tensor | None]], act: _Act) -> bool:
    """Equality up to the rounding of several steps in the dtype of ``hidden``.

    ``size``: an activation near 0 that is a difference of larger terms has an error of an epsilon of these terms.
    """
    name, beta, most, shift = act
    eps = torch.finfo(hidden.dtype).eps
    expected = torch.zeros_like(hidden, dtype=torch.float64)
    size = torch.zeros_like(expected)
    for gate, up in pairs:
        if most is not None and up is not None:
            gate, up = gate.clamp(max=most), up.clamp(-most, most)
        value = ACTIVATIONS[name](gate, beta)
        if shift and up is not None:
            size += (value * up).abs() + (value * shift).abs()
            up = up + shift
        expected += value if up is None else value * up
        size += (gate if up is None else gate * up).abs()
        size += (value if up is None else value * up).abs()
    limit = 4 * eps * size + 8 * eps * expected.abs() + torch.finfo(hidden.dtype).tiny
    largest = torch.finfo(hidden.dtype).max
    error = (hidden.double().clamp(-largest, largest) - expected.clamp(-largest, largest)).abs()
    return bool((error <= limit).all())


def _beta(hidden: Tensor, gate: Tensor, up: Tensor | None) -> float | None:
    """The factor in ``z * sigmoid(beta * z)``, to six digits: the median over single values."""
    share = hidden.double() / (gate if up is None else gate * up)
    telling = (gate.abs() > 0.3) & (gate.abs() < 3) & (share > 1e-3) & (share < 1 - 1e-3)
    if not telling.any():
        return None
    return float(f"{(torch.logit(share[telling]) / gate[telling]).median().item():.6g}")
