# SPDX-License-Identifier: BSD-3-Clause
"""A feed-forward that is a part of a layer which does more: its linear layers are children of a block with attention
and norms (BART, Whisper, ESM-2), or of a longer ``nn.Sequential``. Which statements it is, and a forward around them.

The source of the block's method is cut: from the first linear layer's input to the last one's output it becomes a
function of one tensor, which is recognised as a layer's forward is. The rest stays as its author wrote it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .probe import ProbeError, linear_shape, original_class
from .segment import Names, Segment, called, function_of, named, source

_PART = "_ffn_ops_part"


@dataclass(frozen=True)
class Part:
    """Of a class: which children, and the methods that have them. It says all that there is to rewrite."""

    names: Names
    methods: tuple[str, ...]


@dataclass(frozen=True)
class Cut:
    """A method with its part taken out."""

    part: Any  # function of self and one tensor
    outer: Any  # the method, which calls the part by its name
    children: frozenset[str] | None  # that the part asks for, or None: it may ask for any


def part_name(method: str) -> str:
    return f"{_PART}_{method}"


def _is_sequence(cls: Any) -> bool:
    return getattr(cls, "forward", None) is nn.Sequential.forward  # a script has none


def candidates(layer: nn.Module) -> list[Names]:
    """Direct children whose shapes are those of an FFN: D to F (twice, or 2 F, where there is a gate) and back to D."""
    shapes = {name: linear_shape(module) for name, module in layer._modules.items() if module is not None}
    known = {name: shape for name, shape in shapes.items() if shape is not None}
    cls: Any = original_class(layer)
    called = [list(known)] if _is_sequence(cls) else list(_orders(cls, frozenset(known)))
    found: dict[Names, None] = {}
    for order in called:
        for i, last in enumerate(order):
            f, d = known[last]
            if i > 0 and known[order[i - 1]] in ((d, f), (d, 2 * f)):
                found[(order[i - 1],), last] = None
            if i > 1 and known[order[i - 1]] == known[order[i - 2]] == (d, f) and not _is_sequence(cls):
                found[(order[i - 2], order[i - 1]), last] = None
    return list(found)


@functools.cache
def _orders(cls: type, children: frozenset[str]) -> tuple[list[str], ...]:
    """For each method: these children, in the order in which its source calls them."""
    orders = []
    for method in _methods(cls):
        function = _undecorated(inspect.getattr_static(cls, method, None), children)
        if function is not None:
            try:
                tree = source(function.__code__)
            except ProbeError:  # then cut() says so
                orders.append([name for name in function.__code__.co_names if name in children])
                continue
            calls = [called(node, tree) for node in ast.walk(tree) if isinstance(node, ast.Call)]
            order = [name for name, _ in sorted([c for c in calls if c and c[0] in children], key=lambda c: c[1])]
            if len(order) > 1:
                orders.append(order)
    return tuple(orders)


@functools.cache
def _methods(cls: type) -> list[str]:
    """forward, the methods that it names, and those that they name: another is not known to be called."""
    found = ["forward"]
    for method in found:  # which grows
        names: dict[str, None] = {}
        for base in cls.__mro__:
            if method in vars(base) and base is not nn.Module:
                named_here = dict.fromkeys(_named(vars(base)[method]))
                names |= named_here
                if "super" not in named_here:
                    break
        for name in names:
            own = inspect.getattr_static(cls, name, None)
            if isinstance(own, types.FunctionType) and not hasattr(nn.Module, name) and name not in found:
                found.append(name)
    return found


def _named(function: Any) -> Iterator[str]:
    """By the code of a function, of those in it, and of those that it decorates."""
    codes = []
    while isinstance(function, types.FunctionType):
        codes.append(function.__code__)
        function = getattr(function, "__wrapped__", None)
    for code in codes:  # which grows
        yield from code.co_names
        codes += [each for each in code.co_consts if isinstance(each, types.CodeType)]


def methods_with(cls: Any, names: Names) -> list[str]:
    """Those whose own code asks for all of the children."""
    if _is_sequence(cls):
        return ["forward"]
    children = {*names[0], names[1]}
    found = [(name, _undecorated(inspect.getattr_static(cls, name, None), children, all)) for name in _methods(cls)]
    return [name for name, function in found if function is not None]


def _undecorated(function: Any, children: Iterable[str], which: Any = any) -> Any:
    """The function whose own code asks for children, below decorators that hold it in their closure, or None."""
    while isinstance(function, types.FunctionType):
        if which(name in function.__code__.co_names for name in children):
            return function
        inner = getattr(function, "__wrapped__", None)
        if not any(_content(cell) is inner for cell in function.__closure__ or ()):
            return None
        function = inner
    return None


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return _content


@functools.cache
def cut(cls: Any, method: str, names: Names) -> Cut:
    """Raises: ProbeError, with what is in the way."""
    if _is_sequence(cls):
        return _cut_sequence(method, names)
    own = inspect.getattr_static(cls, method, None)
    function = _undecorated(own, {*names[0], names[1]}, all)
    if function is None:
        raise ProbeError(f"{named(names)} are not called by {method} itself")
    tree = source(function.__code__)
    segment = Segment(tree, names, function.__code__)
    inner = segment.inner()
    part = function_of(inner, function, inner.name)
    outer = function_of(segment.outer(part_name(method)), function, function.__name__)
    asked = segment.asked
    alone = asked is not None and not any(hasattr(cls, name) for name in asked)  # else it calls methods, say
    return Cut(part, _decorated_like(own, function, outer), asked if alone else None)


def _cut_sequence(method: str, names: Names) -> Cut:
    (first,), last = names

    def part(self: Any, x: Any) -> Any:
        inside = False
        for name, module in self._modules.items():
            inside = inside or name == first
            if inside:
                x = module(x)
            if name == last:
                break
        return x

    def outer(self: Any, input: Any) -> Any:
        inside = False
        for name, module in self._modules.items():
            if name == first:
                inside = True
                input = getattr(self, part_name(method))(input)
            elif not inside:
                input = module(input)
            inside = inside and name != last
        return input

    return Cut(part, outer, None)


def _decorated_like(own: Any, function: Any, inner: Any) -> Any:
    """``own`` with ``inner`` in the place of the function that its decorators hold in their closures."""
    if own is function:
        return inner
    below = own.__wrapped__
    held = types.CellType(_decorated_like(below, function, inner))
    closure = tuple([held if _content(cell) is below else cell for cell in own.__closure__])
    made = types.FunctionType(own.__code__, own.__globals__, own.__name__, own.__defaults__, closure)
    made.__kwdefaults__ = own.__kwdefaults__
    return made
