# SPDX-License-Identifier: BSD-3-Clause
"""Time and memory of a training step and of decoding against the length of the context, and where the time goes."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

import ffn_ops

from .model import BYTES, Arm, LanguageModel, Size

PARTS = ("indexer", "attention", "router", "ffn", "rest")  # modules of a block, and all else
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Cost:
    """Of one model at one length; ``step`` is forward and backward of one sequence, ``decode`` one more token."""

    arm: str
    length: int
    step_seconds: float
    step_parts: dict[str, float]  # seconds, disjoint; the indexer's loss is the attention's
    step_mb: float | None  # at most, above what the process held before; None where the system does not tell
    decode_seconds: float
    cache_mb: float


def resident(field: str) -> float:
    """MB of this process: VmRSS at present, VmHWM at most since it was reset."""
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(field)) / 1024


def give_memory_back() -> None:
    gc.collect()
    ffn_ops.empty_cache()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def peak_mb(call: Callable[[], object]) -> float | None:
    give_memory_back()
    try:
        CLEAR.write_text("5")  # resets VmHWM
        before = resident("VmRSS")
    except OSError:  # another system, or a container that forbids it
        call()
        return None
    call()
    return resident("VmHWM") - before


def parts_of(profile: ffn_ops.Profile) -> tuple[float, dict[str, float]]:
    """All its seconds, and those of each part."""
    found = profile.as_dict()
    parts = dict.fromkeys(PARTS, 0.0)
    for row in found["rows"]:
        name = row["path"].rpartition(".")[2]
        parts[name if name in parts else "rest"] += row["forward_seconds"] + row["backward_seconds"]
    return found["total_seconds"], parts


def cost(size: Size, arm: Arm, length: int, repeats: int, tokens: int = 8) -> Cost:
    """``tokens``: decoded in a row for one sample. Weights and cached keys are random: they do not change the time."""
    model = LanguageModel(size, arm, seed=0)
    text = torch.randint(BYTES, (1, length + 1), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        with ffn_ops.profile(model) as profile:
            logits, index_loss = model(text[:, :-1])
            (F.cross_entropy(logits[0], text[0, 1:]) + index_loss).backward()
            model.zero_grad(set_to_none=True)
        profiles.append(profile)

    caches = model.caches(1, length)
    for cache in caches:
        cache.kv.normal_()
        cache.index_k.normal_()

    def decode() -> float:
        began = time.perf_counter()
        for token in range(tokens):
            for cache in caches:
                cache.length = length - tokens + token
            model.decode(text[:, token : token + 1], caches)
        return (time.perf_counter() - began) / tokens

    profiles: list[ffn_ops.Profile] = []
    megabytes = peak_mb(step)
    for _ in range(repeats - 1):
        step()
    seconds, parts = min(map(parts_of, profiles), key=lambda each: each[0])  # what other programs disturbed least
    model.eval()
    cached = sum(cache.kv.nbytes + cache.index_k.nbytes for cache in caches) / 2**20
    return Cost(arm.key, length, seconds, parts, megabytes, min(decode() for _ in range(repeats + 1)), cached)


def exponent(lengths: Sequence[int], values: Sequence[float]) -> float | None:
    """The slope of log value over log length, by least squares, in the upper half of the lengths: value grows with
    the length to this power. None with fewer than two values above 0 there."""
    half = len(lengths) // 2
    points = [(math.log(x), math.log(y)) for x, y in zip(lengths[half:], values[half:], strict=True) if y > 0]
    if len(points) < 2:
        return None
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
