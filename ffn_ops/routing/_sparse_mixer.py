# SPDX-License-Identifier: BSD-3-Clause
"""SparseMixer: two experts one after the other, each by a softmax over those that are nearly the best."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from ..ops._route import top_k_of
from ._routing import Routing, fold_logits, wide

_MIDPOINT = 0.3333  # as PhiMoE's models have it for Heun's 1/3


def sparse_mixer(
    logits: Tensor,
    *,
    jitter: float = 0.01,
    training: bool = True,
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
) -> Routing:
    """PhiMoE's router: the best expert, and the best of the others, each weighted with its share of a softmax over the
    experts within ``(best - z) / max(|z|, best) <= 2 * jitter``; the two weights do not sum to 1.

    In training each is drawn from that softmax instead. A weight that is not the softmax's largest is then a third
    with probability 3/4, and its gradient is always that of the whole weight (Heun's third-order method), so that the
    expected gradient is that of the sum over all experts, to that order.

    Args:
        logits: ``[..., E]``, E >= 2.
        jitter: how near to the best an expert must be, 0 for the best alone.
        training: whether to draw.
        generator: of the draws.
        mask: see :func:`top_k`.

    Raises:
        TypeError, ValueError: name of the argument, what was expected and what came.

    Source: Liu et al., Sparse Backpropagation for MoE Training (2023); Liu et al., GRIN (2024), section 2; PhiMoE.

    Example:
        >>> z = torch.tensor([[1.0, 0.0, 2.0]])
        >>> ffn_ops.routing.sparse_mixer(z, jitter=0.3, training=False).weight  # of experts 0, and 2, which came first
        tensor([1.0000, 0.7311])
    """
    check.number("jitter", jitter)
    if jitter < 0:
        raise ValueError(f"jitter: expected 0 or more, got {jitter}")
    check.flag("training", training)
    z, mask = fold_logits(logits, mask)
    z = wide(z)
    check.at_least("number of experts", z.shape[1], 2)
    left, ids, weights = z, [], []
    for _ in range(2):
        chosen, weight = _draw(z, left, jitter, training, generator)
        left = left.scatter(1, chosen, -torch.inf)
        ids.append(chosen)
        weights.append(weight)
    return Routing.from_topk(torch.cat(ids, 1), torch.cat(weights, 1), z.shape[1], mask=mask)


def _draw(
    z: Tensor, left: Tensor, jitter: float, training: bool, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """The expert ``[T, 1]`` of those in ``left``, and its weight."""
    with torch.no_grad():
        best = left.amax(1, keepdim=True)
        far = (best - z) / z.abs().clamp(min=best) > 2 * jitter
    near = left.masked_fill(far, -torch.inf)
    weight, chosen = top_k_of(near, 1)
    if not training:
        return chosen, weight
    with torch.no_grad():
        drawn = (near - torch.empty_like(near).exponential_(generator=generator).log()).argmax(1, keepdim=True)
        whole = torch.rand(weight.shape, generator=generator, dtype=weight.dtype, device=weight.device) > 0.75
        factor = torch.where((drawn == chosen) | whole, 1.0, _MIDPOINT)
    weight, _ = top_k_of(near, 1, ids=drawn)
    held = weight.detach()
    return drawn, held * factor + (weight - held)
