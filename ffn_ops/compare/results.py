# SPDX-License-Identifier: BSD-3-Clause
"""What a comparison found: the raw records of every stage and the figures derived from the training runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from .activations import Activations
from .architectures import BASELINE, LAYERS
from .counts import CountRow
from .layers import LayerResult
from .mixtures import MIXTURES, NAMES, Load
from .paired import Paired, Summary, paired, summary
from .settings import Settings
from .train import Run


@dataclass(frozen=True)
class TextFacts:
    name: str
    train_bytes: int
    validation_bytes: int
    truncated: bool


@dataclass
class Results:
    machine: dict[str, Any]
    settings: Settings
    text: TextFacts
    counts: list[CountRow] = field(default_factory=list)
    mixture_counts: list[CountRow] = field(default_factory=list)
    activations: Activations | None = None
    layers: list[LayerResult] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    mixtures: list[Run] = field(default_factory=list)
    stress: list[Run] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def equal_flops(self) -> list[Run]:
        """The mixtures' runs and the dense baseline's of the same seeds."""
        seeds = {r.seed for r in self.mixtures}
        return [r for r in self.runs if r.architecture == BASELINE and r.seed in seeds] + self.mixtures


@dataclass(frozen=True)
class Trained:
    """One architecture over its seeds; ``paired`` is against the baseline, unit counts are sums over the seeds."""

    architecture: str
    d_ff: int
    ffn_parameters: int
    budget_deviation: float  # of the feed-forward parameters from the baseline's
    losses: dict[int, float]
    loss: Summary | None
    paired: Paired | None
    step_ms: float
    step_times: list[float]  # losses of the seeds that did not diverge, in order
    gradient_ratio: float | None  # geometric mean over time and seeds of first layer's norm / last layer's
    units: int
    dead_at_start: int
    dead_at_end: int
    peak_dead_share: float
    died: int
    revived: int
    diverged: int
    training_load: Load | None  # of a mixture at the last recorded step, mean over blocks and seeds
    validation_load: Load | None  # the same after the last step, on the validation text
    training_max_over_mean: float | None  # of the load, mean over all recorded steps, blocks and seeds


def losses(runs: Sequence[Run], key: str) -> dict[int, float]:
    return {r.seed: r.final_validation for r in runs if r.architecture == key and r.final_validation is not None}


def _gradient_ratio(runs: Sequence[Run]) -> float | None:
    ratios = [norms[0] / norms[-1] for r in runs for norms in r.gradient_norms if norms[0] > 0 and norms[-1] > 0]
    return math.exp(fmean(map(math.log, ratios))) if ratios else None


def _end_load(recorded: Sequence[Sequence[Sequence[Load]]]) -> Load | None:
    """``recorded``: per run, per point, per layer."""
    last = [load for points in recorded if points for load in points[-1]]
    if not last:
        return None
    fields = ("entropy", "max_over_mean", "dropped", "unreached")
    return Load(*(fmean(getattr(load, name) for load in last) for name in fields))


def _mean_maximum(recorded: Sequence[Sequence[Sequence[Load]]]) -> float | None:
    found = [load.max_over_mean for points in recorded for layers in points for load in layers]
    return fmean(found) if found else None


def trained(runs: Sequence[Run]) -> list[Trained]:
    """In the order of the lists of layers, without layers that did not run."""
    baseline = losses(runs, BASELINE)
    budget = next((r.ffn_parameters for r in runs if r.architecture == BASELINE), None)
    rows = []
    for key in NAMES:
        mine = [r for r in runs if r.architecture == key]
        if not mine:
            continue
        own = losses(runs, key)
        parameters = mine[0].ffn_parameters
        ended = [r for r in mine if not r.diverged]
        times = [ms for r in ended for ms in r.step_ms]
        peak = max((fmean(shares) for r in mine for shares in r.dead_share), default=0.0)
        rows.append(
            Trained(
                architecture=key,
                d_ff=mine[0].d_ff,
                ffn_parameters=parameters,
                budget_deviation=0.0 if budget is None else parameters / budget - 1,
                losses=own,
                loss=summary(list(own.values())),
                paired=paired(own, baseline),
                step_ms=median(times) if times else 0.0,
                step_times=times,
                gradient_ratio=_gradient_ratio(mine),
                units=sum(r.units for r in ended),
                dead_at_start=sum(r.dead_at_start for r in ended),
                dead_at_end=sum(r.dead_at_end for r in ended),
                peak_dead_share=peak,
                died=sum(r.died for r in ended),
                revived=sum(r.revived for r in ended),
                diverged=sum(r.diverged for r in mine),
                training_load=_end_load([r.training_loads for r in ended]),
                validation_load=_end_load([r.validation_loads for r in ended]),
                training_max_over_mean=_mean_maximum([r.training_loads for r in ended]),
            )
        )
    return rows


def write_json(results: Results, path: Path) -> None:
    """Strict JSON, one line per part. Values that were not measured are null; NaN raises."""
    record = asdict(results)
    record["settings"]["out"] = None
    for layer, written in zip(results.layers, record["layers"], strict=True):
        for name, provider in layer.providers.items():
            times = {"forward": provider.forward.record(), "forward_backward": provider.forward_backward.record()}
            written["providers"][name] |= times
    record["settings"]["text"] = results.text.name
    record["architectures"] = {a.key: {"name": a.name, "formula": a.formula} for a in (*LAYERS, *MIXTURES)}
    derived = (("trained", results.runs), ("trained_mixtures", results.equal_flops), ("stressed", results.stress))
    for name, runs in derived:
        record[name] = [{k: v for k, v in asdict(t).items() if k != "step_times"} for t in trained(runs)]
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False, default=str)}" for key, value in record.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
