# SPDX-License-Identifier: BSD-3-Clause
"""The part of transformers' loading that keeps quantised weights: a quantizer named "ffn_ops", and the operation that
puts what it reads into the model. It imports transformers; ``register`` imports it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .._quantized import QuantizedWeight
from .._quantized.linear import QuantizedLinear
from .._replace import ReplaceEntry
from ._checkpoints import METHODS, OWN, settings_of, stacked, why_apart
from ._quantized_embedding import QuantizedEmbedding
from .transformers import _runs_ours


class KeptConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """In a config: how a checkpoint of another method is stored, while it is loaded; then the format of each weight."""

    def __init__(self, weights: Any = None, checkpoint: Any = None, **_: Any) -> None:
        self.quant_method = OWN
        self.weights = weights
        self.checkpoint = checkpoint

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_dict().items() if value is not None}


class KeepingQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads what a checkpoint has quantised as QuantizedWeight, and the rest as transformers does."""

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        foreign = quantization_config.checkpoint
        self.settings = {"quant_method": OWN, "weights": quantization_config.weights} if foreign is None else foreign
        self.method = METHODS[self.settings["quant_method"]]
        self.entries: list[ReplaceEntry] = []
        self.formats: dict[str, str] = {}
        self.made: set[int] = set()  # addresses of copies
        self.dtype = torch.float32
        self.plan: dict[str, torch.dtype] = {}

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = dtype
        return dtype

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """Makes the model's converters collect all tensors of a weight, and those of weights that have none."""
        self.plan = model._get_dtype_plan(self.dtype)
        general = [
            WeightConverter(list(names), target, [Keep(self, [Concatenate(1)] if target in self.method.joined else ())])
            for target, names in self.method.names.items()
        ]
        if self.method.own_names:
            return general
        renames = [WeightRenaming(source, target) for source, target in self.method.renames]
        return [*renames, *(self._collecting(each) for each in weight_conversions), *general]

    def _collecting(self, converter: Any) -> Any:
        names = self.method.names.get("weight", ())
        sources = getattr(converter, "_original_source_patterns", ())
        if not names or not isinstance(converter, WeightConverter) or not all(s.endswith(".weight") for s in sources):
            return converter
        every = [source.removesuffix("weight") + name for source in sources for name in names]
        return converter.copy(every, converter._original_target_patterns, operations=[Keep(self, converter.operations)])

    def dtype_of(self, name: str) -> torch.dtype:
        """As transformers casts a parameter that is not quantised."""
        if self.plan:
            found, groups, _ = build_glob_alternation(list(self.plan))
            if (match := found.search(name)) is not None:
                return self.plan[groups[match.lastgroup]]
        return self.dtype

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for module in model.modules():
            if isinstance(module, QuantizedWeight):
                vars(module).pop(INITIALIZED, None)
        for path, module in model.named_modules():
            if _runs_ours(module):
                self._alike(path, module)
        if self.made:  # else one view of the file would keep all its pages, beside the copies of them
            for t in (*model.parameters(), *model.buffers()):
                if t.data_ptr() not in self.made:
                    t.data = t.detach().clone()
        # Saved are the model's own names, with codes and scales behind those of quantised weights.
        model._weight_conversions = []
        self.quantization_config.weights, self.quantization_config.checkpoint = self.formats, None
        return model

    def _alike(self, path: str, experts: Any) -> None:
        """The operator takes quantised weights or dense ones: where one had to be dequantised, so is the other."""
        kept = [name for name in ("gate_up_proj", "up_proj", "down_proj") if name in experts._modules]
        if len(kept) != 1:
            return
        w, name = experts._modules.pop(kept[0]), f"{path}.{kept[0]}"
        values = w.dequantize(self.dtype_of(name))
        setattr(experts, kept[0], nn.Parameter(values.mT.contiguous() if experts.is_transposed else values))
        del self.formats[name]
        why = "another weight of its experts is dense"
        entry = ReplaceEntry(name, type(experts).__name__, "dequantised", str(values.dtype)[6:], why)
        self.entries = [*(each for each in self.entries if each.path != name), entry]  # behind its reason

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # all but the quantised weights, or adapters

    @property
    def is_compileable(self) -> bool:
        return True


INITIALIZED = "_is_hf_initialized"  # else transformers draws a weight again


class Keep(ConversionOps):  # type: ignore[misc]
    """Puts the quantised weights that it collects into the model. Where that is impossible it dequantises them and goes
    on with ``then``, the operations for dense weights, and the report says why."""

    def __init__(self, quantizer: KeepingQuantizer, then: Sequence[Any] = ()) -> None:
        self.hf_quantizer, self.then = quantizer, list(then)

    def __deepcopy__(self, memo: Any) -> Keep:
        return self  # transformers copies it for each tensor

    @torch.no_grad()
    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **more: Any) -> Any:
        model, name, quantizer = more["model"], more["full_layer_name"], self.hf_quantizer
        branches = {
            prefix: list(self._read(parts, name, model)) for prefix, parts in _by_weight(input_dict, source_patterns)
        }
        weights = [w for branch in branches.values() for w in branch]
        quantized = [isinstance(w, QuantizedWeight) for w in weights]
        if all(quantized):
            why = self._why_not(model, name) or why_apart([*branches.values()])
            if why is None:
                self._put(model, name, [*branches.values()])
                more["missing_keys"].discard(name)
                return {}
        else:
            why = "some of its experts are not quantised" if any(quantized) else None
        dtype = quantizer.dtype_of(name)
        if any(quantized):
            module = type(_owner(model, name)[0]).__name__
            quantizer.entries.append(
                ReplaceEntry(name, module, "dequantised", str(dtype).removeprefix("torch."), why or "")
            )
        dense = {prefix: [_dense(w, dtype) for w in branch] for prefix, branch in branches.items()}
        if not self.then:
            ((t,),) = dense.values()
            return {name: t}
        result = {f"{prefix}.weight": tensors for prefix, tensors in dense.items()}
        for op in self.then:
            result = op.convert(result, source_patterns=source_patterns, target_patterns=target_patterns, **more)
        return result

    def _read(self, parts: dict[str, list[Tensor]], name: str, model: Any) -> Iterator[Any]:
        quantizer = self.hf_quantizer
        settings = quantizer.settings
        if settings.get("weights") is not None:
            base = f"{model.base_model_prefix}."
            known = (name, base + name, name.removeprefix(base))
            format = next((settings["weights"][each] for each in known if each in settings["weights"]), None)
            if format is None:
                raise ValueError(f"quantization_config: expected a format for {name}, got none")
            settings = {**settings, "format": format}
        counts = {leaf: len(tensors) for leaf, tensors in parts.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"{name}: expected as many tensors of each kind, got {counts}")
        for tensors in zip(*parts.values(), strict=True):
            yield quantizer.method.read(dict(zip(parts, tensors, strict=True)), settings)

    def _why_not(self, model: Any, name: str) -> str | None:
        owner, attribute = _owner(model, name)
        tied = model.all_tied_weights_keys
        if name in tied or name in tied.values():
            return "it is tied to another weight"
        if attribute == "weight" and type(owner) in (nn.Linear, nn.Embedding) and not self.then:
            return None
        if not _runs_ours(owner):
            return "its class runs code of its own"
        kinds = [type(op) for op in self.then]
        if kinds not in ([], [MergeModulelist], [Concatenate], [MergeModulelist, Concatenate]) or any(
            op.dim != (0 if isinstance(op, MergeModulelist) else 1) for op in self.then
        ):
            return f"its experts are put together by {', '.join(map(repr, self.then))}"
        return None

    def _put(self, model: Any, name: str, branches: list[list[QuantizedWeight]]) -> None:
        owner, attribute = _owner(model, name)
        w = stacked(branches) if self.then else branches[0][0]
        shape = getattr(owner, attribute).shape
        turned = shape[:-2] + shape[:-3:-1] if getattr(owner, "is_transposed", False) else shape
        if w.shape != turned:
            raise ValueError(f"{name}: expected a quantised weight of shape {list(turned)}, got {list(w.shape)}")
        setattr(w, INITIALIZED, True)
        quantizer = self.hf_quantizer
        if self.then or w.format == "uint4":
            quantizer.made.update(t.data_ptr() for t in w.parts)
        quantizer.formats[name] = w.stacked()[1]
        quantizer.entries.append(ReplaceEntry(name, type(owner).__name__, "quantised", w.extra_repr()))
        if isinstance(owner, (nn.Linear, nn.Embedding)):
            if isinstance(owner, nn.Embedding):
                layer: nn.Module = QuantizedEmbedding(w, quantizer.dtype_of(name))
            else:
                layer = QuantizedLinear(w, owner.bias)
            parent, child = _owner(model, name.rpartition(".")[0])
            parent._modules[child] = layer
        else:
            delattr(owner, attribute)
            setattr(owner, attribute, w)


def _by_weight(collected: Any, patterns: Sequence[str]) -> list[tuple[str, dict[str, list[Tensor]]]]:
    """Of each weight, in the order of the patterns, its tensors by the last part of their names."""
    found: dict[str, dict[str, list[Tensor]]] = {}
    for pattern in patterns:
        if pattern in collected:
            prefix, _, leaf = pattern.rpartition(".")
            tensors = collected.pop(pattern)
            found.setdefault(prefix, {})[leaf] = tensors if isinstance(tensors, list) else [tensors]
    return list(found.items())


def _owner(model: Any, name: str) -> tuple[Any, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _dense(w: Any, dtype: torch.dtype) -> Tensor:
    return w.dequantize(dtype) if isinstance(w, QuantizedWeight) else w.to(dtype)


def describe(model: Any) -> None:
    """Gives a model with quantised weights what :class:`KeepingQuantizer` gives those that it loads."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        quantizer = model.hf_quantizer = KeepingQuantizer(KeptConfig(weights={}))
    if isinstance(quantizer, KeepingQuantizer):
        weights = {path: w for path, w in model.named_modules() if isinstance(w, QuantizedWeight)}
        quantizer.formats.update((path, w.stacked()[1]) for path, w in weights.items())
        quantizer.postprocess_model(model)


def _keeping_ours(method: Any) -> Any:
    """``set_experts_implementation`` that leaves quantised experts to the implementation that computes them."""

    @functools.wraps(method)
    def setting(self: Any, experts_implementation: Any) -> Any:
        every = not isinstance(experts_implementation, dict)
        asked = {"": experts_implementation} if every else experts_implementation
        for part, implementation in asked.items():
            config = self.config if part == "" else getattr(self.config, part, None)
            for path, module in self.named_modules() if implementation != OWN else ():
                if _runs_ours(module) and _is_quantized(module) and (every or module.config is config):
                    raise ValueError(
                        f"experts_implementation: expected {OWN!r}, which alone computes quantised experts such as"
                        f" {path}, got {implementation!r}"
                    )
        return method(self, experts_implementation)

    return setting


def _is_quantized(experts: nn.Module) -> bool:
    return any(isinstance(w, QuantizedWeight) for w in experts._modules.values())


def register_kept() -> None:
    if OWN not in AUTO_QUANTIZER_MAPPING:
        PreTrainedModel.set_experts_implementation = _keeping_ours(PreTrainedModel.set_experts_implementation)
    if OWN not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(OWN)(KeptConfig)
        register_quantizer(OWN)(KeepingQuantizer)


def kept_config(config: Any) -> Any:
    """The config with our quantizer in the place of the checkpoint's own."""
    settings = settings_of(config)
    if settings["quant_method"] != OWN:
        config.quantization_config = KeptConfig(checkpoint=settings)
    return config
