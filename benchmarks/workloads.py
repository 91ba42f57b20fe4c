# SPDX-License-Identifier: BSD-3-Clause
"""Workloads: shapes, rows, and the formulas for their FLOPs and bytes. This file runs no layer."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace
from typing import Literal

import torch

Mode = Literal["training", "inference"]

MODES: tuple[Mode, ...] = ("training", "inference")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """A gated FFN ``w2(act(w1 x) * w3 x)`` of T tokens, width D and FFN width F; LLaMA's has no biases."""

    T: int
    D: int
    F: int
    activation: str = "silu"
    bias: bool = False
    dropout: float = 0.0

    @property
    def label(self) -> str:
        extras = [self.activation] if self.activation != "silu" else []
        extras += ["bias"] if self.bias else []
        extras += [f"dropout {self.dropout:g}"] if self.dropout else []
        return " ".join([f"T {self.T} {self.D}/{self.F}", *extras])

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of what the layer is called with."""
        return ("x",)

    @property
    def rows(self) -> float:
        """The number of rows that a weight multiplies."""
        return self.T

    @property
    def parameters(self) -> int:
        """The number of parameters that a pass reads."""
        return 3 * self.D * self.F + (2 * self.F + self.D if self.bias else 0)

    @property
    def forward_flops(self) -> int:
        """Of the products; activations and biases are not counted."""
        return 6 * self.T * self.D * self.F

    @property
    def between(self) -> int:
        """Numbers of all pre-activations."""
        return 2 * self.T * self.F

    @property
    def routing_bytes(self) -> int:
        """Bytes of the routing, kept for backward."""
        return 0

    def moved(self, mode: Mode) -> tuple[int, int]:
        """Numbers that forward and backward read or write at least: each tensor once for each pass that needs it.

        Inference: weights, x, y. Training adds in forward the pre-activations (written), in backward weights, x,
        pre-activations, d_y (read) and the gradients of weights and x (written). Of experts those that are chosen.
        """
        tokens = self.T * self.D
        forward = self.parameters + 2 * tokens
        if mode == "inference":
            return forward, 0
        return forward + self.between, 2 * self.parameters + self.between + 3 * tokens


@dataclass(frozen=True)
class Elementwise(Shape):
    """``act(gate) * up`` alone, of gate and up ``[T, F]``."""

    D: int = 0
    F: int = 1

    @property
    def label(self) -> str:
        return f"gated_act {self.activation} {self.T} x {self.F}"

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("gate", "up")

    @property
    def parameters(self) -> int:
        return 0

    @property
    def forward_flops(self) -> int:
        return 0

    def moved(self, mode: Mode) -> tuple[int, int]:
        """gate, up, y; then d_y, gate, up and their gradients."""
        return 3 * self.T * self.F, 0 if mode == "inference" else 5 * self.T * self.F


@dataclass(frozen=True)
class Mixture(Shape):
    """E experts of FFN width F, K of them for each token: SwiGLU with ``silu``, otherwise two layers.

    D = F = 0 is the routing alone.
    """

    E: int = 8
    K: int = 2

    @property
    def gated(self) -> bool:
        return self.activation == "silu"

    @property
    def label(self) -> str:
        extras = ["swiglu" if self.gated else self.activation, *(["bias"] if self.bias else [])]
        sizes = [f"{self.D}/{self.F}"] if self.D else ["routing"]
        return " ".join([f"T {self.T}", *sizes, f"E {self.E} K {self.K}", *(extras if self.D else [])])

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("x", "logits") if self.D else ("logits",)

    @property
    def rows(self) -> float:
        return self.T * self.K / self.E

    @property
    def _layers(self) -> int:
        return 3 if self.gated else 2

    @property
    def parameters(self) -> int:
        """Those of the experts that are chosen."""
        biases = (self._layers - 1) * self.F + self.D if self.bias else 0
        return chosen_experts(self.T, self.E, self.K) * (self._layers * self.D * self.F + biases)

    @property
    def forward_flops(self) -> int:
        return 2 * self._layers * self.T * self.K * self.D * self.F

    @property
    def between(self) -> int:
        return (self._layers - 1) * self.T * self.K * self.F

    @property
    def routing_bytes(self) -> int:
        """Of a row its token, place and expert (int64) and weight; int64 offsets by expert and by token; logits."""
        return 28 * self.T * self.K + 8 * (self.E + 1) + 8 * (self.T + 1) + 4 * self.T * self.E


def drawn_logits(T: int, E: int, draws: int = 1) -> list[torch.Tensor]:
    """``[T, E]`` each; apart from the other numbers, so that who is chosen is known without them."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(T, E, generator=generator) for _ in range(draws)]


@functools.cache
def chosen_experts(T: int, E: int, K: int) -> int:
    """How many experts have rows in the draw that is timed."""
    return len(drawn_logits(T, E)[0].topk(K).indices.unique())


@dataclass(frozen=True)
class Row:
    """One line of the report: forward alone without gradients, or forward and backward with all gradients."""

    shape: Shape
    dtype: str
    mode: Mode
    threads: int = 1
    configuration: str = ""  # its number in the list of configurations to report
    device: str = "cpu"

    @property
    def name(self) -> str:
        where = f"{self.threads} thread{'s' * (self.threads > 1)}" if self.device == "cpu" else self.device
        return f"{self.shape.label} {self.dtype} {self.mode} {where}"

    @property
    def flops(self) -> int:
        """Backward takes twice those of forward."""
        return (3 if self.mode == "training" else 1) * self.shape.forward_flops

    @property
    def _size(self) -> int:
        return torch.finfo(DTYPES[self.dtype]).bits // 8

    @property
    def forward_bytes(self) -> int:
        """The part of ``least_bytes`` that forward moves."""
        return self._size * self.shape.moved(self.mode)[0]

    @property
    def least_bytes(self) -> int:
        """Traffic that no implementation with a small cache can avoid."""
        return self._size * sum(self.shape.moved(self.mode))

    @property
    def saved_bytes(self) -> int:
        """What a lean backward keeps: x, the pre-activations and the routing."""
        return self._size * (self.shape.T * self.shape.D + self.shape.between) + self.shape.routing_bytes


TALL = Shape(2048, 512, 2048)
WIDE = Shape(512, 1024, 2816)
FEW = Shape(16, 2048, 5632)
ONE = Shape(1, 2048, 5632)
TINY = Shape(1, 16, 16)
EXAMPLE = Shape(4, 128, 176, bias=True, dropout=0.1)  # FeedForward(128, 256, 16, 0.1) on (4, 128)

BRIEF = Shape(64, 512, 2048)
PAIRED = (TALL, WIDE, BRIEF)  # on one thread and on two

CONFIGURATIONS = {
    "1": Shape(4096, 512, 2048),
    "2": BRIEF,
    "3": Shape(1, 512, 2048),
    "4": Shape(1, 4096, 11008),
    "5": Shape(128, 4096, 11008),
    "6": FEW,
    "7": Shape(2048, 1024, 4096, activation="gelu"),
}


def target_rows(threads: int = 1, pair: bool = True) -> list[Row]:
    """The rows that the targets read; ``pair``: with those that run on two threads."""
    rows = [
        *(Row(shape, "float32", "training", threads) for shape in PAIRED),
        *(Row(shape, "float32", mode, threads) for shape in (FEW, ONE) for mode in MODES),
        Row(TALL, "bfloat16", "training", threads),
        Row(BRIEF, "float16", "training", threads),  # for the rate of native float16
        Row(TALL, "float16", "training", threads),
        Row(TINY, "float32", "inference", threads),
        Row(EXAMPLE, "float32", "training", threads),
    ]
    if pair and threads == 1 and (os.cpu_count() or 1) >= 2:
        rows += [Row(shape, "float32", "training", 2) for shape in PAIRED]
    return rows


def configuration_rows(threads: int = 1) -> list[Row]:
    return [
        Row(shape, dtype, mode, threads, number)
        for number, shape in CONFIGURATIONS.items()
        for dtype in ("float32", "bfloat16")
        for mode in MODES
    ]


def quick_rows(threads: int = 1) -> list[Row]:
    """A minute: the targets at fewer samples, the 16-bit one at a size that native 16-bit backward survives."""
    rows = [row for row in target_rows(threads) if row.shape not in (WIDE, BRIEF) and row.dtype == "float32"]
    return rows + [Row(BRIEF, "bfloat16", mode, threads, "2") for mode in MODES]


def all_rows(threads: int = 1) -> list[Row]:
    """Configurations and targets without repetition, in no order."""
    return _without_repetition(configuration_rows(threads) + target_rows(threads))


def _without_repetition(rows: list[Row]) -> list[Row]:
    return list({(row.shape, row.dtype, row.mode, row.threads): row for row in reversed(rows)}.values())


MOE_TALL = Mixture(2048, 512, 2048, "gelu", bias=True)
MOE_FEW = replace(MOE_TALL, T=16)
MOE_ONE = replace(MOE_TALL, T=1)
FINE = Mixture(1024, 512, 256, E=64, K=8)
FINE_GELU = replace(FINE, activation="gelu")
MANY = Mixture(64, 2048, 768, E=128, K=8)
ROUTING = Mixture(4096, 0, 0, E=64, K=8)
MOE_PAIRED: tuple[tuple[Mixture, Mode], ...] = (
    (MOE_TALL, "training"), (FINE, "training"), (FINE_GELU, "training"), (MOE_FEW, "inference"), (MOE_ONE, "inference"),
)  # fmt: skip
GROWTH = tuple(Mixture(1024, 128, 64, E=experts, K=8) for experts in (8, 16, 32, 64, 128, 256))  # 24 MiB at most
GROWING = "growth"  # their configuration

MOE_CONFIGURATIONS = (
    ("8", replace(MOE_TALL, T=4096)),
    ("9", replace(MOE_TALL, T=256)),
    ("10", MOE_FEW),
    ("10", MOE_ONE),
    ("11", replace(MANY, T=1)),
    ("11", MANY),
    ("12", FINE),
)


def moe_target_rows(threads: int = 1, pair: bool = True) -> list[Row]:
    """The rows that the targets of mixtures read; ``pair``: with those that run on two threads."""
    rows = [
        *(Row(shape, "float32", mode, threads) for shape, mode in MOE_PAIRED),
        Row(MOE_FEW, "float32", "training", threads),
        Row(ROUTING, "float32", "inference", threads),
        *(Row(shape, "bfloat16", "training", threads) for shape in (MOE_TALL, FINE)),
        *(Row(shape, "float32", mode, threads, GROWING) for shape in GROWTH for mode in MODES),
    ]
    if pair and threads == 1 and (os.cpu_count() or 1) >= 2:
        rows += [Row(shape, "float32", mode, 2) for shape, mode in MOE_PAIRED]
        rows.append(Row(MANY, "bfloat16", "inference", 2))
    return rows


def moe_quick_rows(threads: int = 1) -> list[Row]:
    """A minute: the targets at fewer samples, without the largest rows."""
    left_out = (MOE_TALL, FINE_GELU, *GROWTH[1:-1])
    return [row for row in moe_target_rows(threads, pair=False) if row.shape not in left_out]


def moe_all_rows(threads: int = 1) -> list[Row]:
    rows = [
        Row(shape, dtype, mode, threads, number)
        for number, shape in MOE_CONFIGURATIONS
        for dtype in ("float32", "bfloat16")
        for mode in MODES
    ]
    return _without_repetition(rows + moe_target_rows(threads))


def in_order(rows: list[Row]) -> list[Row]:
    """Fewest tokens first, so that slow providers show their rate early; one shape and dtype after the other, so that
    rows share their reference."""
    return sorted(rows, key=lambda r: (r.shape.T, r.shape.D * r.shape.F, r.shape.label, r.dtype, r.threads, r.mode))
