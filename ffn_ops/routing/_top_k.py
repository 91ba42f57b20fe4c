# SPDX-License-Identifier: BSD-3-Clause
"""Top-k routing. Its options give the routers of most models of 2024 to 2026."""

from __future__ import annotations

from torch import Tensor

from .. import _checks as check
from ..ops._gated_act import gated_act
from ..ops._route import top_k_of
from ..ops._shared import arithmetic
from ._routing import Routing, expert_capacity, fold_logits, wide


def top_k(
    logits: Tensor,
    k: int,
    *,
    score: str = "softmax",
    renormalize: bool = False,
    by_logits: bool = False,
    softcap: float | None = None,
    bias: Tensor | None = None,
    shared: int = 0,
    num_groups: int = 1,
    top_groups: int = 1,
    group_best: int = 2,
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
        score: ``"softmax"`` over all experts, or of each ``"sigmoid"`` or ``"sqrt_softplus"``,
            ``sqrt(log(1 + exp(z)))``.
        renormalize: divide the k weights by their sum (plus 1e-20).
        by_logits: choose by logits, and make the scores of the chosen ones alone.
        softcap: ``softcap * tanh(z / softcap)`` in the place of the logits.
        bias: ``[E]``, added to the scores (to the logits with ``by_logits``) for the choice, not to the weights.
        shared: this many of the E experts, the last ones, get every token. They come after the k chosen ones and take
            part in ``renormalize``, but not in the choice, its bias and its groups.
        num_groups, top_groups: choose within the ``top_groups`` best of ``num_groups`` groups of neighbouring experts.
        group_best: a group's score is the sum of its two best (biased) scores, or with 1 its best.
        scale: factor of all weights.
        capacity_factor, min_capacity: an expert takes at most ``C = ceil(capacity_factor * T * k / E)`` rows, at least
            ``min_capacity``, at most T; the others are dropped. None, and with shared experts: dropless.
        drop: see :meth:`ffn_ops.Routing.from_topk`.
        mask: bool, one for each token, False for padding, which gets no rows and does not count for the capacity.

    Returns:
        A :class:`ffn_ops.Routing` with R = T * (k + shared). The gradient of the weights reaches the logits through
        the chosen entries.

    Raises:
        TypeError, ValueError: with the argument, what was expected and what came.

    Source:
        Shazeer et al., Outrageously Large Neural Networks (2017); Jiang et al., Mixtral of Experts (2024), section 2.1;
        DeepSeek-V2 (2024), section 2.1.2; DeepSeek-V3 (2024), equations 13 to 16; DeepSeek-V4 (2026), section 2.1.

    Example:
        >>> routing = ffn_ops.routing.top_k(torch.randn(5, 4), k=2, renormalize=True)
        >>> routing.weight.sum()  # 1 for each token
        tensor(5.0000)
        >>> z = torch.tensor([[0.0, 2.0, 1.0]])
        >>> ffn_ops.routing.top_k(z, k=2, score="sqrt_softplus", renormalize=True).weight  # of experts 1, 2
        tensor([0.5600, 0.4400])
    """
    z, mask = fold_logits(logits, mask)
    tokens, experts = z.shape
    if softcap is not None:
        check.number("softcap", softcap)
        if softcap <= 0:
            raise ValueError(f"softcap: expected a positive number, got {softcap}")
        z = softcap * gated_act(wide(z) / softcap, activation="tanh")
    if bias is not None:
        check.at_least("shared", shared, 0, experts - 1)
        check.tensor("bias", bias, (experts - shared,))
        check.device("bias", bias, z, "logits")
        bias = bias.detach().to(arithmetic(z))
    weights, ids = top_k_of(
        z, k, bias=bias, shared=shared, score=score, renormalize=renormalize, by_logits=by_logits,
        num_groups=num_groups, top_groups=top_groups, group_best=group_best, scale=scale,
    )  # fmt: skip
    if shared and capacity_factor is not None:
        raise ValueError(f"capacity_factor: expected None with shared experts, got {capacity_factor}")
    capacity = expert_capacity(tokens, k, experts, capacity_factor, min_capacity)
    return Routing.from_topk(ids, weights, experts, capacity=capacity, drop=drop, mask=mask)
