# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face transformers: ``experts_implementation="ffn_ops"``, ``register(model)`` for experts that ask for no
implementation, ``from_pretrained`` for quantised checkpoints. Only calls of these import transformers."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._quantized import QuantizedWeight
from .._replace import ReplaceEntry, ReplaceReport
from ..moe_ffn import MoEFFN
from ..ops import moe, moe_combine, moe_dispatch, moe_experts
from ..routing import Routing
from . import _exchange
from ._checkpoints import ASIDE, HUB, REFUSED, named, on_cpu
from ._gates import gate_of
from ._peft import adapters_of, adopt

NAME = "ffn_ops"
OLDEST = (5, 23)
OWN_CODE = "the model's own code runs, which asks for no experts_implementation"
CAN_EXCHANGE = f"{OWN_CODE}; register(model) exchanges it"
_warned: set[str] = set()
_asking: set[Any] = set()  # forwards of classes that have been seen to call ours


def register(model: nn.Module | None = None) -> None:
    """Makes ``experts_implementation="ffn_ops"`` known to ``from_pretrained``, ``from_config`` and
    ``model.set_experts_implementation``. Calling it again changes nothing.

    transformers cannot exchange the experts of every mixture. If a model is made with this implementation, or set to
    it, and some of its experts keep their own code, a ``UserWarning`` names their classes, once per process.

    ``register(model)`` exchanges those too, in place: Switch Transformers, NLLB-MoE, JetMoE, Llama 4, Step-3.5 and 3.7,
    LongCat-Flash, DBRX, Doge, ViTPose. Each instance gets a subclass of its class, whose forward calls this package's
    operators on the same parameters. A class whose forward does not agree with ours on a tiny instance is left alone.
    Children that would be bypassed and have hooks, adapters or quantised weights are called: then the own forward runs,
    and :func:`report` says so. :func:`ffn_ops.restore` gives the classes back; the results are the same bits as before.

    Args:
        model: whose experts to exchange, or None.

    Raises:
        ImportError: if transformers is missing or older than 5.23.
        TypeError: if ``model`` is not an ``nn.Module``.
    Warns:
        UserWarning: if nothing in ``model`` was exchanged.

    Source: ``ExpertsInterface`` of ``transformers/integrations/moe.py``.

    Example:
        >>> from ffn_ops.integrations.transformers import register
        >>> register()
        >>> from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        >>> "ffn_ops" in ALL_EXPERTS_FUNCTIONS.valid_keys()
        True
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError("ffn_ops: transformers is not installed, run pip install 'ffn_ops[transformers]'") from error
    version = str(transformers.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise ImportError(f"transformers: expected at least {'.'.join(map(str, OLDEST))}, got {version}")
    importlib.import_module("transformers.integrations.moe").ExpertsInterface.register(NAME, experts_forward)
    for method, chosen in (
        ("set_experts_implementation", lambda model, experts_implementation: experts_implementation),
        ("post_init", lambda model: model.config._experts_implementation),  # the end of every model's __init__
    ):
        _warn_after(transformers.PreTrainedModel, method, chosen)
    adopt(_runs_ours)
    importlib.import_module("ffn_ops.integrations._keep").register_kept()
    if model is not None:
        _exchange_in(model)


def from_pretrained(model_class: Any, name: Any, *args: Any, **options: Any) -> Any:
    """``model_class.from_pretrained(name, ...)`` that keeps a quantised checkpoint quantised, on a CPU.

    The experts, linear layers and embeddings that the checkpoint has quantised become :class:`ffn_ops.QuantizedWeight`.
    Experts and linear layers run as this package's operators, forward and backward to their input; activations are not
    quantised. Everything else is loaded as ever.
    :func:`report` lists what stayed quantised and what did not. ``save_pretrained`` writes the same bytes in this
    package's layout, which this function reads, and after :func:`register` transformers' own ``from_pretrained``.

    Args:
        model_class: ``AutoModelForCausalLM`` or another class of transformers.
        name: as transformers takes it. The config's ``quant_method`` is one of ``mxfp4`` (gpt-oss), ``fp8`` (DeepSeek),
            ``gptq`` and ``awq`` (4 bits), ``compressed-tensors`` (``pack-quantized`` of 4 bits,
            ``mxfp4-pack-quantized``, ``nvfp4-pack-quantized``, ``int-quantized``, ``float-quantized``), ``ffn_ops``. No
            other library is needed.
        options: as transformers takes them. ``experts_implementation`` is "ffn_ops". ``gguf_file`` needs gguf-py and
            takes Qwen2-MoE, Qwen3-MoE and MiniMax-M2.

    Returns:
        The model.

    Raises:
        ImportError: as :func:`register`; with ``gguf_file``, if gguf is missing.
        TypeError: if ``model_class`` or ``name`` is of another type.
        ValueError: if the checkpoint is not quantised or by another method, if it is to be loaded on a GPU, or for an
            option that has no meaning here.
        RuntimeError: from transformers, if a weight does not fit; its report above has our message.
    Warns:
        UserWarning: if weights had to be dequantised.

    Example:
        >>> import tempfile, transformers
        >>> from ffn_ops.integrations.transformers import from_pretrained, register
        >>> register()
        >>> widths = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> config = transformers.Qwen3MoeConfig(vocab_size=50, num_experts=4, num_key_value_heads=1, **widths)
        >>> auto, folder = transformers.AutoModelForCausalLM, tempfile.TemporaryDirectory()
        >>> model = auto.from_config(config, experts_implementation="ffn_ops")
        >>> _ = ffn_ops.quantize_(model, "mxfp4")
        >>> model.save_pretrained(folder.name)
        >>> from_pretrained(auto, folder.name).model.layers[0].mlp.experts.down_proj
        QuantizedWeight(mxfp4, [4, 64, 32], 0.0 of 0.0 MB in bfloat16)
    """
    named(model_class, name)
    register()
    for option in REFUSED:
        if options.get(option) is not None:
            raise ValueError(f"{option}: expected None where a quantised checkpoint is kept, got {options[option]!r}")
    if options.setdefault("experts_implementation", NAME) != NAME:
        raise ValueError(f"experts_implementation: expected {NAME!r}, got {options['experts_implementation']!r}")
    on_cpu(options.get("device_map"))
    hub = {key: options.pop(key) for key in HUB if key in options}
    keep = importlib.import_module("ffn_ops.integrations._keep")
    if (file := options.pop("gguf_file", None)) is not None:
        if importlib.util.find_spec("gguf") is None:
            raise ImportError("ffn_ops: gguf is not installed, run pip install gguf")
        gguf = importlib.import_module("ffn_ops.integrations._gguf")
        model_class, config, options["state_dict"] = gguf.opened(model_class, name, file, hub)
        config.quantization_config = keep.KeptConfig(checkpoint={"quant_method": "gguf"})
        options.setdefault("dtype", torch.float32)  # as transformers loads such files
        return _loaded(model_class, None, args, config, hub, options)
    config = options.pop("config", None)
    if config is None:
        aside = {key: options.pop(key) for key in ASIDE if key in options}
        auto = importlib.import_module("transformers").AutoConfig
        config, options = auto.from_pretrained(name, return_unused_kwargs=True, **hub, **options)
        options |= aside
    return _loaded(model_class, name, args, keep.kept_config(copy.deepcopy(config)), hub, options)


def _loaded(model_class: Any, name: Any, args: Any, config: Any, hub: dict[str, Any], options: dict[str, Any]) -> Any:
    model = model_class.from_pretrained(name, *args, config=config, **hub, **options)
    found = model[0] if isinstance(model, tuple) else model  # with output_loading_info
    if lost := [entry for entry in _weights(found) if entry.status == "dequantised"]:
        what = f"{len(lost)} quantised weights were dequantised, because {lost[0].why}"
        warnings.warn(f"{what}. ffn_ops.integrations.transformers.report(model) lists them", stacklevel=3)
    return model


def save_as_kept(model: nn.Module) -> None:
    """Makes ``save_pretrained`` of a model of transformers, which may be inside of others, write its quantised weights
    as :func:`from_pretrained` reads them. transformers would take their codes and scales for weights and cut them."""
    loaded = sys.modules.get("transformers.modeling_utils")
    found = next((m for m in model.modules() if loaded is not None and isinstance(m, loaded.PreTrainedModel)), None)
    if found is not None:
        importlib.import_module("ffn_ops.integrations._keep").describe(found)


def _weights(model: nn.Module) -> list[ReplaceEntry]:
    """What :func:`from_pretrained` did with the quantised weights of its checkpoint."""
    return getattr(getattr(model, "hf_quantizer", None), "entries", [])


def _exchange_in(model: nn.Module) -> None:
    _check(model)
    found = {path: module for path, module in model.named_modules() if _exchange.exchange_of(module) is not None}
    refused = {path: why for path, module in found.items() if (why := _exchange.exchange(module)) is not None}
    if len(refused) == len(found):
        reasons = "; ".join(f"{path}: {why}" for path, why in refused.items()) or "it has no such class"
        none = f"register(model): no experts of {type(model).__name__} were exchanged: {reasons}"
        where = "ffn_ops.integrations.transformers.report(model) lists what computes which experts"
        warnings.warn(f"{none}. {where}", UserWarning, stacklevel=3)


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")


class ExpertsReport(ReplaceReport):
    """The result of :func:`report`. ``print`` shows identical layers in one line.

    Example:
        >>> from ffn_ops.integrations.transformers import report
        >>> report(nn.Linear(2, 2)).entries
        ()
    """

    def __str__(self) -> str:
        return super().__str__() if self.entries else "no mixture of experts found"


def report(model: nn.Module) -> ExpertsReport:
    """Lists every module of ``model`` that holds experts, and says whether this package computes them.

    ``status`` is "ffn_ops"; "refused" if a call would raise, with the reason in ``why``; or "left" if another
    ``experts_implementation`` is set, or if the module runs its own code whatever is set (Switch Transformers, Llama 4,
    DBRX, until ``register(model)``). It changes nothing and computes no expert.

    ::

        register()
        model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="ffn_ops")
        print(report(model))

    Of a model that :func:`from_pretrained` made it also lists each weight that the checkpoint has quantised, which is
    "quantised" or "dequantised", with the reason.

    It finds modules that transformers declares as experts, modules whose weights have one slice for each of their
    experts, and lists named ``experts``.

    Raises:
        TypeError: if ``model`` is not an ``nn.Module``.

    Example:
        >>> from ffn_ops.integrations.transformers import report
        >>> print(report(nn.Linear(2, 2)))
        no mixture of experts found
    """
    _check(model)
    return ExpertsReport((*_entries(model), *_weights(model)))


def _entries(model: nn.Module) -> Iterator[ReplaceEntry]:
    inside: tuple[str, ...] = ()  # of what is computed as a whole
    for path, module in model.named_modules():
        entry = functools.partial(ReplaceEntry, path, type(module).__name__)
        if inside and path.startswith(inside):
            continue
        if isinstance(module, MoEFFN):
            yield entry("ffn_ops", str(module.activation))
        elif _exchange.is_exchanged(module):
            try:
                gate = _exchange.gate_in(module)
                why = _exchange.why_own_code(module)
            except ValueError as error:
                yield entry("refused", "", str(error))
                continue
            yield entry("left", "", why) if why else entry("ffn_ops", "linear" if gate is None else str(gate))
            inside = (*inside, f"{path}." if path else "")
        elif _declared(module):
            implementation = getattr(module.config, "_experts_implementation", None)
            if implementation != NAME:
                yield entry("left", "", f"experts_implementation is {implementation!r}")
                continue
            try:
                if _asks(module):
                    yield entry("ffn_ops", str(gate_of(module)))
                else:
                    yield entry("left", "", OWN_CODE)
            except (ValueError, KeyError) as error:
                yield entry("refused", "", str(error.args[0]))
        elif _holds_experts(path, module):
            yield entry("left", "", _why_left(model, path))


def _why_left(model: nn.Module, path: str) -> str:
    """Looks for a forward for the module or the one around it."""
    for module in (model.get_submodule(p) for p in (path, path.rpartition(".")[0])):
        if _exchange.exchange_of(module) is not None:
            why = _exchange.why_never_called(module)
            return CAN_EXCHANGE if why is None else f"{OWN_CODE}; {why}"
    return OWN_CODE


def _declared(module: nn.Module) -> bool:
    """True for modules with transformers' ``use_experts_implementation``."""
    return all(hasattr(module, name) for name in ("config", "has_gate", "is_transposed", "_apply_gate"))


def _runs_ours(experts: nn.Module) -> bool:
    forward = type(experts).forward  # what is known of it comes first: this runs in each call of each layer
    known = forward in _asking
    if not (known or _declared(experts)) or getattr(experts.config, "_experts_implementation", None) != NAME:
        return False
    if not known:
        with contextlib.suppress(KeyError):
            if not _asks(experts):
                return False
            _asking.add(forward)
    return forward in _asking


class _AskedError(Exception):
    """Raised by our forward when it is called with this class in place of a tensor: proof that it was called."""


def _asks(module: nn.Module) -> bool:
    """Whether the forward of its class calls ours at present; another library may have replaced it.

    Raises:
        KeyError: if it looks up a table without ours, such as the one for 8-bit weights.
    """
    try:
        type(module).forward(module, _AskedError, _AskedError, _AskedError)
    except _AskedError:
        return True
    except KeyError:
        raise
    except Exception:
        return False
    return False


def _holds_experts(path: str, module: nn.Module) -> bool:
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return len(module) > 1 and "experts" in path.rpartition(".")[2]
    counts = {value for name, value in vars(module).items() if "experts" in name and type(value) is int and value > 1}
    shapes = [w.shape for w in module.parameters(recurse=False) if not is_lazy(w) and w.dim() > 1]
    stacked = [shape for shape in shapes if any(shape[0] % count == 0 for count in counts)]
    tables = [
        child for child in module.children() if isinstance(child, nn.Embedding) and child.num_embeddings in counts
    ]
    # A router also has one row for each expert, but only one such weight.
    return len(stacked) + len(tables) > 1 or any(len(shape) > 2 and shape[0] in counts for shape in stacked)


def _warn_after(cls: Any, name: str, chosen: Callable[..., Any]) -> None:
    method = getattr(cls, name)
    if hasattr(method, "_ffn_ops"):
        return

    @functools.wraps(method)
    def warning(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        asked = chosen(self, *args, **kwargs)
        if asked == NAME or (isinstance(asked, dict) and NAME in asked.values()):
            _warn(self, every=asked == NAME)
        return result

    warning._ffn_ops = True  # type: ignore[attr-defined]
    setattr(cls, name, warning)


def _warn(model: nn.Module, every: bool) -> None:
    """Warns of experts that this package does not compute. Unless ``every``, only of those that no implementation
    reaches."""
    left = {e.layer: e.why for e in _entries(model) if e.status == "left" and (every or e.why.startswith(OWN_CODE))}
    if new := left.keys() - _warned:
        _warned.update(new)
        reasons = "; ".join(f"{layer}: {left[layer]}" for layer in sorted(new))
        text = f"experts_implementation={NAME!r} does not compute {reasons}. ffn_ops.integrations.transformers.report"
        warnings.warn(f"{text}(model) lists what computes which experts", UserWarning, stacklevel=3)


def experts_forward(self: Any, hidden_states: Any, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Computes a module with ``use_experts_implementation`` in one operator.

    Args:
        self: the experts: ``gate_up_proj [E, 2F, D]`` (``up_proj [E, F, D]`` without a gate), ``down_proj [E, D, F]``,
            each transposed if ``is_transposed``; ``*_bias [E, ...]`` if ``has_bias``. Gate rows come first if
            ``is_concatenated``, else gate and up rows alternate.
        hidden_states: ``[T, D]``.
        top_k_index, top_k_weights: ``[T, K]``; ids from ``num_experts`` on belong to another rank and are skipped.

    Returns:
        ``[T, D]``. The weights are applied and summed in float32.

    Raises:
        TypeError, ValueError: if weights do not fit, or the operator does not have the gate.
    """
    if hidden_states is _AskedError:
        raise _AskedError
    first = "gate_up_proj" if self.has_gate else "up_proj"
    w_in, w_down = getattr(self, first), self.down_proj
    if self.is_transposed and not isinstance(w_in, QuantizedWeight):  # which has rows of outputs always
        w_in, w_down = w_in.transpose(1, 2), w_down.transpose(1, 2)
    if "parametrizations" in self._modules:
        adopt(_runs_ours)  # peft was imported after `register`; from the next call on it leaves the weights alone
    routing = Routing.from_topk(top_k_index, top_k_weights, self.num_experts)
    experts: dict[str, Any] = {
        "gated": self.has_gate,
        "activation": gate_of(self),
        "b_in": getattr(self, f"{first}_bias") if self.has_bias else None,
        "b_down": self.down_proj_bias if self.has_bias else None,
        "lora": adapters_of(self, first),
    }
    if not getattr(self, "has_post_expert_norm", False):
        return moe(hidden_states, routing, w_in, w_down, **experts)
    rows = moe_experts(moe_dispatch(hidden_states, routing), routing.offsets, w_in, w_down, **experts)
    return moe_combine(self.post_expert_norm(rows), routing)
