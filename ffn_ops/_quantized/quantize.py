# SPDX-License-Identifier: BSD-3-Clause
"""quantize: a dense weight into one of the formats, rounded to nearest."""

from __future__ import annotations

from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from .. import _checks as check
from .readers import _pairs
from .weight import QuantizedWeight

MADE = ("mxfp4", "fp8", "int8", "int4")
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class QuantizationError(NamedTuple):
    """What rounding has changed: the root mean square of the differences over that of the values, the largest
    difference, and how many values lay beyond the largest code.

    Example:
        >>> ffn_ops.quantize(torch.zeros(4, 32), "mxfp4", return_error=True)[1]
        QuantizationError(relative=0.0, largest=0.0, saturated=0)
    """

    relative: float
    largest: float
    saturated: int


@overload
def quantize(w: Tensor, format: str, *, group: int | tuple[int, int] | None = None) -> QuantizedWeight: ...
@overload
def quantize(
    w: Tensor, format: str, *, group: int | tuple[int, int] | None = None, return_error: bool
) -> tuple[QuantizedWeight, QuantizationError]: ...
@torch.no_grad()
def quantize(w: Tensor, format: str, *, group: int | tuple[int, int] | None = None, return_error: bool = False) -> Any:
    """Rounds a weight to the nearest codes of a format, with the scales that its largest magnitudes ask for.

    Args:
        w: ``[N, K]`` or ``[E, N, K]``; float64, float32, float16 or bfloat16, all finite in float32.
        format: ``mxfp4`` (power-of-two scales, OCP's choice of exponent: the largest values may saturate by up to a
            quarter), ``fp8``, ``int8``, ``int4`` (symmetric).
        group: columns of a scale. None: 32 of mxfp4 (the only choice), blocks of 128 x 128 of fp8, whole rows of int8,
            32 of int4. A pair has rows and columns, for fp8.
        return_error: also return a ``QuantizationError``.

    Returns:
        A :class:`ffn_ops.QuantizedWeight`, or with ``return_error`` the pair of it and the error.

    Raises:
        TypeError, ValueError: with the argument, what was expected and what came.

    Source:
        OCP Microscaling Formats (MX) Specification 1.0 (2023), section 6.3.

    Example:
        >>> w, error = ffn_ops.quantize(torch.randn(64, 128), "int8", return_error=True)
        >>> w.format, error.relative < 0.01, error.saturated
        ('int8', True, 0)
    """
    check.tensor("w", w)
    check.choice("format", format, MADE)
    check.flag("return_error", return_error)
    if w.dim() not in (2, 3):
        raise ValueError(f"w: expected shape [N, K] or [E, N, K], got {list(w.shape)}")
    if w.is_meta:
        raise ValueError("w: expected a tensor with values, got one on the meta device")
    x = w.float()
    if not bool(x.isfinite().all()):  # of float64 also what lies beyond float32
        raise ValueError(f"w: expected finite values, got {int((~x.isfinite()).sum())} that are not")
    rows, cols = w.shape[-2:]
    block = _block(format, group, rows, cols)
    quantized, saturated = _ROUNDED[format](x, block)
    if not return_error:
        return quantized
    difference = quantized.dequantize() - x
    scale = float(x.square().mean().sqrt()) if x.numel() else 0.0
    rms = float(difference.square().mean().sqrt()) if x.numel() else 0.0
    largest = float(difference.abs().max()) if x.numel() else 0.0
    return quantized, QuantizationError(rms / scale if scale else 0.0, largest, int(saturated))


def _block(format: str, group: Any, rows: int, cols: int) -> tuple[int, int]:
    default = {"mxfp4": (1, 32), "fp8": (128, 128), "int8": (1, max(cols, 1)), "int4": (1, 32)}[format]
    pair: Any = default if group is None else group if isinstance(group, tuple) else (1, group)
    if len(pair) != 2:
        raise ValueError(f"group: expected columns, or rows and columns, got {group!r}")
    for each in pair:
        check.positive("group", each)
    if format == "mxfp4" and pair != (1, 32):
        raise ValueError(f"group: expected 32 of mxfp4, got {group!r}")
    if format != "fp8" and (pair[0] != 1 or cols % pair[1]):
        got = f"{pair[1]}, the default of {format}" if group is None else repr(group)
        raise ValueError(f"group: expected a divisor of K = {cols}, got {got}")
    if format == "int4" and cols % 2:
        raise ValueError(f"w: expected an even number of columns for int4, got {[rows, cols]}")
    return pair  # type: ignore[no-any-return]


def _blocks(x: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The largest magnitude of each block ``[..., rows, columns]``; and a function's worth of scales spread over x."""
    pad = (-x.shape[-1] % block[1], -x.shape[-2] % block[0])
    padded = torch.nn.functional.pad(x.abs(), (0, pad[0], 0, pad[1]))
    cells = padded.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))
    return cells.amax((-3, -1)), x


def _spread(scales: Tensor, block: tuple[int, int], like: Tensor) -> Tensor:
    wide = scales.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return wide[..., : like.shape[-2], : like.shape[-1]]


def _integers(x: Tensor, block: tuple[int, int], most: int) -> tuple[Tensor, Tensor]:
    scales = _blocks(x, block)[0] / most
    divisor = torch.where(scales == 0, 1.0, scales)
    return (x / _spread(divisor, block, x)).round().clamp(-most - 1, most), scales


def _int8(x: Tensor, block: tuple[int, int]) -> tuple[QuantizedWeight, int]:
    codes, scales = _integers(x, block, 127)
    return QuantizedWeight("int8", codes.to(torch.int8).view(torch.uint8), scales, block=block), 0


def _int4(x: Tensor, block: tuple[int, int]) -> tuple[QuantizedWeight, int]:
    codes, scales = _integers(x, block, 7)
    return QuantizedWeight("int4", _pairs((codes + 8).to(torch.uint8)), scales, block=block), 0


def _fp8(x: Tensor, block: tuple[int, int]) -> tuple[QuantizedWeight, int]:
    scales = _blocks(x, block)[0] / 448
    divisor = torch.where(scales == 0, 1.0, scales)
    codes = (x / _spread(divisor, block, x)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return QuantizedWeight("fp8", codes.view(torch.uint8), scales, block=block), 0


def _mxfp4(x: Tensor, block: tuple[int, int]) -> tuple[QuantizedWeight, int]:
    largest = _blocks(x, block)[0]
    exponent = (torch.frexp(largest).exponent - 1 - 2).clamp(-127, 127)  # 6 is 1.5 * 2^2
    exponent = torch.where(largest == 0, -127, exponent)
    scaled = torch.ldexp(x, -_spread(exponent, block, x))
    magnitude = scaled.abs().contiguous()
    values = torch.tensor(_FP4, device=x.device)
    middles = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(magnitude, middles)  # a value in the middle: to the lower one
    codes += (magnitude == middles[codes.clamp(max=6)]) & (codes % 2 == 1)  # ties to even
    codes |= (scaled.signbit().to(codes.dtype)) << 3
    scales = (exponent + 127).to(torch.uint8)
    return QuantizedWeight("mxfp4", _pairs(codes), scales, block=block), int((magnitude > 6).sum())


_ROUNDED = {"mxfp4": _mxfp4, "fp8": _fp8, "int8": _int8, "int4": _int4}
