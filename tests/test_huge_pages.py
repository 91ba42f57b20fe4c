# SPDX-License-Identifier: BSD-3-Clause
"""use_huge_pages: what the system says of the memory afterwards, and that nothing else changes."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed.tensor
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import ffn_ops

pytestmark = pytest.mark.cpu_only("the pages of the CPU's memory")
HUGE = 2 << 20


def can_collapse() -> bool:
    """Whether the system moves memory of its own onto a huge page."""
    if sys.platform != "linux":
        return False
    memory = mmap.mmap(-1, 2 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(b"x" * len(memory))
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return bool(madvise((start + HUGE - 1) // HUGE * HUGE, HUGE, 25) == 0)  # MADV_COLLAPSE


def huge_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of the mappings that hold these tensors, as the system counts them."""
    places = [t.data_ptr() + t.nbytes // 2 for t in tensors]
    total, held = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(each, 16) for each in span.groups())
            held = any(begin <= place < end for place in places)
        elif held and line.startswith("AnonHugePages"):
            total += int(line.split()[1]) << 10
    return total


def layer() -> nn.Module:
    """16 MB in float32, a quantised weight, and one that is tied."""
    torch.manual_seed(0)
    model = nn.Module()
    model.up, model.tied = nn.Linear(1024, 2048), nn.Linear(1024, 2048, bias=False)
    model.tied.weight = model.up.weight
    model.down = ffn_ops.quantize(torch.randn(4096, 2048), "int8")
    model.pair = nn.Parameter(TwoTensor(torch.randn(512, 2048), torch.randn(512, 2048)))
    return model


@pytest.mark.skipif(not can_collapse(), reason="needs Linux 6.1 with transparent huge pages")
def test_the_system_counts_what_is_returned() -> None:
    model = layer()
    moved = ffn_ops.use_huge_pages(model)
    pair = model.pair
    held = [model.up.weight, model.down.codes, pair.a, pair.b]  # type: ignore[union-attr]
    total = 4 * 1025 * 2048 + model.down.nbytes + 2 * 4 * 512 * 2048  # type: ignore[union-attr,operator]
    assert 0.6 * total < moved <= total  # what shares its huge page with nothing of ours may stay
    large = moved - (total - sum(t.nbytes for t in held))  # without what is smaller than a page
    assert large <= huge_bytes(held), (moved, huge_bytes(held))
    assert ffn_ops.use_huge_pages(model) >= moved  # again: they lie there already


def test_values_and_addresses_stay() -> None:
    model = layer()
    tensors = {name: t for name, t in model.state_dict().items() if type(t) is torch.Tensor}
    before = {name: (t.data_ptr(), t.clone()) for name, t in tensors.items()}
    x = torch.randn(3, 1024)
    y = model.up(x)  # type: ignore[operator]
    ffn_ops.use_huge_pages(model)
    for name, (address, values) in before.items():
        assert tensors[name].data_ptr() == address
        assert torch.equal(tensors[name], values), name
    assert torch.equal(model.up(x), y)  # type: ignore[operator]


@pytest.mark.skipif(not can_collapse(), reason="needs Linux 6.1 with transparent huge pages")
def test_memory_that_tensors_share_counts_once() -> None:
    """And of a view only what it covers."""
    memory = torch.randn(8 << 20)
    model = nn.ParameterList([memory[: 3 << 20], memory[2 << 20 : 5 << 20], memory[:4].t(), memory[: 3 << 20]])
    moved = ffn_ops.use_huge_pages(model)
    assert 4 * (5 << 20) - 2 * HUGE <= moved <= 4 * (5 << 20)
    assert ffn_ops.use_huge_pages(nn.ParameterList([memory[: 1 << 20].view(1024, 1024).t()])) <= 4 << 20


def test_tensors_of_other_kinds() -> None:
    """DTensors, lazy and fake ones; whatever device is torch's default."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        sharded = torch.distributed.tensor.distribute_tensor(torch.randn(2048, 2048), mesh)
        model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
        model.register_parameter("sharded", nn.Parameter(sharded))
        with FakeTensorMode():
            model.fake = nn.Linear(2048, 2048)
        with torch.device("meta"):
            moved = ffn_ops.use_huge_pages(model)
        assert 4 * 2048 * 2048 - 2 * HUGE <= moved <= 4 * 2048 * 2048 + 4 * 6 if can_collapse() else moved == 0
    finally:
        torch.distributed.destroy_process_group()


def test_small_and_absent_memory() -> None:
    """Nothing, tensors of another device, and what lies within a page cost nothing and raise nothing."""
    model = nn.Linear(4, 4)
    assert 0 <= ffn_ops.use_huge_pages(model) <= 4 * 20
    assert ffn_ops.use_huge_pages(nn.Linear(4096, 4096, device="meta")) == 0
    assert ffn_ops.use_huge_pages(nn.Linear(0, 4, bias=False)) == 0
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got Tensor"):
        ffn_ops.use_huge_pages(torch.zeros(4))  # type: ignore[arg-type]
