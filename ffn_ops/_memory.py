# SPDX-License-Identifier: BSD-3-Clause
"""The workspace memory that the CPU kernels keep between calls."""

from __future__ import annotations

import torch

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
