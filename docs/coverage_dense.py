# SPDX-License-Identifier: BSD-3-Clause
"""Counts what replace() does with the dense layers of model libraries, and writes docs/coverage-dense.md.

python -m docs.coverage_dense [LIBRARY ...]    those named, or all that are installed; others keep their rows

Models are built on the meta device, those of transformers with two layers. A layer counts once for each
model, class and form, so that a hundred equal blocks count as one.
"""

from __future__ import annotations

import collections
import importlib
import importlib.metadata
import inspect
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ffn_ops import replace_report

PAGE = Path(__file__).with_name("coverage-dense.md")
Models = Iterator[tuple[str, Callable[[], nn.Module]]]
BIG = ("transformers", "diffusers")  # whose models do not fit into memory as their defaults are
NOT_DENSE = ("experts", "takes no mixtures")  # reasons of mixtures, which docs/coverage.md lists
LAYERS = 2  # of a transformers model
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth",
          "num_decoder_layers")  # fmt: skip


# ---- the libraries: a name and a function that builds each model ----------------------------------------------------


def transformers_models() -> Models:
    transformers = importlib.import_module("transformers")
    mapping = importlib.import_module("transformers.models.auto.configuration_auto")
    autos = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText",
             "AutoModelForPreTraining")  # fmt: skip

    def build(kind: str) -> nn.Module:
        config = _shrunk(mapping.CONFIG_MAPPING[kind](), transformers.PretrainedConfig)
        for auto in autos:
            try:
                return getattr(transformers, auto).from_config(config)
            except ValueError as error:  # not of this kind
                reason = error
        modeling = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
        for cls in vars(modeling).values():
            if getattr(cls, "config_class", None) is type(config) and cls.__module__ == modeling.__name__:
                return cls._from_config(config)
        raise reason

    for kind in sorted(mapping.CONFIG_MAPPING_NAMES):
        yield kind, lambda kind=kind: build(kind)  # type: ignore[misc]


def _shrunk(config: Any, base: Any) -> Any:
    for name, value in list(vars(config).items()):
        if isinstance(value, base):
            _shrunk(value, base)
        elif type(value) is int and name in COUNTS:
            setattr(config, name, min(value, LAYERS))
        elif name in ("layer_types", "mlp_layer_types") and isinstance(value, list):
            setattr(config, name, value[:LAYERS])
    return config


def timm_models() -> Models:
    """The first model of each file of architectures."""
    timm = importlib.import_module("timm")
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if names:
            yield names[0], lambda name=names[0]: timm.create_model(name)  # type: ignore[misc]


def torchvision_models() -> Models:
    models = importlib.import_module("torchvision").models

    def build(name: str) -> nn.Module:
        known = inspect.signature(models.get_model_builder(name)).parameters
        backbone = {"weights_backbone": None} if "weights_backbone" in known else {}
        return models.get_model(name, weights=None, **backbone)

    for name in models.list_models():
        yield name, lambda name=name: build(name)  # type: ignore[misc]


def diffusers_models() -> Models:
    """Every model that its defaults build."""
    models = importlib.import_module("diffusers.models")
    base = importlib.import_module("diffusers").ModelMixin
    for name in sorted(dir(models)):
        cls = getattr(models, name)
        if inspect.isclass(cls) and issubclass(cls, base) and cls is not base:
            yield name, cls


def open_clip_models() -> Models:
    """One of each pair of towers."""
    library = importlib.import_module("open_clip")
    kinds: dict[str, str] = {}
    for name in library.list_models():
        config = library.get_model_config(name)
        towers = {k: sorted(v) for k, v in config.items() if isinstance(v, dict)}
        own = re.split(r"[-_/]", str(config["vision_cfg"].get("timm_model_name", "")))[0]
        if not any("hf_" in key for keys in towers.values() for key in keys):  # those are of transformers
            kinds.setdefault(json.dumps([towers, own]), name)
    for name in kinds.values():
        yield name, lambda name=name: library.create_model(name)  # type: ignore[misc]


def x_transformers_models() -> Models:
    """A decoder for each option of its feed-forward layers."""
    library = importlib.import_module("x_transformers")
    options = ({}, "ff_glu", "ff_swish", "ff_relu_squared", "ff_no_bias", "ff_post_act_ln", "ff_custom_activation",
               "ff_sugar_glu", "macaron", "sandwich_norm", "use_rmsnorm", "ff_glu ff_swish",
               "ff_glu ff_swish ff_no_bias use_rmsnorm", "ff_glu ff_glu_mult_bias", "shift_tokens")  # fmt: skip
    values: dict[str, Any] = {"ff_custom_activation": nn.Tanh(), "shift_tokens": 1}
    for each in options:
        chosen = {name: values.get(name, True) for name in (each.split() if isinstance(each, str) else ())}

        def build(chosen: dict[str, Any] = chosen) -> nn.Module:
            layers = library.Decoder(dim=64, depth=2, heads=4, **chosen)
            return library.TransformerWrapper(num_tokens=64, max_seq_len=64, attn_layers=layers)

        yield each or "plain", build


LIBRARIES: dict[str, Callable[[], Models]] = {
    "transformers": transformers_models, "timm": timm_models, "torchvision": torchvision_models,
    "diffusers": diffusers_models, "open_clip_torch": open_clip_models, "x-transformers": x_transformers_models,
}  # fmt: skip


# ---- the walk -------------------------------------------------------------------------------------------------------


def _on_meta(build: Callable[[], nn.Module], library: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return build()
    except (NotImplementedError, RuntimeError):  # it reads a value while it is built
        if library in BIG:
            raise
    return build()


def walk(library: str) -> dict[str, Any]:
    """What replace_report says of each model."""
    counts: collections.Counter[str] = collections.Counter()
    left: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    unbuilt: dict[str, str] = {}
    for name, build in LIBRARIES[library]():
        try:
            entries = replace_report(_on_meta(build, library)).entries
        except Exception as error:
            unbuilt[name] = f"{type(error).__name__}: {error}".split("\n")[0][:100]
            continue
        dense = {
            (e.layer, e.status, e.computes, e.why) for e in entries if not any(word in e.why for word in NOT_DENSE)
        }
        counts["models"] += 1
        counts["with feed-forward layers"] += bool(dense)
        for layer, status, _, why in dense:
            counts["left" if status == "left" else "replaced"] += 1
            if status == "left":
                left[why][layer] += 1
        print(f"{library} {name}: {len(dense)}", file=sys.stderr, flush=True)
    return {
        "version": importlib.metadata.version(library),
        "counts": dict(counts),
        "left": {why: dict(layers) for why, layers in left.items()},
        "unbuilt": unbuilt,
    }


# ---- the page -------------------------------------------------------------------------------------------------------

START, END = "<!-- {} -->", "<!-- end of {} -->"


def section(library: str, found: dict[str, Any]) -> str:
    counts = collections.Counter(found["counts"])
    lines = [
        START.format(library),
        f"## {library} {found['version']}",
        f"{counts['models']} models, {counts['with feed-forward layers']} of them with feed-forward layers:"
        f" {counts['replaced']} layers replaced, {counts['left']} left.",
    ]
    if found["left"]:
        lines += ["", "| left because | layers |", "|---|---|"]
        for why, layers in sorted(found["left"].items(), key=lambda item: -sum(item[1].values())):
            names = sorted(layers)
            shown = ", ".join(f"`{name}`" for name in names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "")
            lines.append(f"| {why.replace('|', '/')} | {shown} |")
    if found["unbuilt"]:
        lines += ["", f"Not built from their defaults: {len(found['unbuilt'])}."]
    return "\n".join([*lines, END.format(library)])


def main(libraries: list[str]) -> None:
    os.environ["TRANSFORMERS_VERBOSITY"] = "critical"
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    for library in libraries or LIBRARIES:
        try:
            importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            print(f"{library} is not installed: its rows stay", file=sys.stderr)
            continue
        found = walk(library)
        print(json.dumps(found["unbuilt"], indent=1), file=sys.stderr)
        text = re.sub(
            f"{re.escape(START.format(library))}.*?{re.escape(END.format(library))}",
            lambda _, library=library, found=found: section(library, found),  # type: ignore[misc]
            PAGE.read_text(encoding="utf-8"),
            flags=re.DOTALL,
        )
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
