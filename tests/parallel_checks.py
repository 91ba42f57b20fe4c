# SPDX-License-Identifier: BSD-3-Clause
"""The work of a rank in tests/test_distributed.py: FSDP2 and tensor parallelism around the modules, compared with one
process. A separate module, so that processes import it without the tests.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ranks import raised
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import ffn_ops
from ffn_ops import routing

D, F = 12, 20
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "FeedForward": lambda: ffn_ops.FeedForward(D, 30, 4, 0.0),
    "FeedForward, recompute": lambda: ffn_ops.FeedForward(D, 30, 4, 0.0, bias=False, recompute=True),
    "PlainFFN": lambda: ffn_ops.GELUFFN(D, F),
    "GLU": lambda: ffn_ops.GLU(D, D),
    "GatedFFN": lambda: ffn_ops.GatedFFN(D, F, 2, out_proj=True),
    "MoEFFN": lambda: ffn_ops.MoEFFN(D, F, 4, 2, gated=True, num_shared=1),
}


def seeded(make: Callable[[], Any], seed: int = 3) -> Any:
    torch.manual_seed(seed)
    return make()


def full(t: Any) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def fsdp(rank: int) -> None:
    """Two optimiser steps of a model of every layer, sharded layer by layer, and the same in one process."""

    def model() -> nn.Module:
        return nn.Sequential(*(make() for make in LAYERS.values()))

    one, ours = seeded(model), seeded(model)
    for layer in ours:
        fully_shard(layer)
    fully_shard(ours)
    x, target = torch.randn(2, 8, D, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(x.chunk(2)[rank]), one(x).chunk(2)[rank])
    for found, t, goal in ((one, x, target), (ours, *(t.chunk(2)[rank] for t in (x, target)))):
        optimizer = torch.optim.AdamW(found.parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            (found(t) - goal).square().mean().backward()
            optimizer.step()
    for (name, p), q in zip(ours.named_parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(full(p), q, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")

    one.apply(lambda m: getattr(m, "reset_parameters", int)())
    with torch.device("meta"):
        ours = model()
    for layer in ours:
        fully_shard(layer)
    ours.to_empty(device="cpu")
    with torch.no_grad():
        for p in ours.parameters():
            p.fill_(torch.nan)
    ours.apply(lambda m: getattr(m, "reset_parameters", int)())
    for (name, p), q in zip(ours.named_parameters(), one.parameters(), strict=True):
        assert isinstance(p, DTensor) and full(p).abs().max() < 2 * q.abs().max(), name
        assert p.numel() < 99 or full(p).std() > q.std() / 2, name


def fsdp_mixed(rank: int) -> None:
    """bfloat16 parameters and activations, float32 gradients: output and gradients of the bfloat16 layer to the bit."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for name, make in LAYERS.items():
        one, ours = seeded(make), seeded(make)
        fully_shard(ours, mp_policy=policy)
        both = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1))
        y = ours(both[rank])
        assert y.dtype is torch.bfloat16
        y.float().square().sum().backward()
        low = copy.deepcopy(one).bfloat16()
        grads = []
        for i in range(2):
            expected = low(both[i].bfloat16())
            assert i != rank or torch.equal(y, expected), name
            grads.append(
                [g.float() for g in torch.autograd.grad(expected.float().square().sum(), list(low.parameters()))]
            )
        for p, first, second in zip(ours.parameters(), *grads, strict=True):
            assert full(p).dtype is torch.float32
            torch.testing.assert_close(full(p.grad), (first + second) / 2, rtol=1e-6, atol=1e-6)


class Choose(nn.Module):
    """A router as a module of its own, which FSDP2 wraps: its result is a Routing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, 4)

    def forward(self, x: Tensor) -> ffn_ops.Routing:
        return ffn_ops.routing.top_k(self.linear(x), k=2)


def rounded(routing: ffn_ops.Routing, dtype: torch.dtype) -> ffn_ops.Routing:
    return routing._replace(weight=routing.weight.to(dtype))


def fsdp_routing(rank: int) -> None:
    """A Routing that FSDP2's casts of arguments and results have rounded: output and gradients of those weights."""
    half = torch.bfloat16
    for output_dtype, cast in ((None, True), (None, False), (half, False), (torch.float32, True)):
        policy = MixedPrecisionPolicy(half, torch.float32, output_dtype=output_dtype, cast_forward_inputs=cast)
        layers = [seeded(Choose), seeded(lambda: ffn_ops.MoEFFN(D, F, 4, 2))]
        low = [copy.deepcopy(layer).to(half) for layer in layers]
        for layer in layers:
            fully_shard(layer, mp_policy=policy)
        both = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1)).to(half)
        y, routing, _ = layers[1](both[rank], routing=layers[0](both[rank]), return_routing=True)
        last = torch.float32 if output_dtype is None and not cast else output_dtype or half
        assert routing.weight.dtype is last and routing.token.dtype is torch.int64
        y.float().square().sum().backward()
        grads = []
        for i in range(2):
            chosen = low[0](both[i])
            if output_dtype is half or cast:
                chosen = rounded(chosen, half)
            expected = low[1](both[i], routing=rounded(chosen, torch.float32))  # exact: what is asked of 16 bits
            assert i != rank or torch.equal(y, expected.to(y.dtype)), (output_dtype, cast)
            total = expected.float().square().sum()
            parameters = [p for layer in low for n, p in layer.named_parameters() if not n.startswith("router")]
            grads.append([g.float() for g in torch.autograd.grad(total, parameters)])
        parameters = [p for layer in layers for n, p in layer.named_parameters() if not n.startswith("router")]
        for p, first, second in zip(parameters, *grads, strict=True):
            torch.testing.assert_close(full(p.grad), (first + second) / 2, rtol=1e-6, atol=1e-6)


COLUMNS, ROWS = {"local": ColwiseParallel, "dtensor": lambda: ColwiseParallel(use_local_output=False)}, RowwiseParallel


def plans(kind: str) -> dict[str, dict[str, Any]]:
    column = COLUMNS[kind]
    whole = ColwiseParallel(output_layouts=Replicate())
    feed = {"w1": column(), "w3": column(), "w2": ROWS()}
    return {
        "FeedForward": feed,
        "FeedForward, recompute": feed,
        "PlainFFN": {"linear1": column(), "linear2": ROWS()},
        "GLU": {"linear_gate": whole, "linear_value": whole},
        "GatedFFN": {"value_layers.*": column(), "gate_layers.*": column(), "out_proj": ROWS()},
        "MoEFFN": {f"shared.{name}": style for name, style in feed.items()},
    }


def tensor_parallel(rank: int) -> None:
    """Column- and row-wise children: output and gradients of one process, with local tensors or DTensors between."""
    mesh = init_device_mesh("cpu", (2,))
    x = torch.randn(7, D, generator=torch.Generator().manual_seed(1))
    for kind in COLUMNS:
        for name, plan in plans(kind).items():
            one, ours = seeded(LAYERS[name]), seeded(LAYERS[name])
            parallelize_module(ours, mesh, plan)
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            expected, y = one(a), ours(b)
            say = "{}, {}: {}".format
            torch.testing.assert_close(y, expected, msg=functools.partial(say, kind, name))
            for out in (expected, y):
                out.square().sum().backward()
            torch.testing.assert_close(b.grad, a.grad)
            for (key, p), q in zip(ours.named_parameters(), one.parameters(), strict=True):
                torch.testing.assert_close(full(p.grad), q.grad, msg=functools.partial(say, name, key))


def dtensors(rank: int) -> None:
    """gated_act is computed shard by shard, with its gradient; operators that need whole matrices raise an error."""
    mesh = init_device_mesh("cpu", (2,))
    gate, up, d = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1))
    a, b = gate.clone().requires_grad_(), up.clone().requires_grad_()
    expected = ffn_ops.gated_act(a, b)
    expected.backward(d)
    for placement in (Shard(0), Shard(1), Replicate()):
        sharded = [distribute_tensor(t, mesh, [placement]).requires_grad_() for t in (gate, up)]
        out = ffn_ops.gated_act(*sharded)
        assert out.placements == (placement,) and torch.equal(out.full_tensor(), expected), placement
        out.backward(distribute_tensor(d, mesh, [placement]))
        for found, right in zip(sharded, (a, b), strict=True):
            assert torch.equal(found.grad.full_tensor(), right.grad), placement
    # Sums that are still to be made are made before the activation, and placements that differ are brought together.
    halves = DTensor.from_local(gate / 2, mesh, [Partial()])
    out = ffn_ops.gated_act(halves, distribute_tensor(up, mesh, [Shard(1)]))
    torch.testing.assert_close(out.full_tensor(), expected)
    assert "up: expected a DTensor" in raised(lambda: ffn_ops.gated_act(halves, up))
    w = distribute_tensor(torch.zeros(6, 6), mesh, [Shard(0)])
    message = raised(lambda: ffn_ops.ffn(gate, w, w))
    assert message.startswith("TypeError: w_in: expected a plain tensor, such as a local shard, got a DTensor"), message
    layer = ffn_ops.MoEFFN(D, F, 4)
    layer.w_in = nn.Parameter(distribute_tensor(layer.w_in.detach(), mesh, [Shard(1)]))
    assert "w_in: expected a plain tensor" in raised(lambda: layer(torch.zeros(3, D)))


def expert_and_fsdp(rank: int) -> None:
    """Two groups of two ranks: experts sharded over a group and, by FSDP, across them; the rest over all four."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    everyone = init_device_mesh("cpu", (4,))

    def model(expert_mesh: Any = None) -> nn.Module:
        options: dict[str, Any] = {"gated": True, "num_shared": 1, "expert_mesh": expert_mesh}
        return nn.Sequential(nn.Linear(D, D), *(ffn_ops.MoEFFN(D, F, 8, 2, **options) for _ in range(2)))

    one, ours = seeded(model), seeded(lambda: model(mesh["ep"]))
    for layer in ours[1:]:
        for part in (layer.router, layer.shared):
            fully_shard(part, mesh=everyone)
        fully_shard(layer, mesh=mesh["dp"], shard_placement_fn=lambda p: Shard(1))
    fully_shard(ours, mesh=everyone)
    for module in ours.modules():  # the losses of all ranks are summed, and so are the gradients of every parameter
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    x, target = torch.randn(2, 16, D, generator=torch.Generator().manual_seed(1))
    for found, t, goal in ((one, x, target), (ours, *(t.chunk(4)[rank] for t in (x, target)))):
        optimizer = torch.optim.AdamW(found.parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            ((found(t) - goal).square().sum() / x.numel()).backward()
            optimizer.step()
    for (name, p), q in zip(ours.named_parameters(), one.parameters(), strict=True):
        whole = full(p)
        assert isinstance(p, DTensor) and p.to_local().numel() == p.numel() // 4, name
        torch.testing.assert_close(whole, q, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def balance(rank: int, ranks: int) -> None:
    """Loads of all ranks move the bias and weigh the loss: what one process computes of all of their tokens."""
    whole = torch.randn(ranks, 9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole += 2 * torch.eye(6, dtype=torch.float64)[:ranks, None]  # each rank likes an expert of its own
    mask = torch.rand(ranks, 9, generator=torch.Generator().manual_seed(2)).argsort(1) > 2
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("dp", "ep"))
    pair = slice(rank // 2 * 2, rank // 2 * 2 + 2)
    everyone, two = whole.flatten(0, 1), whole[pair].flatten(0, 1)
    groups = ((dist.group.WORLD, everyone), (mesh, everyone), (mesh["ep"], two), (mesh["ep"].get_group(), two))
    for group, tokens in groups:
        one, ours = routing.BiasedTopK(6, 2), routing.BiasedTopK(6, 2)
        for _ in range(5):
            one.update(one(tokens), 0.5)
            ours.update(ours(whole[rank]), 0.5, group=group)
        assert one.bias.any() and torch.equal(ours.bias, one.bias)
        for _ in range(2):
            one.solve(tokens)
            ours.solve(whole[rank], group=group)
        assert one(tokens).statistics().max_over_mean < 1.6 and torch.equal(ours.bias, one.bias)
    alone = routing.BiasedTopK(6, 2)
    alone.update(alone(whole[rank]))
    biases = [torch.empty(6) for _ in range(ranks)]
    dist.all_gather(biases, alone.bias)
    assert not all(torch.equal(bias, alone.bias) for bias in biases)  # without a group they drift apart
    empty = routing.BiasedTopK(6, 2)
    empty.update(empty(whole[rank][: 9 * (rank == 0)]), group=mesh)
    alone.bias.zero_()
    alone.update(alone(whole[0]))
    assert torch.equal(empty.bias, alone.bias)
    empty.solve(whole[rank][: 9 * (rank == 0)], group=mesh)
    alone.solve(whole[0])
    assert torch.equal(empty.bias, alone.bias)

    for masks in (None, mask):
        mine, all_of_them = whole[rank].clone().requires_grad_(), everyone.clone().requires_grad_()
        r = routing.top_k(mine, 2, capacity_factor=0.5, mask=None if masks is None else masks[rank])
        loss = routing.load_balancing_loss(mine, r, group=mesh)
        chosen = routing.top_k(all_of_them, 2, mask=None if masks is None else masks.flatten())
        expected = routing.load_balancing_loss(all_of_them, chosen)
        assert abs(loss - routing.load_balancing_loss(mine, r)) > 0.01  # the rank's own, which is another
        (grad,), (right,) = torch.autograd.grad(loss, mine), torch.autograd.grad(expected, all_of_them)
        torch.testing.assert_close(grad / ranks, right.view_as(whole)[rank])
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        torch.testing.assert_close(mean, expected.detach())
    for call in (lambda: alone.update(r, group="dp"), lambda: routing.load_balancing_loss(mine, r, group=2)):
        assert raised(call).startswith("TypeError: group: expected a ProcessGroup or a DeviceMesh, got")


def extra_experts(rank: int) -> None:
    """Experts without computation, latent ones, scales and gates: what one process computes of a rank's tokens."""
    options: dict[str, Any] = {"num_shared": 1, "shared_gate": True, "expert_scale": True, "d_latent": 4}
    options |= {"num_identity": 2, "num_null": 1, "router": functools.partial(routing.top_k, k=3)}
    x = torch.randn(9 - rank, 8, generator=torch.Generator().manual_seed(rank))
    found = []
    for more in ({}, {"expert_mesh": init_device_mesh("cpu", (2,))}):
        torch.manual_seed(3)
        layer = ffn_ops.MoEFFN(8, 12, 6, **options, **more)
        with torch.no_grad():
            layer.expert_scale.copy_(torch.linspace(0.5, 2, 6))
        y = layer(x)
        y.square().sum().backward()
        grads = {n: p.grad for n, p in layer.named_parameters() if not isinstance(p, DTensor)}
        found.append((y.detach(), {n: grads[n] for n in grads if n not in ("w_in", "w_down", "b_in", "b_down")}))
    assert len(found[0][1]) == 12 and all(grad.any() for grad in found[0][1].values())
    torch.testing.assert_close(found[1], found[0])


def benchmark(rank: int) -> dict[str, Any]:
    """The benchmark's own record of a small row, and what it says of a wrong result."""
    from benchmarks import expert_parallel as bench

    (row,) = bench.QUICK
    (record,) = bench.rank_rows(rank, 2, [row], 2)
    layer = bench.Layer(row, rank, 2)
    layer.leaves["x"].data *= 1.01
    record["refused"] = raised(lambda: layer.verify(init_device_mesh("cpu", (2,))))
    chosen = layer.ids[layer.mine] // (row.E // 2)
    return {**record, "others": int((chosen != rank).sum())}


def lines(rank: int, blocks: list[str]) -> None:
    """The lines of docs/distributed.md, one block after the other as in one session; each layer then makes a step."""
    names: dict[str, Any] = {
        "torch": torch,
        "ffn_ops": ffn_ops,
        "Shard": Shard,
        "device": "cpu",
        "x": torch.randn(5, 64),
    }
    for block in blocks:
        exec(block, names)
        y = names["layer"](names["x"])
        assert y.shape == (5, 64)
        y.float().square().sum().backward()
        assert all(p.grad is not None for p in names["layer"].parameters()), block
