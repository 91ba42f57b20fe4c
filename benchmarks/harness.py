# SPDX-License-Identifier: BSD-3-Clause
"""Measures rows: verifies every provider, then times all of them round by round, with the machine's limits between."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ffn_ops import _peak as peak
from ffn_ops._accuracy import Limit, WrongResultError, limit, worst
from ffn_ops._timing import Timed, take_turns, verified

from .providers import COMPILING, PROVIDERS, Inputs, Provider, converted, eager_inputs, groups, limit_inputs
from .runners import Local, Remote, Runner
from .worker import OtherProcess, norms
from .workloads import DTYPES, Mode, Row, Shape

PREDICTING_ROWS = 64  # elements of a weight from which a call's time follows its FLOPs
NORM_TOLERANCE = 1e-3  # of float32 results in another process; 16 bits: a few roundings of them


@dataclass(frozen=True)
class Budget:
    """Seconds for one provider in one row, and when to stop."""

    seconds: float = 1.0
    least_rounds: int = 3
    most_rounds: int = 15
    least_sample: float = 0.01  # shorter calls are repeated within a sample
    longest_call: float = 25.0  # a provider whose predicted call is longer does not run

    def rounds(self, sample: float) -> int:
        """As many samples of this length as the budget holds, and ``least_rounds`` while thrice the budget does."""
        wanted = min(self.most_rounds, max(self.least_rounds, math.ceil(self.seconds / sample)))
        return max(1, min(wanted, int(3 * self.seconds / sample)))


QUICK = Budget(seconds=0.3, most_rounds=9, longest_call=4.0)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Machine(Protocol):
    """Where rows run: what limits them there, and how a provider is timed."""

    def limits(self, row: Row) -> dict[str, float]:
        """Measured now, between the samples of a row."""

    def runner(self, inputs: Inputs, shape: Shape, mode: Mode) -> Runner: ...

    def facts(self) -> dict[str, Any]:
        """What belongs to a row besides its limits, as it is now."""


class Cpu:
    """The processor, with one of its instruction sets."""

    def __init__(self, isa: str) -> None:
        self.isa = isa

    def limits(self, row: Row) -> dict[str, float]:
        return {"fma_gflops": peak.fma(self.isa, row.threads), "read_gbs": peak.read(self.isa, row.threads)}

    def runner(self, inputs: Inputs, shape: Shape, mode: Mode) -> Runner:
        return Local(inputs, shape, mode)

    def facts(self) -> dict[str, Any]:
        return {"isa": self.isa}


class Case:
    """One shape and dtype: the weights and inputs, the exact results, and what error is right."""

    def __init__(self, shape: Shape, dtype: str, device: str = "cpu") -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.inputs = eager_inputs(shape, dtype, device)
        large = shape.forward_flops > 6e8
        # A GPU's rows in 16 bits are so large that float32 must do: its error is a thousandth of what they may have.
        exact = torch.float64 if device == "cpu" or dtype == "float32" else torch.float32
        with threads((os.cpu_count() or 1) if large else 1):
            self.exact = Local(converted(self.inputs, shape, exact), shape, "training").results()
            eager = Local(limit_inputs(self.inputs), shape, "training").results()
            self.limits: list[Limit] = [limit(e, x) for e, x in zip(eager, self.exact, strict=True)]
        _, d_y = self.inputs.draws[0]
        leaves = [] if d_y is None else [f"d_{name}" for name in (*shape.inputs, *groups(self.inputs.module))]
        self.outputs = len(self.exact) - len(leaves)
        self.names = (*("y", "y1", "y2")[: self.outputs], *leaves)

    def worst(self, results: Sequence[Tensor], slack: float = 1.0) -> float:
        """The largest quotient of error and limit, of the output alone or with all gradients."""
        count = self.outputs if len(results) == self.outputs else len(self.exact)
        return worst(self.names[:count], results, self.exact[:count], self.limits[:count], slack)

    def check_norms(self, found: Sequence[float]) -> None:
        tolerance = max(NORM_TOLERANCE, 2 * torch.finfo(DTYPES[self.dtype]).eps)
        for name, norm, right in zip(self.names, found, norms(self.exact[: len(found)]), strict=False):
            if not math.isclose(norm, right, rel_tol=tolerance):
                raise WrongResultError(f"{name}: norm {norm:.6g}, expected {right:.6g}")


@dataclass
class Measured:
    """A row with its providers and the machine's limits as found between its rounds."""

    row: Row
    facts: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, list[float]] = field(default_factory=dict)  # one entry a round
    timed: list[Timed] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        row = self.row
        return {
            **asdict(row),
            "name": row.name,
            "flops": row.flops,
            "least_bytes": row.least_bytes,
            "forward_bytes": row.forward_bytes,
            "lean_saved_bytes": row.saved_bytes,
            **self.facts,
            **{name: statistics.median(values) for name, values in self.limits.items()},
            "limits": self.limits,
            "providers": {each.provider: each.record() for each in self.timed},
        }


class Harness:
    """Measures one row after another; keeps the case that rows share and the rates that predict a call's time."""

    def __init__(
        self,
        budget: Budget,
        machine: Machine,
        providers: Sequence[Provider] = PROVIDERS,
        others: Sequence[OtherProcess] = (),
    ) -> None:
        self.budget, self.machine, self.providers, self.others = budget, machine, providers, others
        self._case: Case | None = None
        self._rates: dict[tuple[str, str, str], float] = {}  # seconds per FLOP

    def close(self) -> None:
        for process in self.others:
            process.close()

    def case(self, row: Row) -> Case:
        wanted = (row.shape, row.dtype, row.device)
        if self._case is None or (self._case.shape, self._case.dtype, self._case.device) != wanted:
            self._case = None  # free first, also what failed providers left in their tracebacks
            gc.collect()
            self._case = Case(*wanted)
        return self._case

    def measure(self, row: Row) -> Measured:
        """Verifies, then times in rounds."""
        case = self.case(row)
        measured = Measured(row, self.machine.facts())
        running = []
        with threads(row.threads):
            for name, prepare in self._chosen(row, case):
                timed, runner, rounds = self._verified(Timed(name), row, case, prepare)
                measured.timed.append(timed)
                if runner is not None:
                    running.append((timed, runner, rounds))
            gc.collect()
            gc.disable()
            try:
                self._rounds(measured, running)
            finally:
                gc.enable()
        for timed in measured.timed:
            if timed.seconds and row.flops and row.shape.rows >= PREDICTING_ROWS:
                self._rates[timed.provider, row.dtype, row.mode] = min(timed.seconds) / row.flops
        return measured

    def _chosen(self, row: Row, case: Case) -> Iterator[tuple[str, Any]]:
        for provider in self.providers:
            if provider.serves(row):
                yield (
                    provider.name,
                    lambda it=provider: self.machine.runner(it.build(case.inputs, row.shape), row.shape, row.mode),
                )
        for process in self.others:
            if process.serves(row):
                yield process.name, lambda it=process: Remote(it, row)

    def _verified(self, timed: Timed, row: Row, case: Case, prepare: Any) -> tuple[Timed, Runner | None, int]:
        """Checks a provider and plans its rounds; no runner where it must not or need not run again."""
        # Rows come smallest first: the last rate is that of the most similar row.
        expected = self._rates.get((timed.provider, row.dtype, row.mode), 0.0) * row.flops
        if expected > self.budget.longest_call:
            timed.note = f"not run: a call would take about {expected:.0f} s at the rate of a smaller row"
            return timed, None, 0
        found = verified(timed, lambda: self._prepared(timed, row, case, prepare))
        return (timed, None, 0) if found is None else (timed, *found)

    def _prepared(self, timed: Timed, row: Row, case: Case, prepare: Any) -> tuple[Runner | None, int]:
        runner: Runner = prepare()
        timed.error, timed.first_call = runner.check(case)
        timed.saved_bytes = runner.saved_bytes()
        once = timed.first_call
        if timed.provider in COMPILING:
            once = runner.sample(1)
            if row.shape.dropout:  # training and evaluation differ: it has compiled again
                timed.first_call += once
                once = runner.sample(1)
        if once >= 10 * self.budget.seconds:
            timed.seconds, timed.note = [once], "one call, not warmed up"
            return None, 0
        return runner, self._plan(timed, runner, once)

    def _plan(self, timed: Timed, runner: Runner, once: float) -> int:
        """Sets how often a sample repeats the call, and returns how many rounds there are.

        From the least of a few tries: the first are not warm, and any may be interrupted.
        """
        least = self.budget.least_sample
        once = min(once, runner.sample(1))
        for _ in range(2):
            if once >= least:
                break
            once = min(runner.sample(math.ceil(least / once / 2)) for _ in range(3))
        timed.repeats = math.ceil(least / once)
        return self.budget.rounds(once * timed.repeats)

    def _rounds(self, measured: Measured, running: list[tuple[Timed, Runner, int]]) -> None:
        """Every round measures the limits and then one sample of each provider."""

        def limits() -> None:
            for name, value in self.machine.limits(measured.row).items():
                measured.limits.setdefault(name, []).append(value)

        def sampler(timed: Timed, runner: Runner) -> Callable[[], float]:
            def sample() -> float:
                if timed.repeats > 1:
                    runner.sample(1)  # the bandwidth's buffer has emptied the caches
                seconds = runner.sample(timed.repeats)
                if runner.forward is not None:
                    timed.forward_seconds.append(runner.forward)
                return seconds

            return sample

        take_turns([(timed, sampler(timed, runner), rounds) for timed, runner, rounds in running], limits)
