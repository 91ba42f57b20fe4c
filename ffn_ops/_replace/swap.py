# SPDX-License-Identifier: BSD-3-Clause
"""The class that replaces a layer's own, so that the instance computes its plan.

A subclass of an instance's class survives deepcopy, pickle and the compiler, where a forward set on it would not.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.compiler import is_compiling

from .. import _checks as check
from .layer import CALLS, PLAN, Plan, fused
from .part import Part, cut, part_name
from .probe import ORIGINAL
from .recognise import Recogniser

FUSES = "_ffn_ops_fuses"  # attribute of a class: which method, and which part of it


@dataclass
class Calls:
    """Counts calls of one replaced layer since it was replaced. Calls of compiled code are not counted."""

    fused: int = 0  # an operator of this package computed the layer or a part of it
    own: int = 0  # the layer's own forward ran
    arguments: str = ""  # further arguments of the last such call

    def missed(self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.own += 1
        names = [name for name in (*plan.arguments[: len(args)], *kwargs) if name != plan.arguments[0]]
        self.arguments = ", ".join(names)


def _fusing(own: Any) -> Any:
    """``own``, but what the instance's plan says where that holds."""

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        plan = getattr(self, PLAN, None)  # None if another library held this forward when restore() ran
        if plan:
            x = args[0] if len(args) == 1 and not kwargs else only_tensor(plan, args, kwargs)
            if x is not None:
                y = fused(self, plan, x)
                if y is not None:
                    if not is_compiling():
                        self.__dict__[CALLS].fused += 1
                    return y
            if not is_compiling():
                self.__dict__[CALLS].missed(plan, args, kwargs)
        return own(self, *args, **kwargs)

    return forward


def _with_part(own: Any, outer: Any) -> Any:
    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (outer if getattr(self, PLAN, None) else own)(self, *args, **kwargs)

    return forward


def _methods(original: Any, part: Part) -> dict[str, Any]:
    """The methods that have the part, and the part of each."""
    members = {}
    for method in part.methods:
        made = cut(original, method, part.names)
        members[method] = _with_part(inspect.getattr_static(original, method), made.outer)
        members[part_name(method)] = _fusing(made.part)
    return members


@functools.cache
def fused_class(original: Any, method: str, part: Part | None = None) -> Any:
    """A subclass, of the same name, whose ``method``, or a part of it, computes what the instance's plan says."""

    def setattr_(self: Any, name: str, value: Any) -> None:
        original.__setattr__(self, name, value)
        if name[0] != "_" and name not in ("training", "forward") and self._ffn_ops_plan is not None:
            finding = Recogniser().part(self) if part else Recogniser()(self, method)
            plan = None if finding is None else finding.plan
            self.__dict__[PLAN] = plan if plan is not None and plan.part == part else False

    def reduce(self: Any, protocol: Any) -> Any:
        function, arguments, *rest = original.__reduce_ex__(self, max(2, protocol))
        if arguments and arguments[0] is fused_class(original, method, part):  # other processes only know the original
            function, arguments = _new, (original, method, part, *arguments[1:])
        return function, arguments, *rest

    def extra_repr(self: Any) -> str:
        plan = self._ffn_ops_plan
        return ", ".join(filter(None, [original.extra_repr(self), f"ffn_ops: {plan.form}" if plan else ""]))

    members = {
        ORIGINAL: original, FUSES: (method, part), PLAN: None, CALLS: None,
        "__setattr__": setattr_, "__reduce_ex__": reduce, "extra_repr": extra_repr,
        "__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__,
        "__prepare_scriptable__": check.refuse_script,
        **(_methods(original, part) if part else {method: _fusing(getattr(original, method))}),
    }  # fmt: skip
    return type(original)(original.__name__, (original,), members)


def only_tensor(plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns forward's one tensor, or None if other arguments may have an effect."""
    names = plan.arguments
    if len(args) > len(names):
        return None
    given = dict(zip(names, args, strict=False))
    if given.keys() & kwargs.keys():
        return None
    given.update(kwargs)
    x = given.pop(names[0], None)
    for name, value in given.items():
        if name not in plan.idle:
            return None
        idle = plan.idle[name]
        if value is not idle and (type(value) is not type(idle) or value != idle):
            return None
    return x


def _new(original: Any, method: str, part: Part | None = None, *arguments: Any) -> nn.Module:
    cls = fused_class(original, method, part)
    layer: nn.Module = cls.__new__(cls, *arguments)
    return layer
