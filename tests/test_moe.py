# SPDX-License-Identifier: BSD-3-Clause
"""moe and its parts against a loop over experts: every router, extreme loads, what must not be read, bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from device import generator, gradcheck, gradgradcheck
from problems import DTYPES, assert_same_bits, dtype_name
from routes import ROUTERS
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ffn_ops
from ffn_ops import Gate, Routing, reference, routing


def experts(
    E: int, D: int = 5, F: int = 6, O: int = 4, *, gated: bool = False, dtype: Any = torch.float64
) -> dict[str, Tensor]:
    g = generator(E + F)
    rows = 2 * F if gated else F
    shapes = {"w_in": (E, rows, D), "w_down": (E, O, F), "b_in": (E, rows), "b_down": (E, O)}
    return {n: (torch.randn(s, generator=g, dtype=torch.float64) * 0.5).to(dtype) for n, s in shapes.items()}


def naive(x: Tensor, r: Routing, *, gated: bool, **e: Tensor) -> Tensor:
    """Row by row through the plain FFN; each token's rows are added in the order of its slots."""
    kept = int(r.offsets[-1])
    expert = torch.bucketize(torch.arange(kept), r.offsets[1:], right=True)
    y = []
    for t in range(len(x)):
        total = x.new_zeros(e["w_down"].shape[1])
        for i in r.row[r.slot_offsets[t] : r.slot_offsets[t + 1]].tolist():
            if i < kept:
                n = expert[i]
                assert r.token[i] == t
                out = reference.ffn(
                    x[t], e["w_in"][n], e["w_down"][n], gated=gated, b_in=e["b_in"][n], b_down=e["b_down"][n],
                    activation="gelu",
                )  # fmt: skip
                total = total + r.weight[i] * out
        y.append(total)
    return torch.stack(y) if y else x.new_zeros(0, e["w_down"].shape[1])


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    d = torch.randn(y.shape, generator=generator(9), dtype=y.dtype)
    found = torch.autograd.grad(y, leaves, d, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("name", ROUTERS)
def test_every_router(name: str, gated: bool) -> None:
    """Output and the gradients of tokens, logits and experts."""
    x = torch.randn(17, 5, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(17, 6, dtype=torch.float64, requires_grad=True)
    e = {n: t.requires_grad_() for n, t in experts(6, gated=gated).items()}
    leaves = [x, logits, *e.values()]
    ours = ffn_ops.moe(x, ROUTERS[name](logits), gated=gated, **e)
    plain = naive(x, ROUTERS[name](logits), gated=gated, **e)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradients(ours, leaves), gradients(plain, leaves))


LOADS: dict[str, tuple[int, int, int, Any]] = {
    "all tokens to one expert": (40, 7, 1, lambda T, E: torch.full((T, 1), 3)),
    "one expert in all": (13, 1, 1, lambda T, E: torch.zeros(T, 1).long()),
    "K = E": (11, 4, 4, lambda T, E: torch.arange(E).repeat(T, 1).roll(1, 1)),
    "fewer tokens than experts": (3, 50, 2, lambda T, E: torch.tensor([[49, 0], [7, 8], [8, 7]])),
    "odd number of experts, most empty": (
        30, 385, 2, lambda T, E: torch.stack((torch.arange(T), torch.arange(T) + 350), 1),
    ),
    "no tokens": (0, 5, 2, lambda T, E: torch.empty(0, 2).long()),
    "one token": (1, 5, 2, lambda T, E: torch.tensor([[4, 1]])),
    "loads around every way to multiply": (
        150, 9, 1,
        lambda T, E: torch.arange(9).repeat_interleave(torch.tensor([1, 2, 6, 7, 9, 32, 33, 60, 0]))[:, None],
    ),
    "nothing is here": (9, 3, 2, lambda T, E: torch.full((T, 2), E)),
}  # fmt: skip


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_loads(load: str, gated: bool, isa: str) -> None:
    """Also: gradients of experts without tokens are exact zeros, whatever lay in their memory before."""
    T, E, K, make = LOADS[load]
    ids = make(T, E)
    assert ids.shape == (T, K)
    x = torch.randn(T, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(T, K, dtype=torch.float64, requires_grad=True)
    e = {n: t.requires_grad_() for n, t in experts(E, gated=gated).items()}
    leaves = [x, weights, *e.values()]
    plain = reference.moe(x, ids, weights, gated=gated, **e)
    expected = gradients(plain, leaves)
    dirt = [torch.full_like(t, torch.nan) for t in leaves for _ in range(3)]
    del dirt
    ours = ffn_ops.moe(x, Routing.from_topk(ids, weights, E), gated=gated, **e)
    torch.testing.assert_close(ours, plain)
    actual = gradients(ours, leaves)
    torch.testing.assert_close(actual, expected)
    empty = [n for n in range(E) if n not in ids]
    assert all(not grad[empty].any() for grad in actual[2:])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_parts_give_the_whole(dtype: torch.dtype) -> None:
    """dispatch, experts, combine: in float32 and float64 the bits of moe; 16-bit parts round between them."""
    x, logits = torch.randn(31, 5).to(dtype), torch.randn(31, 6)
    r = routing.top_k(logits.double() if dtype is torch.float64 else logits, 2, capacity_factor=0.8)
    e = experts(6, dtype=dtype)
    rows = ffn_ops.moe_dispatch(x, r)
    kept = int(r.offsets[-1])
    assert torch.equal(rows[:kept], x[r.token[:kept]]) and not rows[kept:].any() and kept < len(rows)
    out = ffn_ops.moe_experts(rows, r.offsets, **e)
    assert not out[kept:].any()
    whole, parts = ffn_ops.moe(x, r, **e), ffn_ops.moe_combine(out, r)
    if dtype.itemsize == 2:
        torch.testing.assert_close(parts, whole, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    else:
        assert torch.equal(parts, whole)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_gradients_of_the_parts(gated: bool) -> None:
    """gradcheck and gradgradcheck of each, with dropped rows; and of products per expert, from which they are built."""
    g = generator(0)

    def t(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)

    ids = torch.tensor([[0, 2], [2, 0], [0, 3], [2, 9]])
    e = [w.requires_grad_() for w in experts(4, 3, 2, 2, gated=gated).values()]
    weights = t(4, 2)

    def r(w: Tensor) -> Routing:
        return Routing.from_topk(ids, w, 4, capacity=2)

    offsets = r(weights).offsets

    def options(e: tuple[Tensor, ...]) -> dict[str, Any]:
        return dict(zip(("w_in", "w_down", "b_in", "b_down"), e), gated=gated, activation="silu")  # noqa: B905

    ops = torch.ops.ffn_ops
    for call, inputs in (
        (lambda x, w: ffn_ops.moe_dispatch(x, r(w)), (t(4, 3), weights)),
        (lambda rows, w: ffn_ops.moe_combine(rows, r(w)), (t(8, 3), weights)),
        (lambda rows, *e: ffn_ops.moe_experts(rows, offsets, **options(e)), (t(8, 3), *e)),
        (lambda x, w, *e: ffn_ops.moe(x, r(w), **options(e)), (t(4, 3), weights, *e)),
        (lambda x, w, *e: ffn_ops.moe(x, r(w), **options(e), recompute=True), (t(4, 3), weights, *e[:2])),
        (lambda rows, w: ops.moe_linear(rows, w, offsets), (t(8, 3), t(4, 2, 3))),
        (lambda a, b: ops.moe_outer(a, b, offsets), (t(8, 3), t(8, 2))),
    ):
        assert gradcheck(call, inputs, nondet_tol=0)
        assert gradgradcheck(call, inputs, nondet_tol=0)


def test_poisoned_rows_change_nothing() -> None:
    """NaN behind offsets[E], and in tokens all of whose rows are dropped: not in any output or gradient."""
    ids = torch.tensor([[0, 1], [9, 9], [0, 1], [1, 0], [1, 2]])  # token 1 is on another rank
    r = Routing.from_topk(ids, torch.rand(5, 2, dtype=torch.float64), 3, capacity=2)
    kept = int(r.offsets[-1])
    assert kept == 5 and len(r.token) == 10
    e = experts(3)
    clean = torch.randn(10, 5, dtype=torch.float64)
    poisoned = clean.clone()
    poisoned[kept:] = torch.nan
    results = []
    for rows in (clean, poisoned):
        rows = rows.clone().requires_grad_()
        leaves = {n: w.clone().requires_grad_() for n, w in e.items()}
        out = ffn_ops.moe_experts(rows, r.offsets, **leaves)
        d = torch.where(torch.arange(10)[:, None] < kept, 1.0, torch.nan).expand(10, 4).double()
        grads = torch.autograd.grad(out, [rows, *leaves.values()], d)
        results.append([out.detach(), *grads])
    assert all(torch.equal(a, b) and torch.isfinite(a).all() for a, b in zip(*results, strict=True))
    assert torch.equal(ffn_ops.moe_combine(clean, r), ffn_ops.moe_combine(poisoned, r))
    x = torch.randn(5, 5, dtype=torch.float64)
    expected = ffn_ops.moe(x, r, **e)
    x[1] = torch.nan
    y = ffn_ops.moe(x.requires_grad_(), r, **e)
    assert torch.equal(y, expected) and not y[1].any()
    assert not torch.autograd.grad(y.sum(), x)[0][1].any()


def test_two_ranks_give_the_whole() -> None:
    """Experts split in two halves: ids of the other half are skipped, no gradient for their weights."""
    x = torch.randn(23, 5, dtype=torch.float64)
    ids, weights = reference.top_k(torch.randn(23, 6, dtype=torch.float64), 3)
    weights.requires_grad_()
    e = experts(6)
    whole = ffn_ops.moe(x, Routing.from_topk(ids, weights, 6), **e)
    parts, grads = [], []
    for rank in (0, 1):
        local = ids - 3 * rank
        local = torch.where(local < 0, 3, local)
        mine = {n: w[3 * rank : 3 * rank + 3] for n, w in e.items()}
        part = ffn_ops.moe(x, Routing.from_topk(local, weights, 3), **mine)
        grads.append(torch.autograd.grad(part.sum(), weights)[0])
        parts.append(part)
        assert torch.equal(grads[rank] != 0, local < 3)
    torch.testing.assert_close(parts[0] + parts[1], whole)
    torch.testing.assert_close(grads[0] + grads[1], torch.autograd.grad(whole.sum(), weights)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_permuting_tokens_permutes_bits(gated: bool, dtype: torch.dtype, isa: str) -> None:
    x, logits = torch.randn(90, 40).to(dtype), torch.randn(90, 6)
    e = experts(6, 40, 70, 33, gated=gated, dtype=dtype)
    d = torch.randn(90, 33).to(dtype)

    def run(x: Tensor, logits: Tensor, d: Tensor) -> dict[str, Tensor]:
        x, logits = x.clone().requires_grad_(), logits.clone().requires_grad_()
        y = ffn_ops.moe(x, routing.top_k(logits, 2), gated=gated, **e)
        d_x, d_logits = torch.autograd.grad(y, [x, logits], d)
        return {"y": y.detach(), "d_x": d_x, "d_logits": d_logits}

    order = torch.randperm(90)
    expected = {n: t[order] for n, t in run(x, logits, d).items()}
    assert_same_bits(run(x[order], logits[order], d[order]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_name)
def test_routing_weights_stay_wide(dtype: torch.dtype) -> None:
    """float32 weights with 16-bit tokens are the normal case; float64 ones are computed with in float32."""
    x, logits = torch.randn(20, 8).to(dtype), torch.randn(20, 4, requires_grad=True)
    e = experts(4, 8, dtype=dtype)
    r = routing.top_k(logits, 2)
    y = ffn_ops.moe(x, r, **e)
    wide = ffn_ops.moe(x, r._replace(weight=r.weight.double()), **e)
    assert y.dtype is dtype and torch.equal(y, wide)
    (grad,) = torch.autograd.grad(y.float().sum(), logits, retain_graph=True)
    exact = ffn_ops.moe(x.double(), r._replace(weight=r.weight.double()), **{n: w.double() for n, w in e.items()})
    (expected,) = torch.autograd.grad(exact.sum(), logits)
    assert grad.dtype is torch.float32
    torch.testing.assert_close(grad, expected, rtol=0.05, atol=0.05 if dtype is torch.bfloat16 else 0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_rounded_routing_weights_are_widened(dtype: torch.dtype) -> None:
    """16-bit weights, as casts of arguments leave them: the same bits as with these values in float32."""
    x, e = torch.randn(20, 8), experts(4, 8, dtype=torch.float32)
    r = routing.top_k(torch.randn(20, 4), 2)
    low = r._replace(weight=r.weight.to(dtype).requires_grad_())
    wide = r._replace(weight=low.weight.detach().float().requires_grad_())
    for call in (lambda r: ffn_ops.moe(x, r, **e), lambda r: ffn_ops.moe_combine(x.repeat(2, 1), r)):
        y, expected = call(low), call(wide)
        assert torch.equal(y, expected) and not torch.equal(y, call(r))
        (grad,), (wanted,) = (torch.autograd.grad(t.sum(), s.weight) for t, s in ((y, low), (expected, wide)))
        assert grad.dtype is dtype and torch.equal(grad, wanted.to(dtype))


def test_subsets_with_dropped_rows() -> None:
    """Every subset of the gradients: the bits of the full backward."""
    r = routing.top_k(torch.randn(12, 4), 2, capacity_factor=0.7)
    weight = r.weight.detach()
    tensors = {"x": torch.randn(12, 5), "weight": weight, **experts(4, dtype=torch.float32)}

    def run(names: tuple[str, ...]) -> dict[str, Tensor]:
        given = {n: t.detach().requires_grad_(n in names) for n, t in tensors.items()}
        rest = {n: t for n, t in given.items() if n not in ("x", "weight")}
        y = ffn_ops.moe(given["x"], r._replace(weight=given["weight"]), **rest)
        return dict(zip(names, torch.autograd.grad(y.sum(), [given[n] for n in names]), strict=True))

    expected = run(tuple(tensors))
    for count in range(1, len(tensors)):
        for names in itertools.combinations(tensors, count):
            assert_same_bits(run(names), {n: expected[n] for n in names}, str(names))


def test_checkpointing_chooses_the_same_experts() -> None:
    """Bitwise the gradients without checkpointing; a routing can also be made once and passed in."""
    seen: list[Tensor] = []

    def router(logits: Tensor) -> Routing:
        r = routing.top_k(logits, 2)
        seen.append(r.token)
        return r

    layer = ffn_ops.MoEFFN(12, 20, 6, 2, router=router)
    x = torch.randn(40, 12, requires_grad=True)
    expected = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    seen.clear()
    actual = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), [x, *layer.parameters()])
    assert len(seen) == 2 and torch.equal(*seen)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    r = layer.route(layer.logits(x.detach()))
    (expected,) = torch.autograd.grad(layer(x, routing=r).sum(), x, retain_graph=True)
    y = checkpoint(lambda x: layer(x, routing=r), x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


@pytest.mark.slow
def test_slabs_of_columns() -> None:
    """More routed rows than one slab of columns holds: the bits of a call that fits into one."""
    T, D, E = 33000, 600, 4
    x, logits = torch.randn(T, D), torch.randn(T, E)
    e = experts(E, D, 8, D, dtype=torch.float32)
    y = ffn_ops.moe(x, routing.top_k(logits, 2), **e)
    some = torch.arange(0, T, 500)
    assert torch.equal(y[some], ffn_ops.moe(x[some], routing.top_k(logits[some], 2), **e))


def refused_by_moe(cases: Callable[[Routing, Tensor], Iterable[tuple[str, Any, str]]]) -> None:
    """Each changes one argument of a call that passes."""
    r = routing.top_k(torch.randn(6, 3), 2)
    x = torch.randn(6, 5)
    good = {"x": x, **dict(zip(r._fields[:5], r[:5], strict=True))}
    end = (*experts(3, dtype=torch.float32).values(), False, False, "gelu", [0.0, 0.0], False)
    torch.ops.ffn_ops.moe(*good.values(), *end)
    for name, wrong, message in cases(r, x):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.ffn_ops.moe(*{**good, name: wrong}.values(), *end)


def test_raw_operators_refuse() -> None:
    """Shapes and dtypes that do not fit: an error before any work, never a crash."""
    refused_by_moe(
        lambda r, x: (
            ("token", r.token[:-1], "row: expected shape"),
            ("offsets", r.offsets[:-1], r"w_in: expected shape \[2, F, 5\], got \[3, "),
            ("offsets", r.offsets.int(), "offsets: expected dtype int64, got int32"),
            ("weight", r.weight.double(), "weight: expected dtype float32"),
            ("weight", None, "routing: expected token, weight, row"),
            ("x", x[:, :4], "w_in: expected shape"),
            ("x", x[:5], "token: expected|slot_offsets: expected"),
        )
    )
    ops = torch.ops.ffn_ops
    r = routing.top_k(torch.randn(6, 3), 2)
    with pytest.raises(RuntimeError, match="weight: expected shape"):
        ops.moe_sort(torch.ones(2, 3).long(), None, torch.ones(2), 3, 2, -1, False)
    with pytest.raises(RuntimeError, match="rows: expected shape"):
        ops.moe_combine(torch.randn(6, 5), *r[:5])


NOT_LOOKED_AT = "a GPU's indices are not read by the host: kernels drop what steps outside (tests/test_cuda.py)"


@pytest.mark.cpu_only(NOT_LOOKED_AT)
def test_raw_operators_refuse_indices() -> None:
    """Indices that would step outside."""
    refused_by_moe(
        lambda r, x: (
            ("token", r.token + 6, "token: expected indices between 0 and 5"),
            ("token", r.token - 1 - r.token.min(), "token: expected indices"),
            ("row", r.row + 1, "row: expected indices between 0 and 11"),
            ("offsets", r.offsets + 1, "offsets: expected"),
            ("offsets", r.offsets.flip(0), "offsets: expected"),
            ("slot_offsets", r.slot_offsets * 2, "slot_offsets: expected"),
            ("row", r.row.flip(0), "routing that lists each of its 12 rows once"),
            ("row", r.row * 0, "routing that lists each of its 12 rows once"),
            ("token", r.token * 0, "routing that lists each of its 12 rows once"),
            ("slot_offsets", r.slot_offsets * 0, "routing that lists each of its 12 rows once"),
        )
    )
    r, rows = routing.top_k(torch.randn(1, 4), 2), torch.randn(2, 5)
    for wrong in (r._replace(row=r.row * 0), r._replace(slot_offsets=r.slot_offsets // 2)):  # one token: twice, and one
        for call in (lambda r=wrong: ffn_ops.moe_dispatch(rows[:1], r), lambda r=wrong: ffn_ops.moe_combine(rows, r)):
            with pytest.raises(RuntimeError, match="lists each of its 2 rows once"):
                call()
    high = torch.full((6, 1), 3)
    with pytest.raises(RuntimeError, match="ids: expected indices below 3"):
        torch.ops.ffn_ops.route_top_k_backward(torch.ones(6, 1), torch.ones(6, 3), high, "softmax", False, False, 1.0)
    r, x, e = routing.top_k(torch.randn(6, 3), 2), torch.randn(6, 5), experts(3, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="offsets: expected"):
        ffn_ops.moe_experts(x, r.offsets, **e)


def test_public_errors() -> None:
    r = routing.top_k(torch.randn(6, 3), 2)
    e = experts(3, dtype=torch.float32)
    x = torch.randn(6, 5)
    for call, error, message in (
        (lambda: ffn_ops.moe(x, tuple(r), **e), TypeError, "routing: expected an ffn_ops.Routing"),
        (lambda: ffn_ops.moe(x[:5], r, **e), ValueError, r"x: expected shape \[..., D\] with 6 tokens"),
        (lambda: ffn_ops.moe(x, r._replace(token=r.token.int()), **e), TypeError, "routing.token: expected dtype"),
        (lambda: ffn_ops.moe(x, r._replace(row=r.row[1:]), **e), ValueError, r"routing.row: expected shape \[12\]"),
        (lambda: ffn_ops.moe(x, r._replace(weight=r.weight.int()), **e), TypeError, "routing.weight: expected.* int32"),
        (lambda: ffn_ops.moe(x, r._replace(weight=[1.0]), **e), TypeError, "routing.weight: .* list"),
        (lambda: ffn_ops.moe(x, routing.top_k(torch.randn(6, 4), 2), **e), ValueError, r"w_in: .*\[4, F, 5\]"),
        (lambda: ffn_ops.moe(x, r, **e, gated=1), TypeError, "gated: expected True or False"),
        (lambda: ffn_ops.moe(x, r, **e, activation=Gate("gelu", interleaved=True)), ValueError, "interleaved: "),
        (lambda: ffn_ops.moe(x, r, **e, activation=Gate("gelu", limit=1.0)), ValueError, "limit, up_shift: expected"),
        (lambda: ffn_ops.moe(x, r, **experts(3, F=7, dtype=torch.float32), gated=True), ValueError, "w_in: |w_down: "),
        (lambda: ffn_ops.moe(x, r, **e, activation="swiglu"), ValueError, "activation: expected one of"),
        (lambda: ffn_ops.moe_combine(x, r), ValueError, r"rows: expected shape \[12, D\]"),
        (lambda: ffn_ops.moe_dispatch(x[:4], r), ValueError, "with 6 tokens"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
