# SPDX-License-Identifier: BSD-3-Clause
"""Losses that keep a router balanced and its logits small. They return tensors and keep no state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _checks as check
from ._group import sum_over
from ._routing import Routing, fold_logits, mask_of, wide

if TYPE_CHECKING:
    from ._group import Group


def load_balancing_loss(
    logits: Tensor,
    routing: Routing,
    *,
    score: str = "softmax",
    mask: Tensor | None = None,
    group: Group | None = None,
) -> Tensor:
    """``E * sum over i of f_i * P_i``: 1 for uniform routing, up to E for a collapsed one.

    f_i is the fraction of routed rows that chose expert i before dropping (no gradient), P_i the mean over tokens of
    p_i. Published forms differ by factors of k and E.

    Args:
        logits: ``[..., E]`` for T tokens; in float32 (float64 for float64).
        routing: the router's result for them.
        score: ``"softmax"``, or ``"sigmoid"`` for sigmoid scores divided by their sum.
        mask: None or the routing's own mask, which is used in either case. Another mask raises an error, because f and
            P would leave out different tokens. The comparison waits for a GPU.
        group: a ``ProcessGroup`` or a ``DeviceMesh`` (all of its dimensions): f then counts the tokens of all of
            its ranks, which balances the whole batch instead of each rank's part. The call is a collective. P, and with
            it the gradient, is of this rank's tokens: the mean over ranks, as DDP and FSDP average gradients, is the
            loss and gradient of the whole batch if every rank has equally many real tokens.

    Returns:
        A scalar; 0 for T = 0.

    Raises:
        TypeError, ValueError: with the argument, what was expected and what came.

    Source: Fedus, Zoph, Shazeer, Switch Transformers (2021), equations 4 to 6; f over a group: Qiu et al., Demons in
        the Detail (2025).

    Example:
        >>> logits = torch.zeros(4, 4)
        >>> balanced = ffn_ops.Routing.from_topk(torch.arange(4)[:, None], torch.ones(4, 1), num_experts=4)
        >>> ffn_ops.routing.load_balancing_loss(logits, balanced)
        tensor(1.)
    """
    z, _ = fold_logits(logits)
    check.routing(routing, z, "logits")
    check.choice("score", score, ("softmax", "sigmoid"))
    check.tensor("logits", z, (routing.slot_offsets.shape[0] - 1, routing.offsets.shape[0] - 1))
    z, real = fold_logits(z, mask_of(routing, mask, z))
    z = wide(z)
    p = torch.softmax(z, 1)
    if score == "sigmoid":
        p = torch.sigmoid(z)
        p = p / p.sum(1, keepdim=True)
    f = sum_over(routing.counts, group).to(p.dtype)
    f = f / f.sum().clamp(min=1)
    return z.shape[1] * (f * _mean(p, real)).sum()


def z_loss(logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The mean over tokens of ``logsumexp(z)**2``; 0 for T = 0.

    Args:
        logits: ``[..., E]`` for T tokens; in float32 (float64 for float64).
        mask: bool, one for each token, False for padding.

    Source: Zoph et al., ST-MoE (2022), equation 5.

    Example:
        >>> ffn_ops.routing.z_loss(torch.zeros(3, 1))
        tensor(0.)
    """
    z, real = fold_logits(logits, mask)
    return _mean(torch.logsumexp(wide(z), 1).square().unsqueeze(1), real).sum()


def _mean(values: Tensor, real: Tensor | None) -> Tensor:
    """Over tokens ``[T, n]``."""
    if real is None:
        return values.sum(0) / max(1, values.shape[0])
    return torch.where(real.unsqueeze(1), values, 0).sum(0) / real.sum().clamp(min=1)
