# SPDX-License-Identifier: BSD-3-Clause
"""replace, restore, replace_report: run the feed-forward layers of any model with this package's operators.

recognise.py decides which module is a feed-forward layer; layer.py defines a call.
"""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from ..modules import has_own_forward
from .layer import CALLS, PLAN, Plan, plan_of, state
from .probe import EXCHANGED, ORIGINAL, original_class
from .recognise import METHODS, OURS, Finding, Recogniser, linear_children, plausible
from .refused import has_stacked_experts, is_feed_forward
from .swap import FUSES, Calls, fused_class

_log = logging.getLogger("ffn_ops.replace")
EXPERTS = "ffn_ops"  # registered by integrations/transformers.py
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class ReplaceEntry:
    """One feed-forward layer of a model.

    ``status`` is "replaced", "partly" (replaced, but ``why`` says what is not fused at present), "replaceable", "left"
    (for the reason in ``why``), or "fused" (it uses the operators by itself, as this package's modules do).

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> (entry,) = ffn_ops.replace_report(model).entries
        >>> entry.status, entry.computes
        ('replaceable', '2(gelu(0(x)))')
    """

    path: str
    layer: str  # the name of its class
    status: str
    computes: str
    why: str = ""
    fused_calls: int = 0  # since it was replaced, without calls of compiled code
    own_calls: int = 0  # calls of the layer's own forward


@dataclass(frozen=True)
class ReplaceReport:
    """The result of :func:`replace_report`. ``print`` shows identical layers in one line.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> ffn_ops.replace_report(model).paths("replaceable")
        ['']
    """

    entries: tuple[ReplaceEntry, ...]

    def paths(self, *statuses: str) -> list[str]:
        """Paths of the entries with one of these statuses."""
        return [entry.path for entry in self.entries if entry.status in statuses]

    def __str__(self) -> str:
        groups: dict[tuple[str, ...], list[ReplaceEntry]] = {}
        for e in self.entries:
            key = (re.sub(r"\b\d+\b", "*", e.path), e.layer, e.status, e.computes, e.why)
            groups.setdefault(key, []).append(e)
        lines = []
        for (pattern, layer, status, computes, why), alike in groups.items():
            where = alike[0].path or "the model itself" if len(alike) == 1 else f"{len(alike)} x {pattern}"
            fused, own = sum(e.fused_calls for e in alike), sum(e.own_calls for e in alike)
            lines.append(f"{status:11} {where} ({layer}){': ' if computes else ''}{computes}")
            if why:
                lines.append(f"{'':11}   {why}")
            if fused + own:
                lines.append(f"{'':11}   fused in {fused} of {fused + own} calls")
        return "\n".join(lines) or "no feed-forward layer found"


@dataclass(frozen=True)
class _Site:
    path: str
    layer: nn.Module
    method: str
    finding: Finding
    by_itself: bool = False  # uses the operators without replace()


def replace(model: Model) -> Model:
    """Makes this package's operators compute the feed-forward layers of ``model``, in place, and returns it.

    A layer is recognised by what its forward does with its children. ``replace`` runs it on a stub copy of the layer,
    whose linear layers return random values. It must compute ``down(act(gate x) * up x)``, ``down(act(first x))``, or a
    GLU layer without ``down``, with only dropout, normalisation and a residual connection around it. Other layers are
    left alone.

    Parameters, their names, the state dict, hooks, dtypes, devices and ``requires_grad`` stay as they are. The instance
    gets a subclass of its class, whose forward calls an operator on the same parameters. Every call checks what may
    have changed. If adapters (LoRA), hooks, parametrisations or dropout act on a child, that child is called, and only
    the part between is fused; children that are all quantised in a format of :class:`ffn_ops.QuantizedWeight` are part
    of the operator. If the activation has hooks or was exchanged, the layer's own forward
    runs. :func:`replace_report` says what is fused at present.

    deepcopy, pickle (in an environment that has this package) and ``torch.compile(fullgraph=True)`` work as before.
    :func:`restore` restores the classes.

    Raises:
        TypeError: if ``model`` is not an ``nn.Module``.
    Warns:
        UserWarning: if no layer was recognised.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> print(ffn_ops.replace_report(ffn_ops.replace(model)))
        replaced    the model itself (Sequential): 2(gelu(0(x)))
    """
    _check(model)
    replaced = False
    sites = list(_sites(model))
    for site in sites:
        replaced |= _is_replaced(site.layer) or site.by_itself
        if site.finding.plan is not None and not _is_replaced(site.layer):
            replaced |= _swap(site, site.finding.plan)
    if not replaced:
        warnings.warn(f"ffn_ops.replace: no layer was replaced\n{_report(sites)}", UserWarning, stacklevel=2)
    elif _log.isEnabledFor(logging.INFO):
        _log.info("%s", _report(sites))
    return model


def restore(model: Model) -> Model:
    """Undoes :func:`replace`, in place, and returns ``model``. Every layer has its class again, and computes the same
    bits as before.

    If another library has subclassed our class since (as FSDP2's ``fully_shard`` does), that class stays, with the
    original forward.

    Raises:
        TypeError: if ``model`` is not an ``nn.Module``.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)), torch.randn(4, 8)
        >>> y = model(x)
        >>> torch.equal(ffn_ops.restore(ffn_ops.replace(model))(x), y)
        True
    """
    _check(model)
    for module in model.modules():
        for name in (PLAN, CALLS, EXCHANGED):
            vars(module).pop(name, None)
        if ORIGINAL in vars(type(module)):
            if has_own_forward(module):
                vars(module).pop("forward", None)  # left there by another library
            module.__class__ = original_class(module)
    return model


def replace_report(model: nn.Module) -> ReplaceReport:
    """Lists every feed-forward layer of ``model``: replaced, partly fused at present, replaceable, or left, and why.

    It reports the present state: adapters and hooks, training or eval. It changes nothing. Entries of replaced layers
    count the calls since the replacement, fused and not, without calls of compiled code.

    Raises:
        TypeError: if ``model`` is not an ``nn.Module``.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> print(ffn_ops.replace_report(model))
        replaceable the model itself (Sequential): 2(gelu(0(x)))
    """
    _check(model)
    return _report(_sites(model))


def _report(sites: Iterable[_Site]) -> ReplaceReport:
    return ReplaceReport(tuple([_entry(site) for site in sites]))


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")


def _is_replaced(module: nn.Module) -> bool:
    return bool(plan_of(module))


def _sites(model: nn.Module) -> Iterator[_Site]:
    """Yields outermost layers first, and skips modules inside them."""
    taken: set[int] = set()
    recognise = Recogniser()
    for path, module in model.named_modules():
        if id(module) in taken:
            continue
        site = _site(path, module, recognise)
        if site is None:
            continue
        plan = site.finding.plan
        if EXCHANGED in vars(module):
            called = vars(module)[EXCHANGED]
            taken.update(id(m) for p, m in module.named_modules() if p and p.partition(".")[0] not in called)
        if plan is not None:
            for name in {linear.split(".")[0] for linear in plan.form.linears}:
                taken.update(id(below) for below in module.get_submodule(name).modules())
        yield site


def _site(path: str, module: nn.Module, recognise: Recogniser) -> _Site | None:
    known = plan_of(module)
    if EXCHANGED in vars(module):
        return _Site(path, module, "forward", Finding(None, "experts computed after register(model)"), True)
    if isinstance(module, OURS):
        return _Site(path, module, "forward", Finding(None, "one of this package's modules, which fuses itself"), True)
    if known:
        return _Site(path, module, "", Finding(known))
    if not module._modules:
        return _experts(path, module)
    refused: list[tuple[str, Finding]] = []
    for method in METHODS:
        if plausible(module) if method == "forward" else callable(getattr(type(module), method, None)):
            finding = recognise(module, method)
            if finding.plan is not None:
                if method == "forward" and _hands_on(module, recognise):
                    return None
                return _Site(path, module, method, finding)
            refused.append((method, finding))
    methods = [(m, f) for m, f in refused if m != "forward" and not f.lacks_child]
    if methods:
        method, finding = methods[0]
        return _Site(path, module, method, Finding(None, f"{method}: {finding.reason}"))
    reason = next((f.reason for m, f in refused if m == "forward"), "")
    inner = recognise.part(module)
    if inner is not None:
        if inner.plan is not None and inner.plan.part is not None:
            return _Site(path, module, inner.plan.part.methods[0], inner)
        reason = "" if inner.outside else reason or inner.reason
    if reason and (known is False or is_feed_forward(module, recognise)):
        return _Site(path, module, "forward", Finding(None, reason))
    return _experts(path, module)


def _hands_on(module: nn.Module, recognise: Recogniser) -> bool:
    """It takes arguments that it does not name, which may be for a layer in it: that one knows what they do."""
    kinds = [p.kind for p in inspect.signature(original_class(module).forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds and inspect.Parameter.VAR_KEYWORD not in kinds:
        return False
    inner: nn.Module | None = module
    while inner is not None:
        children = {path.split(".")[0] for path in linear_children(inner, 3)}
        inner = inner._modules[children.pop()] if len(children) == 1 else None
        site = None if inner is None else _site("", inner, recognise)
        if site is not None and site.finding.plan is not None:
            return True
    return False


def _experts(path: str, module: nn.Module) -> _Site | None:
    """Stacked experts. Those of transformers name their implementation in the configuration."""
    if not has_stacked_experts(module):
        return None
    chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if not hasattr(module, "is_concatenated"):  # transformers cannot exchange it
        return _Site(path, module, "", Finding(None, "stacked experts: replace() takes no mixtures"))
    if chosen == EXPERTS:
        return _Site(path, module, "", Finding(None, f'experts computed by experts_implementation="{EXPERTS}"'), True)
    why = f'stacked experts: replace() takes no mixtures, experts_implementation="{EXPERTS}" does'
    return _Site(path, module, "", Finding(None, why))


def _swap(site: _Site, plan: Plan) -> bool:
    kind: Any = type(site.layer)
    try:
        if ORIGINAL in vars(kind) or not hasattr(kind, ORIGINAL):
            original: Any = original_class(site.layer)
            site.layer.__class__ = fused_class(original, site.method, plan.part)
        elif getattr(kind, FUSES) != (site.method, plan.part):
            raise TypeError(f"{kind.__name__} is another library's subclass of a class that fuses other children")
    except TypeError as error:  # classes of another memory layout, or that refuse subclasses
        _log.warning("%s is left alone: its class cannot be replaced: %s", site.path, error)
        return False
    if site.method == "forward":
        vars(site.layer).pop("forward", None)  # the original class's, left there by another library
    vars(site.layer)[PLAN] = plan
    vars(site.layer)[CALLS] = Calls()
    return True


def _entry(site: _Site) -> ReplaceEntry:
    name = original_class(site.layer).__name__
    plan: Plan | None = site.finding.plan
    if plan is None:
        return ReplaceEntry(site.path, name, "fused" if site.by_itself else "left", "", site.finding.reason)
    whole, why = state(site.layer, plan)
    if not _is_replaced(site.layer):
        return ReplaceEntry(site.path, name, "replaceable", str(plan.form), why)
    calls: Calls = vars(site.layer)[CALLS]
    if calls.own and calls.arguments:
        why = "; ".join(filter(None, [why, f"its own forward runs where it is given {calls.arguments}"]))
    status = "replaced" if whole else "partly"
    return ReplaceEntry(site.path, name, status, str(plan.form), why, calls.fused, calls.own)
