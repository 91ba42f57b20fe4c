# SPDX-License-Identifier: BSD-3-Clause
"""Layouts of other libraries, as constructors of QuantizedWeight. Most take the bytes as they lie."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check

_GGUF = {"Q8_0": "q8_0", "Q4_0": "q4_0", "Q4_K": "q4_k", "Q5_K": "q5_k", "Q6_K": "q6_k", "MXFP4": "gguf_mxfp4"}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word is column 8 * word + _AWQ_ORDER[i]


def _of(name: str, t: Any, *dtypes: torch.dtype) -> Tensor:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if t.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {wanted}, got {str(t.dtype).removeprefix('torch.')}")
    return t


def _bytes(t: Tensor) -> Tensor:
    return t if t.dtype is torch.uint8 else t.contiguous().view(torch.uint8)


def _dims(name: str, t: Tensor, dims: tuple[int, ...], shape: str) -> None:
    if t.dim() not in dims:
        raise ValueError(f"{name}: expected shape {shape}, got {list(t.shape)}")


def _shaped(name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    if t.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(t.shape)}")


def _pairs(nibbles: Tensor) -> Tensor:
    """Two neighbours of the last dimension in a byte, the first in the low nibble."""
    if nibbles.shape[-1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return (nibbles[..., ::2] | nibbles[..., 1::2] << 4).to(torch.uint8)


def _nibbles(words: Tensor) -> Tensor:
    """The eight nibbles of each int32, lowest first, as a last dimension."""
    return words.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32, device=words.device) & 15


class Readers:
    """Constructors of :class:`ffn_ops.QuantizedWeight`, of one weight or, with a first dimension E, of a stack."""

    @classmethod
    def _make(cls, *args: Any, **options: Any) -> Any:
        return cls(*args, **options)

    @classmethod
    def from_mxfp4(cls, blocks: Tensor, scales: Tensor) -> Any:
        """gpt-oss, DeepSeek-V4 and compressed-tensors' ``mxfp4-pack-quantized``: the bytes as they lie.

        Args:
            blocks: uint8 (or int8) ``[..., N, K / 32, 16]`` or ``[..., N, K / 2]``; the low nibble is the even element.
            scales: ``[..., N, K / 32]`` e8m0, as uint8 or float8_e8m0fnu.

        Example:
            >>> blocks = torch.randint(256, (8, 2, 16), dtype=torch.uint8)
            >>> scales = torch.full((8, 2), 127, dtype=torch.uint8)
            >>> ffn_ops.QuantizedWeight.from_mxfp4(blocks, scales).shape
            torch.Size([8, 64])
        """
        blocks = _bytes(_of("blocks", blocks, torch.uint8, torch.int8))
        scales = _bytes(_of("scales", scales, torch.uint8, torch.float8_e8m0fnu))
        _dims("scales", scales, (2, 3), "[..., N, K / 32]")
        if blocks.dim() == scales.dim() + 1:
            if blocks.shape[-1] != 16:
                raise ValueError(f"blocks: expected shape [..., N, K / 32, 16], got {list(blocks.shape)}")
            blocks = blocks.flatten(-2)
        return cls._make("mxfp4", blocks, scales, block=(1, 32))

    @classmethod
    def from_nvfp4(cls, packed: Tensor, scales: Tensor, factor: Tensor) -> Any:
        """ModelOpt: the bytes as they lie. A value is fp4 times the rounded product of scale and factor.

        Args:
            packed: uint8 ``[..., N, K / 2]``, the low nibble is the even element.
            scales: float8_e4m3fn ``[..., N, K / 16]``.
            factor: float32, one for the tensor or one for each expert (``weight_scale_2``).

        Example:
            >>> packed = torch.randint(256, (8, 32), dtype=torch.uint8)
            >>> scales = torch.ones(8, 4).to(torch.float8_e4m3fn)
            >>> ffn_ops.QuantizedWeight.from_nvfp4(packed, scales, torch.tensor(0.5)).shape
            torch.Size([8, 64])
        """
        packed = _of("packed", packed, torch.uint8)
        scales = _bytes(_of("scales", scales, torch.uint8, torch.float8_e4m3fn))
        factor = _of("factor", factor, torch.float32)
        lead = packed.shape[:-2]
        if factor.numel() not in (1, lead.numel()):
            raise ValueError(
                f"factor: expected one value or one for each expert, {list(lead)}, got {list(factor.shape)}"
            )
        factor = factor.reshape(lead) if factor.numel() == lead.numel() else factor.reshape(()).expand(lead)
        return cls._make("nvfp4", packed, scales, factor=factor, block=(1, 16))

    @classmethod
    def from_fp8(cls, weight: Tensor, scale_inv: Tensor, block: tuple[int, int] | str = (128, 128)) -> Any:
        """DeepSeek's blocks, or one scale for a row or for the tensor: the bytes as they lie.

        Args:
            weight: float8_e4m3fn ``[..., N, K]``.
            scale_inv: what codes are multiplied by: ``[..., ceil(N / 128), ceil(K / 128)]``, the last blocks are
                partial where 128 does not divide; float32, 16-bit (widened), or e8m0 as uint8 or float8_e8m0fnu.
            block: rows and columns of a block, ``"row"`` for scales ``[..., N]`` or ``[..., N, 1]``, ``"tensor"`` for
                one scale (of each expert).

        Example:
            >>> weight = torch.randn(300, 192).to(torch.float8_e4m3fn)
            >>> ffn_ops.QuantizedWeight.from_fp8(weight, torch.ones(3, 2)).shape
            torch.Size([300, 192])
        """
        weight = _of("weight", weight, torch.float8_e4m3fn)
        _dims("weight", weight, (2, 3), "[..., N, K]")
        scale = _of(
            "scale_inv", scale_inv, torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.float8_e8m0fnu
        )
        scale = _bytes(scale) if scale.element_size() == 1 else scale.float()
        *lead, rows, cols = weight.shape
        if isinstance(block, str):
            check.choice("block", block, ("row", "tensor"))
            block, grid = ((1, cols), (rows, 1)) if block == "row" else ((rows, cols), (1, 1))
            if scale.numel() != torch.Size((*lead, *grid)).numel():
                raise ValueError(f"scale_inv: expected shape {[*lead, *grid]}, got {list(scale.shape)}")
            scale = scale.reshape(*lead, *grid)
        return cls._make("fp8", _bytes(weight), scale, block=block)

    @classmethod
    def from_int8(cls, weight: Tensor, scale: Tensor) -> Any:
        """Symmetric int8: the bytes as they lie.

        Args:
            weight: int8 ``[..., N, K]``.
            scale: ``[..., N]`` or ``[..., N, 1]`` for rows, ``[..., N, K / group]`` for groups along K;
                float32 or 16-bit.

        Example:
            >>> weight = torch.randint(-127, 128, (8, 64), dtype=torch.int8)
            >>> ffn_ops.QuantizedWeight.from_int8(weight, torch.ones(8, 2)).shape
            torch.Size([8, 64])
        """
        weight = _of("weight", weight, torch.int8)
        _dims("weight", weight, (2, 3), "[..., N, K]")
        scale = _of("scale", scale, torch.float32, torch.float16, torch.bfloat16)
        if scale.dim() == weight.dim() - 1:
            scale = scale.unsqueeze(-1)
        return cls._make("int8", _bytes(weight), scale, block=(1, _group("scale", weight.shape[-1], scale)))

    @classmethod
    def from_gptq(
        cls,
        qweight: Tensor,
        qzeros: Tensor,
        scales: Tensor,
        g_idx: Tensor | None = None,
        *,
        version: int = 1,
        group: int | None = None,
    ) -> Any:
        """GPTQ's 4-bit words, which run along K, turned once into as many bytes that run along rows.

        Args:
            qweight: int32 ``[..., K / 8, N]``.
            qzeros: int32 ``[..., K / group, N / 8]``; in version 1 of the format zeros are stored less one.
            scales: ``[..., K / group, N]``; float32 or 16-bit.
            g_idx: the group of each k, which must be ``k // group``.
            version: 1, or 2, which stores zeros as they are.
            group: columns of a group, of which the last may be partial. None: what ``g_idx`` says; without it one group
                is all of K, and several are whole ones of a power of two.

        Example:
            >>> words = torch.randint(2**31, (8, 16), dtype=torch.int32)
            >>> ffn_ops.QuantizedWeight.from_gptq(words, words[:2, :2], torch.ones(2, 16)).shape
            torch.Size([16, 64])
        """
        qweight, qzeros = _of("qweight", qweight, torch.int32), _of("qzeros", qzeros, torch.int32)
        scales = _of("scales", scales, torch.float32, torch.float16, torch.bfloat16)
        _dims("qweight", qweight, (2, 3), "[..., K / 8, N]")
        if version not in (1, 2):
            raise ValueError(f"version: expected 1 or 2, got {version!r}")
        words, rows = qweight.shape[-2:]
        cols = 8 * words
        if g_idx is not None:
            _dims("g_idx", _of("g_idx", g_idx, torch.int32, torch.int64), (1, 2), "[..., K]")
            if g_idx.shape[-1] != cols:
                raise ValueError(f"g_idx: expected shape [..., {cols}], got {list(g_idx.shape)}")
            group = group or int((g_idx.flatten()[:cols] == 0).sum()) or None
        group = _check_groups(qweight, cols, rows, qzeros, scales, group)
        if g_idx is not None:
            order = torch.arange(cols, device=g_idx.device) // group
            if not bool((g_idx == order).all()):
                raise ValueError(
                    f"g_idx: expected k // {group}, got another order (desc_act), which needs permuted inputs"
                )
        codes = qweight.transpose(-1, -2).contiguous().view(torch.uint8)
        if version == 1:
            qzeros = qzeros + 0x11111111  # to the word: a borrow ran through its nibbles, where a zero was 0
        zeros = _nibbles(qzeros).flatten(-2).transpose(-1, -2)
        return cls._make("uint4", codes, scales.transpose(-1, -2), zeros=_pairs(zeros), block=(1, group))

    @classmethod
    def from_awq(cls, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Any:
        """AWQ's 4-bit words, which run along N, turned once into as many bytes that run along rows.

        Args:
            qweight: int32 ``[..., K, N / 8]``, nibbles in the order 0, 2, 4, 6, 1, 3, 5, 7.
            qzeros: int32 ``[..., K / group, N / 8]``, in the same order.
            scales: ``[..., K / group, N]``; float32 or 16-bit.

        Example:
            >>> words = torch.randint(2**31, (64, 2), dtype=torch.int32)
            >>> ffn_ops.QuantizedWeight.from_awq(words, words[:2], torch.ones(2, 16)).shape
            torch.Size([16, 64])
        """
        qweight, qzeros = _of("qweight", qweight, torch.int32), _of("qzeros", qzeros, torch.int32)
        scales = _of("scales", scales, torch.float32, torch.float16, torch.bfloat16)
        _dims("qweight", qweight, (2, 3), "[..., K, N / 8]")
        cols, words = qweight.shape[-2:]
        groups = scales.shape[-2] if scales.dim() > 1 else 0
        if groups == 0 or cols % groups:
            raise ValueError(f"scales: expected shape [..., K / group, N] for K = {cols}, got {list(scales.shape)}")
        group = _check_groups(qweight, cols, 8 * words, qzeros, scales, cols // groups)
        place = torch.tensor(_AWQ_ORDER, device=qweight.device).argsort()
        codes, zeros = (_nibbles(t)[..., place].flatten(-2).transpose(-1, -2) for t in (qweight, qzeros))
        return cls._make("uint4", _pairs(codes), scales.transpose(-1, -2), zeros=_pairs(zeros), block=(1, group))

    @classmethod
    def from_compressed_tensors(
        cls, weight_packed: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None = None
    ) -> Any:
        """compressed-tensors' ``pack-quantized`` of 4 bits: the bytes as they lie; zeros are turned once.

        Args:
            weight_packed: int32 ``[..., N, K / 8]``, values plus 8.
            weight_scale: ``[..., N, K / group]``; float32 or 16-bit.
            weight_zero_point: int32 ``[..., N / 8, K / group]``, or None where it is symmetric.

        Example:
            >>> words = torch.randint(2**31, (16, 8), dtype=torch.int32)
            >>> ffn_ops.QuantizedWeight.from_compressed_tensors(words, torch.ones(16, 2)).shape
            torch.Size([16, 64])
        """
        packed = _of("weight_packed", weight_packed, torch.int32)
        scale = _of("weight_scale", weight_scale, torch.float32, torch.float16, torch.bfloat16)
        _dims("weight_packed", packed, (2, 3), "[..., N, K / 8]")
        *lead, rows, words = packed.shape
        group = _group("weight_scale", 8 * words, scale)
        if weight_zero_point is None:
            return cls._make("int4", _bytes(packed), scale, block=(1, group))
        zero = _of("weight_zero_point", weight_zero_point, torch.int32)
        _shaped("weight_zero_point", zero, (*lead, -(-rows // 8), scale.shape[-1]))
        zeros = _nibbles(zero).transpose(-1, -2).flatten(-3, -2)[..., :rows, :]
        return cls._make("uint4", _bytes(packed), scale, zeros=_pairs(zeros), block=(1, group))

    @classmethod
    def from_gguf(cls, tensor: Any) -> Any:
        """A tensor of a GGUF file as ``gguf.GGUFReader(path).tensors`` gives it: the file's mapped bytes as they lie.

        Args:
            tensor: has ``data``, bytes ``[..., N, row]``, and ``tensor_type`` with a ``name``: Q8_0, Q4_0, Q4_K, Q5_K,
                Q6_K or MXFP4.
        """
        name, data = getattr(getattr(tensor, "tensor_type", None), "name", None), getattr(tensor, "data", None)
        if name is None or data is None:
            raise TypeError(f"tensor: expected a gguf.ReaderTensor, got {type(tensor).__name__}")
        check.choice("tensor_type", name, tuple(_GGUF))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            codes = torch.as_tensor(data)
        return cls._make(_GGUF[name], _of("data", codes, torch.uint8))


def _group(name: str, cols: int, scale: Tensor) -> int:
    groups = scale.shape[-1] if scale.dim() else 0
    if groups == 0 or cols % groups:
        raise ValueError(f"{name}: expected a last dimension that divides K = {cols}, got {list(scale.shape)}")
    return cols // groups


def _check_groups(like: Tensor, cols: int, rows: int, qzeros: Tensor, scales: Tensor, group: int | None) -> int:
    """Columns of a group."""
    lead, groups = like.shape[:-2], scales.shape[-2] if scales.dim() > 1 else 0
    if group is None:
        whole = cols // groups if groups and cols % groups == 0 else 0
        if groups != 1 and (whole == 0 or whole & (whole - 1)):
            raise ValueError(
                f"group: expected the columns of a group where K = {cols} are not whole groups of a power of two, got"
                f" None and scales of shape {list(scales.shape)}"
            )
        group = whole
    check.positive("group", group)
    if groups != -(-cols // group):
        raise ValueError(
            f"scales: expected shape [..., {-(-cols // group)}, N] for K = {cols}, got {list(scales.shape)}"
        )
    if rows % 8:
        raise ValueError(f"qweight: expected N, a multiple of 8, got {rows}")
    _shaped("scales", scales, (*lead, groups, rows))
    _shaped("qzeros", qzeros, (*lead, groups, rows // 8))
    return group
