# SPDX-License-Identifier: BSD-3-Clause
"""Tests for a GPU only: graphs, streams, waiting for the device, several devices, TF32, agreement with the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from problems import DTYPES, FORMS, INVARIANT_FORMS, MOE_FORMS, Problem, assert_same_bits, dtype_name, results
from routes import ROUTERS
from torch import Tensor

import ffn_ops
from ffn_ops import Routing, routing

pytestmark = pytest.mark.cuda_only

SIZES = {"T": 150, "D": 270, "F": 300, "O": 70, "E": 6}  # several tiles, with tails, in every direction
FREE = {name: router for name, router in ROUTERS.items() if name != "base"}  # BASE assigns on the host
every_form = pytest.mark.parametrize("form", FORMS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
every_free_router = pytest.mark.parametrize("name", FREE)


def step(problem: Problem, tensors: dict[str, Tensor], d_y: Tensor) -> Callable[[], dict[str, Tensor]]:
    return functools.partial(results, problem.ours, tensors, d_y)


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """After a call on another stream, as torch asks for: libraries set themselves up in it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@every_form
def test_graph_of_a_step(form: str, dtype: torch.dtype) -> None:
    """Captured once, replayed on other numbers (mixtures: with other experts): the bits of a plain call on them."""
    problem = Problem(form, **SIZES)
    tensors, d_y = problem.draw(dtype=dtype)
    graph, out = captured(step(problem, tensors, d_y))
    for seed in (1, 2):
        others, d_other = problem.draw(seed, dtype)
        for name, other in others.items():
            tensors[name].copy_(other)
        d_y.copy_(d_other)
        graph.replay()
        assert_same_bits(out, results(problem.ours, others, d_other), f"seed {seed}:")


@every_free_router
def test_graph_of_a_router(name: str) -> None:
    logits = torch.randn(150, 6)
    graph, out = captured(lambda: FREE[name](logits))
    other = torch.randn(150, 6)
    logits.copy_(other)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(out, FREE[name](other), strict=True))


def test_graph_of_a_layer() -> None:
    """Router, mixture, losses and an optimiser step in one graph: it trains."""
    layer = ffn_ops.MoEFFN(64, 96, 6, 2)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    x, target = torch.randn(128, 64), torch.randn(128, 64)

    def train() -> Tensor:
        y, r, logits = layer(x, return_routing=True)
        loss = (y - target).square().mean() + 0.01 * routing.load_balancing_loss(logits, r) + routing.z_loss(logits)
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()
        return loss.detach()

    graph, loss = captured(train)
    losses = []
    for _ in range(20):
        graph.replay()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(abs(value) < 10 for value in losses)


def test_base_is_refused_while_capturing() -> None:
    logits = torch.randn(12, 4)
    routing.base(logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.zeros(1)  # a graph with nothing in it warns
        with pytest.raises(RuntimeError, match="captur"):
            routing.base(logits)
    assert routing.base(logits).offsets[-1] == 12  # and the device is as before


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Every call of torch that waits for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@every_form
def test_a_step_does_not_wait(form: str, request: pytest.FixtureRequest) -> None:
    problem = Problem(form, **SIZES)
    tensors, d_y = problem.draw(dtype=torch.float32)
    request.getfixturevalue("no_waiting")
    results(problem.ours, tensors, d_y)


@every_free_router
def test_a_router_does_not_wait(name: str, request: pytest.FixtureRequest) -> None:
    logits = torch.randn(150, 6, requires_grad=True)
    request.getfixturevalue("no_waiting")
    r = FREE[name](logits)
    r.statistics()
    (routing.load_balancing_loss(logits, r) + routing.z_loss(logits) + r.weight.sum()).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@every_form
def test_current_stream(form: str, dtype: torch.dtype) -> None:
    """Values that arrive late on a side stream: work on any other stream would read NaN."""
    problem = Problem(form, **SIZES)
    tensors, d_y = problem.draw(dtype=dtype)
    expected = results(problem.ours, tensors, d_y)
    late = {name: torch.full_like(t, torch.nan) for name, t in {**tensors, "d": d_y}.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles: a twentieth of a second
        for name, t in {**tensors, "d": d_y}.items():
            late[name].copy_(t)
        d_late = late.pop("d")
        actual = results(problem.ours, late, d_late)
        copies = {name: t.clone() for name, t in actual.items()}
    stream.synchronize()
    assert_same_bits(copies, expected)


def test_streams_at_the_same_time() -> None:
    """Workspaces are not shared between streams: each gets the bits it gets alone."""
    problems = [Problem(form, T=200 + 31 * i, D=128, F=160, O=96, E=6) for i, form in enumerate(("gated", *MOE_FORMS))]
    drawn = [p.draw(seed, torch.bfloat16) for seed, p in enumerate(problems)]
    expected = [results(p.ours, *d) for p, d in zip(problems, drawn, strict=True)]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(10):
        actual = []
        for problem, (tensors, d_y), stream in zip(problems, drawn, streams, strict=True):
            with torch.cuda.stream(stream):
                actual.append(results(problem.ours, tensors, d_y))
        torch.cuda.synchronize()
        for got, wanted in zip(actual, expected, strict=True):
            assert_same_bits(got, wanted)


@every_dtype
@every_form
def test_run_to_run(form: str, dtype: torch.dtype) -> None:
    """Many blocks, with other work that changes their order."""
    problem = Problem(form, T=1000, D=200, F=400, O=200, E=16, K=4)
    tensors, d_y = problem.draw(dtype=dtype)
    expected = results(problem.ours, tensors, d_y)
    other, side = torch.randn(2000, 2000), torch.cuda.Stream()
    for _ in range(5):
        with torch.cuda.stream(side):
            other @ other
        assert_same_bits(results(problem.ours, tensors, d_y), expected)


@every_dtype
@pytest.mark.parametrize("form", INVARIANT_FORMS)
def test_a_few_rows_of_many(form: str, dtype: torch.dtype) -> None:
    """Batch invariance at sizes where tiles and grids differ: 3 of 5000 tokens."""
    problem = Problem(form, T=5000, D=200, F=136, O=128, E=8)
    tensors, d_y = problem.draw(dtype=dtype)
    expected = results(problem.ours, tensors, d_y)
    rows = torch.tensor([0, 2777, 4999])
    tokens = [name for name in tensors if name in ("x", "gate", "up", "logits")]
    part = {name: t[rows] if name in tokens else t for name, t in tensors.items()}
    actual = results(problem.ours, part, d_y[rows])
    for name in ["y", *(f"d_{n}" for n in tokens)]:
        assert torch.equal(actual[name], expected[name][rows]), name


@every_dtype
@every_form
def test_agrees_with_the_cpu(form: str, dtype: torch.dtype) -> None:
    problem = Problem(form, **SIZES)
    tensors, d_y = problem.draw(dtype=dtype)
    actual = results(problem.ours, tensors, d_y)
    expected = results(problem.ours, {name: t.cpu() for name, t in tensors.items()}, d_y.cpu())
    for name, value in expected.items():
        close = 16 * torch.finfo(dtype).eps * max(1.0, float(value.abs().max()))
        torch.testing.assert_close(
            actual[name].cpu(), value, rtol=0, atol=close, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("name", ROUTERS)
def test_routes_as_the_cpu(name: str) -> None:
    """Who computes what is the same; weights to their last bits."""
    logits = torch.randn(150, 6, dtype=torch.float64)
    actual, expected = ROUTERS[name](logits), ROUTERS[name](logits.cpu())
    kept = int(expected.offsets[-1])
    for field in ("offsets", "slot_offsets", "counts"):
        assert torch.equal(getattr(actual, field).cpu(), getattr(expected, field)), field
    assert torch.equal(actual.token[:kept].cpu(), expected.token[:kept])
    here, there = (torch.where(r.row < kept, r.row, kept).cpu() for r in (actual, expected))
    assert torch.equal(here, there)
    torch.testing.assert_close(actual.weight[:kept].cpu(), expected.weight[:kept], rtol=1e-13, atol=1e-13)


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("form", ["plain", "gated", "gated_linear", *MOE_FORMS])
def test_float32_is_float32_unless_torch_says_otherwise(form: str, tf32: None) -> None:
    """TF32 keeps 11 bits. It is used only under torch's own switch, and leaves nothing behind."""
    problem = Problem(form, T=256, D=1024, F=512, O=256)
    tensors, d_y = problem.draw(dtype=torch.float32)
    exact = results(problem.plain, {name: t.double() for name, t in tensors.items()}, d_y.double())

    def worst(found: dict[str, Tensor]) -> float:
        return max(float((t - exact[n]).norm() / exact[n].norm()) for n, t in found.items())

    torch.backends.cuda.matmul.allow_tf32 = False
    first = results(problem.ours, tensors, d_y)
    assert worst(first) < 1e-5
    torch.backends.cuda.matmul.allow_tf32 = True
    assert worst(results(problem.ours, tensors, d_y)) < 3e-3
    torch.backends.cuda.matmul.allow_tf32 = False
    assert_same_bits(results(problem.ours, tensors, d_y), first)


OUTSIDE: dict[str, Callable[[Routing], Routing]] = {
    "tokens": lambda r: r._replace(token=r.token + 1000),
    "tokens below": lambda r: r._replace(token=r.token - 1000),
    "rows": lambda r: r._replace(row=r.row + 1_000_000),
    "rows below": lambda r: r._replace(row=-1 - r.row),
    "offsets": lambda r: r._replace(offsets=r.offsets + 1_000_000),
    "offsets that fall": lambda r: r._replace(offsets=r.offsets.flip(0)),
    "tokens' offsets": lambda r: r._replace(slot_offsets=r.slot_offsets * 1000),
}


@pytest.mark.parametrize("what", OUTSIDE)
def test_indices_that_step_outside(what: str) -> None:
    """The host cannot check them, so kernels skip such rows: no access out of range (compute-sanitizer checks), no
    uninitialised memory in the result, and the next call is right."""
    problem = Problem("moe_gated", **SIZES)
    tensors, d_y = problem.draw(dtype=torch.float32)
    logits = tensors.pop("logits")
    good = routing.top_k(logits, 2)

    def run(r: Routing) -> dict[str, Tensor]:
        def ours(x: Tensor, **weights: Tensor) -> Tensor:
            return ffn_ops.moe(x, r, **weights, gated=True, activation="silu")

        return results(ours, tensors, d_y)

    expected = run(good)
    found = run(OUTSIDE[what](good))
    torch.cuda.synchronize()
    assert all(torch.isfinite(t).all() for t in found.values())
    assert_same_bits(run(good), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
@every_form
def test_other_device(form: str) -> None:
    """Tensors on another than the current device: results there, the same bits, the current one unchanged."""
    problem = Problem(form, **SIZES)
    tensors, d_y = problem.draw(dtype=torch.float32)
    expected = results(problem.ours, tensors, d_y)
    there = {name: t.to("cuda:1") for name, t in tensors.items()}
    actual = results(problem.ours, there, d_y.to("cuda:1"))
    assert torch.cuda.current_device() == 0 and actual["y"].device.index == 1
    assert_same_bits({name: t.to("cuda:0") for name, t in actual.items()}, expected)
    if len(there) > 1:
        name, value = list(tensors.items())[-1]
        with pytest.raises((ValueError, RuntimeError), match=r"device|cuda:0"):
            problem.ours(**{**there, name: value})
