# SPDX-License-Identifier: BSD-3-Clause
"""Time and memory of a training step and of decoding against the length of the context, and where the time goes."""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

import ffn_ops

from .clock import Clock
from .model import BYTES, Arm, LanguageModel, Size

PARTS = ("indexer", "attention", "router", "FFN", "rest")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Cost:
    """Of one model at one length; ``step`` is forward and backward of one sequence, ``decode`` one more token."""

    arm: str
    length: int
    step_seconds: float
    step_parts: dict[str, float]  # seconds, disjoint; the indexer's are those of scores and choice
    step_mb: float | None  # at most, above what the process held before; None where the system does not tell
    decode_seconds: float
    decode_parts: dict[str, float]
    cache_mb: float


def resident(field: str) -> float:
    """MB of this process: VmRSS at present, VmHWM at most since it was reset."""
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(field)) / 1024


def give_memory_back() -> None:
    gc.collect()
    ffn_ops.empty_cache()
    ctypes.CDLL(None).malloc_trim(0)


def peak_mb(call: Callable[[], object]) -> float | None:
    if not CLEAR.exists():
        call()
        return None
    give_memory_back()
    before = resident("VmRSS")
    CLEAR.write_text("5")  # resets VmHWM
    call()
    return resident("VmHWM") - before


def disjoint(clock: Clock, whole: float) -> dict[str, float]:
    """Seconds of each part of ``whole``: the indexer lies within the attention, the router within the FFN."""
    found = {part: clock.seconds.get(part, 0.0) for part in PARTS}
    found["rest"] = whole - found["attention"] - found["FFN"]
    found["attention"] -= found["indexer"]
    found["FFN"] -= found["router"]
    return found


Timed = tuple[float, dict[str, float]]  # seconds, and those of each part


def timed(call: Callable[[Clock], object]) -> Timed:
    clock, began = Clock(), time.perf_counter()
    call(clock)
    seconds = time.perf_counter() - began
    return seconds, disjoint(clock, seconds)


def fastest(samples: Iterable[Timed]) -> Timed:
    """The fastest call is the one that the rest of the machine disturbed least."""
    return min(samples, key=lambda sample: sample[0])


def cost(size: Size, arm: Arm, length: int, repeats: int, tokens: int = 8) -> Cost:
    """``tokens``: decoded in a row for one sample. Weights and cached keys are random: they do not change the time."""
    model = LanguageModel(size, arm, seed=0)
    text = torch.randint(BYTES, (1, length + 1), generator=torch.Generator().manual_seed(0))

    def step(clock: Clock) -> None:
        logits, index_loss = model(text[:, :-1], clock)
        (F.cross_entropy(logits[0], text[0, 1:]) + index_loss).backward()
        model.zero_grad(set_to_none=True)

    samples: list[Timed] = []
    megabytes = peak_mb(lambda: samples.append(timed(step)))
    step_seconds, step_parts = fastest([*samples, *(timed(step) for _ in range(repeats - 1))])
    model.eval()
    caches = model.caches(1, length)
    for cache in caches:
        cache.kv.normal_()
        cache.index_k.normal_()

    def decode(clock: Clock) -> None:
        for token in range(tokens):
            for cache in caches:
                cache.length = length - tokens + token
            model.decode(text[:, token : token + 1], caches, clock)

    decode_seconds, decode_parts = fastest(timed(decode) for _ in range(repeats + 1))
    return Cost(
        arm.key,
        length,
        step_seconds,
        step_parts,
        megabytes,
        decode_seconds / tokens,
        {part: seconds / tokens for part, seconds in decode_parts.items()},
        sum(cache.bytes() for cache in caches) / 2**20,
    )


def exponent(lengths: Sequence[int], values: Sequence[float]) -> float | None:
    """The slope of log value over log length, by least squares, in the upper half of the lengths: value grows with
    the length to this power. None with fewer than two lengths."""
    half = len(lengths) // 2
    points = [(math.log(x), math.log(y)) for x, y in zip(lengths[half:], values[half:], strict=True) if y > 0]
    if len(points) < 2:
        return None
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
