# SPDX-License-Identifier: BSD-3-Clause
"""replace beside sharded weights, on a mesh of one process: DTensors, FSDP2, and accelerate's hooks. More processes are
tested with what this package has for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from replacing import LAYERS, D, LlamaLike, pair
from same_function import assert_same_function, on, operators, results, seeded
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import ffn_ops

pytestmark = pytest.mark.cpu_only("the mesh is one of CPU processes")


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("local", [True, False], ids=["local outputs", "DTensor outputs"])
def test_tensor_parallel(mesh: DeviceMesh, local: bool, before: bool) -> None:
    """Sharded children are called; between them one operator, or torch's own where DTensors come out of them."""
    layer, plain = (seeded(LlamaLike) for _ in range(2))
    columns = ColwiseParallel(use_local_output=local)
    plan = {"gate_proj": columns, "up_proj": columns, "down_proj": RowwiseParallel()}
    if before:
        ffn_ops.replace(layer)
    parallelize_module(layer, mesh, plan)
    if not before:
        ffn_ops.replace(layer)
    x = torch.randn(5, D)
    assert operators(layer, x) == (["gated_act"] if local else [])
    ours, expected = results(layer, on(x)), results(plain, on(x))
    full = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in ours.items()}
    torch.testing.assert_close(full, expected)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", ["llama", "in a method"])
def test_fsdp(mesh: DeviceMesh, name: str, before: bool) -> None:
    """fully_shard of the layer itself, which makes a class of its own: gathered weights go into one operator."""
    layer, plain = (seeded(LAYERS[name][0]) for _ in range(2))
    if before:
        ffn_ops.replace(layer)
    fully_shard(layer, mesh=mesh)
    if not before:
        ffn_ops.replace(layer)
    x = torch.randn(5, D)
    assert operators(layer, x) == ["ffn"]
    ours, expected = results(layer, on(x)), results(plain, on(x))
    torch.testing.assert_close(
        {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in ours.items()}, expected
    )
    ffn_ops.restore(layer)
    assert operators(layer, x) == [] and torch.equal(layer(x), plain(x))
    assert operators(ffn_ops.replace(layer), x) == ["ffn"]


def test_fsdp_mixed_precision(mesh: DeviceMesh) -> None:
    layer = ffn_ops.replace(seeded(LlamaLike))
    fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    x = torch.randn(5, D)
    assert operators(layer, x) == ["ffn"] and layer(x).dtype is torch.bfloat16
    layer(x).float().square().sum().backward()
    assert all(p.grad.dtype is torch.float32 for p in layer.parameters())


def test_class_made_by_another_library() -> None:
    """A subclass of ours stays, and computes what the untouched layer does."""
    layer, plain = pair("llama")
    layer.__class__ = type("Wrapped", (type(layer),), {})
    x = torch.randn(5, D)
    assert operators(layer, x) == ["ffn"]
    ffn_ops.restore(layer)
    assert type(layer).__name__ == "Wrapped" and operators(layer, x) == [] and torch.equal(layer(x), plain(x))
    layer.act_fn = nn.GELU()  # nothing is recognised again silently
    assert operators(layer, x) == []


def test_hooks_of_accelerate() -> None:
    """Hooks wrap the instance's forward: if set before, the layer is left alone; if set later, they call the replaced
    layer."""
    hooks: Any = pytest.importorskip("accelerate.hooks")

    class Doubled(hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 2 * output

    x = torch.randn(5, D)
    layer, plain = (seeded(LlamaLike) for _ in range(2))
    hooks.add_hook_to_module(layer, Doubled())
    with pytest.warns(UserWarning, match="forward was set on the instance"):
        ffn_ops.replace(layer)
    assert torch.equal(layer(x), 2 * plain(x))
    layer = ffn_ops.replace(seeded(LlamaLike))
    hooks.add_hook_to_module(layer, Doubled())
    assert operators(layer, x) == ["ffn"]
    torch.testing.assert_close(layer(x), 2 * plain(x))
    hooks.remove_hook_from_module(layer)
    assert_same_function(layer, plain, on(x))
