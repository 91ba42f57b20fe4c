# SPDX-License-Identifier: BSD-3-Clause
"""Which modules of a model have a row: its feed-forward layers, and what stands beside them on the way there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .._replace import ReplaceEntry, _Site, _sites, replace_report
from .._replace.swap import FUSES
from ..moe_ffn import MoEFFN
from .clock import OUTSIDE

_WORDS = (  # of a path's end and of a class's name
    ("norm", ("norm",)),
    ("attention", ("attention", "attn")),
    ("router", ("router", "gate")),
)


@dataclass
class Place:
    """A module whose calls have a row."""

    module: nn.Module
    path: str
    kind: str
    layer: bool = False  # a feed-forward layer or a mixture
    inner: bool = False  # modules in it have rows of their own
    compiled: bool = False

    @property
    def name(self) -> str:
        return self.path or type(self.module).__name__


def places(model: nn.Module, experts: set[str]) -> list[Place]:
    """In the order of ``named_modules``. The first stands for what runs outside of the model. ``experts``: the paths
    of modules that transformers hands to this package."""
    found = {id(site.layer): site for site in _sites(model)}
    mixtures = {id(m) for path, m in model.named_modules() if path in experts or isinstance(m, MoEFFN)}
    ours = [path for path, m in model.named_modules() if path and (id(m) in found or id(m) in mixtures)]
    above = {path.rsplit(".", i)[0] for path in ours for i in range(1, path.count(".") + 1)} | ({""} if ours else set())
    return [Place(nn.Module(), "", "outside"), *_walk(model, "", found, mixtures, above, set())]


def _walk(
    module: nn.Module, path: str, found: dict[int, _Site], mixtures: set[int], above: set[str], seen: set[int]
) -> Iterator[Place]:
    if id(module) in seen:
        return
    seen.add(id(module))
    site = found.get(id(module))
    if is_compiled(module):
        yield Place(module, path, "compiled", compiled=True)
        return
    if site is not None and site.finding.plan is None and path in above:
        site = None  # left as it is, and layers are in it
    mixture = id(module) in mixtures or (site is not None and site.finding.plan is None and _has_experts(module))
    layer = mixture or site is not None
    inside = not layer and (path in above or not path)
    if site is not None and not mixture:  # of a block that does more than its feed-forward layer
        plan = site.finding.plan
        method = getattr(type(module), FUSES, (site.method, None))[0]
        inside = plan is not None and (plan.part is not None or method != "forward")
    has_forward = getattr(type(module), "forward", None) is not nn.Module.forward  # a script has none
    if has_forward:
        kind = ("experts" if mixture else "feed-forward") if layer else "own code" if inside else _kind(module, path)
        yield Place(module, path, kind, layer, inside)
    if inside or not has_forward:
        below = site.finding.plan.form.linears if site is not None and site.finding.plan is not None else ()
        for name, child in module.named_children():
            if name not in {linear.split(".")[0] for linear in below}:
                yield from _walk(child, f"{path}.{name}" if path else name, found, mixtures, above, seen)


def _has_experts(module: nn.Module) -> bool:
    return any(p.dim() == 3 for p in module.parameters(recurse=False)) or "experts" in type(module).__name__.lower()


def is_compiled(module: nn.Module) -> bool:
    frames: Any = sys.modules.get("torch._dynamo.eval_frame")
    compiled = vars(module).get("_compiled_call_impl")
    by_call = compiled is not None and not isinstance(compiled, Timed)
    return by_call or (frames is not None and isinstance(module, frames.OptimizedModule))


def _kind(module: nn.Module, path: str) -> str:
    if isinstance(module, nn.Embedding):
        return "embedding"
    text = f"{path.rpartition('.')[2]} {type(module).__name__}".lower()
    return next((kind for kind, words in _WORDS if any(word in text for word in words)), "other")


class Timed:
    """Stands in front of a module's call. An instance's ``_compiled_call_impl`` is what ``nn.Module.__call__`` calls
    where it is set, as ``Module.compile`` does. Unlike a hook it makes no layer call its children, and neither pickle
    nor deepcopy nor a state dict takes it along."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self.before = vars(module).get("_compiled_call_impl")
        self.inner: Callable[..., Any] = self.before or module._call_impl
        self._call = call
        vars(module)["_compiled_call_impl"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self.inner, args, kwargs)

    def remove(self, module: nn.Module) -> None:
        top = vars(module).get("_compiled_call_impl")
        if top is not self:  # another profile has come later, and is still there
            while isinstance(top, Timed) and top.before is not self:
                top = top.before
            if isinstance(top, Timed):
                top.before, top.inner = self.before, self.inner
        elif self.before is None:
            del vars(module)["_compiled_call_impl"]
        else:
            vars(module)["_compiled_call_impl"] = self.before


def entries(model: nn.Module) -> dict[str, ReplaceEntry]:
    """What computes each layer at present, and why, by its path."""
    found = {entry.path: entry for entry in replace_report(model).entries}
    known = sys.modules.get("ffn_ops.integrations.transformers")
    if known is not None:
        found |= {entry.path: entry for entry in known.report(model).entries if entry.status != "left"}
    for path, module in model.named_modules():
        if isinstance(module, MoEFFN):
            why = "one of this package's modules, which fuses itself"
            found[path] = ReplaceEntry(path, type(module).__name__, "fused", str(module.activation), why)
    return found


__all__ = ["OUTSIDE", "Place", "Timed", "entries", "places"]
