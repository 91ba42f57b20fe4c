# SPDX-License-Identifier: BSD-3-Clause
"""Routers that look at all tokens: BASE, Expert Choice, hash and token rounding, against naive loops."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from device import generator, gradcheck, gradgradcheck
from routes import check_against_naive
from torch import Tensor

from ffn_ops import reference, routing


def quotas(ids: Tensor, E: int) -> None:
    load = torch.bincount(ids, minlength=E)
    low = len(ids) // E
    assert load.sum() == len(ids) and set(load.tolist()) <= {low, low + (len(ids) % E > 0)}


def base_ids(scores: Tensor) -> Tensor:
    r = routing.base(scores)
    expert = torch.bucketize(torch.arange(len(r.token)), r.offsets[1:], right=True)
    return expert[r.row]


@pytest.mark.parametrize(("T", "E"), [(6, 2), (6, 3), (7, 3), (5, 4), (2, 3), (8, 2), (1, 3)])
def test_base_is_optimal(T: int, E: int) -> None:
    """The sum of scores is the largest of all balanced assignments, found by trying them all."""
    for seed in range(12):
        scores = torch.randn(T, E, generator=generator(seed), dtype=torch.float64)
        ids = base_ids(scores)
        quotas(ids, E)
        best = -math.inf
        for each in itertools.product(range(E), repeat=T):
            load = [each.count(e) for e in range(E)]
            if max(load) <= -(-T // E) and min(load) >= T // E:
                best = max(best, sum(scores[t, e].item() for t, e in enumerate(each)))
        assert abs(scores.gather(1, ids[:, None]).sum().item() - best) < 1e-9


@pytest.mark.parametrize(("T", "E"), [(200, 7), (256, 16), (60, 61), (301, 24)])
def test_base_has_no_better_exchange(T: int, E: int) -> None:
    """No cycle of moves, and no chain from a fuller to a less full expert, improves the sum: the optimality
    condition."""
    # all tokens prefer the first expert
    scores = torch.randn(T, E, generator=generator(E), dtype=torch.float64)
    scores[:, 0] += 3
    ids = base_ids(scores)
    quotas(ids, E)
    cost = torch.full((E, E), math.inf, dtype=torch.float64)
    for a in range(E):
        tokens = (ids == a).nonzero()[:, 0]
        if len(tokens):
            cost[a] = (scores[tokens, a : a + 1] - scores[tokens]).min(0).values
    cost.fill_diagonal_(0)
    for b in range(E):
        cost = torch.minimum(cost, cost[:, b : b + 1] + cost[b : b + 1])
    assert cost.diagonal().min() > -1e-9
    load = torch.bincount(ids, minlength=E)
    full, spare = load > T // E, load == T // E
    if full.any():
        assert cost[full][:, spare].min() > -1e-9


def test_base_special_cases() -> None:
    """Cases where the auction of the paper's code fails: one expert, equal scores, T not a multiple of E; also NaN."""
    for scores in (torch.randn(5, 1), torch.zeros(10, 4), torch.full((7, 3), math.nan), torch.full((7, 3), -math.inf)):
        ids = base_ids(scores)
        quotas(ids, scores.shape[1])
        assert torch.equal(ids, base_ids(scores))
    assert base_ids(torch.randn(0, 4)).shape == (0,)
    assert torch.equal(base_ids(torch.tensor([[0.0, math.inf], [0.0, 5.0]])), torch.tensor([1, 0]))


def test_base_training_and_eval() -> None:
    logits = torch.randn(40, 4, requires_grad=True)
    best = routing.base(logits, training=False)
    assert torch.equal(best.offsets.diff(), torch.bincount(logits.argmax(1), minlength=4))
    for r in (best, routing.base(logits)):
        expert = torch.bucketize(torch.arange(40), r.offsets[1:], right=True)
        torch.testing.assert_close(r.weight, torch.sigmoid(logits[r.token, expert]))
    mask = torch.arange(40) % 3 > 0
    r = routing.base(logits, mask=mask)
    assert r.offsets[-1] == mask.sum() and mask[r.token[: r.offsets[-1]]].all()
    assert r.offsets.diff().max() - r.offsets.diff().min() <= 1


@pytest.mark.parametrize(
    ("T", "E", "factor"), [(20, 4, 2.0), (7, 3, 1.0), (3, 8, 2.0), (50, 2, 3.0), (0, 3, 2.0), (9, 3, 0.0)]
)
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_expert_choice(T: int, E: int, factor: float, masked: bool) -> None:
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(T) % 3 > 0 if masked else None
    r = routing.expert_choice(logits, capacity_factor=factor, causal=False, mask=mask)
    p = logits.softmax(1)
    n = min(T, math.ceil(factor * T / E))
    rows: list[tuple[int, int]] = []
    for e in range(E):
        real = [t for t in range(T) if mask is None or mask[t]]
        rows += sorted((e, t) for t in sorted(real, key=lambda t: -p[t, e].item())[:n])
    assert len(r.token) == E * n and r.offsets[-1] == len(rows)
    assert r.token[: len(rows)].tolist() == [t for _, t in rows]
    torch.testing.assert_close(r.weight[: len(rows)], torch.stack([p[t, e] for e, t in rows]) if rows else r.weight[:0])
    mine = [[i for i, (_, other) in enumerate(rows) if other == t] for t in range(T)]
    for t in range(T):
        listed = [i for i in r.row[r.slot_offsets[t] : r.slot_offsets[t + 1]].tolist() if i < len(rows)]
        assert listed == mine[t]


def test_expert_choice_warns() -> None:
    logits = torch.randn(6, 3)
    with pytest.warns(UserWarning, match="leaks the future"):
        routing.expert_choice(logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        routing.expert_choice(logits, causal=False)


def test_hash() -> None:
    table = routing.hash_table(101, 4, seed=5)
    assert torch.equal(table, routing.hash_table(101, 4, seed=5))
    assert torch.bincount(table).max() - torch.bincount(table).min() <= 1
    tokens, logits = torch.randint(0, 101, (3, 7)), torch.randn(3, 7, 4)
    r, learned = routing.hash(tokens, table, 4), routing.hash(tokens, table, 4, logits=logits)
    ids = table[tokens].view(-1, 1)
    check_against_naive(r, ids, torch.ones(21, 1), 4)
    check_against_naive(learned._replace(weight=r.weight), ids, torch.ones(21, 1), 4)
    torch.testing.assert_close(learned.weight[learned.row], logits.view(21, 4).softmax(1).gather(1, ids)[:, 0])


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_hash_with_several_experts_and_scores(score: str, renormalize: bool, isa: str) -> None:
    """DeepSeek-V4's; a table may name an expert twice, as its zeros do before a checkpoint is loaded."""
    table = torch.tensor([[0, 3, 1], [2, 2, 0], [1, 1, 1], [3, 0, 2]])
    tokens, logits = torch.arange(8) % 4, torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    options = {"score": score, "renormalize": renormalize, "scale": 1.5}
    d = torch.randn(8, 3, dtype=torch.float64)

    def weights(z: Tensor) -> Tensor:
        r = routing.hash(tokens, table, 4, logits=z, **options)
        return r.weight[r.row].view(8, 3)

    expected = reference.top_k(logits, 3, ids=table[tokens], **options)[1]
    r = routing.hash(tokens, table, 4, logits=logits, **options)
    torch.testing.assert_close(weights(logits), expected)
    check_against_naive(r, table[tokens], weights(logits), 4)
    grads = [torch.autograd.grad(w, logits, d)[0] for w in (weights(logits), expected)]
    torch.testing.assert_close(grads[0], grads[1])
    low, wide = (weights(logits.detach().to(dtype)) for dtype in (torch.bfloat16, torch.float32))
    torch.testing.assert_close(low, wide, rtol=0.02, atol=0.02)
    assert gradcheck(weights, [logits]) and gradgradcheck(weights, [logits])


@pytest.mark.parametrize(
    ("T", "E", "k", "tile"),
    [
        (40, 4, 2, 8), (40, 4, 2, 7), (10, 3, 1, 16), (30, 5, 5, 4), (9, 4, 2, 1),
        (9, 4, 2, 2**62), (9, 2, 1, 2**70),  # more than there are tokens, and than fits into 64 bits
    ],
)  # fmt: skip
def test_token_rounding(T: int, E: int, k: int, tile: int) -> None:
    logits = torch.randn(T, E, dtype=torch.float64)
    p, (ids, _) = logits.softmax(1), reference.top_k(logits, k)
    r = routing.token_rounding(logits, k, tile=tile)
    assert len(r.token) == T * k + E * min(tile // 2, T)
    rows: list[tuple[int, int]] = []
    for e in range(E):
        mine = [t for t in range(T) if e in ids[t].tolist()]
        wanted = min(T, (len(mine) + tile // 2) // tile * tile)
        order = sorted(range(T), key=lambda t: (t not in mine, -p[t, e].item()))
        rows += sorted((e, t) for t in order[:wanted])
    kept = int(r.offsets[-1])
    expert = torch.bucketize(torch.arange(kept), r.offsets[1:], right=True)
    assert list(zip(expert.tolist(), r.token[:kept].tolist(), strict=True)) == rows
    torch.testing.assert_close(r.weight[:kept], p[r.token[:kept], expert])
