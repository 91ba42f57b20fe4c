# SPDX-License-Identifier: BSD-3-Clause
"""``mask=`` leaves padding out of everything: its values reach no output, gradient, loss or statistic."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from device import generator
from routes import ROUTERS
from torch import Tensor

import ffn_ops
from ffn_ops import Routing, reference, routing

T, D, E = 17, 12, 6
MASK = torch.arange(T) % 3 != 1
TABLE = routing.hash_table(50, E)
TOKEN_IDS = torch.where(MASK, torch.arange(T), -100)
BIASED = routing.BiasedTopK(E, 2)
MASKED = {
    **ROUTERS,
    "glam, random second": lambda z, mask=None: routing.glam_top2(
        z, random_second=True, generator=generator(1), mask=mask
    ),
    "base, eval": lambda z, mask=None: routing.base(z, training=False, mask=mask),
    "biased": lambda z, mask=None: BIASED(z, mask=mask),
    "hash": lambda z, mask=None: routing.hash(TOKEN_IDS, TABLE, E, logits=z, mask=mask),
}


def own_choice(z: Tensor, mask: Tensor | None = None) -> Routing:
    return Routing.from_topk(z.detach().argmax(1, True), z.amax(1, True), E, mask=mask)


ALONE = ("top_k", "softmax after", "groups", "biased", "base, eval", "own choice")  # each token chooses for itself
POISON = (math.nan, math.inf, -math.inf)


def poisoned(t: Tensor, value: float) -> Tensor:
    return torch.where(MASK.view(-1, 1), t, value).requires_grad_(t.requires_grad)


def results(router: Any, logits: Tensor, d_weight: Tensor) -> tuple[Routing, list[Tensor]]:
    """The routing, and losses, statistics and gradients of the logits."""
    r = router(logits, mask=MASK)
    losses = [routing.load_balancing_loss(logits, r, score=score) for score in ("softmax", "sigmoid")]
    losses += [routing.load_balancing_loss(logits, r, mask=MASK), routing.z_loss(logits, mask=MASK)]
    kept = torch.arange(len(r.weight)) < r.offsets[-1]
    found = [*losses, *r.statistics()]
    for out in (
        *losses,
        torch.where(kept, r.weight, 0) * d_weight[: len(r.weight)],
        r.weight * d_weight[: len(r.weight)],
    ):
        found += torch.autograd.grad(out.sum(), logits, retain_graph=True)
    return r, found


@pytest.mark.parametrize("name", MASKED)
def test_routers_losses_and_statistics(name: str) -> None:
    """The same bits whatever padding's logits are, and gradients of exactly 0 there."""
    logits = torch.randn(T, E, generator=generator(2)).requires_grad_()
    d_weight = torch.randn(T * E, generator=generator(3))
    r, expected = results(MASKED[name], logits, d_weight)
    assert MASK[r.token[: r.offsets[-1]]].all() and torch.equal(r.mask, MASK)
    for value in POISON:
        other, found = results(MASKED[name], poisoned(logits, value), d_weight)
        assert all(torch.equal(a, b) for a, b in zip(other, r, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert all(not g[~MASK].any() for g in found if g.shape == logits.shape)
    wide = logits[MASK].double()
    torch.testing.assert_close(expected[3], wide.logsumexp(1).square().mean().float())
    f, p = r.counts / r.counts.sum(), wide.softmax(1).mean(0).float()
    torch.testing.assert_close(expected[0], E * (f * p).sum())
    assert torch.equal(expected[0], expected[2])


@pytest.mark.parametrize("name", [*MASKED, "own choice"])
@pytest.mark.parametrize("form", ["plain", "gated", "jitter"])
def test_layer(name: str, form: str) -> None:
    """Outputs and all gradients, with shared experts: as if padding were zeros, and where tokens choose for themselves
    as if it were not there."""
    gated = form == "gated"
    torch.manual_seed(5)
    layer = ffn_ops.MoEFFN(
        D, 7, E, router=MASKED.get(name, own_choice), gated=gated, num_shared=1, router_jitter=0.1 * (form == "jitter")
    ).double()
    x, d = (torch.randn(T, D, generator=generator(s), dtype=torch.float64) for s in (6, 7))

    def run(x: Tensor, d: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(0)
        x = x.requires_grad_()
        y = layer(x, **options)
        return y, list(torch.autograd.grad(y, [x, *layer.parameters()], d, allow_unused=True))

    y, expected = run(torch.where(MASK.view(-1, 1), x, 0.0), torch.where(MASK.view(-1, 1), d, 0.0), mask=MASK)
    for value in POISON:
        again, found = run(poisoned(x, value), poisoned(d, value), mask=MASK)
        assert torch.equal(again, y) and not again[~MASK].any() and not found[0][~MASK].any()
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None) and (a is None or (torch.equal(a, b) and a.isfinite().all()))
    if name in ALONE and form != "jitter":
        alone, grads = run(x[MASK], d[MASK])
        torch.testing.assert_close(y[MASK], alone)
        torch.testing.assert_close([expected[0][MASK], *expected[1:]], grads)


def test_given_routing_brings_its_mask() -> None:
    layer = ffn_ops.MoEFFN(D, 7, E, gated=True, num_shared=1)
    x = torch.randn(T, D)
    y, r, _ = layer(x, mask=MASK, return_routing=True)
    for options in ({}, {"mask": MASK}):
        again = layer(poisoned(x, math.nan), routing=r, **options)
        assert torch.equal(again, y)
        assert all(g.isfinite().all() for g in torch.autograd.grad(again.sum(), list(layer.shared.parameters())))
    with pytest.raises(ValueError, match="mask: expected the routing's own"):
        layer(x, routing=r, mask=~MASK)


def test_operators_do_not_read_padding() -> None:
    """The routing's weights of padding are zeros, also in second derivatives."""
    ids, weights = torch.randint(0, E, (T, 2)), poisoned(torch.rand(T, 2, dtype=torch.float64), math.nan)
    e = {"w_in": torch.randn(E, 5, D, dtype=torch.float64), "w_down": torch.randn(E, D, 5, dtype=torch.float64)}
    leaves = [t.requires_grad_() for t in (weights, *e.values())]
    x = poisoned(torch.randn(T, D, dtype=torch.float64), math.nan).requires_grad_()
    y = ffn_ops.moe(x, Routing.from_topk(ids, weights, E, mask=MASK), **e)
    first = torch.autograd.grad(y.square().sum(), [x, *leaves], create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *leaves])
    for grads in (first, second):
        assert all(g.isfinite().all() for g in grads) and not any(g[~MASK].any() for g in grads[:2])
    clean = reference.moe(x.detach()[MASK], ids[MASK], weights[MASK], **e)
    torch.testing.assert_close(y[MASK], clean)


@pytest.mark.parametrize("name", MASKED)
def test_loss_takes_the_routings_mask(name: str) -> None:
    """f and P use the same tokens: a mask given only to the loss, or another mask, raises an error."""
    logits = torch.randn(T, E, generator=generator(2))
    r = MASKED[name](logits, mask=MASK)
    loss = routing.load_balancing_loss(logits, r)
    assert torch.equal(loss, routing.load_balancing_loss(logits, r, mask=MASK.clone()))
    refused = [(r, ~MASK)] if name == "hash" else [(r, ~MASK), (MASKED[name](logits), MASK)]
    for given, mask in (*refused, (r._replace(mask=None), MASK)):
        with pytest.raises(ValueError, match="mask: expected the routing's own"):
            routing.load_balancing_loss(logits, given, mask=mask)


def test_six_tensors_are_a_routing() -> None:
    """Of routers that know nothing of masks."""
    logits, x = torch.randn(T, E), torch.randn(T, D)
    r = routing.top_k(logits, 2)
    own = Routing(*r[:6])
    layer = ffn_ops.MoEFFN(D, 7, E, num_shared=1)
    assert torch.equal(layer(x, routing=own), layer(x, routing=r)) and own.mask is None and r.mask.shape == (0,)
    assert routing.load_balancing_loss(logits, own) == routing.load_balancing_loss(logits, r)


def test_compiled_loss_refuses_another_mask(dynamo: None) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(logits: Tensor, mask: Tensor, other: Tensor) -> Tensor:
        return routing.load_balancing_loss(logits, routing.top_k(logits, 2, mask=mask), mask=other)

    logits = torch.randn(T, E)
    assert loss(logits, MASK, MASK) == routing.load_balancing_loss(logits, routing.top_k(logits, 2, mask=MASK))
    if not logits.is_cuda:  # there the device itself stops
        with pytest.raises(RuntimeError, match="mask: expected the routing's own"):
            loss(logits, MASK, ~MASK)


def test_hash_never_looks_at_padding() -> None:
    """Ids of padding may be anything; others must be in the table, also those below 0."""
    r = routing.hash(TOKEN_IDS, TABLE, E, mask=MASK)
    assert torch.equal(r.counts, torch.bincount(TABLE[TOKEN_IDS[MASK]], minlength=E)) and r.offsets[-1] == MASK.sum()
    for bad in (-1, 50, -100, 2**40):
        ids = TOKEN_IDS.clone()
        ids[1], ids[3] = 2**40, bad
        if ids.is_cuda:
            continue  # an assertion of the device
        for call in (
            lambda ids=ids: routing.hash(ids, TABLE, E, mask=MASK),
            lambda ids=ids: routing.hash(ids[3:4], TABLE, E),
        ):
            with pytest.raises(ValueError, match=f"token_ids: expected ids from 0 to 49 .*, got {bad}"):
                call()
    layer = ffn_ops.MoEFFN(D, 7, E, router=lambda z, token_ids, mask: routing.hash(token_ids, TABLE, E, mask=mask))
    assert not copy.deepcopy(layer)(torch.randn(T, D), token_ids=TOKEN_IDS, mask=MASK)[~MASK].any()
