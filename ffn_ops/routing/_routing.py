# SPDX-License-Identifier: BSD-3-Clause
"""The result of a router: which tokens go to which experts, with which weights. This file has no router."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import _checks as check
from ..ops._route import sort_op
from ..ops._rows import combine_op
from ..ops._shared import arithmetic


class Statistics(NamedTuple):
    """The load of the experts, in float32, on the routing's device.

    Attributes:
        tokens_per_expert: ``[E]``, rows that each expert computes, after dropping.
        dropped_fraction: scalar, the share of dropped rows among those that chose an expert.
        load_entropy: scalar, the entropy of ``tokens_per_expert`` divided by log E: 1 is uniform (1 for E = 1).
        max_over_mean: scalar, the largest load over the mean load: 1 is uniform.

    Example:
        >>> routing = ffn_ops.routing.switch(torch.randn(16, 4), capacity_factor=None)
        >>> routing.statistics().dropped_fraction
        tensor(0.)
    """

    tokens_per_expert: Tensor
    dropped_fraction: Tensor
    load_entropy: Tensor
    max_over_mean: Tensor


class Routing(NamedTuple):
    """Which token goes to which expert, with which weight: rows (pairs of a token and an expert), sorted by expert and,
    within an expert, by token.

    It is a pytree of tensors whose shapes do not depend on data. R is T * K for top-k. Dropped rows stand last.

    Attributes:
        token: ``[R]`` int64, the token of each row.
        weight: ``[R]`` float32 (float64 for float64 logits), the factor of each row's output; differentiable.
            Operators widen 16-bit weights, as casts of arguments leave them.
        offsets: ``[E + 1]`` int64. Rows ``offsets[e]`` to ``offsets[e + 1]`` are those of expert e; rows from
            ``offsets[E]`` on are dropped.
        row: ``[R]`` int64, the inverse of ``token``: the rows of token t are ``row[slot_offsets[t]]`` to
            ``row[slot_offsets[t + 1]]``.
        slot_offsets: ``[T + 1]`` int64, see ``row``.
        counts: ``[E]`` int64, how many rows chose each expert, before dropping.
        mask: ``[T]`` bool, False for tokens that were left out; None or of shape ``[0]`` without a mask.

    Raises:
        RuntimeError: from an operator on the CPU, where the fields contradict each other. ``row`` must list each kept
            row once, under its token.

    Example:
        >>> ids = torch.tensor([[1], [0], [1]])
        >>> routing = ffn_ops.Routing.from_topk(ids, torch.ones(3, 1), num_experts=2)
        >>> routing.token, routing.offsets  # token 1 goes to expert 0, tokens 0 and 2 to expert 1
        (tensor([1, 0, 2]), tensor([0, 1, 3]))
    """

    token: Tensor
    weight: Tensor
    offsets: Tensor
    row: Tensor
    slot_offsets: Tensor
    counts: Tensor
    mask: Tensor | None = None

    @classmethod
    def from_topk(
        cls,
        ids: Tensor,
        weights: Tensor,
        num_experts: int,
        *,
        capacity: int | None = None,
        drop: str = "position",
        mask: Tensor | None = None,
    ) -> Routing:
        """Makes a routing from the choice of any router.

        Args:
            ids: ``[T, K]`` integers; those below 0 or >= ``num_experts`` mean "not on this rank" and are skipped.
            weights: ``[T, K]``; float32 or float64 are kept, others become float32.
            num_experts: E.
            capacity: the largest number of rows of an expert; other rows are dropped. None for no limit.
            drop: which rows are dropped: ``"position"`` keeps earlier tokens, and all first slots before any second;
                ``"weight"`` keeps the largest weights, ties in that order.
            mask: ``[T]`` bool, False for tokens to leave out, whatever their ids and weights are.

        Raises:
            TypeError, ValueError: with the argument, what was expected and what came.

        Example:
            >>> weights, ids = torch.randn(5, 4).softmax(-1).topk(2)
            >>> ffn_ops.Routing.from_topk(ids, weights, num_experts=4).offsets[-1]  # 5 * 2 rows, none dropped
            tensor(10)
        """
        check.integers("ids", ids)
        if ids.dim() != 2:
            raise ValueError(f"ids: expected shape [T, K], got {list(ids.shape)}")
        check.tensor("weights", weights, tuple(ids.shape))
        check.device("weights", weights, ids, "ids")
        check.at_least("num_experts", num_experts, 1)
        ids = ids.long()
        if mask is not None:
            mask = check_mask(mask, ids)
            ids = torch.where(mask.unsqueeze(1), ids, num_experts)
            weights = torch.where(mask.unsqueeze(1), weights, 0)
        return sorted_rows(ids, None, weights, num_experts, ids.shape[0], capacity, drop, mask)

    def first(self, num_experts: int) -> Routing:
        """The rows of the first ``num_experts`` experts; the others' count as dropped.

        For experts that compute nothing, the last: :func:`ffn_ops.moe` then does not see them. Of those that pass x
        through, :meth:`weight_of` gives the factor.

        Example:
            >>> ids = torch.tensor([[0, 2], [1, 2]])
            >>> ffn_ops.Routing.from_topk(ids, torch.ones(2, 2), num_experts=3).first(2).counts
            tensor([1, 1])
        """
        check.at_least("num_experts", num_experts, 1, self.counts.shape[0])
        return self._replace(offsets=self.offsets[: num_experts + 1], counts=self.counts[:num_experts])

    def weight_of(self, begin: int, end: int) -> Tensor:
        """``[T]``: the sum of each token's weights of experts ``begin`` to ``end - 1``, with their gradient.

        Example:
            >>> ids, weights = torch.tensor([[0, 2], [1, 0]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]])
            >>> ffn_ops.Routing.from_topk(ids, weights, num_experts=3).weight_of(2, 3)
            tensor([0.2500, 0.0000])
        """
        check.at_least("end", end, 0, self.counts.shape[0])
        check.at_least("begin", begin, 0, end)
        place = torch.arange(self.weight.shape[0], device=self.weight.device)
        inside = (place >= self.offsets[begin]) & (place < self.offsets[end])
        weight = torch.where(inside, wide(self.weight), 0)
        rows = torch.ones_like(weight).unsqueeze(1)
        return combine_op(rows, self.token, weight, self.offsets, self.row, self.slot_offsets).squeeze(1)  # type: ignore[no-any-return]

    def scaled(self, scale: Tensor) -> Routing:
        """Each row's weight times its expert's ``scale`` ``[E]``, which gets a gradient: as if outputs were scaled.

        Example:
            >>> routing = ffn_ops.Routing.from_topk(torch.tensor([[0, 1]]), torch.tensor([[0.75, 0.25]]), num_experts=2)
            >>> routing.scaled(torch.tensor([1.0, 2.0])).weight
            tensor([0.7500, 0.5000])
        """
        check.tensor("scale", scale, (self.counts.shape[0],))
        check.device("scale", scale, self.weight, "weight")
        place = torch.arange(self.weight.shape[0], device=self.weight.device)
        expert = torch.bucketize(place, self.offsets[1:], right=True).clamp(max=scale.shape[0] - 1)
        return self._replace(weight=self.weight * scale.to(self.weight.dtype)[expert])

    def check(self) -> None:
        """Compares all fields with each other, for a hand-made routing. It synchronises with the device. (Operators
        on the CPU check what could make forward and backward differ, and not ``offsets`` against ``counts``.)

        Raises:
            TypeError, ValueError: with the field, what was expected and what came.

        Example:
            >>> routing = ffn_ops.Routing.from_topk(torch.tensor([[1], [0]]), torch.ones(2, 1), num_experts=2)
            >>> routing.check()
        """
        check.routing(self, self.token, "token")
        rows, tokens, experts = self.token.shape[0], self.slot_offsets.shape[0] - 1, self.offsets.shape[0] - 1
        check.indices("routing.counts", self.counts, (experts,))
        for name, ends in (("offsets", self.offsets), ("slot_offsets", self.slot_offsets)):
            if bool((ends[0] != 0) | (ends.diff() < 0).any() | (ends[-1] > rows)):
                raise ValueError(f"routing.{name}: expected 0, then numbers that never fall, up to {rows}, got others")
        load = self.offsets.diff()
        if bool((load > self.counts).any() | (self.counts.sum() > rows)):
            got = f"{self.counts.tolist()} for {load.tolist()} rows"
            raise ValueError(f"routing.counts: expected at least the rows of each expert, {rows} in all, got {got}")
        kept = int(self.offsets[-1])
        token, expert = self.token[:kept], torch.repeat_interleave(load)
        if bool(((token < 0) | (token >= tokens)).any() | ((token.diff() < 0) & (expert.diff() == 0)).any()):
            raise ValueError(f"routing.token: expected tokens below {tokens} that rise within each expert, got others")
        row, of = self.row[: int(self.slot_offsets[-1])], torch.repeat_interleave(self.slot_offsets.diff())
        row, of = row[row < kept], of[row < kept]
        if not torch.equal(row.sort().values, torch.arange(kept, device=row.device)) or bool((token[row] != of).any()):
            raise ValueError(f"routing.row: expected each of {kept} rows once, under its token, got others")
        mask = mask_of(self, None, self.slot_offsets[1:])
        if mask is not None and bool((~mask)[token].any()):
            raise ValueError("routing.mask: expected no rows of tokens that are left out, got some")

    def statistics(self) -> Statistics:
        """Statistics of the load, computed without a synchronisation.

        Example:
            >>> ids = torch.tensor([[0], [0], [1]])
            >>> ffn_ops.Routing.from_topk(ids, torch.ones(3, 1), num_experts=2).statistics().tokens_per_expert
            tensor([2., 1.])
        """
        load = self.offsets.diff().float()
        kept, wanted, experts = load.sum(), self.counts.sum().float(), load.shape[0]
        share = load / kept.clamp(min=1)
        entropy = -(share * share.clamp(min=1e-30).log()).sum()
        return Statistics(
            tokens_per_expert=load,
            dropped_fraction=(wanted - kept) / wanted.clamp(min=1),
            load_entropy=entropy / math.log(experts) if experts > 1 else torch.ones_like(entropy),
            max_over_mean=load.max() * experts / kept.clamp(min=1),
        )


# torch.export.save can then write programs that take or return them, and torch.load(weights_only=True) reads them.
for _kind in (Routing, Statistics):
    pytree._register_namedtuple(_kind, serialized_type_name=f"ffn_ops.{_kind.__name__}")
torch.serialization.add_safe_globals([Routing, Statistics])


def sorted_rows(
    expert: Tensor,
    token: Tensor | None,
    weight: Tensor,
    num_experts: int,
    num_tokens: Any,
    capacity: Any = None,
    drop: str = "position",
    mask: Tensor | None = None,
) -> Routing:
    """Sorts entries into a Routing: ``expert`` [T, K], or ``expert`` and ``token`` [R]. It skips experts and tokens
    out of range."""
    if capacity is not None:
        check.at_least("capacity", capacity, 0)
    check.choice("drop", drop, ("position", "weight"))
    if weight.dtype not in (torch.float32, torch.float64):
        weight = weight.float()
    limit = -1 if capacity is None else capacity
    weight, token, offsets, row, slot_offsets, counts, _ = sort_op(
        expert, token, weight, num_experts, num_tokens, limit, drop == "weight"
    )
    if mask is None:
        mask = weight.new_empty((0,), dtype=torch.bool)
    return Routing(token, weight, offsets, row, slot_offsets, counts, mask)


def fold_logits(logits: Any, mask: Any = None) -> tuple[Tensor, Tensor | None]:
    """Returns logits ``[T, E]`` and mask ``[T]``. Logits of padding become 0 with a gradient of exactly 0, because NaN
    there must not enter a product."""
    check.tensor("logits", logits)
    if logits.dim() < 2 or logits.shape[-1] < 1:
        raise ValueError(f"logits: expected shape [..., T, E] with E >= 1, got {list(logits.shape)}")
    z = logits if logits.dim() == 2 else logits.flatten(0, -2)
    if mask is None:
        return z, None
    mask = check_mask(mask, z)
    return torch.where(mask.unsqueeze(1), z, 0), mask


def check_mask(mask: Any, tokens: Tensor, name: str = "mask") -> Tensor:
    """Returns the mask as ``[T]``, for ``tokens`` [T, ...]."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype is not torch.bool:
        raise TypeError(f"{name}: expected dtype bool, got {str(mask.dtype).removeprefix('torch.')}")
    if mask.numel() != tokens.shape[0]:
        raise ValueError(f"{name}: expected one element for each of {tokens.shape[0]} tokens, got {list(mask.shape)}")
    check.device(name, mask, tokens, "logits")
    return mask.reshape(-1)


def has_values(t: Tensor) -> bool:
    """Whether Python may read the values: not while the call is traced."""
    return type(t) is Tensor and not t.is_meta and not torch.compiler.is_compiling()


def mask_of(routing: Routing, mask: Any, tokens: Tensor) -> Tensor | None:
    """The mask that ``routing`` was made with, or None. ``mask``, if given, must be the same."""
    own = routing.mask if routing.mask is not None and routing.mask.dim() == 1 and routing.mask.shape[0] else None
    if own is not None:
        own = check_mask(own, tokens, "routing.mask")
    if mask is None:
        return own
    mask = check_mask(mask, tokens)
    wrong = "mask: expected the routing's own mask or None, got another mask"
    if tokens.shape[0] and own is None:
        raise ValueError(f"{wrong}: the routing was made without one")
    if own is None:
        return own
    if not has_values(mask):
        torch._assert_async((mask == own).all(), wrong)
    elif mask.data_ptr() != own.data_ptr() and not torch.equal(mask, own):
        raise ValueError(wrong)
    return own


def wide(logits: Tensor) -> Tensor:
    """Casts to the dtype of scores: float32, or float64 for float64. Autocast does not lower it."""
    return logits.to(arithmetic(logits))


def expert_capacity(tokens: Any, k: int, num_experts: int, capacity_factor: float | None, min_capacity: int) -> Any:
    """``ceil(capacity_factor * T * k / E)``, at least ``min_capacity``, at most T; None for no limit."""
    check.at_least("min_capacity", min_capacity, 0)
    if capacity_factor is None:
        return None
    check.number("capacity_factor", capacity_factor)
    if capacity_factor < 0:
        raise ValueError(f"capacity_factor: expected 0 or more, got {capacity_factor}")
    # Integers are exact for the decimal fraction that the caller meant, and a graph with symbolic T can store them.
    if torch._C._get_tracing_state() is not None:  # sizes are tensors there, but its graph holds numbers
        tokens, num_experts = int(tokens), int(num_experts)
    factor = Fraction(capacity_factor).limit_denominator(10**6)
    divisor = factor.denominator * num_experts
    wanted = (factor.numerator * tokens * k + divisor - 1) // divisor  # ONNX rounds negative quotients up
    return torch.sym_min(tokens, torch.sym_max(min_capacity, wanted))
