# SPDX-License-Identifier: BSD-3-Clause
"""Operators of routing: the choice of experts, the sort of routed rows, BASE's assignment and rounding to tiles.

The public functions are in ffn_ops/routing; this file has fakes and autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._library import ContextWith, differentiable, fake, overload, vmap_by_loop
from ..reference import SCORES
from ._shared import arithmetic, backward_tangents

NORM_EPSILON = 1e-20  # as the kernel's
SCORE_NAMES = tuple(SCORES)


def check_top_k(
    logits: Tensor,
    k: Any,
    shared: Any = 0,
    score: Any = "softmax",
    renormalize: Any = False,
    by_logits: Any = False,
    num_groups: Any = 1,
    top_groups: Any = 1,
    group_best: Any = 2,
) -> None:
    check.tensor("logits", logits, ("T", "E"))
    check.at_least("shared", shared, 0, logits.shape[1] - 1)
    experts = logits.shape[1] - shared
    check.at_least("k", k, 1, experts)
    check.choice("score", score, SCORE_NAMES)
    check.flag("renormalize", renormalize)
    check.flag("by_logits", by_logits)
    check.at_least("num_groups", num_groups, 1, experts)
    if experts % num_groups:
        raise ValueError(f"num_groups: expected a divisor of the number of experts ({experts}), got {num_groups}")
    check.at_least("top_groups", top_groups, 1, num_groups)
    if k > experts // num_groups * top_groups:
        raise ValueError(f"top_groups: expected groups that hold k = {k} experts, got {top_groups} of {num_groups}")
    check.at_least("group_best", group_best, 1, 2)


@fake("route_top_k")
def _(
    logits: Tensor,
    bias: Tensor | None,
    ids: Tensor | None,
    k: int,
    shared: int,
    score: str,
    renormalize: bool,
    by_logits: bool,
    num_groups: int,
    top_groups: int,
    group_best: int,
    scale: float,
) -> Any:
    check_top_k(logits, k, shared, score, renormalize, by_logits, num_groups, top_groups, group_best)
    if ids is not None:
        check.indices("ids", ids, (logits.shape[0], k))
        if bias is not None or num_groups > 1 or shared:
            raise ValueError("ids: expected no bias, groups and shared experts")
    shape = (logits.shape[0], k + shared)
    return logits.new_empty(shape, dtype=arithmetic(logits)), logits.new_empty(shape, dtype=torch.int64)


@fake("route_top_k_backward")
def _(
    d_weights: Tensor,
    logits: Tensor,
    ids: Tensor,
    score: str,
    renormalize: bool,
    by_logits: bool,
    scale: float,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _top_k_setup(ctx: Any, inputs: Any, output: Any) -> None:
    logits, *_, ctx.score, ctx.renormalize, ctx.by_logits, _groups, _top, _best, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, output[1])


def _top_k_backward_formula(ctx: Any, d_weights: Tensor | None, _ids: Any) -> Any:
    if d_weights is None:
        return (None,) * 12
    logits, ids = ctx.saved_tensors
    options = (ctx.score, ctx.renormalize, ctx.by_logits, ctx.scale)
    return (top_k_backward_op(d_weights, logits, ids, *options), *(None,) * 11)


def _top_k_backward_setup(ctx: Any, inputs: Any, output: Any) -> None:
    d_weights, logits, ids, ctx.score, ctx.renormalize, ctx.by_logits, ctx.scale = inputs
    ctx.save_for_backward(d_weights, logits, ids)


def _derivatives(score: str, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A score of each logit, its slope and its curvature."""
    p = torch.sigmoid(z)
    if score == "sigmoid":
        slope = p * (1 - p)
        return p, slope, slope * (1 - 2 * p)
    s = SCORES[score](z)  # sqrt_softplus: 2 s s' = sigmoid(z)
    safe = torch.where(s == 0, 1, s)
    slope = torch.where(s == 0, 0, p / (2 * safe))
    return s, slope, slope * (1 - p) - slope * slope / safe


def _top_k_double_backward(ctx: Any, dd: Tensor) -> Any:
    """Of <dd, d_logits>, with s the scores and w = scale s / sum where renormalised.

    Forward mode through the scores: s_t = ds/dz dd; then L = <d_weights, w_t>, which is linear in d_weights.
    """
    d_weights, logits, ids = ctx.saved_tensors
    z, dd = logits.to(d_weights.dtype), dd.to(d_weights.dtype)
    of_row = ctx.score == "softmax"
    of_all = of_row and not ctx.by_logits
    if not of_all:
        z, dd = z.gather(1, ids), dd.gather(1, ids)
    if of_row:
        p = torch.softmax(z, 1)
        mean = (p * dd).sum(1, keepdim=True)
        s, s_t = p, p * (dd - mean)
    else:
        s, slope, curvature = _derivatives(ctx.score, z)
        s_t = slope * dd
    if of_all:
        s, s_t = s.gather(1, ids), s_t.gather(1, ids)
    # w_t and the cotangents of s and s_t in <d_weights, w_t>
    d = d_weights * ctx.scale
    if ctx.renormalize and (of_all or not of_row):
        total = s.sum(1, keepdim=True) + NORM_EPSILON
        total_t = s_t.sum(1, keepdim=True)
        w_t = (s_t - s * total_t / total) / total * ctx.scale
        d_s = (d * s).sum(1, keepdim=True)
        by_s_t = d / total - d_s / total**2
        by_s = -d * total_t / total**2 - (d * s_t).sum(1, keepdim=True) / total**2 + 2 * d_s * total_t / total**3
    else:
        w_t, by_s_t, by_s = s_t * ctx.scale, d, torch.zeros_like(d)
    if of_all:  # an expert may stand in two slots where the caller chose
        empty = torch.zeros_like(z)
        by_s_t, by_s = empty.scatter_add(1, ids, by_s_t), empty.scatter_add(1, ids, by_s)
    # s_t = s'(z) dd
    if of_row:
        by_s = by_s + by_s_t * (dd - mean) - dd * (by_s_t * p).sum(1, keepdim=True)
        by_z = p * (by_s - (p * by_s).sum(1, keepdim=True))
    else:
        by_z = by_s * slope + by_s_t * curvature * dd
    if not of_all:
        by_z = torch.zeros_like(logits, dtype=by_z.dtype).scatter_add(1, ids, by_z)
    return w_t, by_z.to(logits.dtype), *(None,) * 5


def _top_k_backward_tangent(ctx: Any, *tangents: Any) -> Any:
    def again(d: Tensor) -> Any:
        return (top_k_backward_op(d, *ctx.saved_tensors[1:], ctx.score, ctx.renormalize, ctx.by_logits, ctx.scale),)

    ctx.needs = [True]
    return backward_tangents(ctx, tangents, again, _top_k_double_backward, (1,))[0]


def _top_k_tangent(ctx: Any, logits_t: Tensor, *_: Any) -> Any:
    """w_t of the double backward, which does not depend on the weights' gradient."""
    logits, ids = ctx.saved_tensors
    none = logits.new_zeros(ids.shape, dtype=arithmetic(logits))
    return _top_k_double_backward(ContextWith(ctx, saved_tensors=(none, logits, ids)), logits_t)[0], None


top_k_backward_op = differentiable(
    "route_top_k_backward", _top_k_backward_setup, _top_k_double_backward, _top_k_backward_tangent
)
top_k_op = differentiable("route_top_k", _top_k_setup, _top_k_backward_formula, _top_k_tangent)


def top_k_of(
    logits: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    ids: Tensor | None = None,
    shared: int = 0,
    score: str = "softmax",
    renormalize: bool = False,
    by_logits: bool = False,
    num_groups: int = 1,
    top_groups: int = 1,
    group_best: int = 2,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Weights and ids ``[T, k + shared]`` of logits ``[T, E]``, in the arithmetic's dtype; ``ids`` [T, k]: chosen
    already. The options are those of :func:`ffn_ops.routing.top_k`."""
    choice = (shared, score, renormalize, by_logits, num_groups, top_groups, group_best)
    check_top_k(logits, k, *choice)
    check.number("scale", scale)
    return top_k_op(logits, bias, ids, k, *choice, float(scale))  # type: ignore[no-any-return]


# ---- sort -----------------------------------------------------------------------------------------------------------


@fake("moe_sort")
def _(
    expert: Tensor,
    token: Tensor | None,
    weight: Tensor,
    num_experts: Any,
    num_tokens: Any,
    capacity: Any,
    by_weight: bool,
) -> Any:
    rows = expert.shape[0] if token is not None else expert.shape[0] * expert.shape[1]

    def index(*shape: Any) -> Tensor:
        return expert.new_empty(shape, dtype=torch.int64)

    place = index(rows if token is not None else 0)
    offsets = index(num_experts + 1)
    return (
        weight.new_empty((rows,)),
        index(rows),
        offsets,
        index(rows),
        index(num_tokens + 1),
        index(num_experts),
        place,
    )


def _sort_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _weight, _token, _offsets, row, _slot_offsets, _counts, place = output
    ctx.mark_non_differentiable(*(t for i, t in enumerate(output) if i != 0))
    ctx.set_materialize_grads(False)
    ctx.shape = inputs[2].shape
    ctx.save_for_backward(row if inputs[1] is None else place)


def _sort_backward(ctx: Any, d_weight: Tensor | None, *_: Any) -> Any:
    if d_weight is None:
        return (None,) * 7
    (place,) = ctx.saved_tensors  # where each entry went: a permutation
    return None, None, d_weight.index_select(0, place).view(ctx.shape), *(None,) * 4


def _sort_tangent(ctx: Any, _expert: Any, _token: Any, weight_t: Tensor, *_: Any) -> Any:
    (place,) = ctx.saved_tensors
    return weight_t.new_zeros(place.shape).index_copy(0, place, weight_t.reshape(-1)), *(None,) * 6


sort_op = differentiable("moe_sort", _sort_setup, _sort_backward, _sort_tangent)


# ---- assignments ----------------------------------------------------------------------------------------------------


@fake("balanced_assignment")
def _(scores: Tensor, mask: Tensor | None) -> Tensor:
    return scores.new_empty((scores.shape[0],), dtype=torch.int64)


@fake("round_tokens")
def _(scores: Tensor, ids: Tensor, tile: int) -> Any:
    rows = ids.shape[0] * ids.shape[1] + scores.shape[1] * torch.sym_min(tile // 2, scores.shape[0])
    return tuple(scores.new_empty((rows,), dtype=torch.int64) for _ in range(2))


balanced_assignment_op = overload("balanced_assignment")
round_tokens_op = overload("round_tokens")

for _name in ("route_top_k", "route_top_k_backward", "moe_sort", "balanced_assignment", "round_tokens"):
    vmap_by_loop(_name)
