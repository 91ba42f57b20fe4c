# SPDX-License-Identifier: BSD-3-Clause
"""What a traced layer computes, as a Form: which children are gate, up and down, which activation, and what surrounds
them.

A form is accepted only if it explains every call of a child and every value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._gate import NAMES, Gate
from ..reference import UPS, gated_act
from .probe import Event, ProbeError, Trace

BY_TORCH = ("relu", "sigmoid", "tanh", "gelu", "silu", "identity")  # not gelu_tanh: ours is twice as fast
_MOST_STEPS, _NUDGE = 30, 1e-6  # of _with_numbers
ADD_INPUT = ""  # a step after the layer: the residual connection


@dataclass(frozen=True)
class Form:
    """``tail(down(dropout(act(gate x) * up x)))``. Paths are relative to the layer."""

    gates: tuple[str, ...]  # of a plain FFN its first layer; several where branches are summed
    ups: tuple[str, ...]  # none: plain
    down: str | None
    halves: str | None  # gate and up are the rows of one layer: "gate first" or "up first"
    up_called_first: bool
    gate: Gate  # where `learned` is given, of its name alone
    learned: str | None  # the activation, a child with parameters of its own
    head: tuple[str | tuple[int, ...], ...]  # steps before the layer: children, ``reshape(-1, *sizes)``
    dropout: str | None  # between activation and down
    early: bool  # or between the first layer and the activation
    tail: tuple[str, ...]  # steps after the layer: children, and ADD_INPUT
    run: tuple[str, ...]  # modules whose own forward is bypassed
    reads_weights: bool

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.gates, *self.ups, *(() if self.down is None else (self.down,)))

    @property
    def _act(self) -> str:
        if self.learned is not None:
            return self.gate.activation
        return str(self.gate.replace(limit=None, up_shift=0.0))

    def _gate(self, gate: str, up: str) -> str:
        limit, shift = self.gate.limit, self.gate.up_shift
        if self.gate.activation in UPS:
            return f"{self._act}({gate}, {up})"
        if limit is not None:
            gate, up = f"min({gate}, {limit:g})", f"clamp({up}, {limit:g})"
        return f"{self._act}({gate}) * {f'({up} + {shift:g})' if shift else up}"

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
            text = f"{self.gates[0]}({inner})"
            text = f"{self._act}({self.dropout}({text}))" if self.early else f"{self._act}({text})"
        for path in (None if self.early else self.dropout, self.down, *self.tail):
            if path is not None:
                text = f"{text} + x" if path == ADD_INPUT else f"{path}({text})"
        return text


@dataclass(frozen=True)
class _Found:
    gates: tuple[int, ...]
    ups: tuple[int, ...]
    gate: Gate


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
    learned = None
    if len(first) == 1 and events and events[0].learned and _same(events[0].input, first[0].output):
        learned = events.pop(0)
    dropout = None
    early = _is_early(first, events)
    if early:
        dropout = events.pop(0)
        first = [replace(first[0], output=dropout.output)]
    elif len(events) > 1 and events[0].kind == "dropout" and events[1].kind == "linear":
        dropout = events.pop(0)
        if not _same(events[0].input, dropout.output):
            raise ProbeError(f"{events[0].path} is not called with the output of {dropout.path}")
    down = events.pop(0) if events and events[0].kind == "linear" else None
    # The output of the activation and the gate is the input of the next child.
    following = (None if early else dropout) or down or (events[0] if events else None)
    hidden = trace.y if following is None else following.input
    between = following is not None and following is not dropout and following is not down
    if between and len(first) == 1 and torch.equal(hidden.reshape(-1), first[0].output.reshape(-1)):
        _check_later(events, "identity")
    halves = None
    gate = None if known is None else known.gate
    gates: tuple[str, ...]
    ups: tuple[str, ...] = ()
    if learned is not None:
        if down is None or not _same(hidden, learned.output):
            raise ProbeError(f"{learned.path} is not all that is between its linear children")
        found = _Found((0,), (), Gate(learned.learned))
        gates = (first[0].path,)
    elif len(first) == 1 and hidden.shape[-1] * 2 == first[0].output.shape[-1]:
        both = first[0].output.double().chunk(2, -1)
        found = _activation(hidden, both, gate)
        halves = "gate first" if found.gates == (0,) else "up first"
        gates = (first[0].path,)
    else:
        found = _activation(hidden, [event.output.double() for event in first], gate)
        gates = tuple([first[i].path for i in found.gates])
        ups = tuple([first[i].path for i in found.ups])
    if down is None and not ups and halves is None:
        _check_later(events, found.gate.activation)
    paths = [event.path for event in first] + ([down.path] if down else [])
    if len(set(paths)) != len(paths):
        raise ProbeError("it calls a child twice")
    return Form(
        gates, ups, None if down is None else down.path, halves, bool(ups) and found.ups[0] < found.gates[0],
        found.gate, None if learned is None else learned.path, tuple(head),
        None if dropout is None else dropout.path, early,
        _tail(trace, events, hidden if down is None else down.output), tuple([path for path in trace.run if path]),
        trace.reads_weights,
    )  # fmt: skip


def _is_early(first: Sequence[Event], events: Sequence[Event]) -> bool:
    """Dropout acts on what one linear layer gives, and what it gives is not what the next one gets."""
    if len(first) != 1 or len(events) < 2 or [event.kind for event in events[:2]] != ["dropout", "linear"]:
        return False
    return _same(events[0].input, first[0].output) and not _same(events[1].input, events[0].output)


def _check_later(events: Sequence[Event], act: str) -> None:
    """An activation that a linear layer follows after more than dropout. Raises: ProbeError where that is no FFN, or
    nothing would be gained."""
    later = [i for i, event in enumerate(events) if event.kind == "linear"]
    if not later:
        raise ProbeError("an activation follows one linear child, and there is no second one")
    if act in BY_TORCH:
        where = next((event.path for event in events[: later[0]] if event.kind != "dropout"), events[0].path)
        alone = f", and torch has {act} as one operator" if act != "identity" else ""
        raise ProbeError(f"{where}, a norm or an activation with parameters, is between its linear children{alone}")


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


def _activation(hidden: Tensor, outputs: Sequence[Tensor], known: Gate | None) -> _Found:
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
        for gate in [known] if known else _candidates(hidden, pairs):
            if _fits(hidden, pairs, gate):
                return _Found(gates, ups, gate)
    raise ProbeError("no activation of the operators matches what it computes between its linear children")


def _candidates(hidden: Tensor, pairs: Sequence[tuple[Tensor, Tensor | None]]) -> Iterator[Gate]:
    named = [Gate(name) for name in NAMES if name not in ("swish", "leaky_relu") and name not in UPS]
    yield from named
    if len(pairs) > 1:
        return
    ((gate, up),) = pairs
    for shift in (0.0,) if up is None else (0.0, 1.0):
        near = torch.ones_like(gate, dtype=torch.bool) if up is None else (up.abs() < 0.5) & (gate < 0.5)
        acts = [*named, *_fitted(hidden[near], gate[near], None if up is None else up[near] + shift)]
        yield from [act.replace(up_shift=shift) for act in (acts if shift else acts[len(named) :])]
        if up is None:
            break
        for act in acts:
            for limit in _limits(hidden.double(), gate, up, shift, gated_act(gate, activation=act)):
                if 0.5 <= limit <= 25:
                    yield act.replace(limit=float(f"{limit:.6g}"), up_shift=shift)
    if up is not None:
        for name in UPS:
            yield from _with_numbers(Gate(name), hidden.double(), gate, up)


def _limits(hidden: Tensor, gate: Tensor, up: Tensor, shift: float, value: Tensor) -> Iterator[float]:
    """What the limit may be, if ``value`` is the activation of gates that are below it."""
    far = (up.abs() >= 25) & (gate < 0.5) & (value.abs() > 0.02)  # up is at its limit, which is what the share says
    if far.any():
        yield ((hidden / value)[far] - shift).abs().median().item()
    power = {25.0: 1.0, 625.0: 2.0}.get(value[gate == 25].max().item() if (gate == 25).any() else 0.0)
    if power is None or shift:
        return
    # relu and its square are 0 below 0, so few numbers are there. Where gate is at its limit: up is not, or is, too.
    at = (gate >= 25) & (hidden != 0)
    for share, root in ((hidden / up)[at], power), (hidden[at], power + 1):
        yield from share.abs().pow(1 / root).tolist()


def _with_numbers(start: Gate, hidden: Tensor, gate: Tensor, up: Tensor) -> Iterator[Gate]:
    """A gate with sides of its own, with the numbers that fit best: least squares by Newton's steps from its defaults,
    then to six digits."""
    yield start
    if not bool(hidden.isfinite().all()):
        return
    names = list(start.own)
    units = torch.eye(len(names), dtype=torch.float64, device="cpu")
    numbers = torch.tensor(list(start.own.values()), dtype=torch.float64, device="cpu")
    weight = 1 / (hidden.abs() + 1e-2)

    def values(numbers: Tensor) -> Tensor:
        form = start.replace(**dict(zip(names, numbers.tolist(), strict=True)))
        return (gated_act(gate, up, activation=form) * weight).flatten()

    for _ in range(_MOST_STEPS):
        now = values(numbers)
        moved = [values(numbers * (1 + _NUDGE * unit)) - now for unit in units]
        step = torch.linalg.lstsq(torch.stack(moved, -1) / _NUDGE, (hidden * weight).flatten() - now).solution
        if not bool(step.isfinite().all()):
            return
        numbers = numbers * (1 + step.clamp(-0.5, 1.0))
        if float(step.abs().max()) < 1e-9:
            break
    yield start.replace(**{name: float(f"{number:.6g}") for name, number in zip(names, numbers.tolist(), strict=True)})


def _fits(hidden: Tensor, pairs: Sequence[tuple[Tensor, Tensor | None]], form: Gate) -> bool:
    """Equality up to the rounding of several steps in the dtype of ``hidden``.

    ``size``: an activation near 0 that is a difference of larger terms has an error of an epsilon of these terms.
    """
    eps = torch.finfo(hidden.dtype).eps
    expected = torch.zeros_like(hidden, dtype=torch.float64)
    size = torch.zeros_like(expected)
    for gate, up in pairs:
        if form.limit is not None and up is not None:
            gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
        if up is not None and form.up_shift:
            value = gated_act(gate, activation=form.replace(limit=None, up_shift=0.0))
            size += (value * up).abs() + (value * form.up_shift).abs()
        value = gated_act(gate, up, activation=form)
        expected += value
        shifted = None if up is None else up + form.up_shift
        size += (gate if shifted is None else gate * shifted).abs() + value.abs()
    limit = 4 * eps * size + 8 * eps * expected.abs() + torch.finfo(hidden.dtype).tiny
    largest = torch.finfo(hidden.dtype).max
    error = (hidden.double().clamp(-largest, largest) - expected.clamp(-largest, largest)).abs()
    return bool((error <= limit).all())


def _fitted(hidden: Tensor, gate: Tensor, up: Tensor | None) -> Iterator[Gate]:
    """Activations with a number that ``hidden`` tells, to six digits: the median over single values."""
    share = hidden.double() / (gate if up is None else gate * up)
    telling = (gate.abs() > 0.3) & (gate.abs() < 3) & (share > 1e-3) & (share < 1 - 1e-3)
    if telling.any():
        yield Gate("swish", beta=float(f"{(torch.logit(share[telling]) / gate[telling]).median().item():.6g}"))
    slopes = share[(gate < -0.3) & (gate > -30) & share.isfinite()]
    if slopes.numel():
        yield Gate("leaky_relu", slope=float(f"{slopes.median().item():.6g}"))
