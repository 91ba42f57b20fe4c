# SPDX-License-Identifier: BSD-3-Clause
"""A GPU as the place where rows run: CUDA events around forward and backward with the L2 cache flushed before each
call, the limits that cuBLAS and a copy reach, and clocks. The twin of the harness's Cpu."""

from __future__ import annotations

import datetime
import gc
import itertools
import shutil
import statistics
import subprocess
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ffn_ops

from .providers import Inputs
from .runners import Local, Runner
from .workloads import DTYPES, Mode, Row, Shape

MATRIX = 8192  # of the product whose rate is the limit: 1.1 TFLOP
AHEAD = 2_000_000  # cycles, a millisecond: by then the host has launched all of a call
COPIED = 1 << 30  # bytes of the copy whose rate is the other: twenty times the L2 cache
CLOCKS = {
    "sm_mhz": "clocks.sm",
    "most_sm_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "celsius": "temperature.gpu",
    "watts": "power.draw",
    "slowed_by": "clocks_event_reasons.active",
}


def nvidia_smi(fields: dict[str, str]) -> dict[str, Any]:
    """What nvidia-smi says about the current device, numbers as such; nothing where it is missing or refuses."""
    if shutil.which("nvidia-smi") is None:
        return {}
    uuid = str(torch.cuda.get_device_properties().uuid) if torch.cuda.is_available() else "0"
    device = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits", f"--id={device}"],
        capture_output=True,
        text=True,
    )
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode != 0 or len(values) != len(fields):
        return {}
    return {name: _number(value) for name, value in zip(fields, values, strict=True)}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _milliseconds(*calls: Callable[[], Any]) -> list[float]:
    """Of each call, from events around them: the host does not wait in between."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    marks[0].record()
    for call, mark in zip(calls, marks[1:], strict=True):
        call()
        mark.record()
    marks[-1].synchronize()
    return [float(a.elapsed_time(b)) for a, b in itertools.pairwise(marks)]


def let_host_run_ahead() -> None:
    """Keeps the GPU busy while the host launches what is timed next."""
    torch.cuda._sleep(AHEAD)


class GpuLocal(Local):
    """A provider on the GPU; a sample is the median of its calls, so that one interruption does not count."""

    def __init__(self, inputs: Inputs, shape: Shape, mode: Mode, cold: Tensor) -> None:
        super().__init__(inputs, shape, mode)
        self.cold = cold  # larger than the L2 cache: writing it leaves nothing else there

    def sample(self, repeats: int) -> float:
        args, d_y = self.draws[0]
        found: list[Any] = []

        def forward() -> None:
            found.append(self.module(*args))

        def backward() -> None:
            if self.leaves:
                torch.autograd.grad(found.pop(), self.leaves, d_y, allow_unused=True)

        def prepare() -> None:
            self.cold.zero_()
            let_host_run_ahead()

        calls = [prepare, forward, backward, found.clear] * repeats
        with torch.inference_mode(self.mode == "inference"):
            times = _milliseconds(*calls)
        self.forward = statistics.median(times[1::4]) * 1e-3
        return statistics.median(a + b for a, b in zip(times[1::4], times[2::4], strict=True)) * 1e-3


class Gpu:
    """The current CUDA device."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties().L2_cache_size
        self.cold = torch.empty(max(2 * cache, 64 << 20), dtype=torch.uint8, device="cuda")
        self._copied = torch.empty(2, COPIED, dtype=torch.uint8, device="cuda")
        self._factors: tuple[str, Tensor] | None = None

    def _matrices(self, dtype: str) -> Tensor:
        if self._factors is None or self._factors[0] != dtype:
            self._factors = (dtype, torch.randn(3, MATRIX, MATRIX, device="cuda").to(DTYPES[dtype]))
        return self._factors[1]

    def limits(self, row: Row) -> dict[str, float]:
        """GFLOP/s of a large cuBLAS product of the row's dtype, GB/s of a copy within the device's memory."""
        a, b, c = self._matrices(row.dtype)
        to, source = self._copied
        times = _milliseconds(*[lambda: torch.mm(a, b, out=c)] * 2, *[lambda: to.copy_(source)] * 2)
        return {
            "matmul_gflops": 2 * MATRIX**3 / (min(times[:2]) * 1e-3) * 1e-9,
            "copy_gbs": 2 * COPIED / (min(times[2:]) * 1e-3) * 1e-9,
        }

    def runner(self, inputs: Inputs, shape: Shape, mode: Mode) -> Runner:
        gc.collect()  # also what failed providers left in their tracebacks
        torch.cuda.empty_cache()  # the next provider may need other sizes
        return GpuLocal(inputs, shape, mode, self.cold)

    def facts(self) -> dict[str, Any]:
        return {"clocks": nvidia_smi(CLOCKS)}


def machine() -> dict[str, Any]:
    """Facts about the machine of a run."""
    properties = torch.cuda.get_device_properties()
    return {
        "device": "cuda",
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "version": ffn_ops.info()["version"],
        "cpu": ffn_ops.info()["cpu"],
        **nvidia_smi({"driver": "driver_version", **CLOCKS}),
        "date": datetime.date.today().isoformat(),
    }
