# SPDX-License-Identifier: BSD-3-Clause
"""The work of a rank in tests/test_expert_parallel.py: its part of a batch, compared with the one-process layer.

A separate module, so that processes import it without the tests. Each function is the whole work of a rank.
"""

from __future__ import annotations

import copy
import functools
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from ranks import raised
from routes import ROUTERS
from tolerance import assert_error_like_eagers
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import ffn_ops
from ffn_ops import Routing, expert_parallel, reference, routing

D, F, O = 12, 20, 10
TOKENS = {1: [7], 2: [9, 4], 4: [5, 0, 9, 3]}  # of each rank


def mesh_of(ranks: int) -> DeviceMesh:
    return init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))


def part(t: Tensor, rank: int, tokens: list[int]) -> Tensor:
    return t.split(tokens)[rank]


def problem(E: int, K: int, T: int, dtype: torch.dtype, gated: bool, bias: bool) -> dict[str, Any]:
    g = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=g, dtype=torch.float64) / shape[-1] ** 0.5).to(dtype)

    rows = 2 * F if gated else F
    found = {"x": normal(T, D) * D**0.5, "w_in": normal(E, rows, D), "w_down": normal(E, O, F), "d_y": normal(T, O)}
    if bias:
        found |= {"b_in": normal(E, rows), "b_down": normal(E, O)}
    found["logits"] = torch.randn(T, E, generator=g, dtype=torch.float64)
    found["ids"] = found["logits"].topk(K).indices
    found["weights"] = torch.rand(T, K, generator=g, dtype=torch.float64).to(
        torch.float64 if dtype is torch.float64 else torch.float32
    )
    return found


WEIGHTS = ("w_in", "w_down", "b_in", "b_down")


def results(
    p: dict[str, Any], E: int, mesh: DeviceMesh | None, rank: int, tokens: list[int], gated: bool, **options: Any
) -> dict[str, Tensor]:
    """Output and gradients; with a mesh of this rank's tokens and experts."""
    x, ids, weights, d_y = (p[n] if mesh is None else part(p[n], rank, tokens) for n in ("x", "ids", "weights", "d_y"))
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    begin, end = (0, E) if mesh is None else expert_parallel.experts_of(E, mesh.size(), rank)
    own = {n: p[n][begin:end].clone().requires_grad_() for n in WEIGHTS if n in p}
    r = Routing.from_topk(ids, weights, E, **options)
    if mesh is None:
        y = ffn_ops.moe(x, r, **own, gated=gated)
    else:
        y = expert_parallel.moe(x, r, **own, gated=gated, mesh=mesh)
    y.backward(d_y)
    return {"y": y.detach(), "x": x.grad, "weights": weights.grad, **{n: t.grad for n, t in own.items()}}


def operator(rank: int, ranks: int) -> None:
    """Gradients to the bit, outputs by the rule, whatever the ranks hold."""
    mesh, tokens = mesh_of(ranks), TOKENS[ranks]
    T = sum(tokens)
    for E, K, gated, bias, dtype in (
        (6, 2, True, True, torch.float32),  # four ranks: one without experts
        (8, 3, False, True, torch.float64),
        (5, 1, False, False, torch.float32),
        (8, 2, True, True, torch.bfloat16),
        (3, 2, False, True, torch.float32),
    ):
        p = problem(E, K, T, dtype, gated, bias)
        one = results(p, E, None, rank, tokens, gated)
        ours = results(p, E, mesh, rank, tokens, gated)
        exact = reference_results(p, torch.float64, gated)
        eager = reference_results(p, dtype, gated) if dtype is not torch.float64 else one
        begin, end = expert_parallel.experts_of(E, ranks, rank)
        for name, found in ours.items():
            own = (
                functools.partial(part, rank=rank, tokens=tokens)
                if name in ("y", "x", "weights")
                else slice_of(begin, end)
            )
            if found is None:
                assert begin == end
                continue
            assert found.dtype is one[name].dtype and found.shape == own(one[name]).shape, name
            if name == "y" or dtype is torch.bfloat16:
                if found.numel() > 20:
                    assert_error_like_eagers(found, own(eager[name]), own(exact[name]))
            else:
                assert torch.equal(found, own(one[name])), (name, E, dtype)
        if dtype is torch.float64:
            torch.testing.assert_close(ours["y"], part(one["y"], rank, tokens), rtol=1e-13, atol=1e-13)


def slice_of(begin: int, end: int) -> Any:
    return lambda t: t[begin:end]


def reference_results(p: dict[str, Any], dtype: torch.dtype, gated: bool) -> dict[str, Tensor]:
    def cast(t: Tensor) -> Tensor:
        return t.detach().to(dtype).requires_grad_()

    leaves = {n: cast(p[n]) for n in ("x", *WEIGHTS) if n in p}
    weights = p["weights"].to(torch.float64 if dtype is torch.float64 else torch.float32).requires_grad_()
    named = {n: leaves[n] for n in WEIGHTS if n in leaves}
    y = reference.moe(leaves["x"], p["ids"], weights, **named, gated=gated, activation="gelu")
    y.backward(p["d_y"].to(y.dtype))
    return {"y": y.detach(), "weights": weights.grad, **{n: t.grad for n, t in leaves.items()}}


def loads(rank: int, ranks: int) -> None:
    """All rows to one rank, no rows, dropped and skipped rows, frozen parts: every rank joins every call."""
    mesh, tokens = mesh_of(ranks), TOKENS[ranks]
    E, T = 4, sum(tokens)
    p = problem(E, 2, T, torch.float64, False, True)
    last = p["ids"] * 0 + E - 1
    for case in (
        {**p, "ids": torch.stack((last[:, 0], last[:, 0] - 1), 1)},
        {**p, "ids": torch.where(p["ids"] == 1, E, p["ids"])},  # another group's
        {**p, "ids": p["ids"] * 0 + E},  # nothing to send anywhere
    ):
        one, ours = results(case, E, None, rank, tokens, False), results(case, E, mesh, rank, tokens, False)
        torch.testing.assert_close(ours["y"], part(one["y"], rank, tokens))
        assert torch.equal(ours["x"], part(one["x"], rank, tokens))
        begin, end = expert_parallel.experts_of(E, ranks, rank)
        assert begin == end or torch.equal(ours["w_in"], one["w_in"][begin:end])
    # Saved for backward: what one process saves, and the received rows; no expert's output, of width O.
    shapes: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
        results(problem(E, 2, T, torch.float64, False, False), E, mesh, rank, tokens, False)
    assert shapes and not any(len(shape) == 2 and shape[1] == O for shape in shapes), shapes
    none = {n: t[:0] if n in ("x", "ids", "weights", "d_y", "logits") else t for n, t in p.items()}
    ours = results(none, E, mesh, rank, [0] * ranks, False)
    assert ours["y"].shape == (0, O) and not ours["w_in"].any()
    # A capacity is each rank's own: what one process computes of this rank's tokens alone.
    mine = {n: part(t, rank, tokens) if n in ("x", "ids", "weights", "d_y", "logits") else t for n, t in p.items()}
    for options in ({"capacity": 2}, {"mask": torch.arange(tokens[rank]) % 3 > 0}):
        alone = results(mine, E, None, rank, tokens, False, **options)
        ours = results(p, E, mesh, rank, tokens, False, **options)
        torch.testing.assert_close(ours["y"], alone["y"])
        assert torch.equal(ours["x"], alone["x"])
    # Only one rank's x, or only one rank's experts, learn: the others take part in backward all the same.
    for learns in ("x", "w_in"):
        x, begin = part(p["x"], rank, tokens).clone(), expert_parallel.experts_of(E, ranks, rank)
        own = {n: p[n][slice(*begin)].clone() for n in WEIGHTS}
        if rank == ranks - 1:
            (x if learns == "x" else own["w_in"]).requires_grad_()
        r = Routing.from_topk(part(p["ids"], rank, tokens), part(p["weights"], rank, tokens), E)
        y = expert_parallel.moe(x, r, **own, mesh=mesh)
        assert y.requires_grad
        y.backward(part(p["d_y"], rank, tokens))
        one = results(p, E, None, rank, tokens, False)
        if rank == ranks - 1:
            expected = part(one["x"], rank, tokens) if learns == "x" else one["w_in"][slice(*begin)]
            assert torch.equal(x.grad if learns == "x" else own["w_in"].grad, expected)


def second_order(rank: int, ranks: int) -> None:
    """Second derivatives cross the ranks too."""
    mesh, tokens = mesh_of(ranks), TOKENS[ranks]
    E = 4
    p = problem(E, 2, sum(tokens), torch.float64, True, True)
    begin, end = expert_parallel.experts_of(E, ranks, rank)

    def second(mesh: Any) -> list[Tensor]:
        cut = (lambda t: t) if mesh is None else functools.partial(part, rank=rank, tokens=tokens)
        leaves = [cut(p["x"]), cut(p["weights"]), p["w_in"], p["w_down"], p["b_in"], p["b_down"]]
        if mesh is not None:
            leaves[2:] = [t[begin:end] for t in leaves[2:]]
        leaves = [t.clone().requires_grad_() for t in leaves]
        x, weights, w_in, w_down, b_in, b_down = leaves
        r = Routing.from_topk(cut(p["ids"]), weights, E)
        options = {"gated": True, "b_in": b_in, "b_down": b_down}
        if mesh is None:
            y = ffn_ops.moe(x, r, w_in, w_down, **options)
        else:
            y = expert_parallel.moe(x, r, w_in, w_down, mesh=mesh, **options)
        first = torch.autograd.grad(y, leaves, cut(p["d_y"]), create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    one, ours = second(None), second(mesh)
    for i, (a, b) in enumerate(zip(ours, one, strict=True)):
        torch.testing.assert_close(a, part(b, rank, tokens) if i < 2 else b[begin:end])


def layer(rank: int, ranks: int) -> None:
    """MoEFFN: two optimiser steps as in one process, its options, its checkpoints, its copies."""
    mesh, tokens = mesh_of(ranks), TOKENS[ranks]
    options: dict[str, Any] = {"gated": True, "num_shared": 1, "activation": "silu", "bias": ranks != 2}
    torch.manual_seed(3)
    one = ffn_ops.MoEFFN(D, F, 6, 2, **options)
    torch.manual_seed(3)
    ours = ffn_ops.MoEFFN(D, F, 6, 2, expert_mesh=mesh, **options)
    g = torch.Generator().manual_seed(1)
    x, target = torch.randn(2, sum(tokens), D, generator=g)
    for found, t, goal in ((one, x, target), (ours, part(x, rank, tokens), part(target, rank, tokens))):
        optimizer = torch.optim.AdamW(found.parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            y = found(t)
            ((y - goal).square().sum() / sum(tokens)).backward()
            if found is ours:
                for q in (*ours.router.parameters(), *ours.shared.parameters()):  # what every rank has
                    dist.all_reduce(q.grad)
            optimizer.step()
    for name, value in ours.state_dict().items():
        whole = value.full_tensor() if name in WEIGHTS else value
        torch.testing.assert_close(whole, one.state_dict()[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(part(x, rank, tokens)), part(one(x), rank, tokens), rtol=1e-3, atol=1e-4)

    own = part(x, rank, tokens)
    assert torch.equal(copy.deepcopy(ours)(own), ours(own))
    assert "expert_mesh" in repr(ours)
    with torch.no_grad():
        assert torch.equal(ours(own), ours(own))
    low, widely = copy.deepcopy(ours).bfloat16()(own.bfloat16()), ours(own)
    torch.testing.assert_close(low.float(), widely, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        low = ours(own)
    torch.testing.assert_close(low.float(), widely, rtol=0.05, atol=0.05)
    compiled = torch.compile(ours, backend="eager")(own)
    assert torch.equal(compiled, widely)
    again = torch.utils.checkpoint.checkpoint(ours, own, use_reentrant=False)
    again.sum().backward()
    assert torch.equal(again, widely)

    # Whole checkpoints: the guides' keys and the stacked ones load, each rank taking its part.
    plain = ffn_ops.MoEFFN(D, F, 6, 2)
    for state in (plain.document_state_dict(), plain.state_dict()):
        sharded = ffn_ops.MoEFFN(D, F, 6, 2, expert_mesh=mesh)
        sharded.load_state_dict(state, strict=True)
        for name, value in plain.document_state_dict().items():
            copied = torch.empty_like(value)
            copied.copy_(sharded.document_state_dict()[name])
            assert rank or torch.equal(copied, value), name
    with torch.device("meta"):
        empty = ffn_ops.MoEFFN(D, F, 6, 2, expert_mesh=mesh)
    empty.to_empty(device="cpu").load_state_dict(sharded.state_dict())
    assert torch.equal(empty(own), sharded(own))
    torch.manual_seed(3 + rank)
    empty.to_empty(device="cpu").reset_parameters()
    fresh = [ffn_ops.MoEFFN(D, F, 6, 2).state_dict() for seed in (3, 3 + rank) if torch.manual_seed(seed)]
    begin, end = expert_parallel.experts_of(6, ranks, rank)
    for name, value in empty.state_dict().items():  # its own experts, and the first rank's router
        expected = fresh[1][name][begin:end] if name in WEIGHTS else fresh[0][name]
        assert torch.equal(value.to_local() if name in WEIGHTS else value, expected), name


def routers(rank: int, ranks: int) -> None:
    """Each router sees its rank's tokens: what one process computes of them alone."""
    mesh, tokens = mesh_of(ranks), TOKENS[ranks]
    x = torch.randn(max(tokens), D, generator=torch.Generator().manual_seed(rank))[: tokens[rank]]
    for name, router in ROUTERS.items():
        make = functools.partial(ffn_ops.MoEFFN, D, F, 6, router=router)
        if name in ("base", "expert choice"):
            message = raised(lambda make=make: make(expert_mesh=mesh))
            assert message.startswith("ValueError: router: expected one that chooses for each token, got"), message
            continue
        torch.manual_seed(3)
        one = make()
        torch.manual_seed(3)
        torch.testing.assert_close(make(expert_mesh=mesh)(x), one(x), msg=lambda m, name=name: f"{name}: {m}")
    ours = ffn_ops.MoEFFN(D, F, 6, router=routing.BiasedTopK(6, 2), expert_mesh=mesh)
    _, r, _ = ours(x, return_routing=True)
    ours.choose.update(r, group=mesh)
    bias = ours.choose.bias.clone()
    dist.broadcast(bias, 0)
    assert bias.any() and torch.equal(bias, ours.choose.bias)


def errors(rank: int) -> None:
    """Two ranks with inputs that do not fit raise an error on both, and can go on."""
    mesh = mesh_of(2)
    p = problem(4, 2, 6, torch.float32, False, True)
    own = {n: p[n][2 * rank : 2 * rank + 2] for n in WEIGHTS}
    r = Routing.from_topk(p["ids"], p["weights"], 4)

    def call(x: Tensor, **changes: Any) -> str:
        return raised(lambda: expert_parallel.moe(x, r, mesh=mesh, **{**own, **changes}))

    wide = own["w_in"].new_zeros(2, F, D + rank)
    assert call(torch.zeros(6, D + rank), w_in=wide) == (
        f"ValueError: expert parallelism: expected the same width of x on every rank, got [{D}, {D + 1}]"
    )
    if rank:
        found = raised(
            lambda: expert_parallel.moe(p["x"].double(), r, mesh=mesh, **{n: t.double() for n, t in own.items()})
        )
    else:
        found = call(p["x"])
    assert "expected the same dtype of x on every rank, got [torch.float32, torch.float64]" in found, found
    with torch.set_grad_enabled(rank == 0):
        assert "is_grad_enabled() on every rank, got [1, 0]" in call(p["x"])
    E = 4 + 4 * rank
    more = {n: torch.zeros(E // 2, *p[n].shape[1:]) for n in WEIGHTS}
    routing_ = Routing.from_topk(p["ids"], p["weights"], E)
    found = raised(lambda: expert_parallel.moe(p["x"], routing_, **more, mesh=mesh))
    assert "expected the same number of experts on every rank, got [4, 8]" in found, found
    assert call(p["x"]) == "nothing"
    made = raised(lambda: ffn_ops.MoEFFN(D, F + rank, 4, expert_mesh=mesh))
    assert made == f"ValueError: d_ff: expected the same on every rank of expert_mesh, got [{F}, {F + 1}]"
    made = raised(lambda: ffn_ops.MoEFFN(D, F, 4 + rank, expert_mesh=mesh))
    assert "num_experts: expected the same" in made
    # Errors that one rank can detect alone are raised before anything is sent.
    assert "w_in: expected shape [2, F, 12], got [4, 20, 12]" in call(p["x"], w_in=p["w_in"])
    replicated = torch.distributed.tensor.distribute_tensor(p["w_in"], mesh, [torch.distributed.tensor.Replicate()])
    assert "w_in: expected a DTensor of placement Shard(0)" in call(p["x"], w_in=replicated)
    assert "x: expected a plain tensor" in raised(lambda: ffn_ops.moe(replicated[0], r, p["w_in"], p["w_down"]))
    assert "mesh: expected a torch.distributed" in raised(lambda: expert_parallel.moe(p["x"], r, **own, mesh=2))
    flat = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "ep"))
    assert "expert_mesh: expected one dimension" in raised(lambda: ffn_ops.MoEFFN(D, F, 4, expert_mesh=flat))
    experts = raised(lambda: ffn_ops.MoEFFN(D, F, 4, 5, expert_mesh=mesh))
    assert experts.startswith("ValueError: top_k: expected at most num_experts = 4")


def failing(rank: int, how: str) -> tuple[str, float]:
    """The second rank does not join the call. Returns the error of the first, and the seconds until it came."""
    mesh = mesh_of(2)
    p = problem(4, 2, 6, torch.float32, False, True)
    r = Routing.from_topk(p["ids"], p["weights"].requires_grad_(), 4)
    own = {n: p[n][2 * rank : 2 * rank + 2] for n in WEIGHTS}
    start = time.monotonic()
    if how == "in backward":
        y = expert_parallel.moe(p["x"], r, **own, mesh=mesh)
    if rank and how in ("dies", "in backward"):
        os._exit(1)
    if rank and how == "sleeps":
        time.sleep(5)
        return "", 0.0
    if how == "in backward":
        return raised(lambda: y.sum().backward()), time.monotonic() - start
    return raised(lambda: expert_parallel.moe(p["x"], r, **own, mesh=mesh)), time.monotonic() - start


def save(rank: int, folder: str) -> None:
    """Two ranks write a checkpoint of layer and optimiser after a step."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    torch.manual_seed(7)
    ours = ffn_ops.MoEFFN(D, F, 6, 2, expert_mesh=mesh_of(2))
    optimizer = torch.optim.AdamW(ours.parameters())
    ours(torch.ones(5, D)).sum().backward()
    for q in ours.router.parameters():
        dist.all_reduce(q.grad)
    optimizer.step()
    model, state = get_state_dict(ours, optimizer)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder)
    whole = {n: t.full_tensor() if n in WEIGHTS else t for n, t in ours.state_dict().items()}
    if rank == 0:
        torch.save({"model": whole, "moment": optimizer.state[ours.w_in]["exp_avg"].to_local()}, f"{folder}/whole.pt")
    dist.barrier()


def load(rank: int, ranks: int, folder: str) -> None:
    """Another number of ranks reads it, each its experts."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    ours = ffn_ops.MoEFFN(D, F, 6, 2, expert_mesh=mesh_of(ranks))
    optimizer = torch.optim.AdamW(ours.parameters())
    model, state = get_state_dict(ours, optimizer)
    found = {"model": model, "optimizer": state}
    dcp.load(found, checkpoint_id=folder)
    set_state_dict(ours, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    whole = torch.load(f"{folder}/whole.pt")
    for name, value in ours.state_dict().items():
        assert torch.equal(value.full_tensor() if name in WEIGHTS else value, whole["model"][name]), name
    moment = optimizer.state[ours.w_in]["exp_avg"].full_tensor()
    assert moment.any() and torch.equal(moment[:3], whole["moment"])
    one = ffn_ops.MoEFFN(D, F, 6, 2)
    one.load_state_dict(whole["model"])
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(rank))
    torch.testing.assert_close(ours(x), one(x))


def everything(rank: int, ranks: int) -> None:
    operator(rank, ranks)
    loads(rank, ranks)
    second_order(rank, ranks)
    layer(rank, ranks)
    routers(rank, ranks)
