# SPDX-License-Identifier: BSD-3-Clause
"""The workspace memory that the CPU kernels keep between calls, and the pages that weights lie on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import _checks as check


def empty_cache() -> None:
    """Returns the CPU workspace that is kept for later calls to the system.

    An operator needs workspace for packed operands, the hidden layer and its gradient. Touching fresh pages costs time,
    so the library keeps this memory for the next call: one block for each call that runs at the same time, of the size
    of the largest. No tensor lies in it. When an allocation fails, the library frees it by itself. On a GPU all memory
    is torch's; see :func:`torch.cuda.empty_cache`.

    Example:
        >>> y = ffn_ops.ffn(torch.randn(4, 8), torch.randn(16, 8), torch.randn(8, 16))
        >>> ffn_ops.empty_cache()
    """
    torch.ops.ffn_ops._empty_cache()


def set_cache_limit(limit: int | None) -> None:
    """Sets how much CPU workspace is kept for later calls; see :func:`empty_cache`.

    Args:
        limit: in bytes; 0 keeps nothing. None means the value of the environment variable ``FFN_OPS_CACHE_LIMIT``, or
            384 MiB without it. A call that needs more gets it, and frees it when it ends.

    Raises:
        TypeError, ValueError: if ``limit`` or ``FFN_OPS_CACHE_LIMIT`` is not a number of bytes.

    Example:
        >>> ffn_ops.set_cache_limit(64 << 20)
        >>> ffn_ops.set_cache_limit(None)
    """
    if limit is not None:
        check.at_least("limit", limit, 0)
    try:
        torch.ops.ffn_ops._set_cache_limit(-1 if limit is None else limit)
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of: a subclass's own (DTensor, torchao), or itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        part = getattr(tensor, name)
        if isinstance(part, Tensor):  # DTensor names its mesh too
            yield from _plain(part)


def _span(tensor: Tensor) -> tuple[int, int] | None:
    """Where a plain tensor begins and ends in the CPU's memory, if it has any there."""
    if is_lazy(tensor) or tensor.layout != torch.strided or tensor.numel() == 0:
        return None
    try:
        storage = tensor.untyped_storage()
        if storage.device.type != "cpu" or storage.data_ptr() == 0:
            return None
    except RuntimeError:  # a subclass without memory
        return None
    begin = storage.data_ptr() + tensor.storage_offset() * tensor.itemsize
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(begin), int(begin + (last + 1) * tensor.itemsize)


def use_huge_pages(model: nn.Module) -> int:
    """Moves a model's parameters and buffers onto huge pages of memory, in their place.

    A token reads each weight once, and on pages of 4 KiB, which is what torch gives weights, a core spends a part of
    that time on looking pages up. On pages of 2 MiB it reads faster, and so does every layer that reads these weights,
    ours or not. Values, storages and addresses stay as they are, so it can be called at any time; once, after the
    model is loaded and replaced, is enough. It takes half a second for a gigabyte. Memory that a tensor has not touched
    yet is filled with zeros, and pages of a mapped file are read.

    It asks Linux (6.1 or later) to collapse the pages that exist (``MADV_COLLAPSE``); the system's setting of
    transparent huge pages does not matter. On other systems, and where no huge page is free, pages stay as they are.
    ``THP_MEM_ALLOC_ENABLE=1`` in the environment makes torch itself ask for huge pages from the start.

    Args:
        model: any module. Its tensors on other devices are passed by.

    Returns:
        The bytes of its parameters and buffers that lie on huge pages now.

    Raises:
        TypeError: if ``model`` is no module.

    Source:
        Linux manual pages, madvise(2).

    Example:
        >>> model = torch.nn.Linear(2048, 5632)
        >>> ffn_ops.use_huge_pages(model) <= 4 * (2048 + 1) * 5632
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    tensors = (*model.parameters(), *model.buffers())
    spans = sorted(filter(None, (_span(part) for tensor in tensors for part in _plain(tensor))))
    moved = end = 0
    for begin, stop in spans:
        begin = max(begin, end)  # of memory that several share, once
        if begin < stop:
            moved += torch.ops.ffn_ops._use_huge_pages(begin, stop - begin)
            end = stop
    return moved
