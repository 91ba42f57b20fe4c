# SPDX-License-Identifier: BSD-3-Clause
"""The machine's limits, measured: float32 multiply-adds per second and bytes read per second. The kernels:
peak_kernels.h."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
ENGINE = FOLDER.parent / "csrc"
SOURCES = (FOLDER / "peak.cpp", ENGINE / "cpu/dispatch.cpp", *sorted((ENGINE / "cpu/isa").glob("*.cpp")))
HEADERS = (FOLDER / "peak.h", FOLDER / "peak_kernels.h", *sorted(ENGINE.glob("c[op]*/**/*.h")))
FLAGS = (
    *("-std=c++20", "-O3", "-g0", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-Wno-psabi"),
    *("-include", str(FOLDER / "peak.h"), '-DFFN_OPS_KERNELS="../../../benchmarks/peak_kernels.h"'),
)
SECONDS = 0.02  # of one FMA sample
LEAST_BUFFER = 256 << 20
MOST_BUFFER = 2 << 30


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ffn_ops"


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = os.environ.get("CXX", "c++").split()
    texts = (path.read_bytes() for path in (*SOURCES, *HEADERS))
    key = hashlib.sha256(b"\0".join([*texts, *(part.encode() for part in (*compiler, *FLAGS))]))
    built = _cache_folder() / f"peak-{key.hexdigest()[:16]}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            fresh = Path(folder) / built.name
            try:
                done = subprocess.run(
                    [*compiler, *FLAGS, *map(str, SOURCES), "-o", str(fresh)], capture_output=True, text=True
                )
            except FileNotFoundError:
                raise RuntimeError(f"benchmarks need a C++ compiler: no {compiler[0]!r} on PATH (set CXX)") from None
            if done.returncode != 0:
                raise RuntimeError(f"{SOURCES[0].name} does not compile:\n{done.stderr}")
            fresh.replace(built)  # atomic: two runs may build at once
    library = ctypes.CDLL(str(built))
    library.peak_isa_name.restype = ctypes.c_char_p
    library.peak_fma.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_double]
    library.peak_fma.restype = ctypes.c_double
    library.peak_buffer.argtypes = [ctypes.c_size_t]
    library.peak_buffer.restype = ctypes.c_void_p
    library.peak_read.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    library.peak_read.restype = ctypes.c_double
    return library


@functools.cache
def isas() -> tuple[str, ...]:
    """The instruction sets of this machine that have a peak, widest last."""
    library = _library()
    return tuple(library.peak_isa_name(i).decode() for i in range(library.peak_isa_count()))


def fma(isa: str, threads: int, seconds: float = SECONDS) -> float:
    """GFLOP/s of float32 multiply-adds in registers."""
    return float(_library().peak_fma(isas().index(isa), threads, seconds))


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
def _buffer() -> tuple[int, int]:
    bytes_ = min(MOST_BUFFER, max(LEAST_BUFFER, 5 * last_level_cache()))
    memory = _library().peak_buffer(bytes_)
    if not memory:
        raise MemoryError(f"no {bytes_ >> 20} MiB for the bandwidth buffer")
    return memory, bytes_


def read(isa: str, threads: int) -> float:
    """GB/s of one pass over a buffer more than four times the last-level cache, on huge pages."""
    memory, bytes_ = _buffer()
    return float(_library().peak_read(isas().index(isa), threads, memory, bytes_))
