"""What is measured: shapes, rows, and the formulas for their FLOPs and bytes. Nothing here runs a layer."""

from __future__ import annotations

import os
from dataclasses import dataclass
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
    def parameters(self) -> int:
        return 3 * self.D * self.F + (2 * self.F + self.D if self.bias else 0)


@dataclass(frozen=True)
class Row:
    """One line of the report: forward alone without gradients, or forward and backward with all gradients."""

    shape: Shape
    dtype: str
    mode: Mode
    threads: int = 1
    configuration: str = ""  # its number in the list of configurations to report

    @property
    def name(self) -> str:
        return f"{self.shape.label} {self.dtype} {self.mode} {self.threads} thread{'s' * (self.threads > 1)}"

    @property
    def flops(self) -> int:
        """``6 T D F`` forward, twice that backward; activations and biases are not counted."""
        forward = 6 * self.shape.T * self.shape.D * self.shape.F
        return 3 * forward if self.mode == "training" else forward

    @property
    def least_bytes(self) -> int:
        """Traffic that no implementation with a small cache avoids: each tensor once for each pass that needs it.

        Inference: weights, x, y. Training adds in forward the two pre-activations (written), in backward weights, x,
        pre-activations, d_y (read) and the gradients of weights and x (written).
        """
        size = torch.finfo(DTYPES[self.dtype]).bits // 8
        tokens, between = self.shape.T * self.shape.D, 2 * self.shape.T * self.shape.F
        inference = self.shape.parameters + 2 * tokens
        if self.mode == "inference":
            return size * inference
        backward = 2 * self.shape.parameters + between + 3 * tokens
        return size * (inference + between + backward)

    @property
    def saved_bytes(self) -> int:
        """What a lean backward keeps: x and two pre-activations."""
        size = torch.finfo(DTYPES[self.dtype]).bits // 8
        return size * self.shape.T * (self.shape.D + 2 * self.shape.F)


TALL = Shape(2048, 512, 2048)
WIDE = Shape(512, 1024, 2816)
FEW = Shape(16, 2048, 5632)
ONE = Shape(1, 2048, 5632)
TINY = Shape(1, 16, 16)
EXAMPLE = Shape(4, 128, 176, bias=True, dropout=0.1)  # FeedForward(128, 256, 16, 0.1) on (4, 128)

CONFIGURATIONS = {
    "1": Shape(4096, 512, 2048),
    "2": Shape(64, 512, 2048),
    "3": Shape(1, 512, 2048),
    "4": Shape(1, 4096, 11008),
    "5": Shape(128, 4096, 11008),
    "6": FEW,
    "7": Shape(2048, 1024, 4096, activation="gelu"),
}


def target_rows(threads: int = 1, pair: bool = True) -> list[Row]:
    """The rows that the targets read; ``pair``: with the two that run on two threads."""
    rows = [
        Row(TALL, "float32", "training", threads),
        Row(WIDE, "float32", "training", threads),
        *(Row(shape, "float32", mode, threads) for shape in (FEW, ONE) for mode in MODES),
        Row(TALL, "bfloat16", "training", threads),
        Row(CONFIGURATIONS["2"], "float16", "training", threads),  # for the rate of native float16
        Row(TALL, "float16", "training", threads),
        Row(TINY, "float32", "inference", threads),
        Row(EXAMPLE, "float32", "training", threads),
    ]
    if pair and threads == 1 and (os.cpu_count() or 1) >= 2:
        rows += [Row(shape, "float32", "training", 2) for shape in (TALL, WIDE)]
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
    small = CONFIGURATIONS["2"]
    rows = [row for row in target_rows(threads) if row.shape != WIDE and row.dtype == "float32"]
    return rows + [Row(small, "bfloat16", mode, threads, "2") for mode in MODES]


def all_rows(threads: int = 1) -> list[Row]:
    """Configurations and targets without repetition, in no order."""
    rows = configuration_rows(threads)
    seen = {(row.shape, row.dtype, row.mode, row.threads) for row in rows}
    rows += [row for row in target_rows(threads) if (row.shape, row.dtype, row.mode, row.threads) not in seen]
    return rows


def in_order(rows: list[Row]) -> list[Row]:
    """Fewest tokens first, so that slow providers show their rate early; one shape and dtype after the other, so that
    rows share their reference."""
    return sorted(rows, key=lambda r: (r.shape.T, r.shape.D * r.shape.F, r.shape.label, r.dtype, r.threads, r.mode))
