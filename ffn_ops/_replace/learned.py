# SPDX-License-Identifier: BSD-3-Clause
"""Activations that are modules with parameters of their own: which of ours one computes, and these parameters as
learned_act takes them.

Names of tensors say what a module may be; that it gives the values of the formula, whatever they are, proves it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks as check
from .. import ops
from ..modules import PLAIN_TENSORS, has_own_forward
from ..ops._shared import arithmetic
from ..reference import ACTIVATIONS
from .alike import OF_EVERY_MODULE, Reads

Numbers = Callable[..., tuple[Tensor, ...]]


def _xielu(alpha_p: Tensor, alpha_n: Tensor, beta: Tensor, eps: Tensor) -> tuple[Tensor, ...]:
    return F.softplus(alpha_p), beta + F.softplus(alpha_n), beta, eps


# The module's tensors, and what they are to the operator. Of transformers' Apertus, of timm's MetaFormers, nn.PReLU.
_FORMS: dict[str, tuple[tuple[str, ...], Numbers]] = {
    "xielu": (("alpha_p", "alpha_n", "beta", "eps"), _xielu),
    "star_relu": (("scale", "bias"), lambda scale, bias: (scale, bias)),
    "leaky_relu": (("weight",), lambda weight: (weight,)),
}
_POINTS = (-90.0, -11.0, -3.0, -1.0, -0.3, -1e-3, -1e-7, 0.0, 1e-7, 1e-3, 0.3, 1.0, 3.0, 11.0, 90.0)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    both = (*module._parameters.items(), *module._buffers.items())
    return {name: t for name, t in both if t is not None}


def learned(module: nn.Module, cls: Any, reads: Reads, path: str) -> str:
    """The name of the activation that a module of this class computes with single numbers of its own, or "".
    ``reads`` gets what else it may read."""
    tensors = _tensors(module)
    single = tensors and all(t.numel() == 1 and t.is_floating_point() for t in tensors.values())
    inner = [below for below in module.modules() if below is not module]
    if not single or not has_own_forward(module) or any(_tensors(below) for below in inner):
        return ""
    for name, (names, numbers) in _FORMS.items():
        if tensors.keys() == set(names) and _computes(module, cls, name, names, numbers):
            for below_path, below in module.named_modules(prefix=path):
                own = {k: v for k, v in vars(below).items() if k not in OF_EVERY_MODULE}
                reads.update({(below_path, k): v for k, v in own.items()})
            return name
    return ""


def _computes(module: nn.Module, cls: Any, name: str, names: tuple[str, ...], numbers: Numbers) -> bool:
    copy: Any = object.__new__(cls)
    copy.__dict__.update({**vars(module), "_parameters": {}, "_buffers": {}})
    x = torch.tensor(_POINTS, dtype=torch.float64).reshape(1, 3, 5)
    for first in (0.3, -1.7):
        values = {each: torch.tensor([first + 0.4 * i], dtype=torch.float64) for i, each in enumerate(names)}
        if "eps" in values:
            values["eps"] = torch.tensor([-0.01 * abs(first)], dtype=torch.float64)
        for each, value in values.items():
            kind = "_parameters" if each in module._parameters else "_buffers"
            copy.__dict__[kind][each] = value.reshape(_tensors(module)[each].shape)
        try:
            y = cls.forward(copy, x.clone())
        except Exception:  # the module's own code may not expect this call
            return False
        expected = ACTIVATIONS[name](x, *numbers(*values.values()))
        if not isinstance(y, Tensor) or y.shape != x.shape or not torch.allclose(y, expected, rtol=1e-12, atol=1e-12):
            return False
    return True


def hidden_of(act: Any, name: str, first: Any, x: Tensor, cast: bool) -> Tensor | None:
    """``act(first(x))`` with the activation in one pass. Returns None, before it calls anything, if a tensor is of a
    special type or would change the result's dtype (``cast``: the next layer casts it)."""
    names, numbers = _FORMS[name]
    parameters, buffers, wide = act._parameters, act._buffers, arithmetic(x)
    given = []
    for each in names:  # few calls: each of them costs a small layer noticeable time
        t = parameters.get(each)
        t = buffers.get(each) if t is None else t
        if type(t) not in PLAIN_TENSORS or t.numel() != 1:
            return None
        if t.dim() != 1:
            t = t.reshape(1)
        elif t.dtype is not x.dtype and not cast:
            return None
        given.append(t if t.dtype is wide else t.to(wide))
    value = first(x)
    if type(value) not in PLAIN_TENSORS or value.dtype not in check.DTYPES:  # such as a DTensor
        return act(value)  # type: ignore[no-any-return]
    return ops.learned_act(value, torch.cat(numbers(*given)), activation=name)
