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
from ffn_ops._accuracy import limit, worst
from ffn_ops._timing import Timed, take_turns, verified
from ffn_ops.integrations.transformers import register

from .command import row_options, run_rows
from .harness import threads
from .report import table, time_text
from .workloads import DTYPES

FROZEN = "frozen"
PROVIDERS = {"experts": (FROZEN, "ffn_ops", "grouped_mm", "eager"), "dense": (FROZEN, "ffn_ops", "peft")}
LEAST_SAMPLE = 0.02  # seconds; shorter calls are repeated within a sample
VERIFIED = 8  # experts of the comparison with float64


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
    layer = layer.to(DTYPES[row.dtype]).to_empty(device="cpu")
    for p in layer.parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5).requires_grad_(False)
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


def sampler(row: Row, layer: nn.Module) -> Callable[[], float]:
    given = inputs(row, DTYPES[row.dtype])
    d_y = torch.ones(row.T, row.D, dtype=given[0].dtype)

    def step() -> None:
        if row.mode == "training":
            layer(given[0].requires_grad_(), *given[1:]).backward(d_y)
        else:
            with torch.no_grad():
                layer(*given)

    def seconds(repeats: int) -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - begin) / repeats

    seconds(1)
    repeats = max(1, int(LEAST_SAMPLE / seconds(1)))
    return functools.partial(seconds, repeats)


def prepared(row: Row, timed: Timed) -> Callable[[], float]:
    """Of fewer experts of the same widths, the results are compared with PEFT's own way in float64."""
    few = replace(row, E=min(row.E, VERIFIED))
    plain = FROZEN if timed.provider == FROZEN else "peft" if row.kind == "dense" else "eager"
    exact = results(few, layer_of(few, plain).double(), torch.float64)
    eager = results(few, layer_of(few, plain), DTYPES[row.dtype])
    limits = [limit(e, x) for e, x in zip(eager, exact, strict=True)]
    names = ["y", "d_x", *(f"d_adapter {i}" for i in range(len(exact)))][: len(exact)]
    timed.error = worst(names, results(few, layer_of(few, timed.provider), DTYPES[row.dtype]), exact, limits)
    return sampler(row, layer_of(row, timed.provider))


def measure(row: Row, rounds: int) -> list[Timed]:
    found = [Timed(provider) for provider in PROVIDERS[row.kind]]
    with threads(row.threads):
        running = [(t, s, rounds) for t in found if (s := verified(t, functools.partial(prepared, row, t))) is not None]
        take_turns(running)
    return found


def row_text(row: Row, found: list[Timed]) -> str:
    """Times, and each as a multiple of the frozen layer's: the median over rounds, which share their noise."""
    frozen = found[0].seconds
    lines = []
    for each in found:
        if not each.seconds:
            lines.append([each.provider, each.note, "", "", ""])
            continue
        ratio = statistics.median(a / b for a, b in zip(each.seconds, frozen, strict=True)) if frozen else float("nan")
        times = [time_text(each.median), f"{each.spread:.0%}", f"{ratio:.2f}"]
        lines.append([each.provider, *times, f"{each.error:.2f}"])
    return f"{row.name}\n{table(['provider', 'median', 'spread', '/ frozen', 'error / limit'], lines)}"


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
