# SPDX-License-Identifier: BSD-3-Clause
"""Compares every class of experts of the installed transformers with its own code, and writes docs/coverage.md.

python -m docs.coverage
"""

from __future__ import annotations

import ast
import collections
import copy
import importlib
import importlib.util
import inspect
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ffn_ops._accuracy import limit, worst
from ffn_ops.integrations import _exchange
from ffn_ops.integrations._gates import gate_of
from ffn_ops.integrations.transformers import register

PAGE = Path(__file__).with_name("coverage.md")
DRAWS, TOKENS, EXPERTS = 24, 24, 4


# ---- which classes there are ----------------------------------------------------------------------------------------


class Experts(NamedTuple):
    module: str
    name: str
    declared: bool  # with use_experts_implementation


def classes() -> Iterator[Experts]:
    """Every class of the installed transformers that holds the weights of experts, read off its source: declared as
    exchangeable, or with three-dimensional weights, tables or a list of layers, one for each expert."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None
    for path in sorted((Path(spec.origin).parent / "models").glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if "expert" not in source:
            continue
        module = f"transformers.models.{path.parent.name}.{path.stem}"
        declared = set(re.findall(r"^@use_experts_implementation.*\nclass (\w+)", source, re.MULTILINE))
        for match in CLASS.finditer(source):
            if match[1] in declared:
                yield Experts(module, match[1], True)
            elif "expert" in match[0] and _holds_experts(ast.parse(match[0]).body[0]):
                yield Experts(module, match[1], False)


# A class with its lines, so that only few are parsed.
CLASS = re.compile(r"^class (\w+).*\n(?:[ )].*\n|\n)*", re.MULTILINE)


def _holds_experts(node: Any) -> bool:
    init = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
    for part in [] if init is None else ast.walk(init):
        if isinstance(part, (ast.For, ast.comprehension)) and "expert" in ast.unparse(part.iter):
            return True
        if not isinstance(part, ast.Call):
            continue
        made, sizes = ast.unparse(part.func), [ast.unparse(each) for each in part.args]
        if made.endswith("Embedding") and "expert" in "".join(sizes):
            return True
        if made in ("torch.empty", "torch.zeros", "torch.randn"):
            shape = part.args[0].elts if part.args and isinstance(part.args[0], ast.Tuple) else part.args
            first = ast.unparse(shape[0]) if shape else ""
            if "expert" in first and (len(shape) > 2 or "*" in first):  # a router has one row for each expert
                return True
    return False


# Whose forward is exchanged where it is not that of the class with the weights, and what is no mixture.
EXCHANGED_IN = {
    "Llama4TextExperts": ["Llama4TextMoe"],
    "DbrxExpertGLU": ["DbrxExperts"],
    "JetMoeParallelExperts": ["JetMoeMoE", "JetMoeParallelExperts"],
}
NO_MIXTURE = {"InklingSharedExperts": "every token goes through all of them: no router chooses"}


# ---- a tiny instance of each ----------------------------------------------------------------------------------------


class TinyConfig:
    """A model's default configuration with small widths and few experts."""

    def __init__(self, config: Any) -> None:
        self._own = config
        self._experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self._own, name)
        if isinstance(value, (list, tuple)) and "size" in name:  # one for each modality
            value = value[0]
        if type(value) is not int and not (value is None and ("expert" in name or "size" in name)):
            return value
        if "expert" in name and not any(word in name for word in ("size", "dim", "inter", "per_tok")):
            return EXPERTS
        return 12 if any(word in name for word in ("inter", "ffn", "moe", "expert")) else 16


def _configs(module: Any) -> Iterator[Any]:
    """Default configurations of a model's file, that of its text first."""
    place = importlib.import_module(module.__name__.replace(".modeling_", ".configuration_"))
    found = [c for c in vars(place).values() if inspect.isclass(c) and c.__module__ == place.__name__]
    for config in sorted(found, key=lambda c: "Text" not in c.__name__):
        if hasattr(config, "model_type"):
            yield config()


def declared_instance(found: Experts) -> tuple[nn.Module, Callable[[], tuple[Any, ...]]]:
    """A tiny instance in float64, and arguments for it."""
    module = importlib.import_module(found.module)
    cls = getattr(module, found.name)
    errors = []
    for config in _configs(module):
        try:
            made = cls(TinyConfig(config))
            break
        except Exception as error:
            errors.append(f"{type(config).__name__}: {error!r}")
    else:
        raise RuntimeError("; ".join(errors))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    made = made.double()
    width = _width(made)

    def call() -> tuple[Any, ...]:
        ids = torch.rand(TOKENS, made.num_experts).argsort(1)[:, :2]
        return torch.randn(TOKENS, width, dtype=torch.float64), ids, torch.rand(TOKENS, 2, dtype=torch.float64)

    return made, call


def _width(module: Any) -> int:
    first = getattr(module, "gate_up_proj" if module.has_gate else "up_proj")
    return int(first.shape[1 if module.is_transposed else 2])


# ---- the comparison -------------------------------------------------------------------------------------------------

Results = dict[str, Tensor]


def results(module: nn.Module, args: tuple[Any, ...], seed: int) -> Results:
    """The output, and the gradients of every floating-point argument and parameter."""
    args = tuple([a.detach().requires_grad_() if _is_float(a) else a for a in args])
    y = module(*args)
    outputs = [t for t in (y if isinstance(y, tuple) else (y,)) if _is_float(t)]
    torch.manual_seed(seed)
    total = sum((t * torch.randn(t.shape, dtype=torch.float64).to(t)).sum() for t in outputs)
    leaves = {f"argument {i}": a for i, a in enumerate(args) if _is_float(a)} | dict(module.named_parameters())
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    named = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    return named | {f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True) if g is not None}


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def compare(module: nn.Module, call: Callable[[], tuple[Any, ...]], ours: Callable[[nn.Module], None]) -> None:
    """Compares the module with a copy to which ``ours`` was done.

    Raises:
        ValueError: float64 or bfloat16 is outside the rule of accuracy, or a call is refused.
    """
    fused = copy.deepcopy(module)
    ours(fused)
    low, fused_low, wide = (copy.deepcopy(m).bfloat16() for m in (module, fused, module))
    wide = wide.double()
    rtol, atol = (1e-5, 1e-5) if watched(module, call()).rounds else (1e-9, 1e-10)
    if not watched(fused, call()).ours:
        raise ValueError("no operator of this package runs")
    pooled: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for seed in range(DRAWS):
        torch.manual_seed(1000 + seed)
        args = call()
        own, mine = (results(m, args, seed) for m in (module, fused))
        if own.keys() != mine.keys():
            raise ValueError(f"expected {', '.join(own)}, got {', '.join(mine)}")
        for name, value in own.items():
            if not torch.allclose(mine[name], value, rtol=rtol, atol=atol * float(value.abs().max() + 1)):
                raise ValueError(f"float64: {name} differs by {(mine[name] - value).abs().max():.2g}")
        rounded = tuple([a.bfloat16() if _is_float(a) else a for a in args])
        exact = results(wide, tuple([a.double() if _is_float(a) else a for a in rounded]), seed)
        eager, mine = (results(m, rounded, seed) for m in (low, fused_low))
        size = exact["output 0"].abs().max()
        if (eager["output 0"] - exact["output 0"]).abs().max() > 0.1 * size:
            continue  # rounding sent a token elsewhere, with eager's router
        for name, value in exact.items():
            pooled.setdefault(name, []).append((mine[name], eager[name], value))
    names = list(pooled)
    joined = [[torch.stack(each).flatten() for each in zip(*pooled[name], strict=True)] for name in names]
    limits = [limit(eager, exact) for _, eager, exact in joined]
    worst(names, [j[0] for j in joined], [j[2] for j in joined], limits)


class _Watch(TorchDispatchMode):
    """Sees whether float64 is rounded to float32, and whether an operator of this package runs."""

    rounds = ours = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wide = any(isinstance(a, Tensor) and a.dtype is torch.float64 for a in args)
        self.rounds |= wide and kwargs.get("dtype") is torch.float32
        self.ours |= func._schema.name.startswith("ffn_ops::")
        return func(*args, **kwargs)


def watched(module: nn.Module, args: tuple[Any, ...]) -> _Watch:
    with torch.no_grad(), _Watch() as watch:
        module(*args)
    return watch


def use_implementation(module: Any) -> None:
    module.config._experts_implementation = "ffn_ops"


class Row(NamedTuple):
    """A line of the table."""

    model: str
    layer: str
    state: str
    how: str = ""
    gate: str = ""
    note: str = ""


IN_FLOAT32 = "its own code computes a part in float32"
NOTES = {
    "JetMoeParallelExperts": "the linear layers of its attention heads",
    "NllbMoeExperts": "its model hands it a one-hot mask where it reads ids: experts 0 and 1 compute everything",
    "VitPoseNaiveMoe": "linear layers, chosen by the data set of an image: there is no router",
}
HOW = {True: "`experts_implementation`", False: "`register(model)`"}


def rows(found: Experts) -> Iterator[Row]:
    model = found.module.split(".")[2]
    if found.name in NO_MIXTURE:
        yield Row(model, found.name, "not a mixture", note=NO_MIXTURE[found.name])
        return
    for name in [found.name] if found.declared else EXCHANGED_IN.get(found.name, [found.name]):
        torch.manual_seed(0)
        if not found.declared and f"{found.module}.{name}" not in _exchange.EXCHANGES:
            yield Row(model, name, "not exchangeable", note="its own code runs")
            continue
        try:
            if found.declared:
                module, call = declared_instance(found)
                gate = str(gate_of(module))
                compare(module, call, use_implementation)
            else:
                module, call = _exchange.tiny(f"{found.module}.{name}")
                compare(module, call, register)
                gate = str(_exchange.EXCHANGES[f"{found.module}.{name}"].gate(_exchanged(module)) or "linear")
            note = NOTES.get(name, IN_FLOAT32 if watched(module, call()).rounds else "")
            yield Row(model, name, "works", HOW[found.declared], f"`{gate}`", note)
        except (ValueError, RuntimeError, KeyError, TypeError) as refused:
            yield Row(model, name, "refused", HOW[found.declared], note=str(refused))


def _exchanged(module: nn.Module) -> nn.Module:
    copied = copy.deepcopy(module)
    register(copied)
    return copied


# ---- the page -------------------------------------------------------------------------------------------------------

HEAD = """# Experts of transformers

Every class of transformers {version} that holds experts, found in its source. A tiny instance of each was compared with
the class's own code: the output and all gradients, in float64 and bfloat16, by the rule of accuracy of
[Promises](promises.md). `make coverage-transformers` writes this page.

{counts}.

| model | class | state | by | gate | note |
|---|---|---|---|---|---|
"""


def page(table: list[Row]) -> str:
    version = importlib.import_module("transformers").__version__
    counted = collections.Counter(row.state for row in table)
    counts = ", ".join(f"{state}: {count}" for state, count in counted.most_common())
    text = HEAD.format(version=version, counts=counts[0].upper() + counts[1:])
    return text + "".join(f"| {' | '.join(each.replace('|', '/') for each in row)} |\n" for row in table)


def rows_of_page() -> dict[tuple[str, str], str]:
    """Model and class, and the state, as the page has them."""
    cells = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return {(model[2:], layer): state for model, layer, state, *_ in cells[1:]}


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    register()
    PAGE.write_text(page([row for found in classes() for row in rows(found)]), encoding="utf-8")


if __name__ == "__main__":
    main()
