# SPDX-License-Identifier: BSD-3-Clause
"""``python -m benchmarks.lora``: PEFT's LoRA on stacked experts and on dense layers, inside the operators, in PEFT's
own way, and the frozen layer without adapters. The base is frozen: a step computes the gradients of x and the adapters.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3MoeConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import ffn_ops
from ffn_ops._accuracy import Limit, limit, worst
from ffn_ops._timing import Timed, take_turns, verified
from ffn_ops.integrations.transformers import register

from .command import row_options, run_rows
from .harness import Budget, threads
from .report import table, time_text
from .workloads import DTYPES

FROZEN = "frozen"
PROVIDERS = {"experts": (FROZEN, "ffn_ops", "grouped_mm", "eager"), "dense": (FROZEN, "ffn_ops", "peft")}
LEAST_SAMPLE = 0.02  # seconds; shorter calls are repeated within a sample
VERIFIED = 8  # experts of the comparison with float64
LONGEST_CALL = 15.0  # seconds; a provider whose predicted call is longer does not run


@dataclass(frozen=True)
class Row:
    kind: str
    D: int
    F: int
    E: int  # experts, 8 for each token; 0: dense
    rank: int
    T: int
    mode: str
    dtype: str
    threads: int

    @property
    def name(self) -> str:
        experts = f" E {self.E}" if self.E else ""
        return f"{self.kind} {self.D}/{self.F}{experts} r {self.rank}, T {self.T}, {self.mode}, {self.dtype}"


def rows(count: int) -> list[Row]:
    small, large, dense = ("experts", 256, 128, 64, 8), ("experts", 2048, 768, 128, 16), ("dense", 2048, 5632, 0, 16)
    cases = [
        (small, 64, "training", "float32"), (small, 1, "decode", "float32"),
        (large, 64, "training", "bfloat16"), (large, 1, "decode", "bfloat16"),
        (dense, 512, "training", "float32"), (dense, 16, "training", "float32"), (dense, 1, "decode", "float32"),
    ]  # fmt: skip
    return [Row(*shape, T, mode, dtype, count) for shape, T, mode, dtype in cases]


@functools.lru_cache(maxsize=6)
def base_weight(shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor:
    """One for all providers, as none trains it. Experts beyond those that are verified are copies of them."""
    few = shape if len(shape) < 3 else (min(shape[0], VERIFIED), *shape[1:])
    drawn = torch.randn(few, generator=torch.Generator().manual_seed(sum(name.encode()))) * shape[-1] ** -0.5
    return drawn.to(dtype).repeat(-(-shape[0] // few[0]), *(1 for _ in shape[1:]))[: shape[0]]


def layer_of(row: Row, provider: str) -> nn.Module:
    """The layer as PEFT leaves it, with random factors; the same weights and factors for each provider."""
    torch.manual_seed(0)
    implementation = "ffn_ops" if provider == FROZEN else provider
    dense = row.kind == "dense"
    with torch.device("meta"):
        if dense:
            layer: Any = LlamaMLP(LlamaConfig(hidden_size=row.D, intermediate_size=row.F))
        else:
            config = Qwen3MoeConfig(
                hidden_size=row.D, moe_intermediate_size=row.F, num_experts=row.E, num_experts_per_tok=min(8, row.E)
            )
            config._experts_implementation = implementation
            layer = Qwen3MoeExperts(config)
    layer = layer.to(DTYPES[row.dtype])
    for name, p in list(layer.named_parameters()):
        path, _, own = name.rpartition(".")
        layer.get_submodule(path)._parameters[own] = nn.Parameter(base_weight(tuple(p.shape), p.dtype, name), False)
    if provider != FROZEN:
        targets = ["gate_proj", "up_proj", "down_proj"] if dense else []
        parameters = [] if dense else ["layer.gate_up_proj", "layer.down_proj"]
        lora = LoraConfig(r=row.rank, lora_alpha=row.rank, target_modules=targets, target_parameters=parameters)
        peft: Any = get_peft_model(nn.ModuleDict({"layer": layer}), lora)  # type: ignore[arg-type]
        layer = peft.base_model.model["layer"]
        for n, p in layer.named_parameters():
            if "lora_" in n:
                nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    if dense and implementation == "ffn_ops":
        layer = ffn_ops.replace(nn.Sequential(layer))
    return layer


def inputs(row: Row, dtype: torch.dtype) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(row.T, row.D, generator=g).to(DTYPES[row.dtype]).to(dtype)
    if not row.E:
        return (x,)
    weights, ids = torch.rand(row.T, row.E, generator=g).topk(min(8, row.E))
    return x, ids, weights.to(torch.float64 if dtype is torch.float64 else torch.float32)


def results(row: Row, layer: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    """The output and, in training, the gradients of x and of each adapter."""
    x, *rest = inputs(row, dtype)
    if row.mode == "decode":
        with torch.no_grad():
            return [layer(x, *rest)]
    y = layer(x.requires_grad_(), *rest)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]


def sampler(row: Row, layer: nn.Module) -> Callable[[int], float]:
    """Seconds of a step, the mean of so many."""
    given = inputs(row, DTYPES[row.dtype])
    d_y = torch.ones(row.T, row.D, dtype=given[0].dtype)

    leaves = [given[0], *layer.parameters()]

    def step() -> None:
        if row.mode == "training":
            for leaf in leaves:  # as an optimizer's zero_grad
                leaf.grad = None
            layer(given[0].requires_grad_(), *given[1:]).backward(d_y)
        else:
            with torch.no_grad():
                layer(*given)

    def seconds(repeats: int) -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - begin) / repeats

    return seconds


def plan(timed: Timed, seconds: Callable[[int], float], most: int) -> tuple[Callable[[], float] | None, int]:
    """A sample, and how many of them: fewer where one takes long; none where the first call is all there is."""
    budget = Budget(seconds=4.0, most_rounds=most)
    once = seconds(1)
    if once >= budget.seconds:
        timed.seconds, timed.note = [once], "one call, not warmed up"
        return None, 0
    once = min(once, seconds(1))
    timed.repeats = max(1, int(LEAST_SAMPLE / once))
    return functools.partial(seconds, timed.repeats), budget.rounds(once * timed.repeats)


@functools.lru_cache(maxsize=2)
def right(few: Row, plain: str) -> tuple[list[Tensor], list[Limit]]:
    """The results in float64, and what error each may have."""
    exact = results(few, layer_of(few, plain).double(), torch.float64)
    eager = results(few, layer_of(few, plain), DTYPES[few.dtype])
    return exact, [limit(e, x) for e, x in zip(eager, exact, strict=True)]


def prepared(row: Row, timed: Timed, rounds: int) -> tuple[Callable[[], float] | None, int]:
    """Of fewer experts of the same widths, the results are compared with PEFT's own way in float64."""
    few = replace(row, E=min(row.E, VERIFIED))
    plain = FROZEN if timed.provider == FROZEN else "peft" if row.kind == "dense" else "eager"
    exact, limits = right(few, plain)
    names = ["y", "d_x", *(f"d_adapter {i}" for i in range(len(exact)))][: len(exact)]
    layer, began = layer_of(few, timed.provider), time.perf_counter()
    found = results(few, layer, DTYPES[row.dtype])
    seconds = time.perf_counter() - began
    timed.error = worst(names, found, exact, limits)
    if timed.provider == "eager" and row.mode == "training":
        # Each chosen expert has a gradient of the size of all, so a call grows with the square of their number.
        predicted = seconds * (row.E / few.E) ** 2
        if predicted > LONGEST_CALL:
            timed.note = f"not run: a call would take about {predicted:.0f} s, at the rate of {few.E} experts"
            return None, 0
    return plan(timed, sampler(row, layer_of(row, timed.provider)), rounds)


def measure(row: Row, rounds: int) -> list[Timed]:
    found = [Timed(provider) for provider in PROVIDERS[row.kind]]
    with threads(row.threads):
        planned = [(t, verified(t, functools.partial(prepared, row, t, rounds))) for t in found]
        take_turns([(t, each[0], each[1]) for t, each in planned if each is not None and each[0] is not None])
    return found


def row_text(row: Row, found: list[Timed]) -> str:
    """Times, and each as a multiple of the frozen layer's: the median over rounds, which share their noise."""
    frozen = found[0].seconds
    lines = []
    for each in found:
        if not each.seconds:
            error = "" if each.error is None else f"{each.error:.2f}"
            lines.append([each.provider, "", "", "", error, each.note])
            continue
        ratio = statistics.median(a / b for a, b in zip(each.seconds, frozen, strict=False)) if frozen else float("nan")
        times = [time_text(each.median), f"{each.spread:.0%}", f"{ratio:.2f}"]
        lines.append([each.provider, *times, f"{each.error:.2f}", each.note])
    return f"{row.name}\n{table(['provider', 'median', 'spread', '/ frozen', 'error / limit', 'note'], lines)}"


def main(arguments: list[str] | None = None) -> int:
    parser = row_options("lora", rounds=9)
    parser.add_argument("--quick", action="store_true", help="small shapes and three rounds")
    options = parser.parse_args(arguments)
    register()
    every = rows(options.threads)
    if options.quick:
        every = [replace(row, D=64, F=96, E=min(row.E, 8), T=min(row.T, 16)) for row in every]

    def measured(row: Row) -> tuple[list[Timed], str, dict[str, Any]]:
        found = measure(row, 3 if options.quick else options.rounds)
        return found, row_text(row, found), {}

    return run_rows(parser, options, every, measured)


if __name__ == "__main__":
    sys.exit(main())
