# SPDX-License-Identifier: BSD-3-Clause
"""What a run found, and the figures derived from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from ffn_ops.compare.paired import Paired, paired

from .deepseek import Variant
from .measure import Cost, exponent
from .model import ARMS, Arm, Size, ffn_width, model_flops
from .train import Plan, Run

CONTRASTS = (
    ("sparse_swiglu", "dense_swiglu"),
    ("sparse_moe", "dense_moe"),
    ("window_moe", "dense_moe"),
    ("window_moe", "sparse_moe"),
    ("dense_moe", "dense_swiglu"),
    ("sparse_moe", "sparse_swiglu"),
)


@dataclass
class Results:
    machine: dict[str, Any]
    size: Size
    plan: Plan
    text: str
    runs: list[Run] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    deepseek: list[Variant] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def of(self, arm: str) -> list[Run]:
        return [run for run in self.runs if run.arm == arm]

    def losses(self, arm: str) -> dict[int, float]:
        return {run.seed: run.validation for run in self.of(arm)}

    def contrast(self, arm: str, other: str) -> Paired:
        found = paired(self.losses(arm), self.losses(other))
        assert found is not None  # every seed trains every arm
        return found

    def recall(self, arm: str) -> list[float]:
        """The mean over the seeds for each length."""
        return [fmean(shares) for shares in zip(*(run.recall for run in self.of(arm)), strict=True)]

    def costs_of(self, arm: str) -> list[Cost]:
        return [cost for cost in self.costs if cost.arm == arm]

    def growth(self, arm: str, part: str | None = None) -> float | None:
        """The exponent over the length of a step's time, of one part's, or of its "memory"."""
        costs = self.costs_of(arm)
        figures = [{None: c.step_seconds, "memory": c.step_mb or 0.0, **c.step_parts}[part] for c in costs]
        return exponent([cost.length for cost in costs], figures)

    def mean_flops(self, arm: Arm) -> float:
        """Active FLOPs of the mean token of a training window."""
        return fmean(model_flops(self.size, arm, position) for position in range(self.size.context))

    def write(self, path: Path) -> None:
        record = asdict(self) | {"widths": {arm.key: ffn_width(self.size, arm) for arm in ARMS}}
        path.write_text(json.dumps(record, allow_nan=False, default=str) + "\n", encoding="utf-8")
