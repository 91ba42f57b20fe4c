# SPDX-License-Identifier: BSD-3-Clause
"""Every size of a comparison in one place, and the error that the command turns into one line and exit code 2."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


class CompareError(Exception):
    """A caller's mistake (file, folder, option); only its message is shown."""


@dataclass(frozen=True)
class ModelSize:
    """The language model; ``d_ff`` is the baseline's, the other layers get the width with the same parameter count."""

    d_model: int = 96
    d_ff: int = 384
    layers: int = 3
    heads: int = 4
    context: int = 128


@dataclass(frozen=True)
class LayerSize:
    """The single layer that is timed: the guides' d_model and d_ff on ``tokens`` rows."""

    tokens: int = 512
    d_model: int = 512
    d_ff: int = 2048


@dataclass(frozen=True)
class Settings:
    out: Path
    text: Path | None = None
    device: str = "cpu"
    steps: int = 80
    seeds: int = 5
    most_mixture_seeds: int = 3  # only the first seeds, because the mixtures' steps are the slowest
    repeats: int = 9
    compile: str = "some"
    batch: int = 8
    learning_rate: float = 4e-3
    stress_factor: float = 10.0
    evaluations: int = 10
    validation_windows: int = 16
    final_windows: int = 128
    model: ModelSize = field(default_factory=ModelSize)
    layer: LayerSize = field(default_factory=LayerSize)

    @property
    def mixture_seeds(self) -> int:
        return min(self.seeds, self.most_mixture_seeds)

    @property
    def stress_steps(self) -> int:
        """The stress run's length, enough for a too high learning rate to show its effect."""
        return max(1, self.steps // 2)
