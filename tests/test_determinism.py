# SPDX-License-Identifier: BSD-3-Clause
"""Promises 2 and 3, bit for bit: runs, thread counts, Python threads; a row alone and in a batch, anywhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from device import generator
from problems import DTYPES, FORMS, INVARIANT_FORMS, Problem, assert_same_bits, dtype_name, results
from torch.nn import functional as F

import ffn_ops

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)

# Enough work for several threads, several tasks in every direction, k longer than one chunk.
SPREAD = {"T": 150, "D": 270, "F": 300, "O": 70}


# Tasks and threads know the size of an element, not its kind.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("form", FORMS)
def test_threads_and_runs(form: str, dtype: torch.dtype, isa: str, threads: None) -> None:
    problem = Problem(form, **SPREAD)
    tensors, d_y = problem.draw(dtype=dtype)
    torch.set_num_threads(1)
    expected = results(problem.ours, tensors, d_y)
    for count in (2, 2, 3):
        torch.set_num_threads(count)
        assert_same_bits(results(problem.ours, tensors, d_y), expected, f"{count} threads:")


@pytest.mark.cpu_only("threads are the CPU's")
def test_threads_with_many_experts(threads: None) -> None:
    """So many that a thread packs and multiplies all of an expert by itself."""
    problem = Problem("moe", E=64, T=320, D=170, F=148, O=40)
    tensors, d_y = problem.draw(dtype=torch.float32)
    torch.set_num_threads(1)
    expected = results(problem.ours, tensors, d_y)
    for count in (2, 3):
        torch.set_num_threads(count)
        for _ in range(3):
            assert_same_bits(results(problem.ours, tensors, d_y), expected, f"{count} threads:")


@pytest.mark.cpu_only("threads are the CPU's")
def test_gated_act_threads(threads: None) -> None:
    """Rows longer than one task."""
    problem = Problem("gated_act", T=5, F=50001)
    tensors, d_y = problem.draw(dtype=torch.float32)
    torch.set_num_threads(1)
    expected = results(problem.ours, tensors, d_y)
    torch.set_num_threads(3)
    assert_same_bits(results(problem.ours, tensors, d_y), expected)


LARGE = 33 << 20  # bytes: outputs of more than 32 MiB are stored past the caches


@pytest.mark.cpu_only("the caches are the CPU's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_activations_larger_than_the_caches(dtype: torch.dtype, isa: str) -> None:
    """The bits of small calls. Rows of an odd width begin anywhere in a cache line."""
    F = 30011
    T = LARGE // (F * dtype.itemsize) + 1
    gate, up = torch.randn(T, 2 * F, generator=generator(0)).to(dtype).chunk(2, -1)
    d_y = torch.randn(T, F, generator=generator(1)).to(dtype)

    def run(rows: slice) -> list[torch.Tensor]:
        leaves = [t[rows].detach().requires_grad_() for t in (gate, up)]
        y = ffn_ops.gated_act(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, d_y[rows])]

    whole = run(slice(T))
    for begin in range(0, T, 50):
        rows = slice(begin, begin + 50)
        assert all(torch.equal(w[rows], part) for w, part in zip(whole, run(rows), strict=True))


@pytest.mark.cpu_only("the caches are the CPU's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_dispatch_larger_than_the_caches(dtype: torch.dtype, isa: str) -> None:
    D = 1501
    T = LARGE // (8 * D * dtype.itemsize) + 1
    x = torch.randn(T, D, generator=generator(0)).to(dtype)
    routing = ffn_ops.routing.top_k(torch.randn(T, 16, generator=generator(1)), 8, capacity_factor=1.0)
    rows, kept = ffn_ops.moe_dispatch(x, routing), int(routing.offsets[-1])
    assert kept < len(rows) and torch.equal(rows[:kept], x[routing.token[:kept]]) and not rows[kept:].any()


def test_python_threads() -> None:
    """Calls at the same time share no memory: four threads, different sizes, each gets the bits it gets alone."""
    problems = [Problem("gated", T=20 + 31 * i, D=64, F=96, O=48) for i in range(4)]
    drawn = [p.draw(seed, torch.float32) for seed, p in enumerate(problems)]
    expected = [results(p.ours, *d) for p, d in zip(problems, drawn, strict=True)]

    def repeat(i: int) -> None:
        for _ in range(10):
            assert_same_bits(results(problems[i].ours, *drawn[i]), expected[i], f"problem {i}:")

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(repeat, i) for i in range(4)]:
            done.result()


@pytest.mark.cpu_only("threads are the CPU's")
def test_python_threads_with_helpers(threads: None) -> None:
    """More threads than cores, and as many callers: helpers lose their core in the middle of a task, or do not come
    before the call ends. Every call gets the bits of one thread."""
    time.sleep(0.15)  # after such waits callers work alone for a tenth of a second
    problems = [Problem("gated", T=100 + 31 * i, D=270, F=300, O=48) for i in range(4)]
    drawn = [p.draw(seed, torch.float32) for seed, p in enumerate(problems)]
    torch.set_num_threads(1)
    expected = [results(p.ours, *d) for p, d in zip(problems, drawn, strict=True)]

    def repeat(i: int) -> None:
        torch.set_num_threads((64, 2, 3, 5)[i])
        for _ in range(5):
            assert_same_bits(results(problems[i].ours, *drawn[i]), expected[i], f"problem {i}:")

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(repeat, i) for i in range(4)]:
            done.result()


def _threads_started(call: Callable[[], object], count: int) -> int:
    """How many threads ``call`` starts in a thread that may use ``count`` and has started none."""
    started = []

    def run() -> None:
        torch.set_num_threads(count)
        before = set(Path("/proc/self/task").iterdir())
        call()
        started.append(len(set(Path("/proc/self/task").iterdir()) - before))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return started[0]


@pytest.mark.cpu_only("threads are the CPU's")
def test_small_calls_wake_no_threads(threads: None) -> None:
    """Work for two or three threads does not wake 64; more work does. torch wakes all or none."""
    time.sleep(0.15)  # as above
    layer, gate = ffn_ops.FeedForward(128, 256, 16, 0.0), torch.randn(64, 1500)
    experts, x = ffn_ops.MoEFFN(32, 64, num_experts=4), torch.randn(4, 32)
    token, many = torch.randn(4, 128, requires_grad=True), torch.randn(2048, 128)

    def step() -> object:
        return torch.autograd.grad(layer(token).sum(), [token, *layer.parameters()])

    for call in (step, lambda: experts(x).sum().backward(), lambda: ffn_ops.gated_act(gate), lambda: layer(many[:20])):
        assert _threads_started(call, 64) == 0
    assert _threads_started(lambda: layer(many[:20]), 2) == 1
    time.sleep(0.15)  # as above: starting a thread may have taken long
    assert _threads_started(lambda: layer(many), 64) == 63


BATCH = 257
# One row; sizes to both sides of the register tiles (6, 12, 14), of the streamed sizes (8) and of blocks (64, 256).
COUNTS = (1, 2, 3, 5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17, 28, 31, 32, 33, 63, 65, 256)
INVARIANT = ("y", "d_x", "d_gate", "d_up", "d_logits")  # rows of tokens; weight gradients are sums over the batch


@every_dtype
@pytest.mark.parametrize("form", INVARIANT_FORMS)
def test_rows_alone_and_in_a_batch(form: str, dtype: torch.dtype, isa: str) -> None:
    """The first T rows, and rows from other places, have the bits that they have in a batch of 257."""
    whole = Problem(form, T=BATCH, D=270, F=35, O=40)
    tensors, d_y = whole.draw(dtype=dtype)
    tokens = [name for name, t in tensors.items() if t.shape[0] == BATCH]
    expected = results(whole.ours, tensors, d_y)
    g = generator(0)
    for T in COUNTS:
        for rows in (torch.arange(T), torch.randperm(BATCH, generator=g)[:T]):
            part = {name: t[rows] if name in tokens else t for name, t in tensors.items()}
            actual = results(whole.ours, part, d_y[rows])
            for name in INVARIANT:
                if name in expected:
                    assert torch.equal(actual[name], expected[name][rows]), f"{name}: {T} rows from {rows[0]} on"


def test_linear_is_not_batch_invariant() -> None:
    """Negative control: torch's own product fails the test above at some size, so the test can fail."""
    g = generator(0)
    differs = False
    for dtype in (torch.float32, torch.bfloat16):
        for width in (777, 2048):
            x, w = torch.randn(BATCH, width, generator=g).to(dtype), torch.randn(300, width, generator=g).to(dtype)
            y = F.linear(x, w)
            differs |= any(not torch.equal(F.linear(x[:T], w), y[:T]) for T in COUNTS)
    if not differs:
        pytest.skip("torch's linear happens to be batch-invariant on this machine at these sizes")
    assert differs
