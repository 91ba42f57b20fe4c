# SPDX-License-Identifier: BSD-3-Clause
"""GLaM's and GShard's top-2 routing."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from ..ops._route import top_k_of
from ._routing import Routing, expert_capacity, fold_logits, sorted_rows


def glam_top2(
    logits: Tensor,
    *,
    capacity_factor: float | None = 1.25,
    renormalize: str = "before_drop",
    random_second: bool = False,
    generator: torch.Generator | None = None,
    min_capacity: int = 1,
    drop: str = "position",
    mask: Tensor | None = None,
) -> Routing:
    """The two experts with the highest p for each token; all first choices queue before any second.

    Args:
        logits: ``[..., E]``, E >= 2.
        capacity_factor, min_capacity, drop, mask: see :func:`top_k`; the capacity is
            ``ceil(capacity_factor * 2 T / E)``.
        renormalize: ``"before_drop"`` divides both weights by their sum, ``"after_drop"`` by the sum of the weights
            that are kept, ``"none"`` leaves p.
        random_second: keep the second expert with probability ``min(1, w2 / 0.2)``, where w2 is its renormalised
            weight, drawn from ``generator``. Training only.

    Source: Lepikhin et al., GShard (2020), algorithm 1; Du et al., GLaM (2021), section 4.

    Example:
        >>> routing = ffn_ops.routing.glam_top2(torch.randn(16, 4), capacity_factor=2.0)
        >>> routing.counts.sum()
        tensor(32)
    """
    check.choice("renormalize", renormalize, ("none", "before_drop", "after_drop"))
    check.flag("random_second", random_second)
    z, mask = fold_logits(logits, mask)
    tokens, experts = z.shape
    p, ids = top_k_of(z, 2)
    share = p / p.sum(1, keepdim=True)
    if mask is not None:
        ids = torch.where(mask.unsqueeze(1), ids, experts)
    if random_second:
        draw = torch.rand(tokens, generator=generator, dtype=p.dtype, device=p.device)
        kept = torch.stack((torch.ones_like(draw, dtype=torch.bool), draw < share[:, 1].detach() / 0.2), 1)
        ids = torch.where(kept, ids, experts)
    capacity = expert_capacity(tokens, 2, experts, capacity_factor, min_capacity)
    weights = share if renormalize == "before_drop" else p
    routing = sorted_rows(ids, None, weights, experts, tokens, capacity, drop, mask)
    if renormalize != "after_drop":
        return routing
    stays = (routing.row < routing.offsets[-1]).view(tokens, 2)
    weights = torch.where(stays, p, 0)
    weights = weights / torch.where(stays.any(1, keepdim=True), weights.sum(1, keepdim=True), 1)
    again = sorted_rows(torch.where(stays, ids, experts), None, weights, experts, tokens)
    return Routing(*again[:5], *routing[5:])
