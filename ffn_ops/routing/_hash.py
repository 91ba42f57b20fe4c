# SPDX-License-Identifier: BSD-3-Clause
"""Hash routing: a fixed table from token ids to experts."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from ..ops._route import top_k_of
from ..reference import SCORES
from ._routing import Routing, check_mask, fold_logits, has_values


def hash_table(vocabulary: int, num_experts: int, *, seed: int = 0) -> Tensor:
    """A random table ``[vocabulary]`` in which every expert has floor or ceil of ``vocabulary / num_experts`` ids.

    The values are the same on every device. The table is on torch's default device.

    Example:
        >>> ffn_ops.routing.hash_table(vocabulary=100, num_experts=4).bincount()
        tensor([25, 25, 25, 25])
    """
    check.at_least("vocabulary", vocabulary, 1)
    check.at_least("num_experts", num_experts, 1)
    check.at_least("seed", seed, -(2**63), 2**64 - 1)
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed), device="cpu")
    return order.to(torch.get_default_device()) % num_experts


def hash(
    token_ids: Tensor,
    table: Tensor,
    num_experts: int,
    *,
    logits: Tensor | None = None,
    score: str = "softmax",
    renormalize: bool = False,
    scale: float = 1.0,
    mask: Tensor | None = None,
) -> Routing:
    """The experts that ``table`` gives for each token id, with weight 1, or with their scores of ``logits``.

    Args:
        token_ids: integers ``[...]``, T of them, from 0 to ``vocabulary - 1``; those of padding may be anything.
        table: ``[vocabulary]`` integers below ``num_experts``, such as :func:`hash_table` gives, or
            ``[vocabulary, k]`` for k experts.
        num_experts: E.
        logits: ``[..., E]`` for the same tokens, or None.
        score, renormalize, scale: what weights are made of logits, see :func:`top_k`.
        mask: see :func:`top_k`.

    Raises:
        TypeError, ValueError: with the argument, what was expected and what came. On a GPU
            and in compiled graphs a device-side assertion reports ids outside the table, because nothing waits there.

    Source: Roller et al., Hash Layers (2021), section 3; with scores: DeepSeek-V4 (2026), section 2.1.

    Example:
        >>> table = ffn_ops.routing.hash_table(vocabulary=100, num_experts=4)
        >>> ffn_ops.routing.hash(torch.tensor([7, 7, 8]), table, num_experts=4).counts.sum()
        tensor(3)
    """
    check.integers("token_ids", token_ids)
    check.integers("table", table)
    if table.dim() not in (1, 2) or (table.dim() == 2 and table.shape[1] < 1):
        raise ValueError(f"table: expected shape [vocabulary] or [vocabulary, k], got {list(table.shape)}")
    check.device("table", table, token_ids, "token_ids")
    check.at_least("num_experts", num_experts, 1)
    check.choice("score", score, tuple(SCORES))
    check.flag("renormalize", renormalize)
    check.number("scale", scale)
    tokens = token_ids.reshape(-1).long()
    if mask is not None:
        mask = check_mask(mask, tokens)
        tokens = torch.where(mask, tokens, 0)
    _check_inside(tokens, table.shape[0])
    ids = table.long().index_select(0, tokens)
    ids = ids if ids.dim() == 2 else ids.unsqueeze(1)
    if logits is None:
        return Routing.from_topk(ids, torch.ones_like(ids, dtype=torch.float32), num_experts, mask=mask)
    z = fold_logits(logits, mask)[0]
    check.tensor("logits", z, (ids.shape[0], num_experts))
    check.device("logits", z, token_ids, "token_ids")
    inside = ids.clamp(0, num_experts - 1)
    weights, _ = top_k_of(z, ids.shape[1], ids=inside, score=score, renormalize=renormalize, scale=scale)
    return Routing.from_topk(ids, weights, num_experts, mask=mask)


def _check_inside(tokens: Tensor, vocabulary: int) -> None:
    """An id below 0 would count from the table's end."""
    inside = (tokens >= 0) & (tokens < vocabulary)
    wrong = f"token_ids: expected ids from 0 to {vocabulary - 1} outside of padding"
    if tokens.is_cuda or not has_values(tokens):
        torch._assert_async(inside.all(), wrong)
    elif not torch._C._functorch.is_batchedtensor(inside) and not inside.all():  # otherwise index_select raises
        raise ValueError(f"{wrong}, got {int(tokens[~inside][0])}")
