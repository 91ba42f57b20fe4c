# SPDX-License-Identifier: BSD-3-Clause
"""The text as bytes: reading it with clear errors, the split, and the batches, which are equal for every
architecture."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .settings import CompareError

MAX_BYTES = 64 * 2**20
VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Text:
    name: str
    train: Tensor  # uint8 [N]
    validation: Tensor  # uint8 [M]
    truncated: bool


def default_path() -> Path:
    """The text that ships with Python: the help topics of ``pydoc``."""
    spec = importlib.util.find_spec("pydoc_data.topics")
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise CompareError("this Python lacks pydoc_data/topics.py, the default text: name one with --text FILE")
    return Path(spec.origin)


def load(path: Path | None, context: int) -> Text:
    """Read ``path`` (None: the default) and split it, the last tenth for validation."""
    name = "pydoc_data/topics.py (ships with Python)" if path is None else path.name
    path = default_path() if path is None else path
    try:
        if not path.exists():
            raise CompareError(f"--text {path}: no such file")
        if not path.is_file():
            raise CompareError(f"--text {path}: expected a regular file, got {_kind(path)}")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise CompareError(f"--text {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not raw:
        raise CompareError(f"--text {path}: the file is empty")
    truncated = len(raw) > MAX_BYTES
    raw = raw[:MAX_BYTES]
    split = len(raw) - int(len(raw) * VALIDATION_SHARE)
    needed = 10 * (context + 2)
    if len(raw) < needed:
        raise CompareError(f"--text {path}: too short: {len(raw)} bytes, at least {needed} are needed")
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return Text(name, data[:split], data[split:], truncated)


def _kind(path: Path) -> str:
    return "a folder" if path.is_dir() else "a device, pipe or socket"


def windows(data: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and next-byte targets, both int64 [B, context]."""
    index = starts[:, None] + torch.arange(context + 1)
    rows = data[index].long()
    return rows[:, :-1], rows[:, 1:]


def training_starts(data: Tensor, seed: int, steps: int, batch: int, context: int) -> Tensor:
    """Window starts [steps, batch] that depend on the seed alone: the paired data order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(data) - context, (steps, batch), generator=generator)


def validation_starts(data: Tensor, count: int, context: int) -> Tensor:
    """At most ``count`` windows, spread evenly over the validation text, the same for every run."""
    count = min(count, (len(data) - 1) // context)
    return torch.linspace(0, len(data) - context - 1, count).long()
