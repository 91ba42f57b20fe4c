# SPDX-License-Identifier: BSD-3-Clause
"""``python -m benchmarks.quantized``: layers on quantised weights against the same layers on dense ones.

A row is a shape, a number of tokens and a mode; training asks for the gradient of x. All experts have the values of one
and memory of their own, so that its float64 result verifies every provider, and every expert is read.
"""

from __future__ import annotations

import functools
import gc
import importlib
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ffn_ops
from ffn_ops import _peak as peak
from ffn_ops._accuracy import limit, worst
from ffn_ops._timing import Timed, take_turns, verified

from .command import row_options, run_rows
from .harness import threads
from .models import peak_bytes, resident
from .report import table, time_text
from .workloads import DTYPES

DENSE = ("bfloat16", "float32")
FORMATS = ("mxfp4", "int4", "int8", "fp8")
BLOCKS = {"q8_0": (34, 32, 0), "q4_k": (144, 256, 0), "q6_k": (210, 256, 208)}  # bytes, elements, where scales are
TORCHAO = "torchao int8"
Weight = Any  # Tensor or ffn_ops.QuantizedWeight


@dataclass(frozen=True)
class Row:
    model: str
    E: int
    K: int
    D: int
    F: int
    T: int
    mode: str  # inference, training
    threads: int

    @property
    def name(self) -> str:
        return (
            f"{self.model} {self.mode}, T {self.T}, {self.D}/{self.F}, E {self.E}, K {self.K}, {self.threads} thread(s)"
        )

    @property
    def experts(self) -> float:
        """How many a call reads, on average."""
        return self.E * (1 - (1 - self.K / self.E) ** self.T)


def all_rows(count: int) -> list[Row]:
    shapes = (("gpt-oss-20b", 32, 4, 2880, 2880), ("qwen3-30b", 128, 8, 2048, 768), ("dense", 1, 1, 4096, 11008))
    return [
        Row(*shape, T, mode, count)
        for shape in shapes
        for T, mode in ((1, "inference"), (16, "inference"), (512, "inference"), (512, "training"))
    ]


def weight(format: str, rows: int, cols: int, experts: int) -> Weight:
    """Normal values; those of GGUF blocks are random codes."""
    generator = torch.Generator().manual_seed(rows)
    if format in BLOCKS:
        size, block, at = BLOCKS[format]
        codes = torch.randint(256, (1, rows, cols // block, size), dtype=torch.uint8, generator=generator)
        half = torch.tensor([2e-4], dtype=torch.float16).view(torch.uint8)
        for start in (0, 2) if format == "q4_k" else (at,):
            codes[..., start : start + 2] = half
        one: Weight = ffn_ops.QuantizedWeight(format, codes.flatten(-2))
    else:
        values = torch.randn(1, rows, cols, generator=generator) * cols**-0.5
        one = values.to(DTYPES[format]) if format in DENSE else ffn_ops.quantize(values, format)
    if isinstance(one, Tensor):
        return one.repeat(experts, 1, 1)
    names = dict(zip(("codes", "scales", "zeros", "factor"), one.parts, strict=False))
    return ffn_ops.QuantizedWeight(
        format, block=one.block, **{name: t.repeat(experts, *[1] * (t.dim() - 1)) for name, t in names.items()}
    )


def dequantized(w: Weight, dtype: torch.dtype) -> Tensor:
    """That of the first expert, which all are."""
    if isinstance(w, Tensor):
        return w[0].to(dtype)
    parts, name = w.stacked()
    first: Tensor = torch.ops.ffn_ops.dequantize([t[:1] for t in parts], name, "float32")
    return first[0].to(dtype)


class Layer(nn.Module):
    """``down(silu(gate) * up)``, as a user writes it."""

    def __init__(self, w_in: Tensor, w_down: Tensor) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype) for w in (*w_in.chunk(2), w_down)
        )
        for linear, w in zip((self.gate, self.up, self.down), (*w_in.chunk(2), w_down), strict=True):
            linear.weight = nn.Parameter(w.contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class Called:
    """A provider's weights and its call on x ``[T, D]``: y, and in training d_x."""

    def __init__(self, row: Row, provider: str) -> None:
        self.row = row
        form = "float32" if provider == TORCHAO else provider
        self.w = (weight(form, 2 * row.F, row.D, row.E), weight(form, row.D, row.F, row.E))
        self.dtype = torch.bfloat16 if provider == "bfloat16" else torch.float32
        self.bytes = sum(w.nbytes for w in self.w)
        self.layer: nn.Module | None = None
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(row.T, row.D, generator=generator).to(self.dtype).requires_grad_(row.mode == "training")
        self.d_y = torch.randn(row.T, row.D, generator=generator).to(self.dtype)
        self.routing = ffn_ops.routing.top_k(torch.randn(row.T, row.E, generator=generator), row.K)
        if provider == TORCHAO:
            torchao: Any = importlib.import_module("torchao.quantization")
            self.layer = Layer(*(w[0] for w in self.w))
            torchao.quantize_(self.layer, torchao.Int8WeightOnlyConfig())
            self.bytes //= 4

    def forward(self) -> Tensor:
        if self.layer is not None:
            y: Tensor = self.layer(self.x)
        elif self.row.model == "dense":
            w_in, w_down = (w[0] if isinstance(w, Tensor) else w for w in self.w)
            if isinstance(w_in, Tensor):
                y = ffn_ops.ffn(self.x, w_in, w_down, gated=True, activation="silu")
            else:
                y = ffn_ops.ffn(self.x, *self.flat, gated=True, activation="silu")
        else:
            y = ffn_ops.moe(self.x, self.routing, *self.w, gated=True, activation="silu")
        return y

    @functools.cached_property
    def flat(self) -> list[Weight]:
        """Without the dimension of experts."""
        names = ("codes", "scales", "zeros", "factor")
        return [
            ffn_ops.QuantizedWeight(w.format, block=w.block, **{n: t[0] for n, t in zip(names, w.parts, strict=False)})
            for w in self.w
        ]

    def call(self) -> list[Tensor]:
        if self.row.mode == "inference":
            with torch.no_grad():
                return [self.forward()]
        self.x.grad = None
        y = self.forward()
        y.backward(self.d_y)
        assert self.x.grad is not None
        return [y.detach(), self.x.grad]

    def right(self, dtype: torch.dtype) -> list[Tensor]:
        """The same by torch, of the one expert that all are."""
        x = self.x.detach().to(dtype).requires_grad_()
        layer = Layer(*(dequantized(w, dtype) for w in self.w))
        total = torch.ones(self.row.T) if self.row.model == "dense" else self.weights()
        y = layer(x) * total.to(dtype)[:, None]
        y.backward(self.d_y.to(dtype))
        assert x.grad is not None
        return [y.detach(), x.grad][: 1 if self.row.mode == "inference" else 2]

    def weights(self) -> Tensor:
        """The sum of each token's."""
        return torch.zeros(self.row.T).index_add(0, self.routing.token, self.routing.weight.detach())

    def sample(self) -> float:
        begin = time.perf_counter()
        self.call()
        return time.perf_counter() - begin


def prepared(row: Row, timed: Timed) -> Called:
    called = Called(row, timed.provider)
    results = called.call()
    exact = called.right(torch.float64)
    if timed.provider != TORCHAO:  # which rounds weights in its own way
        limits = [limit(e, x) for e, x in zip(called.right(called.dtype), exact, strict=True)]
        timed.error = worst(("y", "d_x")[: len(exact)], results, exact, limits)
    called.sample()
    return called


def memory(row: Row, provider: str, answer: Any) -> None:
    """In a process of its own: the most that the first call holds above the weights, activations among it."""
    torch.set_num_threads(row.threads)
    called = Called(row, provider)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    called.call()
    answer.put(resident("VmHWM") - before)


def measure(
    row: Row, providers: list[str], rounds: int, with_memory: bool
) -> tuple[list[Timed], dict[str, int], list[float]]:
    """What was found, the bytes of each provider's weights, and the read bandwidth between the rounds."""
    found, running, sizes, reads = [], [], {}, []
    isa = ffn_ops.info()["isa"]
    with threads(row.threads):
        for provider in providers:
            timed = Timed(provider)
            found.append(timed)
            called = verified(timed, functools.partial(prepared, row, timed))
            if called is not None:
                sizes[provider] = called.bytes
                sample: Callable[[], float] = called.sample
                running.append((timed, sample, rounds))
        take_turns(running, lambda: reads.append(peak.read(isa, row.threads)))
    del running
    if with_memory:
        for timed in found:
            if timed.seconds:
                timed.peak_bytes = peak_bytes(memory, row, timed.provider)
    return found, sizes, reads


def row_text(row: Row, found: list[Timed], sizes: dict[str, int], reads: list[float]) -> str:
    """Times; how many times faster than our bfloat16 and float32, the median over rounds, which share their noise."""
    lines = []
    by_name = {each.provider: each for each in found}
    for each in found:
        if not each.seconds:
            lines.append([each.provider, each.note, *[""] * 7])
            continue
        ratios = [
            f"{statistics.median(a / b for a, b in zip(by_name[base].seconds, each.seconds, strict=True)):.2f}"
            if base in by_name and by_name[base].seconds
            else "–"
            for base in DENSE
        ]
        read = sizes[each.provider] * row.experts / row.E * (2 if row.mode == "training" else 1)
        share = statistics.median(read / s / 1e9 / gbs for s, gbs in zip(each.seconds, reads, strict=True))
        lines.append([
            each.provider, time_text(each.median), f"{each.spread:.0%}", *ratios, f"{share:.0%}",
            "–" if each.error is None else f"{each.error:.2f}",
            f"{8 * sizes[each.provider] / (3 * row.E * row.D * row.F):.2f}",
            "–" if each.peak_bytes is None else f"{each.peak_bytes / 2**20:.1f} MiB",
        ])  # fmt: skip
    heads = [
        "weights",
        "median",
        "spread",
        "x bfloat16",
        "x float32",
        "of read",
        "error / limit",
        "bits",
        "peak memory",
    ]
    return f"{row.name} · read {statistics.median(reads or [0]):.1f} GB/s\n{table(heads, lines)}"


def main(arguments: list[str] | None = None) -> int:
    parser = row_options("quantized", rounds=9)
    parser.add_argument("--formats", nargs="+", default=[*FORMATS, *BLOCKS], choices=[*FORMATS, *BLOCKS])
    parser.add_argument("--no-memory", action="store_true", help="without the processes that measure peak memory")
    options = parser.parse_args(arguments)

    def measured(row: Row) -> tuple[list[Timed], str, dict[str, Any]]:
        # Rows of a block's length only.
        fits = [f for f in options.formats if f not in BLOCKS or math.gcd(row.D, row.F) % BLOCKS[f][1] == 0]
        providers = [*DENSE, *fits]
        providers += [TORCHAO] if row.model == "dense" and row.mode == "inference" else []
        found, sizes, reads = measure(row, providers, options.rounds, not options.no_memory)
        return found, row_text(row, found, sizes, reads), {"read_gbs": reads, "weight_bytes": sizes}

    return run_rows(parser, options, all_rows(options.threads), measured)


if __name__ == "__main__":
    sys.exit(main())
