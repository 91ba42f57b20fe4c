# SPDX-License-Identifier: BSD-3-Clause
"""Expert Choice routing: experts choose tokens."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .. import _checks as check
from ..ops._route import top_k_of
from ._routing import Routing, expert_capacity, fold_logits, sorted_rows, wide


def expert_choice(
    logits: Tensor, *, capacity_factor: float = 2.0, causal: bool = True, mask: Tensor | None = None
) -> Routing:
    """Each expert takes its top ``ceil(capacity_factor * T / E)`` tokens (at most T) of p, weighted with p.

    The load is perfectly balanced. A token may get no expert, or all. **The choice compares tokens with each other, so
    a token's output depends on later tokens**: a causal model sees the future in training, and cannot repeat that in
    generation. The function warns unless ``causal=False``.

    Args:
        logits: ``[..., E]`` for T tokens.
        capacity_factor: mean number of experts per token.
        causal: False where tokens may see each other (encoders, vision).
        mask: see :func:`top_k`; T includes padding; the places of padded tokens stay empty.

    Source: Zhou et al., Mixture-of-Experts with Expert Choice Routing (2022), equation 2.

    Example:
        >>> routing = ffn_ops.routing.expert_choice(torch.randn(16, 4), capacity_factor=1.0, causal=False)
        >>> routing.counts
        tensor([4, 4, 4, 4])
    """
    check.flag("causal", causal)
    z, mask = fold_logits(logits, mask)
    if causal and not torch.compiler.is_compiling():
        warnings.warn(
            "expert_choice: a token's experts depend on later tokens, which leaks the future in causal models;"
            " pass causal=False if the data are not causal",
            UserWarning,
            stacklevel=2,
        )
    tokens, experts = z.shape
    count = expert_capacity(tokens, 1, experts, capacity_factor, 0)
    p = torch.softmax(wide(z), 1).t()
    expert = torch.arange(experts, device=z.device).unsqueeze(1).expand(experts, count)
    if isinstance(count, int) and count == 0:
        empty = expert.reshape(-1)
        return sorted_rows(empty, empty, p.new_empty(0), experts, tokens, mask=mask)
    choice = p.detach()
    if mask is not None:
        choice = torch.where(mask, choice, -1.0)
    _, token = top_k_of(choice.contiguous(), count, by_logits=True)
    if mask is not None:
        expert = torch.where(mask[token], expert, experts)
    weight = p.gather(1, token).reshape(-1)
    return sorted_rows(expert.reshape(-1), token.reshape(-1), weight, experts, tokens, mask=mask)
