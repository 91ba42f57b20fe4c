# SPDX-License-Identifier: BSD-3-Clause
"""Wrong arguments of routers: TypeError or ValueError with the name, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from routes import ROUTERS
from torch import Tensor

from ffn_ops import Routing, moe_combine, routing

ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "logits a list": (lambda: routing.top_k([[1.0]], 1), TypeError, "logits: expected a torch.Tensor, got list"),
    "logits of integers": (lambda: routing.top_k(torch.ones(2, 3).int(), 1), TypeError, "logits: expected dtype"),
    "one dimension": (lambda: routing.top_k(torch.ones(3), 1), ValueError, "logits: expected shape"),
    "no experts": (lambda: routing.top_k(torch.ones(3, 0), 1), ValueError, "logits: expected shape"),
    "k > E": (lambda: routing.top_k(torch.ones(2, 3), 4), ValueError, "k: expected 1 to 3, got 4"),
    "k = 0": (lambda: routing.top_k(torch.ones(2, 3), 0), ValueError, "k: expected 1 to 3, got 0"),
    "k a float": (lambda: routing.top_k(torch.ones(2, 3), 1.0), TypeError, "k: expected an integer, got float"),
    "score": (lambda: routing.top_k(torch.ones(2, 3), 1, score="tanh"), ValueError, "score: expected one of softmax"),
    "renormalize": (lambda: routing.top_k(torch.ones(2, 3), 1, renormalize=1), TypeError, "renormalize: expected True"),
    "by logits": (lambda: routing.top_k(torch.ones(2, 3), 1, by_logits=1), TypeError, "by_logits: expected True or"),
    "softcap": (lambda: routing.top_k(torch.ones(2, 3), 1, softcap=0.0), ValueError, "softcap: expected a positive"),
    "shared": (lambda: routing.top_k(torch.ones(2, 3), 1, shared=3), ValueError, "shared: expected 0 to 2, got 3"),
    "k beside shared": (lambda: routing.top_k(torch.ones(2, 3), 3, shared=1), ValueError, "k: expected 1 to 2, got 3"),
    "shared with a capacity": (
        lambda: routing.top_k(torch.ones(2, 3), 1, shared=1, capacity_factor=1.0), ValueError, "capacity_factor: exp",
    ),
    "group_best": (lambda: routing.top_k(torch.ones(2, 6), 1, group_best=3), ValueError, "group_best: expected 1 to 2"),
    "hash table": (
        lambda: routing.hash(torch.ones(2).int(), torch.ones(2, 0).int(), 2), ValueError, r"table: expected shape",
    ),
    "jitter of the sparse mixer": (lambda: routing.sparse_mixer(torch.ones(2, 3), jitter=-1.0), ValueError, "jitter:"),
    "quantiles of all experts": (
        lambda: routing.solve_bias(torch.zeros(3), torch.ones(2, 3), 3), ValueError, "k: expected 1 to 2, got 3",
    ),
    "quantiles in groups": (
        lambda: routing.BiasedTopK(4, 1, num_groups=2).solve(torch.ones(2, 4)), ValueError, "num_groups: expected 1",
    ),
    "scale of experts": (
        lambda: routing.top_k(torch.ones(2, 3), 1).scaled(torch.ones(2)), ValueError, r"scale: expected shape \[3\]",
    ),
    "first experts": (lambda: routing.top_k(torch.ones(2, 3), 1).first(4), ValueError, "num_experts: expected 1 to 3"),
    "groups": (lambda: routing.top_k(torch.ones(2, 6), 1, num_groups=4), ValueError, "num_groups: expected"),
    "top groups": (
        lambda: routing.top_k(torch.ones(2, 6), 3, num_groups=3, top_groups=1), ValueError, "top_groups: expected",
    ),
    "bias": (lambda: routing.top_k(torch.ones(2, 6), 3, bias=torch.ones(5)), ValueError, r"bias: expected shape \[6\]"),
    "scale": (lambda: routing.top_k(torch.ones(2, 6), 3, scale=math.inf), ValueError, "scale: expected a finite"),
    "capacity factor": (
        lambda: routing.top_k(torch.ones(2, 6), 3, capacity_factor=-1.0), ValueError, "capacity_factor: expected 0 or",
    ),
    "min capacity": (lambda: routing.switch(torch.ones(2, 6), min_capacity=-1), ValueError, "min_capacity: exp"),
    "drop": (lambda: routing.switch(torch.ones(2, 6), drop="random"), ValueError, "drop: expected one of position"),
    "mask dtype": (lambda: routing.switch(torch.ones(2, 6), mask=torch.ones(2)), TypeError, "mask: expected dtype"),
    "mask size": (
        lambda: routing.base(torch.ones(2, 6), mask=torch.ones(3, dtype=torch.bool)), ValueError, "mask: expected",
    ),
    "glam": (lambda: routing.glam_top2(torch.ones(2, 6), renormalize="yes"), ValueError, "renormalize: expected"),
    "glam with one expert": (lambda: routing.glam_top2(torch.ones(2, 1)), ValueError, "k: expected 1 to 1, got 2"),
    "tile": (lambda: routing.token_rounding(torch.ones(2, 6), 2, tile=0), ValueError, "tile: expected at least 1"),
    "hash ids": (lambda: routing.hash(torch.ones(2), torch.ones(2).int(), 2), TypeError, "token_ids: expected"),
    "hash options without logits": (
        lambda: routing.hash(torch.ones(2).int(), torch.ones(2).int(), 2, score="tanh"), ValueError, "score: expected",
    ),
    "hash with logits of no number of experts": (
        lambda: routing.hash(torch.ones(2).int(), torch.ones(2).int(), 4.0, logits=torch.ones(2, 4)),  # type: ignore[arg-type]
        TypeError, "num_experts: expected an integer, got float",
    ),
    "sparse hash ids": (
        lambda: routing.hash(torch.ones(2).int().to_sparse(), torch.ones(2).int(), 2), ValueError, "token_ids: exp",
    ),
    "seed": (lambda: routing.hash_table(4, 2, seed="1"), TypeError, "seed: expected an integer"),  # type: ignore[arg-type]
    "options of a biased router": (lambda: routing.BiasedTopK(4, 5), ValueError, "k: expected 1 to 4, got 5"),
    "a score of a biased router": (lambda: routing.BiasedTopK(4, 2, score="tanh"), ValueError, "score: expected"),
    "another router's counts": (
        lambda: routing.BiasedTopK(4, 2).update(routing.top_k(torch.ones(2, 6), 1)),
        ValueError, r"routing.counts: expected shape \[4\], got \[6\]",
    ),
    "another router's logits": (
        lambda: routing.BiasedTopK(4, 2).solve(torch.ones(2, 6)), ValueError, r"logits: expected shape \[T, 4\]",
    ),
    "sparse weights of a routing": (
        lambda: moe_combine(
            torch.ones(2, 3),
            (r := routing.top_k(torch.ones(2, 4), 1))._replace(weight=r.weight.to_sparse()),
        ),
        ValueError, "routing.weight: expected a strided tensor",
    ),
    "ids of floats": (
        lambda: Routing.from_topk(torch.ones(2, 3), torch.ones(2, 3), 4), TypeError, "ids: expected an integer dtype",
    ),
    "ids' shape": (
        lambda: Routing.from_topk(torch.ones(2).int(), torch.ones(2), 4), ValueError, r"ids: expected shape \[T, K\]",
    ),
    "weights' shape": (
        lambda: Routing.from_topk(torch.ones(2, 3).int(), torch.ones(2), 4), ValueError, r"weights: expected shape",
    ),
    "number of experts": (
        lambda: Routing.from_topk(torch.ones(2, 3).int(), torch.ones(2, 3), 0), ValueError, "num_experts: expected",
    ),
    "capacity": (
        lambda: Routing.from_topk(torch.ones(2, 3).int(), torch.ones(2, 3), 2, capacity=-1), ValueError, "capacity:",
    ),
    "loss": (
        lambda: routing.load_balancing_loss(torch.ones(3, 4), routing.top_k(torch.ones(2, 4), 1)), ValueError, "logits",
    ),
    "jitter": (lambda: routing.jitter(torch.ones(3), 2.0), ValueError, "epsilon: expected 0 to 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", ROUTERS)
def test_no_router_contradicts_itself(name: str) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        ROUTERS[name](torch.randn(13, 4)).check()


def changed(t: Tensor, **places: int) -> Tensor:
    t = t.clone()
    for place, value in places.items():
        t[int(place.removeprefix("at"))] = value
    return t


CONTRADICTIONS: dict[str, tuple[Callable[[Routing], dict[str, Any]], str]] = {
    "offsets falls": (lambda r: {"offsets": changed(r.offsets, at1=9)}, "offsets"),
    "offsets ends behind the rows": (lambda r: {"offsets": changed(r.offsets, at3=9)}, "offsets"),
    "slot_offsets begins late": (lambda r: {"slot_offsets": changed(r.slot_offsets, at0=1)}, "slot_offsets"),
    "a row with another expert": (lambda r: {"offsets": changed(r.offsets, at1=3)}, "counts"),
    "counts of another call": (lambda r: {"counts": r.counts.flip(0)}, "counts"),
    "counts too large": (lambda r: {"counts": r.counts + 5}, "counts"),
    "offsets and counts moved": (
        lambda r: {"offsets": changed(r.offsets, at1=1), "counts": torch.tensor([1, 4, 3])}, "token",
    ),
    "tokens out of range": (lambda r: {"token": r.token + 1}, "token"),
    "all rows of one token": (lambda r: {"token": torch.zeros_like(r.token)}, "row"),
    "row flipped": (lambda r: {"row": r.row.flip(0)}, "row"),
    "row twice": (lambda r: {"row": torch.zeros_like(r.row)}, "row"),
    "another mask": (lambda r: {"mask": torch.tensor([True, True, False, True])}, "mask"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_found(case: str) -> None:
    """Each field changed alone, in a routing of 4 tokens with loads 2, 3 and 3."""
    ids = torch.tensor([[0, 1], [1, 2], [2, 0], [1, 2]])
    whole = Routing.from_topk(ids, torch.ones(4, 2), 3)
    whole.check()
    change, field = CONTRADICTIONS[case]
    with pytest.raises(ValueError, match=rf"^routing\.{field}: expected"):
        whole._replace(**change(whole)).check()
