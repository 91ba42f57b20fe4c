# SPDX-License-Identifier: BSD-3-Clause
"""BASE routing: a balanced assignment of tokens to experts."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from ..ops._route import balanced_assignment_op, top_k_of
from ._routing import Routing, fold_logits, wide


def base(logits: Tensor, *, training: bool = True, mask: Tensor | None = None) -> Routing:
    """One expert for each token, weighted with sigmoid(z). In training: the assignment with the largest sum of z in
    which every expert gets floor(T/E) or ceil(T/E) tokens. Else: the expert with the highest z.

    The assignment is exact and deterministic, for every T and E. The CPU solves it. Logits on a GPU are copied there,
    which is the only place where this package waits for the device; a CUDA graph refuses it.

    Args:
        logits: ``[..., E]`` for T tokens.
        training: whether to balance.
        mask: see :func:`top_k`; only real tokens are balanced.

    Source: Lewis et al., BASE Layers (2021), equations 1 and 2.

    Example:
        >>> routing = ffn_ops.routing.base(torch.randn(10, 4))
        >>> sorted(routing.counts.tolist())  # 10 / 4
        [2, 2, 3, 3]
    """
    check.flag("training", training)
    z, mask = fold_logits(logits, mask)
    z = wide(z)
    if training:
        ids = balanced_assignment_op(z.detach(), mask).unsqueeze(1)
        inside = ids.clamp(max=z.shape[1] - 1)
    else:
        inside = ids = top_k_of(z.detach(), 1)[1]
    return Routing.from_topk(ids, torch.sigmoid(z.gather(1, inside)), z.shape[1], mask=mask)
