# SPDX-License-Identifier: BSD-3-Clause
"""Helpers for the tests of routing: every router, and the sort of rows as naive loops. No tests here."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ffn_ops import Routing, routing

ROUTERS: dict[str, Callable[[Tensor], Routing]] = {
    "top_k": functools.partial(routing.top_k, k=2),
    "top_k renormalised, capacity": functools.partial(routing.top_k, k=2, renormalize=True, capacity_factor=0.7),
    "softmax after": functools.partial(routing.top_k, k=2, by_logits=True),
    "sqrt(softplus), shared": functools.partial(
        routing.top_k, k=2, score="sqrt_softplus", renormalize=True, shared=1, softcap=3.0
    ),
    "groups": functools.partial(routing.top_k, k=2, score="sigmoid", num_groups=2, top_groups=1),
    "switch": routing.switch,
    "glam": routing.glam_top2,
    "glam after drop": functools.partial(routing.glam_top2, renormalize="after_drop", capacity_factor=0.8),
    "expert choice": functools.partial(routing.expert_choice, causal=False),
    "base": routing.base,
    "token rounding": functools.partial(routing.token_rounding, k=2, tile=4),
    "sparse mixer": lambda z, mask=None: routing.sparse_mixer(z, training=False, mask=mask),  # MoEFFN would train it
}


def naive(
    ids: Tensor, weights: Tensor, E: int, capacity: int | None = None, drop: str = "position", mask: Any = None
) -> dict[str, Any]:
    T, K = ids.shape
    wanting: list[list[tuple[int, int]]] = [[] for _ in range(E)]
    for k in range(K):
        for t in range(T):
            if ids[t, k] < E and (mask is None or mask[t]):
                wanting[ids[t, k]].append((t, k))
    counts = [len(w) for w in wanting]
    if capacity is not None:
        if drop == "weight":
            wanting = [sorted(w, key=lambda tk: -weights[tk].item()) for w in wanting]
        wanting = [w[:capacity] for w in wanting]
    rows = [tk for w in wanting for tk in sorted(w)]
    return {"rows": rows, "offsets": [0, *itertools.accumulate(len(w) for w in wanting)], "counts": counts}


def check_against_naive(r: Routing, ids: Tensor, weights: Tensor, E: int, **options: Any) -> None:
    T, K = ids.shape
    expected = naive(ids, weights, E, **options)
    kept = expected["offsets"][-1]
    assert r.offsets.tolist() == expected["offsets"] and r.counts.tolist() == expected["counts"]
    assert r.token[:kept].tolist() == [t for t, _ in expected["rows"]]
    assert r.weight[:kept].tolist() == [weights[tk].item() for tk in expected["rows"]]
    assert r.slot_offsets.tolist() == [t * K for t in range(T + 1)]
    assert sorted(r.row.tolist()) == list(range(T * K))  # a permutation: every slot has its row
    place = {tk: i for i, tk in enumerate(expected["rows"])}
    for t, k in itertools.product(range(T), range(K)):
        row = r.row[t * K + k].item()
        assert row == place[(t, k)] if (t, k) in place else row >= kept
    assert T * K == 0 or (r.token.min() >= 0 and r.token.max() < T)
