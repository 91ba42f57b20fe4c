"""Routers and the sort of routed rows against naive loops: ties, NaN, capacity, masks, balance, gradients, errors."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ffn_ops
from ffn_ops import Routing, reference, routing

TOP_K: dict[str, dict[str, Any]] = {
    "the documents'": {},
    "Mixtral, Qwen3": {"renormalize": True},
    "gpt-oss": {"softmax_after": True},
    "sigmoid": {"score": "sigmoid"},
    "sigmoid renormalised, scaled": {"score": "sigmoid", "renormalize": True, "scale": 2.5},
    "DeepSeek-V3": {
        "score": "sigmoid", "renormalize": True, "scale": 2.5, "num_groups": 4, "top_groups": 2, "bias": True,
    },
    "softmax with bias": {"bias": True},
    "softmax after, with bias": {"softmax_after": True, "bias": True},
    "groups of one expert": {"num_groups": 12, "top_groups": 5},
}  # fmt: skip


def options_of(name: str, E: int, dtype: torch.dtype) -> dict[str, Any]:
    options = dict(TOP_K[name])
    if options.get("bias"):
        options["bias"] = torch.linspace(-0.3, 0.3, E, dtype=dtype).flip(0)
    return options


def chosen(logits: Tensor, k: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Ids and weights [T, k] out of the Routing: the experts of each token in the order of its slots."""
    r = routing.top_k(logits, k, **options)
    expert = torch.bucketize(torch.arange(len(r.token)), r.offsets[1:], right=True)
    return expert[r.row].view(-1, k), r.weight[r.row].view(-1, k)


# ---- top k ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOP_K)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_top_k(name: str, dtype: torch.dtype, isa: str) -> None:
    """Against the plain formula, for widths below, at and above vectors; k beyond what insertion is used for."""
    for T, E, k in ((7, 12, 3), (1, 12, 5), (65, 36, 4), (3, 132, 40), (5, 12, 1)):
        options = options_of(name, E, dtype)
        groups = options.get("num_groups", 1)
        if k > E // groups * options.get("top_groups", 1):
            continue
        logits = torch.randn(T, E, generator=torch.Generator().manual_seed(E), dtype=torch.float64).to(dtype)
        ids, weights = chosen(logits, k, **options)
        expected_ids, expected = reference.top_k(logits.double(), k, **options)
        assert torch.equal(ids, expected_ids)
        assert weights.dtype is dtype
        torch.testing.assert_close(weights.double(), expected, rtol=1e-12 if dtype is torch.float64 else 2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits_compute_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(9, 12).to(dtype)
    for name in TOP_K:
        options = options_of(name, 12, torch.float32)
        low, wide = routing.top_k(logits, 2, **options), routing.top_k(logits.float(), 2, **options)
        assert all(torch.equal(a, b) for a, b in zip(low, wide, strict=True))


@pytest.mark.parametrize("name", TOP_K)
def test_ties_go_to_the_lowest_index(name: str, isa: str) -> None:
    options = options_of(name, 12, torch.float32)
    if "bias" in options:
        options["bias"] = torch.zeros(12)
    for logits in (torch.zeros(2, 12), torch.tensor([[0.0, 1.0, -0.0, 1.0] * 3] * 2)):
        ids, _ = chosen(logits, 3, **options)
        assert torch.equal(ids, reference.top_k(logits, 3, **options)[0])
    many = torch.zeros(1, 64 * 3)
    assert torch.equal(chosen(many, 50)[0], torch.arange(50)[None])  # the heap


@pytest.mark.parametrize("name", TOP_K)
def test_nan_and_infinities(name: str, isa: str) -> None:
    """Ids stay distinct and in range, NaN ranks behind everything, weights are what the formula gives."""
    options = options_of(name, 12, torch.float32)
    nan, inf = math.nan, math.inf
    rows = [
        [nan] * 12,
        [nan, 1.0, 2.0] + [nan] * 9,
        [-inf] * 12,
        [inf, 1.0, inf] + [0.0] * 9,
        [-inf, -inf, 3.0, nan] + [-inf] * 8,
        [nan, 0.0] * 6,
    ]
    logits = torch.tensor(rows)
    ids, weights = chosen(logits, 4, **options)
    assert all(len(set(row)) == 4 and min(row) >= 0 and max(row) < 12 for row in ids.tolist())
    expected_ids, expected = reference.top_k(logits, 4, **options)
    if options.get("num_groups", 1) == 1 and ("bias" not in options or options.get("softmax_after")):
        assert torch.equal(ids, expected_ids)  # else NaN scores tie, or NaN group sums do
        torch.testing.assert_close(weights, expected, equal_nan=True)
    assert ids[1, :2].tolist() == [2, 1] or options.get("num_groups", 1) > 1 or "bias" in options


@pytest.mark.parametrize("name", TOP_K)
def test_top_k_gradients(name: str) -> None:
    E, k = 12, 3
    options = options_of(name, E, torch.float64)
    g = torch.Generator().manual_seed(3)
    logits = (torch.randperm(4 * E, generator=g, dtype=torch.float64).view(4, E) / 9 - 2).requires_grad_()

    def weights(z: Tensor) -> Tensor:
        return routing.top_k(z, k, **options).weight

    assert torch.autograd.gradcheck(weights, [logits], nondet_tol=0)
    assert torch.autograd.gradgradcheck(weights, [logits], nondet_tol=0)
    ours = torch.autograd.grad((chosen(logits, k, **options)[1] * torch.arange(k)).sum(), logits)
    plain = torch.autograd.grad((reference.top_k(logits, k, **options)[1] * torch.arange(k)).sum(), logits)
    torch.testing.assert_close(ours, plain)


def test_batch_and_threads(threads: None) -> None:
    """A token's choice and weight have the same bits alone, in a batch and on any number of threads."""
    logits = torch.randn(999, 60)
    ids, weights = chosen(logits, 6, renormalize=True)
    torch.set_num_threads(3)
    again = chosen(logits, 6, renormalize=True)
    assert torch.equal(ids, again[0]) and torch.equal(weights, again[1])
    for t in (0, 500, 998):
        alone = chosen(logits[t : t + 1], 6, renormalize=True)
        assert torch.equal(alone[0][0], ids[t]) and torch.equal(alone[1][0], weights[t])


# ---- the sort -------------------------------------------------------------------------------------------------------


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
    assert r.token_offsets.tolist() == [t * K for t in range(T + 1)]
    assert sorted(r.row.tolist()) == list(range(T * K))  # a permutation: every slot has its row
    place = {tk: i for i, tk in enumerate(expected["rows"])}
    for t, k in itertools.product(range(T), range(K)):
        row = r.row[t * K + k].item()
        assert row == place[(t, k)] if (t, k) in place else row >= kept
    assert T * K == 0 or (r.token.min() >= 0 and r.token.max() < T)


SORTS = {
    "dropless": (50, 8, 2, {}),
    "one expert": (9, 1, 1, {}),
    "K = E": (9, 3, 3, {}),
    "T < E": (3, 50, 2, {}),
    "no tokens": (0, 4, 2, {}),
    "odd number of experts, most empty": (20, 385, 3, {}),
    "capacity by position": (50, 4, 2, {"capacity": 11}),
    "capacity by weight": (50, 4, 2, {"capacity": 11, "drop": "weight"}),
    "capacity 0": (10, 4, 2, {"capacity": 0}),
    "capacity that nobody reaches": (10, 4, 2, {"capacity": 10, "drop": "weight"}),
    "capacity by position, one slot": (50, 4, 1, {"capacity": 5}),
}


@pytest.mark.parametrize("case", SORTS)
@pytest.mark.parametrize("foreign", [False, True], ids=["all here", "ids >= E"])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_sort(case: str, foreign: bool, masked: bool) -> None:
    T, E, K, options = SORTS[case]
    g = torch.Generator().manual_seed(T + E)
    ids = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)]) if T else torch.empty(0, K).long()
    if foreign:
        ids = torch.where(torch.rand(T, K, generator=g) < 0.3, ids + E, ids)
    weights = torch.rand(T, K, generator=g)
    if T:
        weights[T // 2] = weights[0]  # ties
    mask = torch.rand(T, generator=g) < 0.7 if masked else None
    r = Routing.from_topk(ids, weights, E, mask=mask, **options)
    check_against_naive(r, ids, weights, E, mask=mask, **options)


def test_sort_takes_the_same_expert_twice() -> None:
    """A router of one's own may give one expert in two slots: two rows, in the order of the slots."""
    ids, weights = torch.tensor([[1, 1], [0, 1]]), torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    check_against_naive(Routing.from_topk(ids, weights, 2), ids, weights, 2)


def test_weights_gradient_of_the_sort() -> None:
    """Kept weights get their row's gradient, dropped and skipped ones whatever their row gets (moe gives them 0)."""
    ids = torch.tensor([[0, 1], [0, 5], [0, 1], [1, 0]])
    weights = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    for options in ({}, {"capacity": 2}, {"capacity": 2, "drop": "weight"}):
        r = Routing.from_topk(ids, weights, 2, **options)
        d = torch.arange(1.0, 9.0, dtype=torch.float64)
        (grad,) = torch.autograd.grad(r.weight, weights, d)
        assert torch.equal(grad, d[r.row].view(4, 2))
        x = torch.randn(4, 3, dtype=torch.float64)
        w_in, w_down = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
        y = ffn_ops.moe(x, Routing.from_topk(ids, weights, 2, **options), w_in, w_down)
        (grad,) = torch.autograd.grad(y.sum(), weights)
        kept = (r.row < r.offsets[-1]).view(4, 2)
        assert torch.equal(grad != 0, kept)


# ---- capacity, Switch, GLaM -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop", ["position", "weight"])
def test_capacity_factor(drop: str) -> None:
    """C = ceil(factor T k / E), at least min_capacity, at most T."""
    logits = torch.randn(30, 4) + torch.tensor([2.0, 0, 0, 0])
    for factor, least, expected in ((1.0, 1, 15), (1.01, 1, 16), (0.01, 1, 1), (0.0, 3, 3), (9.0, 1, 30), (0.0, 0, 0)):
        r = routing.top_k(logits, 2, capacity_factor=factor, min_capacity=least, drop=drop)
        ids, weights = reference.top_k(logits, 2)
        assert r.offsets.diff().max() <= expected
        check = naive(ids, weights, 4, expected, drop)
        assert r.offsets.tolist() == check["offsets"] and r.counts.tolist() == check["counts"]


def test_switch() -> None:
    logits = torch.randn(40, 8)
    r = routing.switch(logits, capacity_factor=1.0)
    p, ids = logits.softmax(1).max(1, keepdim=True)
    expected = naive(ids, p, 8, 5)
    assert r.offsets.tolist() == expected["offsets"]
    kept = expected["offsets"][-1]
    assert r.token[:kept].tolist() == [t for t, _ in expected["rows"]]
    torch.testing.assert_close(r.weight[:kept], p[r.token[:kept], 0])


def test_jitter() -> None:
    x = torch.ones(1000)
    g = torch.Generator().manual_seed(0)
    y = routing.jitter(x, 0.01, g)
    assert 0.99 <= y.min() < 0.992 and 1.008 < y.max() <= 1.01 and abs(y.mean() - 1) < 1e-3
    assert torch.equal(y, routing.jitter(x, 0.01, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("renormalize", ["none", "before_drop", "after_drop"])
def test_glam(renormalize: str) -> None:
    logits = torch.randn(30, 4, dtype=torch.float64, requires_grad=True)
    r = routing.glam_top2(logits, capacity_factor=0.8, renormalize=renormalize)
    ids, p = reference.top_k(logits, 2)
    expected = naive(ids, p, 4, math.ceil(0.8 * 30 * 2 / 4))
    kept = set(expected["rows"])
    assert r.offsets.tolist() == expected["offsets"] and len(kept) < 60 and r.counts.sum() == 60

    def weight(t: int, k: int) -> Tensor:
        if renormalize == "none":
            return p[t, k]
        slots = [j for j in range(2) if renormalize == "before_drop" or (t, j) in kept]
        return p[t, k] / sum(p[t, j] for j in slots)

    wanted = torch.stack([weight(*tk) for tk in expected["rows"]])
    torch.testing.assert_close(r.weight[: len(kept)], wanted)
    d = torch.randn(len(kept), dtype=torch.float64)
    ours = torch.autograd.grad(r.weight[: len(kept)], logits, d, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(wanted, logits, d))


def test_glam_random_second() -> None:
    """The second expert stays with probability min(1, w2 / 0.2); the generator decides."""
    share = 0.05
    z = torch.zeros(4000, 3)
    z[:, 1], z[:, 2] = math.log(share / (1 - share)), -50.0
    kept = [
        routing.glam_top2(z, capacity_factor=None, random_second=True, generator=torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    ]
    counts = [r.offsets.diff().tolist() for r in kept]
    assert counts[0] == counts[1] != counts[2]
    for first, second, third in counts:
        assert first == 4000 and third == 0
        assert abs(second / 4000 - share / 0.2) < 4 * math.sqrt(0.25 * 0.75 / 4000)


# ---- BASE -----------------------------------------------------------------------------------------------------------


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
        scores = torch.randn(T, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
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
    """No cycle of moves, and no chain from a fuller to a less full expert, gains: which is optimality."""
    scores = torch.randn(T, E, generator=torch.Generator().manual_seed(E), dtype=torch.float64)
    scores[:, 0] += 3  # everybody wants the first
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
    """Where the auction of the paper's code fails: one expert, equal scores, T no multiple of E; and no numbers."""
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


# ---- Expert Choice, hash, token rounding ----------------------------------------------------------------------------


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
        listed = [i for i in r.row[r.token_offsets[t] : r.token_offsets[t + 1]].tolist() if i < len(rows)]
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
    check_against_naive(learned, ids, logits.view(21, 4).softmax(1).gather(1, ids), 4)


@pytest.mark.parametrize(
    ("T", "E", "k", "tile"), [(40, 4, 2, 8), (40, 4, 2, 7), (10, 3, 1, 16), (30, 5, 5, 4), (9, 4, 2, 1)]
)
def test_token_rounding(T: int, E: int, k: int, tile: int) -> None:
    logits = torch.randn(T, E, dtype=torch.float64)
    p, (ids, _) = logits.softmax(1), reference.top_k(logits, k)
    r = routing.token_rounding(logits, k, tile=tile)
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


# ---- losses, statistics, bias ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_load_balancing_loss(score: str, masked: bool) -> None:
    logits = torch.randn(30, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(30) % 4 > 0 if masked else None
    real = torch.ones(30, dtype=torch.bool) if mask is None else mask
    r = routing.top_k(logits, 2, score=score, capacity_factor=0.5, mask=mask)
    loss = routing.load_balancing_loss(logits, r, score=score, mask=mask)
    p = logits.softmax(1) if score == "softmax" else logits.sigmoid() / logits.sigmoid().sum(1, keepdim=True)
    f = torch.bincount(reference.top_k(logits[real], 2, score=score)[0].flatten(), minlength=5) / (2 * real.sum())
    expected = 5 * (f * p[real].mean(0)).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))
    expected = logits[real].logsumexp(1).square().mean()
    torch.testing.assert_close(routing.z_loss(logits, mask=mask), expected)


def test_losses_at_their_limits() -> None:
    uniform = torch.zeros(8, 4)
    r = Routing.from_topk(torch.arange(8)[:, None] % 4, torch.ones(8, 1), 4)
    assert routing.load_balancing_loss(uniform, r) == 1
    collapsed = torch.zeros(8, 4)
    collapsed[:, 2] = 100
    assert routing.load_balancing_loss(collapsed, routing.top_k(collapsed, 1)) == 4
    none = torch.zeros(0, 4, requires_grad=True)
    for loss in (routing.load_balancing_loss(none, routing.top_k(none, 2)), routing.z_loss(none)):
        assert loss == 0
        loss.backward()
    padding = torch.zeros(8, dtype=torch.bool)
    assert routing.z_loss(uniform, mask=padding) == 0
    assert routing.load_balancing_loss(uniform, routing.top_k(uniform, 2, mask=padding), mask=padding) == 0


def test_statistics() -> None:
    logits = torch.randn(50, 6) + torch.tensor([2.0, 0, 0, 0, 0, 0])
    r = routing.top_k(logits, 2, capacity_factor=0.9)
    s = r.statistics()
    load = r.offsets.diff().double()
    p = load / load.sum()
    assert torch.equal(s.tokens_per_expert.double(), load) and s.tokens_per_expert.dtype is torch.float32
    assert abs(s.dropped_fraction.item() - (1 - load.sum().item() / 100)) < 1e-6 and s.dropped_fraction > 0
    assert abs(s.load_entropy.item() + (p * p.log()).sum().item() / math.log(6)) < 1e-6
    assert abs(s.max_over_mean.item() - (load.max() / load.mean()).item()) < 1e-6
    nothing = routing.top_k(torch.empty(0, 3), 1).statistics()
    assert all(torch.isfinite(t).all() for t in nothing) and nothing.dropped_fraction == 0


def test_bias_update() -> None:
    """A bias that follows the load brings a lopsided router into balance, without touching the weights' formula."""
    logits = torch.randn(512, 8, generator=torch.Generator().manual_seed(0)) + torch.linspace(0, 1.5, 8)
    router = routing.BiasedTopK(8, 2)
    first = router(logits).statistics().max_over_mean
    for rate in [0.01] * 200 + [0.001] * 200:
        router.update(router(logits), rate)
    r = router(logits)
    assert first > 1.5 and r.statistics().max_over_mean < 1.1
    expected = reference.top_k(logits, 2, score="sigmoid", renormalize=True, bias=router.bias)
    torch.testing.assert_close(r.weight[r.row].view(-1, 2), expected[1])
    before = router.bias.clone()
    routing.update_bias(router.bias, r, 0.5)
    load = r.counts.float()
    assert torch.equal(router.bias, before + 0.5 * torch.sign(load.mean() - load))
    assert not router.bias.requires_grad and router.bfloat16().bias.dtype is torch.float32


# ---- integration ----------------------------------------------------------------------------------------------------

ROUTERS: dict[str, Callable[[Tensor], Routing]] = {
    "top_k": functools.partial(routing.top_k, k=2),
    "top_k renormalised, capacity": functools.partial(routing.top_k, k=2, renormalize=True, capacity_factor=0.7),
    "softmax after": functools.partial(routing.top_k, k=2, softmax_after=True),
    "groups": functools.partial(routing.top_k, k=2, score="sigmoid", num_groups=2, top_groups=1),
    "switch": routing.switch,
    "glam": routing.glam_top2,
    "glam after drop": functools.partial(routing.glam_top2, renormalize="after_drop", capacity_factor=0.8),
    "expert choice": functools.partial(routing.expert_choice, causal=False),
    "base": routing.base,
    "token rounding": functools.partial(routing.token_rounding, k=2, tile=4),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_compile(name: str, dynamo: None) -> None:
    """One graph, T dynamic."""
    router = ROUTERS[name]
    compiled = torch.compile(router, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (11, 5, 40):
        logits = torch.randn(T, 6)
        assert all(torch.equal(a, b) for a, b in zip(compiled(logits), router(logits), strict=True)), T


@pytest.mark.parametrize("name", ROUTERS)
def test_autocast_leaves_routing_alone(name: str) -> None:
    logits = torch.randn(12, 6)
    expected = ROUTERS[name](logits)
    with torch.autocast("cpu", torch.bfloat16):
        actual = ROUTERS[name](logits)
    assert all(torch.equal(a, b) and a.dtype is b.dtype for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", ROUTERS)
def test_mask_leaves_padding_out(name: str) -> None:
    """Padded tokens get no rows; where tokens do not compete, the others' rows are those they have alone."""
    logits, mask = torch.randn(12, 6), torch.arange(12) % 4 != 1
    r = ROUTERS[name](logits, mask=mask)
    assert mask[r.token[: r.offsets[-1]]].all()
    if name in ("top_k", "softmax after", "groups"):
        alone = ROUTERS[name](logits[mask])
        kept = int(alone.offsets[-1])
        assert torch.equal(r.offsets, alone.offsets) and torch.equal(r.weight[:kept], alone.weight)


def test_leading_dimensions() -> None:
    logits = torch.randn(2, 5, 6)
    for router in ROUTERS.values():
        assert all(torch.equal(a, b) for a, b in zip(router(logits), router(logits.view(10, 6)), strict=True))


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
    "softmax after sigmoid": (
        lambda: routing.top_k(torch.ones(2, 3), 1, score="sigmoid", softmax_after=True), ValueError, "softmax_after",
    ),
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
    "tile": (lambda: routing.token_rounding(torch.ones(2, 6), 2, tile=0), ValueError, "tile: expected 1"),
    "hash ids": (lambda: routing.hash(torch.ones(2), torch.ones(2).int(), 2), TypeError, "token_ids: expected"),
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
        lambda: Routing.from_topk(torch.ones(2, 3).int(), torch.ones(2, 3), 0), ValueError, "num_experts: expected 1",
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
