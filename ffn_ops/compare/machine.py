# SPDX-License-Identifier: BSD-3-Clause
"""Facts about the machine and the device that a comparison runs on."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

import ffn_ops

from .settings import CompareError


def cuda_ready() -> bool:
    """True if there are a GPU and the CUDA kernels."""
    return torch.cuda.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key("ffn_ops::ffn", "CUDA")


def choose_device(name: str | None) -> str:
    """``name``, or the GPU if it can run the fused layers, else the CPU."""
    if name is None:
        return "cuda" if cuda_ready() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise CompareError(f"--device {name}: expected cpu or cuda")
    if kind == "cuda" and not cuda_ready():
        why = "ffn_ops has no CUDA kernels loaded" if torch.cuda.is_available() else "torch sees no CUDA device"
        raise CompareError(f"--device {name}: {why}; see python -m ffn_ops info")
    return name


def facts(device: str) -> dict[str, Any]:
    """What ``ffn_ops.info`` tells (processor, instruction set, threads, versions) and where the layers ran."""
    return {
        **ffn_ops.info(),
        "logical processors": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
    }
