# SPDX-License-Identifier: BSD-3-Clause
"""Finds the plan of a module, or the reason why it is left alone. It changes nothing."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..modules import GLU, FeedForward, GatedFFN, PlainFFN, has_own_forward
from .alike import Found, Known, Reads, structure
from .children import LINEARS, has_only_weights
from .form import Form, explain
from .layer import Plan, child, plan
from .part import Part, candidates, cut, methods_with
from .probe import ProbeError, Run, aside, enough_rows, linear_shape, norm_width, original_class, trace, why_eval_only
from .segment import FromOutsideError, Names, named

# Methods that hold a feed-forward: of transformers' encoders and torch's nn.TransformerEncoderLayer.
METHODS = ("forward", "feed_forward_chunk", "feed_forward_chunk_query", "ff_chunk", "_ff_block")
OURS = (FeedForward, PlainFFN, GLU, GatedFFN)  # these fuse themselves
_MOST_BRANCHES = 16
_MANY = 512  # most modules inside a candidate layer


@dataclass(frozen=True)
class Finding:
    plan: Plan | None
    reason: str = ""
    lacks_child: bool = False  # the class's method uses a child that this instance does not have
    outside: bool = False  # an argument goes in between its linear layers


def linear_children(layer: nn.Module, most: int) -> dict[str, tuple[int, int]]:
    """Paths and (in, out) of the outermost linear layers inside; stops at one more than ``most``."""
    found: dict[str, tuple[int, int]] = {}

    def look(module: nn.Module, prefix: str) -> None:
        for name, below in module._modules.items():
            if below is None or len(found) > most or isinstance(below, OURS):
                continue
            shape = linear_shape(below)
            if shape is None:
                look(below, f"{prefix}{name}.")
            else:
                found[prefix + name] = shape

    look(layer, "")
    return found


def plausible(layer: nn.Module) -> bool:
    """True if the linear layers inside have the shapes of one feed-forward layer."""
    most = 2 * _MOST_BRANCHES + 1
    shapes = list(linear_children(layer, most).values())
    if not 2 <= len(shapes) <= most or sum(1 for _ in layer.modules()) > _MANY:
        return False
    alike = [shape for shape in shapes if shapes.count(shape) >= 2]
    if len(shapes) == 2:
        (_, out), (back, _) = shapes if shapes[0][1] in (shapes[1][0], 2 * shapes[1][0]) else shapes[::-1]
        return bool(alike) or out in (back, 2 * back)
    if len(shapes) == 3:
        return any(shapes[i] == shapes[j] and shapes[3 - i - j][0] == shapes[i][1] for i, j in ((0, 1), (0, 2), (1, 2)))
    common = max(shapes, key=shapes.count)
    return shapes.count(common) == len(shapes) - len(shapes) % 2


def bottleneck(layer: nn.Module) -> tuple[str, str] | None:
    """Direct children that look like the two layers of an FFN: D to F and back, F > D."""
    shapes = {name: linear_shape(module) for name, module in layer._modules.items() if module is not None}
    known = {name: shape for name, shape in shapes.items() if shape is not None}
    for name, (a, b) in known.items():
        for other, (c, d) in known.items():
            if (b, a) == (c, d) and b > a:
                return name, other
    return None


@dataclass(frozen=True)
class _Seen:
    """The finding for a layer and for all layers that are alike."""

    form: Form | None
    reason: str = ""
    lacks_child: bool = False
    outside: bool = False
    arguments: tuple[str, ...] = ()
    idle: dict[str, Any] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    eval_only: str = ""


class Recogniser:
    """Recognises the layers of one model, looking at identical layers once."""

    def __init__(self) -> None:
        self._known: Known[Any] = Known()
        self._structures: dict[int, tuple[nn.Module, int]] = {}  # of a module by its id: which it is, and its structure
        self._numbers: dict[Hashable, int] = {}

    def once(self, layer: nn.Module, what: Hashable, look: Callable[[Reads], Found]) -> Found:
        """Returns ``look(reads)`` of this layer, or its result for a layer that is alike."""
        kept = self._structures.get(id(layer))
        if kept is None:
            tree = structure(layer, original_class)
            kept = self._structures[id(layer)] = layer, self._numbers.setdefault(tree, len(self._numbers))
        found: Found = self._known.get(layer, (what, kept[1]), look)
        return found

    def part(self, layer: nn.Module) -> Finding | None:
        """Whether some children of a layer that does more are a feed-forward; None where none have such shapes."""
        refused: list[tuple[Names, _Seen]] = []
        for names in candidates(layer):
            found: list[tuple[str, _Seen]] = []
            for method in methods_with(original_class(layer), names):
                seen = self._part(layer, method, names)
                if seen.form is None:
                    refused.append((names, seen))
                elif not found or seen == found[0][1]:
                    found.append((method, seen))
            if found:
                return _finding(layer, found[0][1], Part(names, tuple([method for method, _ in found])))
        if not refused:
            return None
        names, seen = next((each for each in refused if (each[0][0][0], each[0][1]) == bottleneck(layer)), refused[0])
        why = f"{named(names)} are children of a layer that does more than an FFN: {seen.reason}"
        return Finding(None, why, outside=seen.outside)

    def _part(self, layer: nn.Module, method: str, names: Names) -> _Seen:
        if _was_set(layer, method):
            return _Seen(None, f"{method} was set on the instance")

        def look(reads: Reads) -> _Seen:
            try:
                cls: Any = original_class(layer)
                made = cut(cls, method, names)
            except ProbeError as error:
                return _Seen(None, str(error), outside=isinstance(error, FromOutsideError))
            width = linear_shape(layer.get_submodule(names[0][0]))[0]  # type: ignore[index]
            narrowest = min(width, linear_shape(layer.get_submodule(names[1]))[0])  # type: ignore[index]
            seen = _recognise(layer, Run(method, made.part, made.children), width, narrowest, reads)
            if seen.form is not None and set(seen.form.linears) != {*names[0], names[1]}:
                return _Seen(None, "other linear layers are between")
            return seen

        return self.once(layer, (method, names), look)

    def __call__(self, layer: nn.Module, method: str) -> Finding:
        """Finds what ``method`` of the layer computes, from runs on a stub copy: ranks, training and eval, dtypes."""
        cls = original_class(layer)
        if not callable(getattr(cls, method, None)):
            return Finding(None, f"it has no {method}")
        if _was_set(layer, method):
            return Finding(None, f"{method} was set on the instance (as accelerate's hooks and kernel libraries do)")
        seen = self.once(layer, method, lambda reads: _look(layer, method, reads))
        if seen.form is None:
            return Finding(None, seen.reason, seen.lacks_child)
        return _finding(layer, seen)


def _was_set(layer: nn.Module, method: str) -> bool:
    return method in vars(layer) and not (method == "forward" and has_own_forward(layer))


def _finding(layer: nn.Module, seen: _Seen, part: Part | None = None) -> Finding:
    """For this very layer what was seen of one that is alike."""
    assert seen.form is not None
    try:
        _check_stateless(layer, seen.form, own=part is None)
    except ProbeError as error:
        return Finding(None, str(error))
    for path in seen.form.linears:
        _look_at_class(layer.get_submodule(path))
    options = (seen.ranks, seen.widths, seen.dtypes, seen.eval_only, part)
    return Finding(plan(layer, seen.form, seen.arguments, seen.idle, *options))


def _look(layer: nn.Module, method: str, reads: Reads) -> _Seen:
    first: _Seen | None = None
    for width, narrowest in widths(layer):
        seen = _recognise(layer, Run(method), width, narrowest, reads)
        if seen.form is not None:
            return seen
        first = first or seen
    return first or _Seen(None, "no linear child")


def widths(layer: nn.Module) -> list[tuple[int, int]]:
    """Candidate widths of the input, likeliest first, and the narrowest of all, which sets how many rows are enough."""
    shapes = list(linear_children(layer, 64).values())
    if not shapes:
        return []
    narrowest = min(min(shape) for shape in shapes)
    inputs = [shape[0] for shape in shapes]
    norms = [norm_width(module) or 0 for module in layer.modules() if module._parameters]
    return [(width, narrowest) for width in dict.fromkeys([*inputs, *norms]) if width > 1][:4]


def _recognise(layer: nn.Module, run: Run, width: int, narrowest: int, reads: Reads) -> _Seen:
    cls = original_class(layer)

    def form(
        shape: tuple[int, ...], training: bool, dtype: torch.dtype, known: Form | None = None, given: Any = None
    ) -> Form:
        seed = 0 if known is None else 1 + len(shape)
        options: Any = {"dtype": dtype, "training": training, "seed": seed, "given": given or {}, "reads": reads}
        return explain(trace(layer, run, shape, **options), known)

    def full(rank: int, width: int) -> tuple[int, ...]:
        return (*enough_rows(rank, narrowest), width)

    def holds(base: Form, shape: tuple[int, ...], training: bool, dtype: torch.dtype, given: Any = None) -> bool:
        try:
            return form(shape, training, dtype, base, given) == base
        except Exception:
            return False

    try:
        try:
            base, first = form(full(3, width), False, torch.float32), 3
        except Exception as error:
            try:
                base, first = form(full(2, width), False, torch.float32), 2
            except Exception:
                if isinstance(error, ProbeError):
                    raise error from None
                raise
    except ProbeError as error:
        return _Seen(None, str(error))
    except Exception as error:  # the layer's own code, called in a way that it may not expect
        lacks = isinstance(error, AttributeError) and f"'{cls.__name__}' object has no attribute" in str(error)
        return _Seen(None, _why_failed(layer, run, error), lacks)
    dtype = next((t.dtype for t in layer.parameters() if t.dtype in check.DTYPES), torch.float32)
    dtypes = tuple([each for each in check.DTYPES if holds(base, full(first, width), False, each)])
    if dtype not in dtypes:
        return _Seen(None, f"in {str(dtype).removeprefix('torch.')} it computes something other than in float32")
    laid = [step[-1] for step in base.head if not isinstance(step, str)]  # layers that merge rows: the merged widths

    def both(rank: int, width: int, training: bool = False) -> bool:
        """Runs with several rows and with the fewest, which a squeeze would treat differently."""
        fewest = (*[1] * (rank - 2), max([1, *[-(-wide // width) for wide in laid]]), width)[-rank:]
        return holds(base, full(rank, width), training, torch.float32) and holds(base, fewest, training, torch.float32)

    ranks = tuple([rank for rank in (1, 2, 3, 4) if both(rank, width)])
    if first not in ranks:
        return _Seen(None, "what it computes depends on the numbers or on how many rows there are")
    others = {wide // parts for wide in laid for parts in (4, 2, 1) if wide % parts == 0} - {width}
    widths = (width, *[wide for wide in others if all(both(rank, wide) for rank in ranks if rank > 1)])

    def in_training() -> bool:
        return all(holds(base, full(rank, width), True, torch.float32) for rank in ranks)

    eval_only = why_eval_only(in_training, "which is no child")
    first_name, *names = list(run.signature(layer).parameters.values())[1:]
    named = [p for p in names if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    # Passing the defaults has no effect, unless forward checks whether an argument was passed.
    idle = {p.name: p.default for p in named if isinstance(p.default, (bool, int, float, str, type(None)))}
    if idle and not holds(base, full(first, width), False, torch.float32, idle):
        idle = {}
    arguments = (first_name.name, *[p.name for p in named if p.kind is not p.KEYWORD_ONLY])
    return _Seen(base, "", False, False, arguments, idle, ranks, widths, dtypes, eval_only)


def _why_failed(layer: nn.Module, run: Run, error: Exception) -> str:
    method = run.name
    if run.function is not None:
        return f"what is between them does not run alone: {_first_line(error)}"
    for path, module in layer.named_modules():
        if not path or (method == "forward" and module._modules and linear_shape(module) is None):
            own = [name for name, value in (*module._parameters.items(), *module._buffers.items()) if value is not None]
            if own:
                return f"it holds a tensor of its own, {path}{'.' if path else ''}{own[0]}"
    if isinstance(error, NotImplementedError) and 'required "forward"' in str(error):
        return "it has no forward: the layer around it calls its children"
    return f"{method} does not run with one tensor [..., D] alone: {_first_line(error)}"


def _look_at_class(linear: nn.Module) -> None:
    """Adds a subclass of nn.Linear to LINEARS if it computes the same (as openai-whisper's, which casts weights)."""
    cls: Any = type(linear)
    if cls is not nn.Linear and isinstance(linear, nn.Linear) and has_only_weights(linear) and _is_linear_class(cls):
        LINEARS.add(cls)


@functools.cache
def _is_linear_class(cls: Any) -> bool:
    same = cls.__call__ is nn.Linear.__call__ and cls.__getattr__ is nn.Linear.__getattr__
    return same and all(_is_linear(cls, dtype, training) for dtype in check.DTYPES for training in (True, False))


def _is_linear(cls: Any, dtype: torch.dtype, training: bool) -> bool:
    with aside():
        plain = nn.Linear(5, 7, dtype=dtype).train(training)
        given = [torch.randn(*lead, 5, dtype=dtype) for lead in ((), (3,), (2, 3), (0,))]
        for bias in (plain.bias, None):
            layer = object.__new__(cls)
            plain._parameters["bias"] = bias
            layer.__dict__.update({**vars(plain), "_parameters": dict(plain._parameters)})
            for x, cast in itertools.product(given, (False, True)):
                try:
                    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                        y, expected = layer.forward(x), plain(x)
                except Exception:
                    return False
                if type(y) is not Tensor or y.dtype is not expected.dtype or not torch.equal(y, expected):
                    return False
    return True


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def _check_stateless(layer: nn.Module, form: Form, own: bool = True) -> None:
    """Checks that bypassed modules hold no tensors of their own, whose present values would be frozen."""
    for path in ("", *form.run) if own else form.run:
        module = child(layer, tuple(path.split(".")) if path else ())
        where = f"{path}." if path else ""
        for name, value in (*module._parameters.items(), *module._buffers.items(), *vars(module).items()):
            if isinstance(value, Tensor):
                raise ProbeError(f"it holds a tensor of its own, {where}{name}")
        if path and not has_own_forward(module):
            raise ProbeError(f"{where}forward was set on the instance")
