"""Losses that keep a router balanced and its logits small. Returned tensors, never globals."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from ._routing import Routing, check_mask, fold_logits, wide


def load_balancing_loss(
    logits: Tensor, routing: Routing, *, score: str = "softmax", mask: Tensor | None = None
) -> Tensor:
    """``E * sum over i of f_i * P_i``: 1 for uniform routing, up to E for a collapsed one.

    f_i is the fraction of routed rows that chose expert i before dropping (no gradient), P_i the mean over tokens of
    p_i. Published forms differ by factors of k and E.

    Args:
        logits: ``[..., E]`` for T tokens; in float32 (float64 for float64).
        routing: what the router made of them.
        score: ``"softmax"``, or ``"sigmoid"`` for sigmoid scores divided by their sum.
        mask: bool, one for each token, False for padding.

    Returns:
        A scalar; 0 for T = 0.

    Source: Fedus, Zoph, Shazeer, Switch Transformers (2021), equations 4 to 6.
    """
    z = wide(fold_logits(logits))
    check.routing(routing, z, "logits")
    check.choice("score", score, ("softmax", "sigmoid"))
    check.tensor("logits", z, (routing.slot_offsets.shape[0] - 1, routing.offsets.shape[0] - 1))
    p = torch.softmax(z, 1)
    if score == "sigmoid":
        p = torch.sigmoid(z)
        p = p / p.sum(1, keepdim=True)
    f = routing.counts.to(p.dtype)
    f = f / f.sum().clamp(min=1)
    return z.shape[1] * (f * _mean(p, mask)).sum()


def z_loss(logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The mean over tokens of ``logsumexp(z)**2``; 0 for T = 0. Arguments as in :func:`load_balancing_loss`.

    Source: Zoph et al., ST-MoE (2022), equation 5.
    """
    z = wide(fold_logits(logits))
    return _mean(torch.logsumexp(z, 1).square().unsqueeze(1), mask).sum()


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Over tokens ``[T, n]``."""
    if mask is None:
        return values.sum(0) / max(1, values.shape[0])
    real = check_mask(mask, values)
    return torch.where(real.unsqueeze(1), values, 0).sum(0) / real.sum().clamp(min=1)
