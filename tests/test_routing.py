# SPDX-License-Identifier: BSD-3-Clause
"""The sort of routed rows, capacity, losses, statistics, and every router inside torch."""

from __future__ import annotations

import math

import pytest
import torch
from device import DEVICE, generator
from routes import ROUTERS, check_against_naive, naive
from torch import Tensor

import ffn_ops
from ffn_ops import Routing, reference, routing

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
    g = generator(T + E)
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
    """A custom router may choose one expert in two slots: this makes two rows, in the order of the slots."""
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
    g = generator(0)
    y = routing.jitter(x, 0.01, g)
    assert 0.99 <= y.min() < 0.992 and 1.008 < y.max() <= 1.01 and abs(y.mean() - 1) < 1e-3
    assert torch.equal(y, routing.jitter(x, 0.01, generator(0)))


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
    kept = [routing.glam_top2(z, capacity_factor=None, random_second=True, generator=generator(s)) for s in (0, 0, 1)]
    counts = [r.offsets.diff().tolist() for r in kept]
    assert counts[0] == counts[1] != counts[2]
    for first, second, third in counts:
        assert first == 4000 and third == 0
        assert abs(second / 4000 - share / 0.2) < 4 * math.sqrt(0.25 * 0.75 / 4000)


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
    logits = torch.randn(512, 8, generator=generator(0)) + torch.linspace(0, 1.5, 8)
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


@pytest.mark.parametrize(("score", "by_logits"), [("sigmoid", False), ("softmax", False), ("sigmoid", True)])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_quantile_bias(score: str, by_logits: bool, masked: bool) -> None:
    """Against its definition: of m tokens the (m k / E)-th in order, less the mean over the experts."""
    T, E, k = 480, 12, 3
    logits = torch.randn(T, E, generator=generator(1), dtype=torch.float64) + torch.linspace(0, 2, E)
    bias = torch.linspace(-0.1, 0.2, E, dtype=torch.float64)
    mask = torch.arange(T) % 4 > 0 if masked else None
    z = logits if mask is None else logits[mask]
    s = z if by_logits else z.softmax(1) if score == "softmax" else z.sigmoid()
    wanted = (s + bias).sort(1, descending=True).values[:, k : k + 1] - s
    routing.solve_bias(bias, logits, k, score=score, by_logits=by_logits, mask=mask)
    q = len(z) * k // E
    quantile = wanted.sort(0).values[q - 1]
    width = 2e-6 * (wanted.max() - wanted.min()).item()
    torch.testing.assert_close(bias, quantile - quantile.mean(), rtol=0, atol=2 * width)


@pytest.mark.parametrize("learns", [False, True], ids=["fixed", "learns"])
def test_quantiles_balance_better_than_steps(learns: bool) -> None:
    """A few calls, without a rate, against as many steps of the best rate there is; also on a router that learns."""
    drift = torch.randn(8, generator=generator(2)) * 0.05 * learns
    loads: dict[str, list[Tensor]] = {"quantile": [], **{str(rate): [] for rate in (3e-3, 1e-2, 3e-2)}}
    for name, found in loads.items():
        for seed in range(3):
            router, g = routing.BiasedTopK(8, 2), generator(seed)
            for step in range(30):
                logits = torch.randn(2048, 8, generator=g) + torch.linspace(0, 1.5, 8) + step * drift
                r = router(logits)
                if step >= 5:
                    found.append(r.statistics().max_over_mean)
                router.solve(logits) if name == "quantile" else router.update(r, float(name))
    means = {name: torch.stack(found).mean().item() for name, found in loads.items()}
    assert means["quantile"] < (1.2 if learns else 1.12)
    assert means["quantile"] < 0.97 * min(m for n, m in means.items() if n != "quantile")


def test_quantile_bias_at_its_limits() -> None:
    router = routing.BiasedTopK(4, 2, shared=1)
    router.bias.copy_(torch.tensor([0.1, -0.2, 0.1]))
    before = router.bias.clone()
    router.solve(torch.empty(0, 4))
    assert torch.equal(router.bias, before)  # nothing to go by
    router.solve(torch.full((5, 4), 3.0))
    assert torch.equal(router.bias, router.bias.new_zeros(3))  # all experts are alike
    r = router(torch.randn(64, 4))
    assert r.counts[3] == 64  # the shared expert's load moves nothing
    router.update(r, 0.5)
    load = r.counts[:3].float()
    assert torch.equal(router.bias, 0.5 * torch.sign(load.mean() - load))


def test_one_step_with_nan_does_not_stay_in_the_bias() -> None:
    """Tokens whose scores are not finite are left out of the quantiles."""
    logits = torch.randn(64, 4)
    bad = torch.tensor([[0.0, math.nan, 0.0, 0.0], [-math.inf, 0.0, 0.0, 0.0]])
    clean, dirty = (routing.BiasedTopK(4, 2, by_logits=True) for _ in range(2))
    clean.solve(logits)
    dirty.solve(torch.cat((bad, logits)), mask=torch.tensor([True] * 66))
    assert bool(clean.bias.any()) and torch.equal(dirty.bias, clean.bias)
    dirty.solve(bad)
    assert torch.equal(dirty.bias, clean.bias)  # nothing to go by


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_bias_made_under_another_default_dtype(dtype: torch.dtype) -> None:
    """As models are made by from_pretrained: float32, so that a step of 1e-3 stays."""
    torch.set_default_dtype(dtype)
    try:
        router = routing.BiasedTopK(2, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    router.update(router(torch.tensor([[1.0, 0.0]])))
    assert torch.equal(router.bias, torch.tensor([-1e-3, 1e-3]))


@pytest.mark.parametrize("table", [torch.zeros(10, dtype=torch.int64), torch.zeros(10, 3, dtype=torch.int64)])
@pytest.mark.parametrize("scored", [False, True])
def test_hash_of_no_tokens(table: Tensor, scored: bool) -> None:
    none = routing.hash(torch.empty(0, dtype=torch.int64), table, 4, logits=torch.empty(0, 4) if scored else None)
    none.check()
    assert torch.equal(none.counts, torch.zeros(4, dtype=torch.int64))


def test_rows_of_some_experts() -> None:
    """``first``, ``weight_of`` and ``scaled``, with gradients, against loops over slots."""
    ids = torch.tensor([[0, 3], [4, 1], [2, 4], [3, 5], [6, 7]])  # 6 and 7 are another rank's
    weights = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(6, dtype=torch.float64, requires_grad=True)
    r = Routing.from_topk(ids, weights, 6)
    few = r.first(3)
    check_against_naive(few, torch.where(ids < 3, ids, 9), weights, 3)
    passed = r.weight_of(3, 5)
    expected = torch.where((ids >= 3) & (ids < 5), weights, 0).sum(1)
    torch.testing.assert_close(passed, expected)
    d = torch.rand(5, dtype=torch.float64)
    assert torch.equal(
        torch.autograd.grad(passed, weights, d, retain_graph=True)[0], torch.autograd.grad(expected, weights, d)[0]
    )
    kept = int(r.offsets[-1])
    scaled = r.scaled(scale).weight[:kept]
    expected = torch.stack([weights[t, k] * scale[ids[t, k]] for t, k in naive(ids, weights, 6)["rows"]])
    assert torch.equal(scaled, expected)
    d = torch.rand(kept, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(w, [weights, scale], d) for w in (scaled, expected)), strict=True):
        torch.testing.assert_close(a, b)


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
    with torch.autocast(DEVICE, torch.bfloat16):
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
