# SPDX-License-Identifier: BSD-3-Clause
"""Writes the tables of docs/coverage.md: which layers of other libraries this package computes.

python -m docs.coverage experts    every class of experts of the installed transformers, against its own code
python -m docs.coverage dense      every feed-forward layer of the installed model libraries, as replace() sees it
"""

from __future__ import annotations

import ast
import copy
import importlib
import importlib.util
import inspect
import logging
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
        for node in ast.parse(source).body:
            if not isinstance(node, ast.ClassDef):
                continue
            if any("use_experts_implementation" in ast.unparse(each) for each in node.decorator_list):
                yield Experts(module, node.name, True)
            elif _holds_experts(node):
                yield Experts(module, node.name, False)


def _holds_experts(node: ast.ClassDef) -> bool:
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


def compare(module: nn.Module, call: Callable[[], tuple[Any, ...]], ours: Callable[[nn.Module], None]) -> str:
    """Returns how our error in bfloat16 relates to the allowed one.

    Raises:
        ValueError: float64 or bfloat16 is outside the rule of accuracy, or a call is refused.
    """
    fused = copy.deepcopy(module)
    ours(fused)
    low, fused_low, wide = (copy.deepcopy(m).bfloat16() for m in (module, fused, module))
    wide = wide.double()
    rtol, atol = (1e-5, 1e-5) if in_float32(module, call()) else (1e-9, 1e-10)
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
    return f"{worst(names, [j[0] for j in joined], [j[2] for j in joined], limits):.2f}"


class _Casts(TorchDispatchMode):
    """Sees whether float64 is rounded to float32."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wide = any(isinstance(a, Tensor) and a.dtype is torch.float64 for a in args)
        self.found |= wide and kwargs.get("dtype") is torch.float32
        return func(*args, **kwargs)


def in_float32(module: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether the class's own code computes a part in float32, with float64 given."""
    with torch.no_grad(), _Casts() as casts:
        module(*args)
    return casts.found


def use_implementation(module: Any) -> None:
    module.config._experts_implementation = "ffn_ops"


class Row(NamedTuple):
    """A line of the table."""

    model: str
    layer: str
    state: str
    how: str = ""
    gate: str = ""
    why: str = ""
    error: str = ""  # in bfloat16, as a part of what is allowed


def rows(found: Experts) -> Iterator[Row]:
    model = found.module.split(".")[2]
    if found.name in NO_MIXTURE:
        yield Row(model, found.name, "not a mixture", why=NO_MIXTURE[found.name])
        return
    for name in [found.name] if found.declared else EXCHANGED_IN.get(found.name, [found.name]):
        how = "experts_implementation" if found.declared else "register(model)"
        torch.manual_seed(0)
        try:
            if found.declared:
                module, call = declared_instance(found)
                gate, error = str(gate_of(module)), compare(module, call, use_implementation)
            elif f"{found.module}.{name}" in _exchange.EXCHANGES:
                module, call = _exchange.tiny(f"{found.module}.{name}")
                error = compare(module, call, register)
                register(module)
                gate = str(_exchange.gate_in(module) or "linear")
            else:
                yield Row(model, name, "not exchangeable", why="its own code runs")
                continue
            yield Row(model, name, "works", how, gate, error=error)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            yield Row(model, name, "refused", how, why=str(error))


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    register()
    for found in classes():
        for row in rows(found):
            print(*row, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
