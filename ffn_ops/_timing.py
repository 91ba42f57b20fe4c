# SPDX-License-Identifier: BSD-3-Clause
"""How `compare` and the benchmarks time: what does not agree with float64 is refused, the others take turns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median, quantiles
from typing import Any, TypeVar

from ._accuracy import WrongResultError

T = TypeVar("T")


@dataclass
class Timed:
    """What was found about one provider in one row."""

    provider: str
    seconds: list[float] = field(default_factory=list)  # one entry a round
    forward_seconds: list[float] = field(default_factory=list)  # the part of forward, where it is told apart
    repeats: int = 1  # calls in a sample
    error: float | None = None  # worst quotient of error and limit: at most 1, or the slack of its inputs
    first_call: float | None = None  # with compilation, where there is one
    saved_bytes: int | None = None
    peak_bytes: int | None = None  # of a process of its own, above what it holds before its first step
    note: str = ""  # why there are no samples, or what is special about them
    refused: bool = False

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third; the extremes with fewer than 4 samples."""
        if len(self.seconds) < 4:
            return min(self.seconds), max(self.seconds)
        low, _, high = quantiles(self.seconds, n=4)
        return low, high

    @property
    def milliseconds(self) -> tuple[float, float, float]:
        """Median and quartiles."""
        low, high = self.quartiles
        return 1e3 * self.median, 1e3 * low, 1e3 * high

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a fraction of the median."""
        low, high = self.quartiles
        return (high - low) / self.median

    def record(self) -> dict[str, Any]:
        record = asdict(self)
        if self.seconds:
            record["low"], record["high"] = self.quartiles
            record |= {"median": self.median, "min": min(self.seconds), "spread": self.spread, "n": len(self.seconds)}
        if self.forward_seconds:
            backward = [a - f for a, f in zip(self.seconds, self.forward_seconds, strict=True)]
            record |= {"forward": median(self.forward_seconds), "backward": median(backward)}
        return record


def verified(timed: Timed, prepare: Callable[[], T]) -> T | None:
    """What ``prepare`` returns, which raises WrongResultError where results are wrong; or None, and ``timed`` has the
    reason. A provider that cannot run is recorded, and the others go on."""
    try:
        return prepare()
    except WrongResultError as wrong:
        timed.note, timed.refused = f"refused: {wrong}", True
    except Exception as failure:
        reason = (str(failure).strip() or "no reason given").splitlines()[0]
        timed.note = f"failed: {type(failure).__name__}: {reason[:160]}"
    return None


def ready(
    providers: Sequence[Timed], prepare: Callable[[Timed], Callable[[], float]], rounds: int
) -> list[tuple[Timed, Callable[[], float], int]]:
    """What :func:`take_turns` takes: the samples of those that ``prepare`` verifies."""
    found = [(timed, verified(timed, functools.partial(prepare, timed))) for timed in providers]
    return [(timed, sample, rounds) for timed, sample in found if sample is not None]


def take_turns(
    providers: Sequence[tuple[Timed, Callable[[], float], int]], between: Callable[[], object] = lambda: None
) -> None:
    """Adds to each provider's seconds those of its ``rounds`` samples, one in a round. So slow moments of the machine
    affect all alike. Each round begins with another provider, so that the contents of caches favour none."""
    for round_ in range(max((rounds for *_, rounds in providers), default=1)):
        between()
        turn = [(timed, sample) for timed, sample, rounds in providers if round_ < rounds]
        first = round_ % max(1, len(turn))
        for timed, sample in turn[first:] + turn[:first]:
            timed.seconds.append(sample())
