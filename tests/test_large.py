# SPDX-License-Identifier: BSD-3-Clause
"""More than 2^31 elements in one tensor: offsets are 64 bits wide everywhere. Only values past that border are read."""

from __future__ import annotations

import functools
import math
import os

import pytest
import torch
from device import DEVICE, generator

import ffn_ops

pytestmark = pytest.mark.slow

GIB = 1 << 30
BORDER = 1 << 31


def host_memory() -> float:
    """GiB that are free; NaN where the system does not say."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
        with open("/proc/meminfo") as lines:
            free = next(int(line.split()[1]) / (1 << 20) for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError, StopIteration):
        free = math.nan
    return free


def device_memory() -> float:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] / GIB


def need(gib: float) -> None:
    """Skips unless that much memory is free."""
    free = device_memory() if DEVICE == "cuda" else host_memory()
    if not free >= gib:
        pytest.skip(f"needs {gib} GiB of free memory, found {free:.1f}")


def silu(z: float) -> float:
    return z / (1 + math.exp(-z))


@pytest.mark.parametrize("shape", [(1, BORDER + 67), (BORDER // 64 + 3, 64)], ids=["one row", "many rows"])
def test_gated_act(shape: tuple[int, int]) -> None:
    """8 GiB: one long row is cut by columns, many rows by rows."""
    need(9)
    gate = torch.zeros(shape, dtype=torch.bfloat16)
    flat = gate.view(-1)
    places = [0, 1, BORDER - 1, BORDER, BORDER + 1, gate.numel() - 1]
    for i, place in enumerate(places):
        flat[place] = i + 1.0
    y = ffn_ops.gated_act(gate).view(-1)
    expected = torch.tensor([silu(i + 1.0) for i in range(len(places))]).bfloat16()
    assert torch.equal(y[places], expected)
    # Nothing else was touched: all other numbers are zero.
    assert sum(int(torch.count_nonzero(part)) for part in y.split(1 << 28)) == len(places)


def test_gated_act_strided() -> None:
    """A view whose last rows start past the border; the result is small."""
    need(5)
    gate = torch.zeros(BORDER + 64, dtype=torch.bfloat16).as_strided((33, 65), ((BORDER - 2) // 32, 1))
    gate[-1, -1], gate[-1, 0] = 2.0, -1.0
    y = ffn_ops.gated_act(gate)
    assert y[-1, -1] == torch.tensor(silu(2.0)).bfloat16() and y[-1, 0] == torch.tensor(silu(-1.0)).bfloat16()
    assert torch.count_nonzero(y) == 2


def test_ffn() -> None:
    """T * F just over 2^31, in forward (4 GiB saved) and backward (4 GiB more): the last token is right."""
    need(16)
    T, D, F = BORDER // 4096 + 5, 8, 4096
    g = generator(0)
    x = torch.zeros(T, D)
    row = torch.randn(1, D, generator=g)
    x[-1:] = row
    w_in, w_down = torch.randn(F, D, generator=g) / 4, torch.randn(3, F, generator=g) / 64
    tensors = [t.bfloat16().requires_grad_() for t in (x, w_in, w_down)]
    y = ffn_ops.ffn(*tensors, activation="silu")
    alone = [row.bfloat16().requires_grad_(), *(t.detach().requires_grad_() for t in tensors[1:])]
    y_alone = ffn_ops.ffn(*alone, activation="silu")
    # cuBLAS's products depend on the number of rows, by what bfloat16 rounds.
    same = torch.equal if DEVICE == "cpu" else functools.partial(torch.allclose, rtol=2**-6, atol=2**-6)
    assert same(y[-1:], y_alone) and torch.count_nonzero(y[:-1]) == 0
    d_y = torch.zeros_like(y)
    d_y[-1] = 1.0
    grads = torch.autograd.grad(y, tensors, d_y)
    expected = torch.autograd.grad(y_alone, alone, d_y[-1:])
    assert same(grads[0][-1:], expected[0]) and torch.count_nonzero(grads[0][:-1]) == 0
    # The sum over tokens has one term; all others are exact zeros.
    assert same(grads[1], expected[1]) and same(grads[2], expected[2])


def test_weight() -> None:
    """A weight with more than 2^31 elements, read to its end by forward and by dX."""
    need(11)
    F = 64
    D = BORDER // F + 3
    w = torch.zeros(F, D, dtype=torch.bfloat16)
    x = torch.zeros(2, D, dtype=torch.bfloat16)
    w[-1, -1], x[-1, -1] = 3.0, 2.0
    x.requires_grad_()
    y = ffn_ops.gated_linear(x, w, w, activation="identity")
    assert y[-1, -1] == 36.0 and torch.count_nonzero(y) == 1
    (d_x,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert d_x[-1, -1] == 36.0 and torch.count_nonzero(d_x) == 1


def test_experts() -> None:
    """Stacked weights with more than 2^31 elements: the last expert; experts without tokens have zero gradients."""
    need(11)
    E, F = 512, 64
    D = BORDER // (E * F) + 1
    w_in, w_down = torch.zeros(E, F, D, dtype=torch.bfloat16), torch.zeros(E, 1, F, dtype=torch.bfloat16)
    x = torch.zeros(2, D, dtype=torch.bfloat16)
    w_in[-1, -1, -1], w_down[-1, 0, -1], x[1, -1] = 3.0, 5.0, 2.0
    w_in.requires_grad_()
    x.requires_grad_()
    routing = ffn_ops.Routing.from_topk(torch.tensor([[0], [E - 1]]), torch.tensor([[1.0], [0.5]]), E)
    y = ffn_ops.moe(x, routing, w_in, w_down, activation="identity")
    assert y.tolist() == [[0.0], [15.0]]
    d_x, d_w_in = torch.autograd.grad(y, [x, w_in], torch.ones_like(y))
    assert d_x[1, -1] == 7.5 and torch.count_nonzero(d_x) == 1
    assert d_w_in[-1, -1, -1] == 5.0
    assert sum(int(torch.count_nonzero(part)) for part in d_w_in.view(-1).split(1 << 28)) == 1


def test_routed_rows() -> None:
    """R * F just over 2^31, in forward and backward: the last token is right, the others are zero."""
    need(24)
    E, K, D, F = 4, 2, 8, 4096
    T = BORDER // (K * F) + 5
    g = generator(0)
    row, logits = torch.randn(1, D, generator=g), torch.randn(1, E, generator=g)
    weights = [(torch.randn(s, generator=g) / 8).bfloat16() for s in ((E, F, D), (E, 3, F))]

    def run(x: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [x.bfloat16().requires_grad_(), *(w.detach().requires_grad_() for w in weights)]
        y = ffn_ops.moe(leaves[0], ffn_ops.routing.top_k(logits, K), *leaves[1:], activation="silu")
        d_y = torch.zeros_like(y)
        d_y[-1] = 1.0
        return (y.detach(), *torch.autograd.grad(y, leaves, d_y))

    alone = run(row, logits)
    x = torch.zeros(T, D)
    x[-1:] = row
    y, d_x, *d_weights = run(x, logits.expand(T, E).contiguous())
    assert torch.equal(y[-1:], alone[0]) and torch.count_nonzero(y[:-1]) == 0
    assert torch.equal(d_x[-1:], alone[1]) and torch.count_nonzero(d_x[:-1]) == 0
    assert all(torch.equal(a, b) for a, b in zip(d_weights, alone[2:], strict=True))
