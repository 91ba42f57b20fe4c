# SPDX-License-Identifier: BSD-3-Clause
"""PEFT's adapters on stacked experts (``target_parameters``) become the ``lora=`` of our operators.

PEFT adapts a parameter by forming ``W + scale * B A`` for all experts in each forward. For experts that run as our
operator its wrapper puts the factors where ``experts_forward`` finds them, and forms nothing. Merging, disabling,
saving and everything else stay PEFT's. Quantised experts take adapters too, before or after they are quantised.
Nothing here imports PEFT before the program does.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .._checks import DTYPES
from .._lora import Lora, together
from .._quantized import QuantizedWeight
from ..modules import is_unhooked


class _Held(threading.local):
    """Of an experts module while this thread runs its wrappers: the adapters of each parameter."""

    def __init__(self) -> None:
        self.of: dict[Any, dict[str, list[tuple[Tensor, Tensor, float]]]] = {}


_held = _Held()


class _Holding(AbstractContextManager[None]):
    """Holds the adapters of more parameters of ``experts``. A class, as it is entered in each call of each layer."""

    __slots__ = ("before", "experts", "found")

    def __init__(self, experts: Any, found: dict[str, list[tuple[Tensor, Tensor, float]]]) -> None:
        self.experts, self.found = experts, found

    def __enter__(self) -> None:
        self.before = _held.of.get(self.experts)
        _held.of[self.experts] = {**self.before, **self.found} if self.before else self.found

    def __exit__(self, *_: object) -> None:
        if self.before is None:
            del _held.of[self.experts]
        else:
            _held.of[self.experts] = self.before


def adopt(runs_ours: Callable[[nn.Module], bool]) -> None:
    """Teaches PEFT's wrapper, if the program has imported PEFT, to leave alone what our operators compute. Calling it
    again changes nothing."""
    layer = sys.modules.get("peft.tuners.lora.layer")
    wrapper = getattr(layer, "ParamWrapper", None)
    theirs = getattr(wrapper, "_activate_lora", None)
    if wrapper is None or theirs is None or hasattr(theirs, "_ffn_ops"):
        return

    def activate(self: Any, active_adapters: Any) -> AbstractContextManager[None]:
        experts = self
        while "base_layer" in experts._modules:  # what get_base_layer() does, at a tenth of its time
            experts = experts._modules["base_layer"]
        # The wrapper around this one has looked, if there is one.
        known = experts in _held.of or runs_ours(experts)
        found = _plain_adapters(self, experts, active_adapters) if known else None
        return theirs(self, active_adapters) if found is None else _Holding(experts, {self.parameter_name: found})  # type: ignore[no-any-return]

    activate._ffn_ops = theirs  # type: ignore[attr-defined]
    wrapper._activate_lora = activate
    if not hasattr(wrapper.forward, "_ffn_ops"):
        wrapper.forward = _all_at_once(wrapper, runs_ours)
    wrapper.merge = _refusing(wrapper.merge)
    tuner: Any = sys.modules["peft.tuners.tuners_utils"].BaseTuner
    tuner.merge_adapter = _refusing_first(tuner.merge_adapter)
    tuner._unload_and_optionally_merge = _refusing_first(tuner._unload_and_optionally_merge)
    inject = getattr(tuner, "_inject_parameters", None)
    if inject is not None:
        tuner._inject_parameters = _showing_parameters(inject)


def _all_at_once(wrapper: Any, runs_ours: Callable[[nn.Module], bool]) -> Callable[..., Any]:
    """``forward`` of the wrappers around experts that run as our operator: the outermost one calls the experts."""
    theirs = wrapper.forward

    def of_all(outermost: Any) -> tuple[Any, dict[str, Any]] | None:
        """The experts, and the adapters of each parameter; None where a wrapper does more than hold plain ones."""
        wrappers: list[Any] = []
        experts = outermost
        while type(experts) is wrapper:
            if experts._disable_adapters or experts.merged_adapters or (wrappers and not is_unhooked(experts)):
                return None
            wrappers.append(experts)
            experts = experts._modules["base_layer"]
        if not hasattr(wrapper._activate_lora, "_ffn_ops") or _has_any_global_hook() or not runs_ours(experts):
            return None
        found: dict[str, Any] = {}
        for each in wrappers:
            adapters = _plain_adapters(each, experts, each.active_adapters)
            if adapters is None:
                return None
            found[each.parameter_name] = adapters
        return experts, found

    @functools.wraps(theirs)
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = of_all(self) if "adapter_names" not in kwargs else None
        if found is None:
            return theirs(self, x, *args, **kwargs)
        with _Holding(*found):
            return found[0](x, *args, **kwargs)

    forward._ffn_ops = theirs  # type: ignore[attr-defined]
    return forward


def _refuse(layer: Any, adapter_names: Any) -> None:
    """Refuses to merge these adapters, or the active ones, into a quantised weight."""
    name = getattr(layer, "parameter_name", "weight")
    if isinstance(layer.get_base_layer()._modules.get(name), QuantizedWeight) and any(
        each in getattr(layer, "lora_A", ()) for each in adapter_names or layer.active_adapters
    ):
        raise TypeError(
            f"{name}: expected a plain weight to merge adapters into, got a QuantizedWeight, which is a constant;"
            " its adapters run beside it"
        )


def _refusing(merge: Callable[..., Any]) -> Callable[..., Any]:
    """``merge`` of one layer."""

    @functools.wraps(merge)
    def refuse(self: Any, safe_merge: bool = False, adapter_names: Any = None) -> Any:
        _refuse(self, adapter_names)
        return merge(self, safe_merge=safe_merge, adapter_names=adapter_names)

    return refuse


def _refusing_first(merge: Callable[..., Any]) -> Callable[..., Any]:
    """``merge`` of a model, which goes from layer to layer: a later one that refuses would leave it half merged."""

    @functools.wraps(merge)
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(merge).bind(self, *args, **kwargs).arguments
        if given.get("merge", True):
            for layer in self.model.modules():
                if hasattr(layer, "get_base_layer") and hasattr(layer, "active_adapters"):
                    _refuse(layer, given.get("adapter_names"))
        return merge(self, *args, **kwargs)

    return refuse


def _showing_parameters(inject: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT looks for parameters to adapt, and reads no more of them than shape, dtype and device: while it does,
    parameters of these stand in the place of quantised weights."""

    @functools.wraps(inject)
    def showing(self: Any, peft_config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden = [
            (module, name, w)
            for module in list(model.modules())
            if hasattr(module, "is_transposed")
            for name, w in list(module._modules.items())
            if isinstance(w, QuantizedWeight)
        ]
        for module, name, w in hidden:
            one = torch.zeros((), device=w.device).expand(w.shape)
            del module._modules[name]
            module._parameters[name] = nn.Parameter(one.mT if module.is_transposed else one, requires_grad=False)
        for module in {module for module, _, _ in hidden}:  # PEFT names adapters by the order of dense experts
            module._parameters["down_proj"] = module._parameters.pop("down_proj")
        try:
            return inject(self, peft_config, model, *args, **kwargs)
        finally:
            for module, name, w in hidden:
                del module._parameters[name]
                module._modules[name] = w

    return showing


def _plain_adapters(wrapper: Any, experts: nn.Module, active: Any) -> list[tuple[Tensor, Tensor, float]] | None:
    """``a [E * r, in]``, ``b [out, r * E]`` and the scale of each active adapter; None if there is more to them."""
    # Straight from the dictionaries: this runs in each call of each layer, and modules look names up slowly.
    of_wrapper, name = wrapper._modules, wrapper.parameter_name
    factors_a, factors_b, drops = (of_wrapper[each]._modules for each in ("lora_A", "lora_B", "lora_dropout"))
    names = [each for each in active or () if each in factors_a]
    w = experts._parameters.get(name)
    quantised = isinstance(experts._modules.get(name), QuantizedWeight)
    if not names or not (quantised or (w is not None and w.dim() == 3 and w.dtype in DTYPES)):
        return None
    # Before 0.20 PEFT took the rows of a weight for its inputs, unless they were; then a takes no row of x.
    if wrapper.__dict__.get("_did_swap_in_out_features", False) is experts.is_transposed:
        return None
    variants, scaling, found = wrapper.lora_variant, wrapper.scaling, []
    for each in names:
        a, b = factors_a[each], factors_b[each]
        if (
            each in variants
            or any(type(factor) is not nn.Linear or factor._parameters["bias"] is not None for factor in (a, b))
            or (each in drops and type(drops[each]) is not nn.Identity)
        ):
            return None
        a_weight, b_weight = (_fitting(factor._parameters["weight"], w) for factor in (a, b))
        if b_weight.dtype is not a_weight.dtype:
            b_weight = b_weight.to(a_weight.dtype)
        found.append((a_weight, b_weight, float(scaling[each])))
    return found


def _fitting(factor: Tensor, w: Tensor | None) -> Tensor:
    """As it is where the operator takes it beside w (None: quantised): of w's dtype, or of its arithmetic's."""
    if w is None:
        return factor if factor.dtype is torch.float32 else factor.float()
    wide = torch.float64 if w.dtype is torch.float64 else torch.float32
    return factor if factor.dtype in (w.dtype, wide) else factor.to(w.dtype)


def adapters_of(experts: Any, first: str) -> Lora | None:
    """What the wrappers of ``experts`` hold for this call; ``first`` names the weight before the activation."""
    held = _held.of.get(experts)
    if held is None:
        return None
    pairs = [("in", *each) for each in held.get(first, ())] + [("down", *each) for each in held.get("down_proj", ())]
    if len({place for place, *_ in pairs}) == len(pairs) and len({scale for *_, scale in pairs}) == 1:
        factors: dict[str, Any] = {}
        for place, a, b, _scale in pairs:
            factors |= {f"a_{place}": a, f"b_{place}": b}
        return Lora(**factors, scale=pairs[0][3])
    parts = [Lora(**{f"a_{place}": a, f"b_{place}": b}, scale=scale) for place, a, b, scale in pairs]  # type: ignore[arg-type]
    return together(parts, experts.num_experts)
