# SPDX-License-Identifier: BSD-3-Clause
"""The machine's limits, measured: float32 multiply-adds per second and bytes read per second. The kernels:
csrc/cpu/kernels/peak.h."""

from __future__ import annotations

import functools
import mmap
from pathlib import Path

import torch

from . import _library  # noqa: F401  (loads the operators)

SECONDS = 0.02  # of one FMA sample
LEAST_BUFFER = 256 << 20
MOST_BUFFER = 2 << 30


def isas() -> tuple[str, ...]:
    """The instruction sets of this machine, widest last."""
    return tuple(torch.ops.ffn_ops._isas().split())


def fma(isa: str, threads: int, seconds: float = SECONDS) -> float:
    """GFLOP/s of float32 multiply-adds in registers."""
    return float(torch.ops.ffn_ops._peak_fma(isa, threads, seconds))


def last_level_cache() -> int:
    """Bytes; 64 MiB where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [64 << 20]
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    found = [path.read_text().strip() for path in folder.glob("index*/size")]
    if found:
        sizes = [int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text) for text in found]
    return max(sizes)


@functools.cache
def buffer() -> torch.Tensor:
    """More than four times the last-level cache, on huge pages where the system grants them, every page written."""
    memory = mmap.mmap(-1, min(MOST_BUFFER, max(LEAST_BUFFER, 5 * last_level_cache())))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).fill_(1.0)


def read(isa: str, threads: int) -> float:
    """GB/s of one pass over :func:`buffer`, which is kept until ``buffer.cache_clear()``."""
    return float(torch.ops.ffn_ops._peak_read(buffer(), isa, threads))


@functools.cache
def limits(isa: str, threads: int) -> dict[str, float]:
    """Both, the best of some samples, as others may use the machine; measured once in a process. Frees the buffer."""
    found = {
        "fma_gflops": max(fma(isa, threads) for _ in range(15)),
        "read_gbs": max(read(isa, threads) for _ in range(7)),
    }
    buffer.cache_clear()
    return found
