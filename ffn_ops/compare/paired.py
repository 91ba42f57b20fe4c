# SPDX-License-Identifier: BSD-3-Clause
"""Mean, spread and paired differences of few values. Plain arithmetic: no torch, no text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, median, stdev

# 97.5 % quantile of Student's t for 1 to 30 degrees of freedom; beyond that the normal's is within 4 %.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

LOWER, HIGHER, NOT_SHOWN, UNTESTABLE = "lower loss", "higher loss", "no difference shown", "not testable"
FASTER, SLOWER = "faster", "slower"


@dataclass(frozen=True)
class Summary:
    mean: float
    spread: float | None  # sample standard deviation; None for one value


@dataclass(frozen=True)
class Paired:
    """Differences to the baseline of the same seed; ``half_width`` is that of the mean's 95 % t interval."""

    differences: dict[int, float]
    mean: float
    half_width: float | None
    verdict: str


def summary(values: Sequence[float]) -> Summary | None:
    if not values:
        return None
    return Summary(fmean(values), stdev(values) if len(values) > 1 else None)


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Paired | None:
    """``values`` and ``baseline`` map seeds to losses; seeds that only one of them has are left out."""
    differences = {seed: values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())}
    if not differences:
        return None
    mean, n = fmean(differences.values()), len(differences)
    if n < 2:
        return Paired(differences, mean, None, UNTESTABLE)
    half = (T_QUANTILES[n - 2] if n - 2 < len(T_QUANTILES) else 1.96) * stdev(differences.values()) / sqrt(n)
    verdict = NOT_SHOWN if abs(mean) <= half else (LOWER if mean < 0 else HIGHER)
    return Paired(differences, mean, half, verdict)


@dataclass(frozen=True)
class Ratio:
    """Per-round ratios of two times: their median and its distribution-free 95 % interval (None: too few rounds)."""

    median: float
    interval: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        if self.interval is None:
            return UNTESTABLE
        low, high = self.interval
        return FASTER if low > 1 else SLOWER if high < 1 else NOT_SHOWN


def speed_ratio(times: Sequence[float], reference: Sequence[float]) -> Ratio:
    """How many times faster ``times`` are than ``reference``, round by round.

    The interval reaches from the k-th smallest to the k-th largest ratio, k as large as the binomial's tail allows.
    """
    ratios = sorted(r / t for t, r in zip(times, reference, strict=True))
    n, k, tail, term = len(ratios), 0, 0, 1  # tail: the sum of the first k binomial coefficients, term: the next
    while 40 * (tail + term) <= 2**n:
        tail, term, k = tail + term, term * (n - k) // (k + 1), k + 1
    return Ratio(median(ratios), (ratios[k - 1], ratios[n - k]) if k else None)
