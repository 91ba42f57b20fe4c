"""From a module to its plan, or to the reason why it is left alone. Nothing is changed here."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..modules import GLU, FeedForward, GatedFFN, PlainFFN, has_own_forward
from .form import Form, explain
from .layer import Plan, child, plan
from .probe import ProbeError, WithoutDropout, linear_shape, original_class, trace

# Where a feed-forward has a method of its own: transformers' encoders, torch's nn.TransformerEncoderLayer.
METHODS = ("forward", "feed_forward_chunk", "feed_forward_chunk_query", "ff_chunk", "_ff_block")
OURS = (FeedForward, PlainFFN, GLU, GatedFFN)  # which fuse themselves
_MOST_BRANCHES = 16
_MANY = 512  # modules below a layer that is looked at


@dataclass(frozen=True)
class Finding:
    plan: Plan | None
    reason: str = ""
    lacks_child: bool = False  # the class's method uses a child that this instance does not have


def linear_children(layer: nn.Module, most: int) -> dict[str, tuple[int, int]]:
    """Paths and (in, out) of the outermost linear layers below; at most one more than ``most``."""
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
    """The shapes of the linear layers below could be those of one feed-forward layer."""
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


def recognise(layer: nn.Module, method: str) -> Finding:
    """What ``method`` of the layer computes, from runs on a hollow copy: ranks, training and eval, dtypes."""
    cls = original_class(layer)
    function = getattr(cls, method, None)
    if not callable(function):
        return Finding(None, f"it has no {method}")
    if method in vars(layer) and not (method == "forward" and has_own_forward(layer)):
        return Finding(None, f"{method} was set on the instance (as accelerate's hooks and kernel libraries do)")
    findings = []
    for width, narrowest in widths(layer, method):
        finding = _recognise(layer, cls, method, width, narrowest)
        if finding.plan is not None:
            return finding
        findings.append(finding)
    return next(iter(findings), Finding(None, "no linear child"))


def widths(layer: nn.Module, method: str) -> list[tuple[int, int]]:
    """Candidate widths of the input, likeliest first, and the narrowest of all, which sets how many rows are enough."""
    shapes = list(linear_children(layer, 64).values())
    if not shapes:
        return []
    narrowest = min(min(shape) for shape in shapes)
    inputs = [shape[0] for shape in shapes]
    return [(width, narrowest) for width in dict.fromkeys(inputs)][:4]


def _recognise(layer: nn.Module, cls: type[nn.Module], method: str, width: int, narrowest: int) -> Finding:
    def form(
        rank: int, training: bool, dtype: torch.dtype, known: Any = None, seed: int = 0, given: Any = None
    ) -> Form:
        seen = trace(
            layer, method, width, narrowest, rank=rank, dtype=dtype, training=training, seed=seed, given=given or {}
        )
        return explain(seen, known)

    def holds(base: Form, rank: int, training: bool, dtype: torch.dtype, given: Any = None) -> bool:
        known = (base.activation, base.beta)
        try:
            return form(rank, training, dtype, known, seed=1 + rank, given=given) == base
        except Exception:
            return False

    try:
        try:
            base, first = form(3, False, torch.float32), 3
        except Exception:
            base, first = form(2, False, torch.float32), 2
        _check_stateless(layer, base)
    except ProbeError as error:
        return Finding(None, str(error))
    except Exception as error:  # the layer's own code, called in a way that it may not expect
        lacks = isinstance(error, AttributeError) and f"'{cls.__name__}' object has no attribute" in str(error)
        return Finding(None, _why_failed(layer, method, error), lacks)
    dtype = next((t.dtype for t in layer.parameters() if t.dtype in check.DTYPES), torch.float32)
    dtypes = tuple([each for each in check.DTYPES if holds(base, first, False, each)])
    if dtype not in dtypes:
        return Finding(None, f"in {str(dtype).removeprefix('torch.')} it computes something else than in float32")
    ranks = tuple([rank for rank in (1, 2, 3, 4) if holds(base, rank, False, torch.float32)])
    if first not in ranks:
        return Finding(None, "it does not compute the same twice")
    eval_only = ""
    if not all(holds(base, rank, True, torch.float32) for rank in ranks):
        with WithoutDropout():
            dropout = all(holds(base, rank, True, torch.float32) for rank in ranks)
        eval_only = "it calls dropout, with p > 0, which is no child" if dropout else "it computes something else"
    first_name, *names = list(inspect.signature(getattr(cls, method)).parameters.values())[1:]
    named = [p for p in names if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    # Given as they are without being given they do nothing, unless forward asks whether they are given.
    idle = {p.name: p.default for p in named if isinstance(p.default, (bool, int, float, str, type(None)))}
    if idle and not holds(base, first, False, torch.float32, idle):
        idle = {}
    by_place = [p.name for p in named if p.kind is not p.KEYWORD_ONLY]
    return Finding(plan(layer, base, (first_name.name, *by_place), idle, ranks, dtypes, eval_only))


def _why_failed(layer: nn.Module, method: str, error: Exception) -> str:
    for path, module in layer.named_modules():
        if not path or (method == "forward" and module._modules and linear_shape(module) is None):
            own = [name for name, value in (*module._parameters.items(), *module._buffers.items()) if value is not None]
            if own:
                return f"it has a tensor of its own, {path}{'.' if path else ''}{own[0]}"
    if isinstance(error, NotImplementedError) and 'required "forward"' in str(error):
        return "it has no forward: the layer around it calls its children"
    text = (str(error).splitlines() or [""])[0]
    return f"{method} does not run with one tensor [..., D] alone: {type(error).__name__}: {text[:120]}"


def _check_stateless(layer: nn.Module, form: Form) -> None:
    """What is stepped over may not hold numbers of its own: they would be frozen as they are today."""
    for path in ("", *form.run):
        module = child(layer, tuple(path.split(".")) if path else ())
        where = f"{path}." if path else ""
        for name, value in (*module._parameters.items(), *module._buffers.items(), *vars(module).items()):
            if isinstance(value, Tensor):
                raise ProbeError(f"it has a tensor of its own, {where}{name}")
        if path and not has_own_forward(module):
            raise ProbeError(f"{where}forward was set on the instance")
