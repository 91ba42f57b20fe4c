# SPDX-License-Identifier: BSD-3-Clause
"""Top-k routing. Its options give the routers of Mixtral, Qwen3, gpt-oss and DeepSeek-V3."""

from __future__ import annotations

from torch import Tensor

from .. import _checks as check
from ..ops._route import check_top_k, top_k_op
from ..ops._shared import arithmetic
from ._routing import Routing, expert_capacity, fold_logits


def top_k(
    logits: Tensor,
    k: int,
    *,
    score: str = "softmax",
    renormalize: bool = False,
    softmax_after: bool = False,
    bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    capacity_factor: float | None = None,
    min_capacity: int = 1,
    drop: str = "position",
    mask: Tensor | None = None,
) -> Routing:
    """The k experts with the highest scores for each token, and their scores as weights.

    Args:
        logits: ``[..., E]`` for T tokens; any floating dtype, computed in float32 (float64 for float64).
        k: experts per token, 1 to E (within the chosen groups).
        score: ``"softmax"`` over all experts or ``"sigmoid"`` of each.
        renormalize: divide the k weights by their sum (plus 1e-20).
        softmax_after: choose by logits and take the softmax of the chosen ones.
        bias: ``[E]``, added to the scores (to the logits with ``softmax_after``) for the choice, not to the weights.
        num_groups, top_groups: choose within the ``top_groups`` best of ``num_groups`` groups of neighbouring experts;
            a group's score is the sum of its two best (biased) scores.
        scale: factor of all weights.
        capacity_factor, min_capacity: an expert takes at most ``C = ceil(capacity_factor * T * k / E)`` rows, at least
            ``min_capacity``, at most T; the others are dropped. None: dropless.
        drop: see :meth:`ffn_ops.Routing.from_topk`.
        mask: bool, one for each token, False for padding, which gets no rows and does not count for the capacity.

    Returns:
        A :class:`ffn_ops.Routing` with R = T * k. The gradient of the weights reaches the logits through the chosen
        entries.

    Raises:
        TypeError, ValueError: with the argument, what was expected and what came.

    Source:
        Shazeer et al., Outrageously Large Neural Networks (2017); Jiang et al., Mixtral of Experts (2024), section 2.1;
        DeepSeek-V3 (2024), equations 13 to 16.

    Example:
        >>> routing = ffn_ops.routing.top_k(torch.randn(5, 4), k=2, renormalize=True)
        >>> routing.weight.sum()  # 1 for each token
        tensor(5.0000)
    """
    z, mask = fold_logits(logits, mask)
    tokens, experts = z.shape
    check_top_k(z, k, score, renormalize, softmax_after, num_groups, top_groups)
    check.number("scale", scale)
    if bias is not None:
        check.tensor("bias", bias, (experts,))
        check.device("bias", bias, z, "logits")
        bias = bias.detach().to(arithmetic(z))
    choice = (k, score, renormalize, softmax_after, num_groups, top_groups, float(scale))
    weights, ids = top_k_op(z, bias, *choice)
    capacity = expert_capacity(tokens, k, experts, capacity_factor, min_capacity)
    return Routing.from_topk(ids, weights, experts, capacity=capacity, drop=drop, mask=mask)


def softmax_top_k(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids and weights ``[T, k]`` of logits ``[T, E]``: the k largest of p."""
    check_top_k(z, k)
    weights, ids = top_k_op(z, None, k, "softmax", False, False, 1, 1, 1.0)
    return ids, weights
