# SPDX-License-Identifier: BSD-3-Clause
"""``python -m benchmarks.busy``: a small training step, and one token, on a quiet machine and while another process
keeps a core busy.

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ffn_ops._timing import Timed, ready, take_turns

from .command import row_options, run_rows
from .harness import Case, threads
from .providers import EAGER, OURS, PROVIDERS
from .report import table, time_text
from .runners import Local
from .workloads import Mode, Shape

# What the other process may run on: nothing of it, every core, the last one alone
STATES = ("quiet", "one core busy", "the last core busy")


@dataclass(frozen=True)
class Row:
    T: int
    D: int
    F: int
    mode: Mode
    state: str
    threads: int

    @property
    def name(self) -> str:
        return f"T {self.T}, {self.D}/{self.F}, {self.mode}, float32, {self.threads} thread(s), {self.state}"


def rows(count: int) -> list[Row]:
    """On one thread and on ``count``."""
    layers: list[tuple[int, int, int, Mode]] = [(1024, 96, 384, "training"), (1, 1024, 2816, "inference")]
    return [Row(*layer, state, each) for layer in layers for state in STATES for each in sorted({1, count})]


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


def prepared(case: Case, mode: Mode, timed: Timed) -> Callable[[], float]:
    """Verifies, and returns what times one call."""
    (provider,) = (each for each in PROVIDERS if each.name == timed.provider)
    runner = Local(provider.build(case.inputs, case.shape), case.shape, mode)
    timed.error, timed.first_call = runner.check(case)
    runner.sample(3)
    return functools.partial(runner.sample, 1)


def measure(row: Row, rounds: int) -> list[Timed]:
    found = [Timed(provider) for provider in (OURS, EAGER)]
    case = Case(Shape(row.T, row.D, row.F, bias=True), "float32")
    with threads(row.threads):
        running = ready(found, functools.partial(prepared, case, row.mode), rounds)
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
