# SPDX-License-Identifier: BSD-3-Clause
"""Token rounding: top-k whose counts are multiples of a tile."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from ..ops._route import round_tokens_op, top_k_of
from ._routing import Routing, fold_logits, sorted_rows, wide


def token_rounding(
    logits: Tensor, k: int, *, tile: int = 128, renormalize: bool = False, mask: Tensor | None = None
) -> Routing:
    """Top-k of p, with each expert's count rounded to the nearest multiple of ``tile`` (half up, at most T): the expert
    loses its tokens with the lowest scores, or gets those with the highest scores among the other tokens.

    Then no tile of the products is partly empty. It changes results, so nothing uses it by default.

    Args:
        logits: ``[..., E]`` for T tokens.
        k: experts per token before rounding.
        tile: rows of a tile.
        renormalize: divide the weights, p, by the sum of the token's k highest.
        mask: see :func:`top_k`; padded tokens join no expert, so a count may then be lower.

    Returns:
        A :class:`ffn_ops.Routing` with R = T * k + E * min(tile // 2, T).

    Source: SonicMoE (2025), token rounding.

    Example:
        >>> routing = ffn_ops.routing.token_rounding(torch.randn(64, 4), k=2, tile=16)
        >>> routing.statistics().tokens_per_expert % 16
        tensor([0., 0., 0., 0.])
    """
    check.at_least("tile", tile, 1)
    check.flag("renormalize", renormalize)
    z, mask = fold_logits(logits, mask)
    tokens, experts = z.shape
    highest, ids = top_k_of(z, k)
    if isinstance(tokens, int) and tokens == 0:  # unused rows name no token
        return sorted_rows(ids, None, highest, experts, tokens, mask=mask)
    p = torch.softmax(wide(z), 1)
    choice = p.detach()
    if mask is not None:
        ids = torch.where(mask.unsqueeze(1), ids, experts)
        choice = torch.where(mask.unsqueeze(1), choice, -1.0)
    expert, token = round_tokens_op(choice, ids, min(tile, 2**62))
    if mask is not None:
        expert = torch.where(mask[token], expert, experts)
    if renormalize:
        p = p / highest.sum(1, keepdim=True)
    weight = p[token, expert.clamp(max=experts - 1)]
    return sorted_rows(expert, token, weight, experts, tokens, mask=mask)
