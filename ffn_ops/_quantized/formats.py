# SPDX-License-Identifier: BSD-3-Clause
"""The formats of quantised weights as csrc/common/formats.h lists them, and the checks of their tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
BYTE = (torch.uint8,)


class Format(NamedTuple):
    """Codes along k come in blocks of ``block`` elements in ``block_bytes`` bytes; ``parts`` are the other tensors."""

    block: int
    block_bytes: int
    parts: tuple[str, ...] = ()
    scales: tuple[torch.dtype, ...] = ()
    group: int | None = None  # columns of a scale, where the format says it


FORMATS = {
    "mxfp4": Format(2, 1, ("scales",), BYTE, 32),
    "nvfp4": Format(2, 1, ("scales", "factor"), BYTE, 16),
    "fp8": Format(1, 1, ("scales",), (torch.float32, torch.uint8)),
    "int8": Format(1, 1, ("scales",), FLOATS),
    "int4": Format(2, 1, ("scales",), FLOATS),
    "uint4": Format(2, 1, ("scales", "zeros"), FLOATS),
    "q8_0": Format(32, 34),
    "q4_0": Format(32, 18),
    "q4_k": Format(256, 144),
    "q5_k": Format(256, 176),
    "q6_k": Format(256, 210),
    "gguf_mxfp4": Format(32, 17),
}


def has_up(formats: str) -> bool:
    """Whether the formats of an operator's weights, with commas between them, are of gate, up and down."""
    return formats.count(",") == 2


def columns(format: str, codes: Tensor) -> Any:
    """K of a weight with these codes."""
    kind = FORMATS[format]
    return codes.shape[-1] // kind.block_bytes * kind.block


def check_parts(format: str, block: tuple[int, int], parts: dict[str, Tensor]) -> None:
    """Checks dtypes, shapes and that scales are finite, before anything is kept."""
    kind, codes = FORMATS[format], parts["codes"]
    for name, t in parts.items():
        if t.layout is not torch.strided:
            raise ValueError(f"{name}: expected a strided tensor, got layout {t.layout}")
    if codes.dim() not in (2, 3):
        raise ValueError(f"codes: expected shape [N, bytes] or [E, N, bytes], got {list(codes.shape)}")
    if codes.shape[-1] % kind.block_bytes:
        raise ValueError(
            f"codes: expected rows of whole blocks of {kind.block_bytes} bytes in {format}, got {codes.shape[-1]} bytes"
        )
    lead, rows, cols = codes.shape[:-2], codes.shape[-2], columns(format, codes)
    if kind.parts and kind.group is not None and cols % kind.group:
        raise ValueError(f"codes: expected rows of a multiple of {kind.group} elements in {format}, got {cols}")
    grid = (-(-rows // block[0]), -(-cols // block[1]))
    shapes = {
        "codes": codes.shape,
        "scales": (*lead, *grid),
        "factor": lead,
        "zeros": (*lead, grid[0], -(-grid[1] // 2)),
    }
    dtypes = {"codes": BYTE, "scales": kind.scales, "factor": (torch.float32,), "zeros": BYTE}
    for name, t in parts.items():
        if t.dtype not in dtypes[name]:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes[name])
            raise TypeError(f"{name}: expected dtype {wanted} in {format}, got {str(t.dtype).removeprefix('torch.')}")
        if t.shape != tuple(shapes[name]):
            raise ValueError(
                f"{name}: expected shape {list(shapes[name])} for {format} codes of {[*lead, rows, cols]}, got"
                f" {list(t.shape)}"
            )
        if t.device != codes.device:
            raise ValueError(f"{name}: expected device {codes.device} as codes has, got {t.device}")
    for name in ("scales", "factor"):
        if name in parts and (bad := _not_finite(format, name, parts[name])):
            raise ValueError(f"{name}: expected finite scales, got {bad} that are not")


def check_groups(name: str, codes: Tensor, format: str, block: tuple[int, int]) -> None:
    """Refuses scales that the kernels of a GPU do not read."""
    cols = columns(format, codes)
    if codes.device.type == "cuda" and FORMATS[format].parts and block[1] < cols and block[1] % 8:
        raise ValueError(
            f"{name}: expected a scale for whole rows or a multiple of 8 columns on a GPU, got one for {block[1]}"
            " columns"
        )


def _not_finite(format: str, name: str, t: Tensor) -> int:
    if t.device.type != "cpu" or type(t) is not Tensor or t.numel() == 0:  # meta and fake tensors have no values
        return 0
    if t.dtype is not torch.uint8:
        return t.numel() - int(t.isfinite().sum())
    return int((t & 0x7F == 0x7F).sum()) if format == "nvfp4" else int((t == 255).sum())
