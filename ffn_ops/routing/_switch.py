# SPDX-License-Identifier: BSD-3-Clause
"""Switch routing: one expert for each token, with a capacity."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from ._routing import Routing
from ._top_k import top_k


def switch(
    logits: Tensor,
    *,
    capacity_factor: float | None = 1.25,
    min_capacity: int = 1,
    drop: str = "position",
    mask: Tensor | None = None,
) -> Routing:
    """The expert with the highest p for each token, weighted with p (not 1, so that the router learns).

    Use :func:`load_balancing_loss` (times 0.01 in the paper) against collapse, :func:`jitter` on the router's input.

    Args:
        logits: ``[..., E]``.
        capacity_factor, min_capacity, drop, mask: see :func:`top_k`; the capacity is ``ceil(capacity_factor * T / E)``.

    Source: Fedus, Zoph, Shazeer, Switch Transformers (2021), equations 2 and 3.

    Example:
        >>> routing = ffn_ops.routing.switch(torch.zeros(8, 4), capacity_factor=1.0)  # ties: all choose expert 0
        >>> routing.statistics().tokens_per_expert  # C = 8 / 4
        tensor([2., 0., 0., 0.])
    """
    return top_k(logits, 1, capacity_factor=capacity_factor, min_capacity=min_capacity, drop=drop, mask=mask)


def jitter(x: Tensor, epsilon: float = 0.01, generator: torch.Generator | None = None) -> Tensor:
    """``x * U(1 - epsilon, 1 + epsilon)``, element by element, for the router's input in training.

    Source: Fedus, Zoph, Shazeer, Switch Transformers (2021), section 2.4.

    Example:
        >>> x = ffn_ops.routing.jitter(torch.ones(100), epsilon=0.01)
        >>> bool((x >= 0.99).all() and (x <= 1.01).all())
        True
    """
    check.tensor("x", x)
    check.number("epsilon", epsilon)
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon: expected 0 to 1, got {epsilon}")
    return x * torch.empty_like(x).uniform_(1 - epsilon, 1 + epsilon, generator=generator)
