# SPDX-License-Identifier: BSD-3-Clause
"""Exchanges the forward of modules of transformers that ask for no ``experts_implementation``, for those of
``_forwards.py``. A class is exchanged only after its own forward and ours agreed on a tiny instance, because names
prove nothing."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from .._gate import Gate
from .._replace.probe import EXCHANGED, ORIGINAL, original_class
from ..modules import PLAIN_TENSORS, has_own_forward
from ._forwards import EXCHANGES, Exchange

TESTED = "5.24"


def exchange_of(module: nn.Module) -> Exchange | None:
    kind = original_class(module)
    return EXCHANGES.get(f"{kind.__module__}.{kind.__qualname__}")


def is_exchanged(module: nn.Module) -> bool:
    return EXCHANGED in vars(module)


def exchange(module: nn.Module) -> str | None:
    """Gives ``module`` the class that computes it with this package's operators, or returns the reason why not.
    ``ffn_ops.restore`` takes it back."""
    kind: Any = original_class(module)
    if is_exchanged(module):
        return None
    if (why := why_never_called(module)) is not None:
        return why
    if not agrees(kind):
        return f"its forward is another function than that of transformers {TESTED}"
    if not isinstance(module, _exchanged_class(kind)):  # parametrised since, and restored
        module.__class__ = _exchanged_class(kind)
        vars(module).pop("forward", None)  # the original class's, left there by another library
    vars(module)[EXCHANGED] = EXCHANGES[f"{kind.__module__}.{kind.__qualname__}"].called
    return None


def why_never_called(module: nn.Module) -> str | None:
    """Why a call of ``module`` would not reach the forward of an exchanged class, or None."""
    if has_own_forward(module):
        return None
    return "forward was set on the instance (as accelerate's hooks and kernel libraries do)"


@functools.cache
def agrees(kind: Any) -> bool:
    """Whether the class's own forward and ours give the same values on a tiny instance, in float64."""
    found = EXCHANGES[f"{kind.__module__}.{kind.__qualname__}"]
    with _disable_current_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.device("cpu"):
            try:
                module, call = tiny(f"{kind.__module__}.{kind.__qualname__}")
                args = call()
                own = module(*args)
                module.__class__ = _exchanged_class(kind)
                ours = found.forward(module, *args)
            except Exception:
                return False  # made in another way, or called with other arguments
    pairs = zip(own, ours, strict=True) if isinstance(own, tuple) else [(own, ours)]
    return all(b is not None and a.shape == b.shape and torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in pairs)


def tiny(name: str) -> tuple[nn.Module, Callable[[], tuple[Any, ...]]]:
    """A tiny instance, with random parameters, in float64 and eval, of a class in ``EXCHANGES``, and a function that
    makes arguments for it."""
    place, _, attribute = name.rpartition(".")
    found = EXCHANGES[name]
    module: nn.Module = getattr(importlib.import_module(place), attribute)(*found.tiny)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.double().eval(), found.call


@functools.cache
def _exchanged_class(original: Any) -> Any:
    """A subclass of the same name. It survives deepcopy, pickle and the compiler, unlike a forward on the instance."""
    found = EXCHANGES[f"{original.__module__}.{original.__qualname__}"]

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Without the mark restore() has run, while another library held this forward or a subclass of this class.
        runs = getattr(self, EXCHANGED, None) is not None and _wrapped(self, found) is None
        y = found.forward(self, *args, **kwargs) if runs else None
        return original.forward(self, *args, **kwargs) if y is None else y

    def reduce(self: Any, protocol: Any) -> Any:
        function, arguments, *rest = original.__reduce_ex__(self, max(2, protocol))
        if arguments and arguments[0] is _exchanged_class(original):  # other processes only know the original
            function, arguments = _new, (original, *arguments[1:])
        return function, arguments, *rest

    members = {
        ORIGINAL: original, "forward": forward, "__reduce_ex__": reduce,
        "__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__,
        **found.members,
    }  # fmt: skip
    return type(original)(original.__name__, (original,), members)


def _new(original: Any, *arguments: Any) -> nn.Module:
    cls = _exchanged_class(original)
    module: nn.Module = cls.__new__(cls, *arguments)
    return module


def why_own_code(module: nn.Module) -> str | None:
    """Why the own forward of an exchanged module runs at present, or None."""
    found = exchange_of(module)
    assert found is not None
    why = _wrapped(module, found) or found.why(module)
    return None if why is None else f"its own forward runs: {why}"


def _wrapped(module: nn.Module, found: Exchange) -> str | None:
    """A weight that is no plain tensor, such as a quantised or sharded one. Weights of linear layers aside, which the
    forwards look at."""
    for holder in (module, *(module.get_submodule(name) for name in found.held)):
        for name, weight in holder._parameters.items():
            if weight is not None and type(weight) not in PLAIN_TENSORS:
                return f"{name} is called (a {type(weight).__name__})"
    return None


def gate_in(module: nn.Module) -> Gate | None:
    found = exchange_of(module)
    assert found is not None
    return found.gate(module)
