# SPDX-License-Identifier: BSD-3-Clause
"""The work of a rank in tests/test_expert_parallel.py on quantised experts: its part of a batch, compared with the
one-process layer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from expert_checks import TOKENS, mesh_of, part
from ranks import raised
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import ffn_ops
from ffn_ops import QuantizedWeight, expert_parallel

SHARDS_BYTES = torch.__version__ >= "2.15"  # before, FSDP2 takes no parameters of integers


def gradients(layer: Any, x: Tensor, d_y: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(d_y)
    return [y.detach(), x.grad]


def layers(E: int, mesh: Any, format: str, **options: Any) -> tuple[Any, Any]:
    """One that has all experts, and this rank's part of it."""
    torch.manual_seed(0)
    whole = ffn_ops.MoEFFN(32, 64, E, top_k=1, gated=True, **options)
    torch.manual_seed(0)
    ours = ffn_ops.MoEFFN(32, 64, E, top_k=1, gated=True, expert_mesh=mesh, **options)
    for layer in (whole, ours):
        assert ffn_ops.quantize_(layer, format).paths("quantised") == [""]
    return whole, ours


def everything(rank: int, ranks: int) -> None:
    mesh = mesh_of(ranks)
    for E, format in ((5, "mxfp4"), (1, "int8")):  # the second rank has fewer experts, or none
        _one(rank, mesh, E, format)


def _one(rank: int, mesh: DeviceMesh, E: int, format: str) -> None:
    ranks, tokens = mesh.size(), TOKENS[mesh.size()]
    g = torch.Generator().manual_seed(1)
    x, d_y = (torch.randn(sum(tokens), 32, generator=g) for _ in range(2))
    whole, ours = layers(E, mesh, format)
    expected = [part(t, rank, tokens) for t in gradients(whole, x, d_y)]
    mine = part(x, rank, tokens), part(d_y, rank, tokens)
    found = gradients(ours, *mine)
    torch.testing.assert_close(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert ours.w_in.shape == whole.w_in.shape and ours.w_in.codes.placements[0].is_shard(0)
    begin, end = expert_parallel.experts_of(E, ranks, rank)
    for name in ("codes", "scales"):  # every rank has quantised its own
        assert torch.equal(getattr(ours.w_in, name).to_local(), getattr(whole.w_in, name)[begin:end])
    state = ours.state_dict()
    assert state["w_in.codes"].shape == whole.w_in.codes.shape
    other = layers(E, mesh, format)[1]
    for w in (other.w_in, other.w_down):
        for t in w.parts:
            t.to_local().zero_()
    other.load_state_dict(state)
    for again in (other, copy.deepcopy(ours).to(torch.float64).to(torch.float32)):
        assert torch.equal(gradients(again, *mine)[0], found[0])
    w_in, w_down = (_local(w) for w in (ours.w_in, ours.w_down))  # a shard as it is
    routing = ffn_ops.routing.top_k(mine[0] @ whole.router.weight.t(), 1)
    options: dict[str, Any] = {"mesh": mesh, "gated": True}
    y = expert_parallel.moe(mine[0], routing, w_in, w_down, **options)
    assert torch.equal(y, expert_parallel.moe(mine[0], routing, ours.w_in, ours.w_down, **options))
    calls = [
        (lambda: expert_parallel.moe(mine[0].double(), routing, w_in, w_down, **options), "got float64"),
        (lambda: expert_parallel.moe(mine[0], routing, w_in, whole.w_down.dequantize(), **options),
         "w_down: expected a QuantizedWeight as the other weights are, got Tensor"),
        (lambda: expert_parallel.moe(mine[0][:, :31], routing, w_in, w_down, **options),
         f"w_in: expected a quantised weight of shape [{end - begin}, 2F, 31]"),
        (lambda: ffn_ops.moe(mine[0], routing, ours.w_in, ours.w_down, gated=True),
         "w_in: expected a plain tensor, such as a local shard, got a DTensor of [Shard(dim=0)]"),
    ]  # fmt: skip
    for call, message in calls:
        assert message in raised(call), raised(call)


def _local(w: QuantizedWeight) -> QuantizedWeight:
    parts = {name: t.to_local() for name, t in w.named_buffers()}  # type: ignore[attr-defined]
    return QuantizedWeight(w.format, block=w.block, **parts)


def sharded(rank: int) -> None:
    """FSDP2 shards parameters: biases and the router, and bytes that became parameters. Those of a rank are its half;
    of three experts one rank has two. Buffers, such as bytes of which none was asked, every rank has whole."""
    mesh = mesh_of(2)
    cases = ((4, "mxfp4", ()), (4, "mxfp4", ("codes", "scales")), (3, "int4", ("codes",)))
    for E, format, cut in cases[: None if SHARDS_BYTES else 1]:
        whole, _ = layers(E, None, format, bias=True, num_shared=0)
        ours = copy.deepcopy(whole)
        for w in (ours.w_in, ours.w_down) if cut else ():
            assert w.as_parameters() is w
        fully_shard(ours, mesh=mesh)
        for w, same in ((ours.w_in, whole.w_in), (ours.w_down, whole.w_down)):
            begin, end = expert_parallel.experts_of(E, 2, rank)
            for name, t in w.named_parts().items():
                local = t.to_local() if name in cut else t  # type: ignore[attr-defined]
                assert torch.equal(local, getattr(same, name)[begin:end] if name in cut else getattr(same, name))
        x, d_y = (torch.randn(6, 32, generator=torch.Generator().manual_seed(3)) for _ in range(2))
        for found, expected in zip(gradients(ours, x, d_y), gradients(whole, x, d_y), strict=True):
            assert torch.equal(found, expected)
        for name, q in whole.named_parameters():
            p = ours.get_parameter(name)
            torch.testing.assert_close(p.grad.full_tensor(), q.grad, msg=name)  # type: ignore[union-attr]
        state = ours.state_dict()
        for name in (f"w_in.{each}" for each in cut):
            assert torch.equal(state[name].full_tensor(), whole.state_dict()[name])
            state[name] = state[name] * 1
            ours.get_parameter(name).to_local().zero_()  # type: ignore[attr-defined]
        ours.load_state_dict(state)
        assert torch.equal(ours(x), whole(x))
    if SHARDS_BYTES:
        _mixed(mesh)


def _mixed(mesh: DeviceMesh) -> None:
    """Mixed precision rounds parameters of floating-point numbers, and no bytes or scales."""
    whole, _ = layers(4, None, "int4", bias=True, num_shared=0)
    ours, x = copy.deepcopy(whole), torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
    for w in (ours.w_in, ours.w_down):
        w.as_parameters()
    fully_shard(ours, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    assert torch.equal(ours(x), whole.to(torch.bfloat16)(x.bfloat16()))
