# SPDX-License-Identifier: BSD-3-Clause
"""Facts about this build and this machine."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from ._library import CUDA_ABSENT, cuda_build
from ._version import __version__


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model name")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cuda() -> str:
    if CUDA_ABSENT is not None:
        return CUDA_ABSENT
    build = cuda_build()
    return "built for {}, by nvcc {} and torch {}".format(*(build.get(k, "?") for k in ("archs", "nvcc", "torch")))


def info() -> dict[str, Any]:
    """Describes this installation and this machine.

    Returns:
        ``version``, ``torch``, ``python``, ``cpu``, ``isa`` (chosen), ``isas`` (available here), ``amx``
        (whether 16-bit layers use torch's products), ``threads``, ``cuda`` (the CUDA library's architectures, or the
        reason for its absence).

    Example:
        >>> ffn_ops.info()["isa"] in ffn_ops.info()["isas"]
        True
    """
    return {
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "isa": torch.ops.ffn_ops._isa(),
        "isas": torch.ops.ffn_ops._isas().split(),
        "amx": torch.ops.ffn_ops._has_amx(),
        "threads": torch.get_num_threads(),
        "cuda": _cuda(),
    }
