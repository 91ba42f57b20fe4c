# SPDX-License-Identifier: BSD-3-Clause
"""``python -m benchmarks.busy``: a small training step on a quiet machine, and while another process keeps a core busy.

Samples are single calls: what counts is how long one call may take. A caller whose helpers do not run should take about
the time of one thread.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ffn_ops
from ffn_ops._accuracy import limit, worst
from ffn_ops._timing import Timed, ready, take_turns

from .command import row_options, run_rows
from .harness import threads
from .report import table, time_text

PROVIDERS = ("ffn_ops", "eager")
# What the other process may run on: nothing of it, every core, the last one alone
STATES = ("quiet", "one core busy", "the last core busy")


@dataclass(frozen=True)
class Row:
    T: int
    D: int
    F: int
    state: str
    threads: int

    @property
    def name(self) -> str:
        return f"T {self.T}, {self.D}/{self.F}, training, float32, {self.threads} thread(s), {self.state}"


def rows(count: int) -> list[Row]:
    """On one thread and on ``count``."""
    return [Row(1024, 96, 384, state, each) for state in STATES for each in sorted({1, count})]


@contextlib.contextmanager
def core_busy(state: str) -> Iterator[None]:
    """Another process computes for as long as this lasts."""
    if state == STATES[0]:
        yield
        return
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        if state == STATES[2]:
            os.sched_setaffinity(other.pid, {max(os.sched_getaffinity(0))})
        yield
    finally:
        other.kill()
        other.wait()


class Eager(nn.Module):
    """The same layer by torch's own operators, of ``layer``'s parameters."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = layer.w1, layer.w2, layer.w3

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return y


def layer_of(row: Row, provider: str) -> nn.Module:
    torch.manual_seed(0)
    layer = ffn_ops.FeedForward(row.D, d_ff=row.F)
    return layer if provider == "ffn_ops" else Eager(layer)


def results(row: Row, layer: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    """The output, and the gradients of x and of each parameter."""
    g = torch.Generator().manual_seed(1)
    x, d_y = (torch.randn(row.T, row.D, generator=g).to(dtype) for _ in range(2))
    y = layer(x.requires_grad_())
    parameters = dict(sorted(layer.named_parameters()))  # providers hold them in other orders
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters.values()], d_y)]


def prepared(row: Row, timed: Timed) -> Callable[[], float]:
    """Verifies, and returns what times one step."""
    layer = layer_of(row, timed.provider)
    exact = results(row, layer_of(row, "eager").double(), torch.float64)
    eager = results(row, layer_of(row, "eager"), torch.float32)
    limits = [limit(e, x) for e, x in zip(eager, exact, strict=True)]
    names = ["y", "d_x", *(f"d_{name}" for name in sorted(dict(layer.named_parameters())))]
    timed.error = worst(names, results(row, layer, torch.float32), exact, limits)
    x, d_y = torch.randn(row.T, row.D, requires_grad=True), torch.ones(row.T, row.D)
    leaves = [x, *layer.parameters()]

    def sample() -> float:
        begin = time.perf_counter()
        torch.autograd.grad(layer(x), leaves, d_y)
        return time.perf_counter() - begin

    for _ in range(3):
        sample()
    return sample


def measure(row: Row, rounds: int) -> list[Timed]:
    found = [Timed(provider) for provider in PROVIDERS]
    with threads(row.threads):
        running = ready(found, functools.partial(prepared, row), rounds)
        with core_busy(row.state):
            take_turns(running)
    return found


def row_text(row: Row, found: list[Timed]) -> str:
    lines = []
    for each in found:
        if not each.seconds:
            lines.append([each.provider, each.note, "", "", "", "", ""])
            continue
        ninth = statistics.quantiles(each.seconds, n=10)[-1] if len(each.seconds) > 1 else each.seconds[0]
        times = [time_text(t) for t in (each.median, statistics.mean(each.seconds), ninth, max(each.seconds))]
        lines.append([each.provider, times[0], f"{each.spread:.0%}", *times[1:], f"{each.error:.2f}"])
    return f"{row.name}\n{table(['provider', 'median', 'spread', 'mean', '9 of 10', 'most', 'error / limit'], lines)}"


def main(arguments: list[str] | None = None) -> int:
    parser = row_options("busy", rounds=300)
    options = parser.parse_args(arguments)

    def measured(row: Row) -> tuple[list[Timed], str, dict[str, Any]]:
        found = measure(row, options.rounds)
        return found, row_text(row, found), {}

    return run_rows(parser, options, rows(options.threads), measured)


if __name__ == "__main__":
    sys.exit(main())
