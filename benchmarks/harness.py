"""Measures rows: verifies every provider, then times all of them round by round, with the machine's limits between."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import peak
from .providers import (
    COMPILING,
    ENOUGH,
    HUGE,
    PROVIDERS,
    Inputs,
    Provider,
    converted,
    eager_inputs,
    groups,
    limit_inputs,
)
from .verify import Limit, WrongResultError, limit, worst
from .worker import HugePageProcess, norms
from .workloads import Mode, Row, Shape

PREDICTING_ROWS = 64  # of a weight; from here on a call's time follows its FLOPs
NORM_TOLERANCE = 1e-3  # of float32 results of the same code in another process


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


def run_once(
    module: nn.Module, args: Sequence[Tensor], d_y: Tensor | None, leaves: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The output or outputs, and the gradients of the leaves if there are any. Freeing them is part of a step.

    An expert that no token chooses may have no gradient.
    """
    y = module(*args)
    if leaves:
        return (y, *torch.autograd.grad(y, leaves, d_y, allow_unused=True))
    return y if isinstance(y, tuple) else (y,)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Case:
    """One shape and dtype: the weights and inputs, the float64 results, and what error is right."""

    def __init__(self, shape: Shape, dtype: str) -> None:
        self.shape, self.dtype = shape, dtype
        self.inputs = eager_inputs(shape, dtype)
        large = shape.forward_flops > 6e8
        with threads((os.cpu_count() or 1) if large else 1):
            self.exact = Local(converted(self.inputs, shape, torch.float64), shape, "training").results()
            eager = Local(limit_inputs(self.inputs), shape, "training").results()
            self.limits: list[Limit] = [limit(e, x) for e, x in zip(eager, self.exact, strict=True)]
        args, d_y = self.inputs.draws[0]
        inputs = ("x", "logits")[: len(args)]
        leaves = [] if d_y is None else [f"d_{name}" for name in (*inputs, *groups(self.inputs.module))]
        self.outputs = len(self.exact) - len(leaves)
        self.names = (*("y", "y1", "y2")[: self.outputs], *leaves)

    def worst(self, results: Sequence[Tensor], slack: float = 1.0) -> float:
        """The largest quotient of error and limit, of the output alone or with all gradients."""
        count = self.outputs if len(results) == self.outputs else len(self.exact)
        return worst(self.names[:count], results, self.exact[:count], self.limits[:count], slack)

    def check_norms(self, found: Sequence[float]) -> None:
        for name, norm, right in zip(self.names, found, norms(self.exact[: len(found)]), strict=False):
            if not math.isclose(norm, right, rel_tol=NORM_TOLERANCE):
                raise WrongResultError(f"{name}: norm {norm:.6g}, expected {right:.6g}")


class Runner(Protocol):
    """A provider, ready to run one row."""

    def check(self, case: Case) -> tuple[float | None, float]:
        """Runs once: the worst quotient of error and limit, and the seconds it took. Raises WrongResultError."""

    def sample(self, repeats: int) -> float:
        """Seconds of one call, from ``repeats`` of them."""

    def saved_bytes(self) -> int | None: ...


class Local:
    """A provider in this process."""

    def __init__(self, inputs: Inputs, shape: Shape, mode: Mode) -> None:
        self.module, self.draws, self.mode = inputs.module, inputs.draws, mode
        self.parameters = tuple(self.module.parameters())
        self.groups = list(groups(self.module).values())
        self.slack = inputs.slack
        args, d_y = self.draws[0]
        self.leaves = () if mode == "inference" or d_y is None else (*args, *self.parameters)
        self.first_call = math.nan
        # Dropout stands behind every provider alike: it is timed and not verified.
        self.module.train(mode == "training" and not shape.dropout)

    def results(self) -> list[Tensor]:
        """Output and gradients; small ones stacked from so many draws that they have ``ENOUGH`` numbers."""
        pools: list[list[Tensor]] = []

        def wanted(number: int, tensors: Sequence[Tensor]) -> bool:
            return number * sum(t.numel() for t in tensors) < ENOUGH

        with torch.inference_mode(self.mode == "inference"):
            for number, (args, d_y) in enumerate(self.draws):
                all_groups = [*((a,) for a in args), *self.groups] if self.leaves else []
                chosen = [place for place, group in enumerate(all_groups) if wanted(number, group)]
                leaves = [leaf for place in chosen for leaf in all_groups[place]]
                if number and not leaves and not any(wanted(number, pool[:1]) for pool in pools):
                    break
                start = time.perf_counter()
                found = list(run_once(self.module, args, d_y, leaves))
                if number == 0:
                    self.first_call = time.perf_counter() - start
                outputs = [t.detach() for t in found[: len(found) - len(leaves)] if t is not None]
                del found[: len(outputs)]
                outputs = list(getattr(self.module, "compared", lambda *y: y)(*outputs))
                if number == 0:
                    pools = [[] for _ in (*outputs, *all_groups)]
                for pool, output in zip(pools, outputs, strict=False):
                    if wanted(number, [output]):
                        pool.append(output)
                for place in chosen:
                    group = all_groups[place]
                    grads = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, group, strict=False)]
                    del found[: len(group)]  # the largest are gigabytes
                    pools[len(outputs) + place].append(grads[0] if len(grads) == 1 else torch.stack(grads))
        return [pool[0] if len(pool) == 1 else torch.stack(pool) for pool in pools]

    def begin(self) -> None:
        """After the results: from here on calls are timed."""
        self.module.train(self.mode == "training")

    def check(self, case: Case) -> tuple[float | None, float]:
        quotient = case.worst(self.results(), self.slack)
        self.begin()
        return quotient, self.first_call

    def sample(self, repeats: int) -> float:
        module, leaves = self.module, self.leaves
        args, d_y = self.draws[0]
        with torch.inference_mode(self.mode == "inference"):
            start = time.perf_counter()
            for _ in range(repeats):
                run_once(module, args, d_y, leaves)
            return (time.perf_counter() - start) / repeats

    def saved_bytes(self) -> int | None:
        """Storages that autograd keeps between forward and backward, the parameters' own not counted."""
        if self.mode == "inference":
            return None
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = self.module(*self.draws[0][0])
        own = {parameter.untyped_storage().data_ptr() for parameter in self.parameters}
        total = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)
        del y
        return total


class Remote:
    """Eager in the huge-page process."""

    def __init__(self, process: HugePageProcess, row: Row) -> None:
        self.process, self.row = process, row

    def check(self, case: Case) -> tuple[float | None, float]:
        found, seconds = self.process.prepare(self.row)
        case.check_norms(found)
        return None, seconds

    def sample(self, repeats: int) -> float:
        return self.process.sample(repeats)

    def saved_bytes(self) -> int | None:
        return None


@dataclass
class Timed:
    """What was found about one provider in one row."""

    provider: str
    seconds: list[float] = field(default_factory=list)  # one entry a round
    repeats: int = 1  # calls in a sample
    error: float | None = None  # worst quotient of error and limit: at most 1, or the slack of its inputs
    first_call: float | None = None  # with compilation, where there is one
    saved_bytes: int | None = None
    note: str = ""  # why there are no samples, or what is special about them
    refused: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a fraction of the median; of the extremes with fewer than 4 samples."""
        if len(self.seconds) < 4:
            return (max(self.seconds) - min(self.seconds)) / self.median
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median

    def record(self) -> dict[str, Any]:
        record = asdict(self)
        if self.seconds:
            record |= {"median": self.median, "min": min(self.seconds), "spread": self.spread, "n": len(self.seconds)}
        return record


@dataclass
class Measured:
    """A row with its providers and the machine's limits as found between its rounds."""

    row: Row
    isa: str
    fma: list[float] = field(default_factory=list)  # GFLOP/s
    read: list[float] = field(default_factory=list)  # GB/s
    timed: list[Timed] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        row = self.row
        return {
            **asdict(row),
            "name": row.name,
            "flops": row.flops,
            "least_bytes": row.least_bytes,
            "lean_saved_bytes": row.saved_bytes,
            "isa": self.isa,
            "fma_gflops": statistics.median(self.fma),
            "read_gbs": statistics.median(self.read),
            "limits": {"fma_gflops": self.fma, "read_gbs": self.read},
            "providers": {each.provider: each.record() for each in self.timed},
        }


class Harness:
    """Measures one row after another; keeps the case that rows share and the rates that predict a call's time."""

    def __init__(self, budget: Budget, isa: str, providers: Sequence[Provider] = PROVIDERS, huge: bool = True) -> None:
        self.budget, self.isa, self.providers = budget, isa, providers
        self.huge = HugePageProcess() if huge else None
        self._case: Case | None = None
        self._rates: dict[tuple[str, str, str], float] = {}  # seconds per FLOP

    def close(self) -> None:
        if self.huge is not None:
            self.huge.close()

    def case(self, row: Row) -> Case:
        if self._case is None or (self._case.shape, self._case.dtype) != (row.shape, row.dtype):
            self._case = None  # free first
            self._case = Case(row.shape, row.dtype)
        return self._case

    def measure(self, row: Row) -> Measured:
        """Verifies, then times in rounds."""
        case = self.case(row)
        measured = Measured(row, self.isa)
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
                yield provider.name, lambda it=provider: Local(it.build(case.inputs, row.shape), row.shape, row.mode)
        if (process := self.huge) is not None and row.dtype == "float32":
            yield HUGE, lambda: Remote(process, row)

    def _verified(self, timed: Timed, row: Row, case: Case, prepare: Any) -> tuple[Timed, Runner | None, int]:
        """Checks a provider and plans its rounds; no runner where it must not or need not run again."""
        # Rows come smallest first: the last rate is that of the most similar row.
        expected = self._rates.get((timed.provider, row.dtype, row.mode), 0.0) * row.flops
        if expected > self.budget.longest_call:
            timed.note = f"not run: a call would take about {expected:.0f} s at the rate of a smaller row"
            return timed, None, 0
        try:
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
                return timed, None, 0
            return timed, runner, self._plan(timed, runner, once)
        except WrongResultError as wrong:
            timed.note, timed.refused = f"refused: {wrong}", True
        except Exception as failure:  # a provider that cannot run is a finding and no reason to lose the others
            timed.note = f"failed: {type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:160]}"
        return timed, None, 0

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
        """Every round measures the limits and then one sample of each provider, beginning with another one."""
        for round_ in range(max((rounds for _, _, rounds in running), default=1)):
            measured.fma.append(peak.fma(self.isa, measured.row.threads))
            measured.read.append(peak.read(self.isa, measured.row.threads))
            turn = [(timed, runner) for timed, runner, rounds in running if round_ < rounds]
            first = round_ % max(1, len(turn))
            for timed, runner in turn[first:] + turn[:first]:
                if timed.repeats > 1:
                    runner.sample(1)  # the bandwidth's buffer has emptied the caches
                timed.seconds.append(runner.sample(timed.repeats))
