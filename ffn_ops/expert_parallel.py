# SPDX-License-Identifier: BSD-3-Clause
"""Expert parallelism: every rank of a mesh holds some of the experts. Rows travel to them and back.

Built on ``torch.distributed``, which is imported where it is needed. The experts themselves are computed by
:func:`ffn_ops.moe`; this file contains no router and no kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _checks as check
from . import ops
from ._gate import Gate
from .ops._moe import expert_form
from .ops._rows import check_routing, check_weights, combine_op, dispatch_op
from .ops._shared import arithmetic, autocast, fold
from .routing import Routing

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# The header of the counts' message. With it ranks whose inputs do not fit raise an error instead of hanging.
_FACTS = ("number of experts", "width of x", "width of the output", "dtype of x", "torch.is_grad_enabled()")
_NEEDS = len(_FACTS)  # which gradients the sender will compute
_DROPPED = _NEEDS + 1  # how many of its rows are dropped
_HEADER = _DROPPED + 1
# message sizes are a multiple of this, so that most ranks that differ in E can still exchange and compare them
_UNIT = 64


def experts_of(num_experts: int, ranks: int, rank: int) -> tuple[int, int]:
    """The range ``(first, end)`` of a rank's experts, by ``Shard(0)``'s rule: ceil(E / ranks) each until none is left.

    Example:
        >>> [ffn_ops.expert_parallel.experts_of(5, 4, rank) for rank in range(4)]
        [(0, 2), (2, 4), (4, 5), (5, 5)]
    """
    each = -(-num_experts // ranks)
    return min(rank * each, num_experts), min((rank + 1) * each, num_experts)


def shard(local: Tensor, num_experts: int, mesh: DeviceMesh) -> Tensor:
    """Makes a ``Shard(0)`` DTensor ``[E, ...]`` from this rank's experts ``[E_local, ...]``. It sends nothing.

    Example::

        first, end = ffn_ops.expert_parallel.experts_of(8, mesh.size(), mesh.get_local_rank())
        w_in = ffn_ops.expert_parallel.shard(torch.randn(end - first, 16, 8), 8, mesh)
    """
    from torch.distributed.tensor import DTensor, Shard

    check.tensor("local", local)
    local = local.contiguous()
    shape = torch.Size((num_experts, *local.shape[1:]))
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=local.stride())


def moe(
    x: Tensor,
    routing: Routing,
    w_in: Tensor,
    w_down: Tensor,
    *,
    mesh: DeviceMesh,
    gated: bool = False,
    b_in: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str | Gate = "gelu",
    recompute: bool = False,
) -> Tensor:
    """:func:`ffn_ops.moe` of this rank's tokens, with experts that the ranks of ``mesh`` hold together.

    One all-to-all sends the rows to the ranks of their experts; another brings the weighted results back. Before them
    an all-to-all exchanges the numbers of rows; there the host waits for the device, once. **Every rank must take part
    in each call and in its backward**, even without tokens. Backward sends the same rows the other way.

    Args:
        x: ``[..., D]``, this rank's tokens, any number of them.
        routing: of these tokens, over all E experts.
        w_in, w_down, b_in, b_down: as :func:`ffn_ops.moe` takes them, each a ``Shard(0)`` DTensor ``[E, ...]`` on
            ``mesh`` or this rank's shard of it.
        mesh: one-dimensional; rank r has the experts of :func:`experts_of`.
        gated, activation, recompute: see :func:`ffn_ops.moe`.

    Returns:
        ``[..., D_out]`` for this rank's tokens. In float32 and float64 the gradients have the bits of the one-process
        operator on the tokens of all ranks, in the order of the ranks. The output may differ in the last bits, because
        it is a sum of rounded products. In 16 bits, rows are rounded before they are sent. Saved for backward: what
        :func:`ffn_ops.moe` saves and the received rows, but no expert's output.

    Raises:
        TypeError, ValueError: with the argument, what was expected and what came; with the values of all ranks if
            these differ.
        RuntimeError: if a rank ended, or did not join the call within the group's time limit.

    Source:
        Lepikhin et al., GShard (2020), section 3.2; the dropless form: Gale et al., MegaBlocks (2023).

    Example::

        mesh = init_device_mesh("cpu", (2,))  # run by torchrun on two processes
        routing = ffn_ops.routing.top_k(x @ w_router.T, k=2)  # this rank's tokens
        y = ffn_ops.expert_parallel.moe(x, routing, w_in, w_down, mesh=mesh)  # this rank's experts
    """
    check_mesh(mesh)
    check.tensor("x", x)
    weights = [_local(*each, mesh) for each in (("w_in", w_in), ("w_down", w_down), ("b_in", b_in), ("b_down", b_down))]
    call = _moe
    if torch.compiler.is_compiling():  # message sizes are numbers on the host, so a compiled graph breaks here
        call = torch.compiler.disable(_moe)
    return call(x, routing, mesh, weights, gated, activation, recompute)


def _moe(
    x: Tensor,
    routing: Routing,
    mesh: DeviceMesh,
    weights: list[Tensor | None],
    gated: bool,
    activation: str | Gate,
    recompute: bool,
) -> Tensor:
    cast: Any = autocast(x, *weights)
    x, w_in, w_down, b_in, b_down = cast
    check_routing(x, routing)
    group, ranks = mesh.get_group(), mesh.size()
    experts = routing.offsets.shape[0] - 1
    begin, end = experts_of(experts, ranks, mesh.get_local_rank())
    here = (w_in, w_down, b_in, b_down)
    expert_form(activation, gated, recompute)
    check_weights(x, end - begin, *here, gated, may_be_none=True)
    token, weight, offsets, row, slot_offsets = routing[:5]
    weight = weight.to(arithmetic(x))
    needs = [x.requires_grad, weight.requires_grad, any(t is not None and t.requires_grad for t in here)]
    facts = [experts, x.shape[-1], w_down.shape[1], check.DTYPES.index(x.dtype), int(torch.is_grad_enabled())]

    total = token.shape[0]
    counts, send, receive, needs, drops = _exchange_counts(offsets, total, end - begin, facts, needs, group, ranks)
    rows, kept = dispatch_op(fold(x), token, None, offsets, row, slot_offsets), sum(send)
    if drops:  # dropped rows are last, and stay here
        rows, weight = rows[:kept], weight[:kept]
    rows, weight = (_joining(t, need) for t, need in zip((rows, weight), needs, strict=False))
    rows, weight = AllToAll.apply(group, send, receive, rows, weight)

    if end > begin:
        owner = torch.arange(end - begin, device=x.device).repeat(ranks)
        owner = owner.repeat_interleave(counts.flatten(), output_size=sum(receive))
        local = Routing.from_topk(owner.unsqueeze(1), weight.unsqueeze(1), end - begin)
        options: dict[str, Any] = {"gated": gated, "activation": activation, "recompute": recompute}
        rows = ops.moe(rows, local, w_in, w_down, b_in=b_in, b_down=b_down, **options)
    else:  # nothing to compute, but the gradients need the same history as on the other ranks
        rows = rows @ rows.new_zeros(rows.shape[1], w_down.shape[1]) * weight.unsqueeze(1).to(rows.dtype)
        rows = rows + sum((t * 0).sum() for t in here if t is not None)

    (rows,) = AllToAll.apply(group, receive, send, _joining(rows, any(needs)))
    if drops:
        rows = F.pad(rows, (0, 0, 0, total - kept))
    y = combine_op(rows, token, None, offsets, row, slot_offsets)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], w_down.shape[1])  # type: ignore[no-any-return]


def _exchange_counts(
    offsets: Tensor, total: int, mine: int, facts: list[int], needs: list[bool], group: Any, ranks: int
) -> tuple[Tensor, list[int], list[int], list[bool], bool]:
    """Rows that come from each rank for each expert here ``[ranks, mine]``, rows to and from each rank, the gradients
    that any rank will compute, and whether any drops rows: backward is a collective too, so that the same graph must
    stand on every rank for all to join and come in one order."""
    counts = offsets.diff()
    each = -(-counts.shape[0] // ranks)
    message = counts.new_zeros(ranks, -(-(_HEADER + each) // _UNIT) * _UNIT)
    message[:, _HEADER : _HEADER + each] = F.pad(counts, (0, ranks * each - counts.shape[0])).view(ranks, each)
    for place, value in enumerate([*facts, sum(need << bit for bit, need in enumerate(needs))]):
        message[:, place] = value
    message[:, _DROPPED] = total - offsets[-1]
    (answer,) = exchange([message.flatten()], None, None, group)
    answer = answer.view(message.shape)
    sent, got = torch.stack((message, answer)).tolist()  # the one place where the host waits for the device
    for place, what in enumerate(_FACTS):
        values = [rank[place] for rank in got]
        if len(set(values)) > 1:
            named = [check.DTYPES[v] if what.startswith("dtype") else v for v in values]
            raise ValueError(f"expert parallelism: expected the same {what} on every rank, got {named}")
    joined = [any(rank[_NEEDS] >> bit & 1 for rank in got) for bit in range(len(needs))]
    send, receive = ([sum(rank[_HEADER:]) for rank in each] for each in (sent, got))
    return answer[:, _HEADER : _HEADER + mine], send, receive, joined, any(rank[_DROPPED] for rank in got)


def _joining(t: Tensor, need: bool) -> Tensor:
    """``t`` with a place in the graph where any rank's has one."""
    return t.detach().requires_grad_() if need and torch.is_grad_enabled() and not t.requires_grad else t


class AllToAll(torch.autograd.Function):
    """Tensors whose first dimension is cut into as many pieces as there are ranks; the gradients take the way back.

    Differentiable to any order. Unlike torch's own function it has the tensors of a call under way together, sends no
    gradient that nobody needs, and says what may have happened where it fails.
    """

    @staticmethod
    def forward(ctx: Any, group: Any, send: list[int], receive: list[int], *tensors: Tensor) -> Any:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        return tuple(exchange(tensors, send, receive, group))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[3:]) if need]
        found = AllToAll.apply(ctx.group, ctx.receive, ctx.send, *(grads[i] for i in wanted))
        result: list[Tensor | None] = [None] * len(grads)
        for i, grad in zip(wanted, found, strict=True):
            result[i] = grad
        return None, None, None, *result


def exchange(tensors: Sequence[Tensor], send: list[int] | None, receive: list[int] | None, group: Any) -> list[Tensor]:
    """One all-to-all for each tensor, all under way before the first is waited for; None: equal pieces.

    Raises:
        RuntimeError: as torch's own, with what may have happened.
    """
    from torch.distributed import _functional_collectives as collectives

    try:
        pending = [collectives.all_to_all_single(t.contiguous(), receive, send, group) for t in tensors]
        return [collectives.wait_tensor(t) for t in pending]
    except RuntimeError as error:
        raise RuntimeError(
            f"expert parallelism: an all-to-all of {group.size()} ranks failed: a rank ended, raised an error of its"
            " own, sent other shapes, or did not join within the group's time limit"
        ) from error


# ---- what a layer checks when it is made ----------------------------------------------------------------------------


def check_mesh(mesh: Any, name: str = "mesh") -> None:
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"{name}: expected a torch.distributed.device_mesh.DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"{name}: expected one dimension, such as mesh['ep'], got {mesh.ndim}")


def check_alike(mesh: DeviceMesh, facts: dict[str, Any]) -> None:
    """A collective. Raises ValueError on every rank where one of the facts differs between ranks."""
    import torch.distributed as dist

    every: list[Any] = [None] * mesh.size()
    dist.all_gather_object(every, facts, group=mesh.get_group())
    for name in facts:
        values = [each.get(name) for each in every]
        if any(value != values[0] for value in values):
            raise ValueError(f"{name}: expected the same on every rank of expert_mesh, got {values}")


@torch.no_grad()
def equalize(mesh: DeviceMesh, tensors: Sequence[Tensor]) -> None:
    """A collective: every rank takes over the first rank's values, as every rank drew its own."""
    import torch.distributed as dist

    for t in tensors:
        if t.device.type != "meta":
            there = t.detach().to(mesh.device_type)
            dist.broadcast(there, group=mesh.get_group(), group_src=0)
            t.copy_(there)


def _local(name: str, t: Tensor | None, mesh: DeviceMesh) -> Tensor | None:
    if t is None or not check.is_dtensor(t):
        return t
    from torch.distributed.tensor import Shard

    d: Any = t
    if d.device_mesh != mesh or tuple(d.placements) != (Shard(0),):
        raise ValueError(
            f"{name}: expected a DTensor of placement Shard(0) on {mesh}, got {d.placements} on {d.device_mesh}"
        )
    return d.to_local()  # type: ignore[no-any-return]
