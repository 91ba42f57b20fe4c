# SPDX-License-Identifier: BSD-3-Clause
"""Finds layers that a probe cannot tell apart, so that one probe is enough for all of them.

Two layers are alike when they have the same tree of classes, attribute names, parameters and sizes, and when every
attribute that forward read in the first has the same value in the second. Records are kept for one call of ``replace``
or ``replace_report``, during which nothing changes.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

WATCH = "_ffn_ops_watch"  # of a stub copy: a function that is called with the name of each attribute that is read
OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}
SIZES = ("in_features", "out_features", "nx", "nf")  # of linear layers, whose weights may be packed
ABSENT = object()
_VALUES = (bool, int, float, str, bytes, type(None))
_MOST = 16  # most layers of one structure, with different attributes, that are kept
Reads = dict[tuple[str, str], Any]  # path and attribute: its value
Found = TypeVar("Found")


@functools.cache
def watched(cls: Any) -> Any:
    """Makes a subclass of the same name, whose instances report which of their attributes are read."""

    def getattribute(self: Any, name: str) -> Any:
        own = object.__getattribute__(self, "__dict__")
        if (name in own or name == "__dict__") and name not in OF_EVERY_MODULE and WATCH in own:
            own[WATCH](name)
        return cls.__getattribute__(self, name)

    def getattr_(self: Any, name: str) -> Any:
        own = object.__getattribute__(self, "__dict__")
        for kind in ("_parameters", "_buffers", "_modules"):
            if name in own[kind]:
                return own[kind][name]
        raise AttributeError(f"'{cls.__name__}' object has no attribute '{name}'")

    members: dict[str, Any] = {"__getattribute__": getattribute, "__module__": cls.__module__}
    if cls.__getattr__ is nn.Module.__getattr__:  # reads __dict__, which counts as reading every attribute
        members["__getattr__"] = getattr_
    return type(cls)(cls.__name__, (cls,), {**members, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__})


def structure(layer: nn.Module, class_of: Callable[[nn.Module], type]) -> Hashable:
    """The structure of a tree of modules, without its attributes. A module that occurs twice has a number the second
    time."""
    seen: dict[int, int] = {}

    def of(module: nn.Module | None) -> Hashable:
        if module is None or id(module) in seen:
            return None if module is None else seen[id(module)]
        seen[id(module)] = len(seen)
        return (
            class_of(module),
            tuple(module.__dict__),
            tuple([size if type(size) is int else None for size in map(module.__dict__.get, SIZES)]),
            tuple(
                [
                    (k, None if p is None else (type(p), None if is_lazy(p) else p.shape, p.dtype))
                    for k, p in module._parameters.items()
                ]
            ),
            tuple(
                [
                    (k, None if b is None else (None if is_lazy(b) else b.shape, b.dtype))
                    for k, b in module._buffers.items()
                ]
            ),
            tuple([(name, of(child)) for name, child in module._modules.items()]),
        )

    return of(layer)


class _Plain:
    pass


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, _VALUES):
        return bool(a == b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, functools.partial):
        return _equal((a.func, a.args, *sorted(a.keywords.items())), (b.func, b.args, *sorted(b.keywords.items())))
    if isinstance(a, types.FunctionType):  # made by the same line of code, with the same values
        cells = [tuple([cell.cell_contents for cell in f.__closure__ or ()]) for f in (a, b)]
        same = a.__code__ is b.__code__ and a.__globals__ is b.__globals__ and not a.__dict__ and not b.__dict__
        return same and _equal(a.__defaults__, b.__defaults__) and _equal(a.__kwdefaults__, b.__kwdefaults__) and (
            _equal(*cells)
        )  # fmt: skip
    if hasattr(a, "__dict__") and type(a).__basicsize__ == _Plain.__basicsize__ and not isinstance(a, nn.Module):
        # Such as diffusers' attention processors, one for each layer. A class of this size keeps all in __dict__.
        mine, other = vars(a), vars(b)
        return mine.keys() == other.keys() and all(
            value is other[name] or (isinstance(value, _VALUES) and _equal(value, other[name]))
            for name, value in mine.items()
        )
    return False


def _alike(layer: nn.Module, reads: Reads) -> bool:
    modules: dict[str, dict[str, Any]] = {}
    for (path, name), value in reads.items():
        own = modules.get(path)
        if own is None:
            own = modules[path] = vars(layer.get_submodule(path) if path else layer)
        if name == "__dict__" or isinstance(value, Tensor) or not _equal(own.get(name, ABSENT), value):
            return False
    return True


class Known(Generic[Found]):
    """The findings for the layers so far."""

    def __init__(self) -> None:
        self._found: dict[Hashable, list[tuple[Reads, Found]]] = {}

    def get(self, layer: nn.Module, key: Hashable, look: Callable[[Reads], Found]) -> Found:
        """Returns ``look(reads)`` of this layer, or of an earlier one that is alike. It records in ``reads`` what it
        read."""
        kept = self._found.setdefault(key, [])
        for reads, found in kept:
            if _alike(layer, reads):
                return found
        reads = {}
        found = look(reads)
        kept.append((reads, found))
        del kept[:-_MOST]
        return found
