"""A feed-forward layer inside a block that does more: its two linear layers and its activation are children of a block
with attention and norms (BART, Whisper, OPT). This file finds the part and defines a call.

A copy of the block's own forward runs, which calls three methods in place of the three children. The first returns its
input. The activation returns it with one more dimension, as a sign that it was called. The last computes all three by
one operator.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils import _pytree

from .. import _checks as check
from ..modules import PLAIN_TENSORS
from .alike import Reads, watched
from .form import Form, explain_between
from .layer import CALLS, PLAN, Plan, fuses, whole
from .probe import (
    Event,
    Probe,
    ProbeError,
    Trace,
    aside,
    asked_besides,
    enough_rows,
    linear_shape,
    original_class,
    why_eval_only,
)

FIRST, BETWEEN, LAST = "_ffn_ops_first", "_ffn_ops_between", "_ffn_ops_last"
Names = tuple[str, str, str]  # children: first, activation (or an attribute), last


def renamed(function: Any, names: Names) -> Any:
    """Copies a function so that it reads the attributes FIRST, BETWEEN and LAST in place of the given names.

    For a decorated function, it also copies the decorator's function, with the copy in its closure.
    """
    code, closure = function.__code__, function.__closure__
    if names[0] in code.co_names:
        new = dict(zip(names, (FIRST, BETWEEN, LAST), strict=True))
        code = code.replace(co_names=tuple([new.get(name, name) for name in code.co_names]))
    else:
        inner = function.__wrapped__
        copied = types.CellType(renamed(inner, names))
        closure = tuple([copied if cell.cell_contents is inner else cell for cell in closure or ()])
    copy = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def undecorated(function: Any, first: str, last: str) -> Any:
    """The function whose own code reads both children, below decorators that hold it in their closure, or None."""
    while isinstance(function, types.FunctionType):
        if {first, last} <= set(function.__code__.co_names):
            return function
        inner = getattr(function, "__wrapped__", None)
        if not any(cell.cell_contents is inner for cell in function.__closure__ or ()):
            return None
        function = inner
    return None


def method_with(cls: type, first: str, last: str) -> str | None:
    """The method whose own code reads both children."""
    for name in ("forward", *[name for name in dir(cls) if not name.startswith("__")]):
        if undecorated(inspect.getattr_static(cls, name, None), first, last) is not None:
            return name
    return None


class Part:
    """Probes the part of a layer once. Raises: ProbeError, or any error of the layer's own code."""

    def __init__(self, layer: nn.Module, method: str, first: str, last: str, reads: Reads) -> None:
        self.layer, self.method, self.reads = layer, method, reads
        self.first, self.last = first, last
        self.width = linear_shape(layer._modules[first])[0]  # type: ignore[arg-type,index]
        self.names: Names = (first, "", last)
        self.function = inspect.getattr_static(original_class(layer), method)
        self.required = asked_besides(self.function)
        full = (*enough_rows(3, self.width), self.width)
        self.given_again = False  # forward's further arguments are None, or the input again (such as a residual)
        try:
            base = self._holds(full, False, torch.float32, None)
        except ProbeError:
            raise
        except Exception:
            if not self.required:
                raise
            self.given_again = True
            base = self._holds(full, False, torch.float32, None)
        self.form: Form = base[0]
        self.rank = base[1]
        self._holds((1, 1, self.width), False, torch.float32, self.form)
        self.dtypes = tuple([each for each in check.DTYPES if self._also(False, each)])
        self.eval_only = why_eval_only(lambda: self._also(True, torch.float32), f"between {first} and {last}")

    def _also(self, training: bool, dtype: torch.dtype) -> bool:
        try:
            self._holds((*enough_rows(3, self.width), self.width), training, dtype, self.form)
        except Exception:
            return False
        return True

    def _holds(
        self, shape: tuple[int, ...], training: bool, dtype: torch.dtype, known: Form | None
    ) -> tuple[Form, int]:
        seen = self._run(shape, training, dtype, None)
        at = [i for i, event in enumerate(seen.events) if event.path in (self.first, self.last)]
        if [seen.events[i].path for i in at] != [self.first, self.last]:
            raise ProbeError(f"it does not call {self.first} and {self.last} once each, one after the other")
        given, result = (seen.events[i] for i in at)
        if at[1] != at[0] + 1:
            raise ProbeError(f"{seen.events[at[0] + 1].path} stands between {self.first} and {self.last}")
        ran = [path for path, i in zip(seen.run, seen.run_at, strict=True) if i == at[1]]
        form = explain_between(given, result, ran, known)
        if known is None:
            self.names = (self.first, self._activation(ran), self.last)
        elif form != known:
            raise ProbeError("what it computes depends on how it is called")
        self._check_alike(seen, self._run(shape, training, dtype, self.names), given)
        return form, given.input.dim()

    def _activation(self, ran: Iterable[str]) -> str:
        children = {path.split(".")[0] for path in ran}
        found = [name for name in children if type(self.layer._modules[name]) is not nn.Dropout]
        if not found:
            asked = undecorated(self.function, self.first, self.last).__code__.co_names
            found = [n for n in dict.fromkeys(asked) if callable(vars(self.layer).get(n))]
        if len(found) != 1:
            raise ProbeError(f"what stands between {self.first} and {self.last} is neither a child nor an attribute")
        return found[0]

    def _run(self, shape: tuple[int, ...], training: bool, dtype: torch.dtype, names: Names | None) -> Trace:
        probe = Probe(dtype, training, 1, self.reads, dropout_is_stub=False)
        with aside():
            x = probe.numbers(shape, dtype)
            probe.trace.x = x.clone()
            hollow = probe.hollow_of(self.layer, "")
            # Through nn.Module, the following would count as reading every attribute.
            if names:
                cls: Any = original_class(self.layer)
                object.__setattr__(hollow, "__class__", _hollow_class(cls, self.method, names))
            own = object.__getattribute__(hollow, "__dict__")
            before = dict(own)
            others = [x.clone() if self.given_again else None for _ in range(self.required)]
            probe.trace.y = getattr(hollow, self.method)(x, *others)
            if own.keys() != before.keys() or any(before[k] is not v for k, v in own.items()):
                raise ProbeError("it sets attributes of its own in its forward")
            if not torch.equal(x, probe.trace.x):
                raise ProbeError("it modifies its input in place")
        return probe.trace

    def _check_alike(self, seen: Trace, parted: Trace, given: Event) -> None:
        """All calls and the result are as before, with the part's input in place of its children's."""
        both = list(zip(seen.events, parted.events, strict=False))
        ok = len(seen.events) == len(parted.events)
        for a, b in both:
            expected = given.input if a.path == self.last else a.input
            ok &= a.path == b.path and _same(expected, b.input) and _same(a.output, b.output)
        leaves, others = (_pytree.tree_leaves(trace.y) for trace in (seen, parted))
        ok &= len(leaves) == len(others)
        pairs = list(zip(leaves, others, strict=False))
        ok &= all([_same(a, b) if isinstance(a, Tensor) else a is b or a == b for a, b in pairs])
        if not ok:
            raise ProbeError(f"it does more than an activation between {self.first} and {self.last}")


def _same(a: Tensor, b: Any) -> bool:
    same = isinstance(b, Tensor) and a.shape == b.shape and a.dtype is b.dtype
    return same and torch.equal(a.nan_to_num(), b.nan_to_num())


@functools.cache
def _hollow_class(cls: Any, method: str, names: Names) -> Any:
    """For a stub copy: the stubs of first and last draw the same numbers as in the layer's own forward."""

    def first(self: Any, x: Tensor) -> Tensor:
        self._modules[names[0]](x)
        return x

    def last(self: Any, x: Tensor) -> Any:
        stub = self._modules[names[2]]
        return stub.answer(x[0], stub.shape[1])

    kind = watched(cls)
    members = {
        method: renamed(inspect.getattr_static(cls, method), names), FIRST: first, BETWEEN: lambda self, z: z[None],
        LAST: last, "__module__": cls.__module__,
    }  # fmt: skip
    return type(kind)(cls.__name__, (kind,), members)


def methods(names: Names, cls: Any, method: str) -> dict[str, Any]:
    """For the class that replaces a block's: its forward, and the methods that this calls in place of the children."""
    own = inspect.getattr_static(cls, method)
    inner = renamed(own, names)
    name, activation, _ = names

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (inner if getattr(self, PLAN, None) else own)(self, *args, **kwargs)

    def first(self: Any, x: Any) -> Any:
        return x if fuses(self, self._ffn_ops_plan, x) else self._modules[name](x)

    def between(self: Any, z: Any) -> Any:
        return z[None] if _passed(self._ffn_ops_plan, z) else _child(self, activation)(z)

    def last(self: Any, h: Any) -> Any:
        plan = self._ffn_ops_plan
        asked = h.dim() - plan.ranks[0] if _passed(plan, h) else 0
        if not is_compiling():
            calls = self.__dict__[CALLS]
            calls.fused, calls.own = calls.fused + (asked == 1), calls.own + (asked != 1)
        if not _passed(plan, h):
            return self._modules[names[2]](h)
        if asked == 1:
            return whole(self, plan, h[0])
        h = self._modules[name](h[(0,) * asked])  # other arguments may take another path through forward
        for _ in range(asked):
            h = _child(self, activation)(h)
        return self._modules[names[2]](h)

    return {method: forward, FIRST: first, BETWEEN: between, LAST: last}


def _child(layer: nn.Module, name: str) -> Any:
    return layer._modules.get(name) or vars(layer)[name]


def _passed(plan: Plan, x: Any) -> bool:
    """Passes on the part's input, which is narrower than the first layer's output."""
    return type(x) in PLAIN_TENSORS and x.shape[-1] == plan.widths[0]
