# SPDX-License-Identifier: BSD-3-Clause
"""Top-k routing against the plain formula: every option, ties, NaN, infinities, gradients, bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from device import generator, gradcheck, gradgradcheck
from torch import Tensor

from ffn_ops import reference, routing

TOP_K: dict[str, dict[str, Any]] = {
    "the documents'": {},
    "Mixtral, Qwen3": {"renormalize": True},
    "gpt-oss": {"by_logits": True},
    "sigmoid": {"score": "sigmoid"},
    "sigmoid renormalised, scaled": {"score": "sigmoid", "renormalize": True, "scale": 2.5},
    "DeepSeek-V3": {
        "score": "sigmoid", "renormalize": True, "scale": 2.5, "num_groups": 4, "top_groups": 2, "bias": True,
    },
    "softmax with bias": {"bias": True},
    "softmax after, with bias": {"by_logits": True, "bias": True},
    "groups of one expert": {"num_groups": 12, "top_groups": 5},
    "DeepSeek-V2": {"num_groups": 4, "top_groups": 2, "group_best": 1, "scale": 16.0},
    "DeepSeek-V4": {"score": "sqrt_softplus", "renormalize": True, "scale": 1.5, "bias": True},
    "sqrt(softplus)": {"score": "sqrt_softplus"},
    "Kolibri": {"score": "sigmoid", "renormalize": True, "by_logits": True, "bias": True},
    "Laguna": {"score": "sigmoid", "renormalize": True, "softcap": 1.5, "bias": True},
    "Inkling": {"score": "sigmoid", "renormalize": True, "scale": 8.0, "shared": 4, "bias": True},
    "softmax with shared experts": {"shared": 4},
    "groups beside shared experts": {"score": "sqrt_softplus", "shared": 4, "num_groups": 4, "top_groups": 2},
}  # fmt: skip


def options_of(name: str, E: int, dtype: torch.dtype) -> dict[str, Any]:
    options = dict(TOP_K[name])
    if options.get("bias"):
        options["bias"] = torch.linspace(-0.3, 0.3, E - options.get("shared", 0), dtype=dtype).flip(0)
    return options


def chosen(logits: Tensor, k: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Ids and weights out of the Routing: the experts of each token in the order of its slots."""
    r = routing.top_k(logits, k, **options)
    expert = torch.bucketize(torch.arange(len(r.token)), r.offsets[1:], right=True)
    k += options.get("shared", 0)
    return expert[r.row].view(-1, k), r.weight[r.row].view(-1, k)


@pytest.mark.parametrize("name", TOP_K)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_top_k(name: str, dtype: torch.dtype, isa: str) -> None:
    """Against the plain formula, for widths below, at and above vectors; k beyond what insertion is used for."""
    for T, E, k in ((7, 12, 3), (1, 12, 5), (65, 36, 4), (3, 132, 40), (5, 12, 1)):
        options = options_of(name, E, dtype)
        groups = options.get("num_groups", 1)
        if k > (E - options.get("shared", 0)) // groups * options.get("top_groups", 1):
            continue
        logits = torch.randn(T, E, generator=generator(E), dtype=torch.float64).to(dtype)
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
        options["bias"] = torch.zeros_like(options["bias"])
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
    assert all(len(set(row)) == len(row) and min(row) >= 0 and max(row) < 12 for row in ids.tolist())
    expected_ids, expected = reference.top_k(logits, 4, **options)
    if options.get("num_groups", 1) == 1 and ("bias" not in options or options.get("by_logits")):
        assert torch.equal(ids, expected_ids)  # else NaN scores tie, or NaN group sums do
        torch.testing.assert_close(weights, expected, equal_nan=True)
    assert ids[1, :2].tolist() == [2, 1] or options.get("num_groups", 1) > 1 or "bias" in options


@pytest.mark.parametrize("name", TOP_K)
def test_top_k_gradients(name: str) -> None:
    E, k = 12, 3
    options = options_of(name, E, torch.float64)
    g = generator(3)
    logits = (torch.randperm(4 * E, generator=g, dtype=torch.float64).view(4, E) / 9 - 2).requires_grad_()

    def weights(z: Tensor) -> Tensor:
        return routing.top_k(z, k, **options).weight

    assert gradcheck(weights, [logits], nondet_tol=0)
    assert gradgradcheck(weights, [logits], nondet_tol=0)
    found, expected = chosen(logits, k, **options)[1], reference.top_k(logits, k, **options)[1]
    d = torch.arange(found.shape[1])
    ours, plain = (torch.autograd.grad((w * d).sum(), logits) for w in (found, expected))
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


@pytest.mark.parametrize("k", [16, 64])  # by insertion in lanes, by a heap
def test_rows_as_wide_as_a_context(k: int, isa: str) -> None:
    """An indexer of sparse attention chooses keys as a router chooses experts: of 16,384, many of them equal, and most
    of them -inf where they lie behind the query."""
    scores = torch.randint(0, 9, (3, 16_384), generator=generator(0)).float()
    for row, seen in enumerate((16_384, 1000, k)):
        scores[row, seen:] = -torch.inf
    wanted = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(chosen(scores, k, by_logits=True)[0], wanted)
