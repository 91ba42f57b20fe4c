"""The memory that the CPU's kernels keep for later calls."""

from __future__ import annotations

import torch

from . import _checks as check


def empty_cache() -> None:
    """Gives back to the system the memory that is kept for later calls on the CPU.

    An operator works in memory of its own: packed operands, the hidden layer, its gradient. Touching fresh pages costs
    time, so that memory is kept for the next call: one block for each call that runs at the same time, of the size of
    the largest. No tensor lies in it. Where memory ends, it is given back without being asked. On a GPU all memory is
    torch's; see :func:`torch.cuda.empty_cache`.

    Example:
        >>> y = ffn_ops.ffn(torch.randn(4, 8), torch.randn(16, 8), torch.randn(8, 16))
        >>> ffn_ops.empty_cache()
    """
    torch.ops.ffn_ops._empty_cache()


def set_cache_limit(limit: int | None) -> None:
    """Sets how much memory is kept for later calls on the CPU; see :func:`empty_cache`.

    Args:
        limit: bytes; 0 keeps nothing. None stands for what the environment variable ``FFN_OPS_CACHE_LIMIT`` says, else
            for 384 MiB. A call that needs more than this gets it, and gives it back when it ends.

    Raises:
        TypeError, ValueError: what was expected and what came; also where ``FFN_OPS_CACHE_LIMIT`` is no number.

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
