# SPDX-License-Identifier: BSD-3-Clause
"""Balance without a loss: a bias that is added for the choice and moved against the load after every step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from ..reference import SCORES
from ._group import sum_over
from ._routing import Routing, fold_logits, wide
from ._top_k import top_k

if TYPE_CHECKING:
    from ._group import Group


@torch.no_grad()
def update_bias(bias: Tensor, routing: Routing, rate: float = 1e-3, *, group: Group | None = None) -> None:
    """Updates in place: ``bias += rate * sign(mean load - load)``, with the load before dropping.

    Args:
        bias: ``[E]``, float32 or float64 (such small steps vanish in 16 bits), without a gradient.
        routing: of this step. For several routings in a step: one call for each, or one with the sum of their counts.
        rate: the size of a step.
        group: a ``ProcessGroup`` or a ``DeviceMesh`` (all of its dimensions) whose ranks train one model, each with
            its own tokens. Their loads are added up, so that every rank makes the same step. **Without it each rank
            follows its own load, and the ranks' biases drift apart.** With it the call is a collective, which every
            rank must join, even without tokens.

    Raises:
        TypeError, ValueError: with the argument, what was expected and what came.

    Source: DeepSeek-V3 (2024), section 2.1.2; Wang et al., Auxiliary-Loss-Free Load Balancing (2024), algorithm 1.

    Example:
        >>> bias = torch.zeros(2)
        >>> ffn_ops.routing.update_bias(bias, ffn_ops.routing.top_k(torch.tensor([[1.0, 0.0]]), k=1), rate=0.5)
        >>> bias
        tensor([-0.5000,  0.5000])
    """
    check.wide("bias", bias)
    check.routing(routing, bias, "bias")
    check.tensor("bias", bias, (routing.counts.shape[0],))
    check.number("rate", rate)
    load = sum_over(routing.counts, group)
    below = load.sum() - load * load.shape[0]  # the sign of E * (mean load - load), exact in integers
    bias += rate * torch.sign(below).to(bias.dtype)


@torch.no_grad()
def solve_bias(
    bias: Tensor,
    logits: Tensor,
    k: int,
    *,
    score: str = "sigmoid",
    by_logits: bool = False,
    mask: Tensor | None = None,
    group: Group | None = None,
) -> None:
    """In place the bias that evens out the loads of these tokens, by quantiles and without a rate.

    With scores s ``[T, E]`` and ``alpha_i`` the (k+1)-th largest of ``s_i + b``, token i takes expert j where
    ``b_j > alpha_i - s_ij``: so ``b_j`` becomes the k/E-quantile over the tokens of ``alpha_i - s_ij``, which as many
    tokens lie below as a balanced expert has, and then ``b`` less its mean. All ``b_j`` move at once, and each moves
    the ``alpha``: one call a step follows a router that learns.

    The quantile is read from histograms, as Kimi K3's: 1000 bins, then 1000 within the bin that was found, from the
    least of ``alpha_i - s_ij`` to the greatest. So ranks add up counts, and all get the same bits.

    Args:
        bias: ``[E]``, float32 or float64.
        logits: ``[..., E]`` for T tokens, those that the bias chose for; several micro-batches go in one call. Tokens
            whose scores are not finite are left out, so that one step with NaN does not stay in the bias.
        k: experts per token, below E.
        score, by_logits: as the router has them, see :func:`top_k`; with ``by_logits`` s are the logits.
        mask: bool, one for each token, False for padding.
        group: see :func:`update_bias`: the call is then a collective, which every rank joins, also without tokens.

    Raises:
        TypeError, ValueError: name of the argument, what was expected and what came.

    Source: Kimi K3 (2026), equations 13 and 14 and appendix D, which Megatron-LM, TransformerEngine and torchtitan
        follow; first: Su, "MoE Odyssey 6" (2026).

    Example:
        >>> bias, logits = torch.zeros(2), torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]])
        >>> ffn_ops.routing.solve_bias(bias, logits, k=1)
        >>> ffn_ops.routing.top_k(logits, k=1, score="sigmoid", bias=bias).counts  # without the bias: 4, 0
        tensor([2, 2])
    """
    check.wide("bias", bias)
    z, mask = fold_logits(logits, mask)
    experts = z.shape[1]
    check.tensor("bias", bias, (experts,))
    check.device("bias", bias, z, "logits")
    check.at_least("k", k, 1, experts - 1)
    check.choice("score", score, tuple(SCORES))
    check.flag("by_logits", by_logits)
    z = z.double() if z.device.type == "cpu" else wide(z)
    s = z if by_logits else SCORES[score](z)
    alpha = (s + bias).topk(k + 1, 1).values[:, k:]
    wanted = alpha - s
    real = wanted.isfinite().all(1) if mask is None else wanted.isfinite().all(1) & mask
    bias.copy_(_quantiles(wanted, real, k / experts, bias, group))


_BINS = 1000


def _quantiles(values: Tensor, real: Tensor, share: float, otherwise: Tensor, group: Any) -> Tensor:
    """Of each column of ``values`` [T, E], in the rows that are ``real`` [T], less their mean; ``otherwise`` where no
    rank has such a row."""
    experts = values.shape[1]
    ends = values.new_full((2,), -torch.inf)
    if values.shape[0]:
        row = real.unsqueeze(1)
        ends = torch.stack([torch.where(row, v, -torch.inf).amax() for v in (-values, values)])
    ends = sum_over(ends, group, "max")
    low, width = (-ends[0]).expand(experts, 1), (ends[0] + ends[1]).clamp(min=1e-30)
    rows = sum_over(real.sum(), group)
    rank, below = rows * share, torch.zeros_like(low)
    values, inside = values.t(), real.expand(experts, -1)
    for _ in range(2):
        width = width / _BINS
        place = ((values - low) / width).nan_to_num(0).long().clamp(0, _BINS - 1)
        counts = torch.zeros(experts, _BINS, dtype=torch.int64, device=values.device)
        counts = sum_over(counts.scatter_add_(1, place, inside.long()), group)
        up_to = counts.cumsum(1) + below
        found = (up_to < rank.ceil()).sum(1, keepdim=True).clamp(max=_BINS - 1)
        inside = inside & (place == found)
        within = counts.gather(1, found)
        below = up_to.gather(1, found) - within
        low = low + found * width
    quantile = (low + (rank - below) / within.clamp(min=1) * width).squeeze(1)
    return torch.where(rows > 0, quantile - quantile.mean(), otherwise.to(quantile.dtype))


class BiasedTopK(nn.Module):
    """:func:`top_k` with a bias as a buffer: DeepSeek-V3's router. After each step ``update(routing)`` moves it by a
    rate, or ``solve(logits)`` makes it anew by quantiles; with ``group=group`` where several ranks train the model.

    Args:
        num_experts: E.
        k: experts per token.
        options: further options of :func:`top_k`; the defaults are DeepSeek-V3's, sigmoid scores renormalised.

    State: ``bias`` ``[E]``, without the ``shared`` experts of the options; always float32: casts of the
    module and of checkpoints do not change its values.

    Example:
        >>> router = ffn_ops.routing.BiasedTopK(num_experts=4, k=2)
        >>> layer = ffn_ops.MoEFFN(8, 16, num_experts=4, router=router)
        >>> y, routing, logits = layer(torch.randn(5, 8), return_routing=True)
        >>> layer.choose.update(routing)
    """

    bias: Tensor

    def __init__(self, num_experts: int, k: int, **options: Any) -> None:
        super().__init__()
        check.at_least("num_experts", num_experts, 1)
        self.k = k
        self.options = {"score": "sigmoid", "renormalize": True, **options}
        shared = options.get("shared", 0)
        check.at_least("shared", shared, 0, num_experts - 1)
        top_k(torch.empty(0, num_experts, device="meta"), k, bias=None, **self.options)  # checks them
        self.register_buffer("bias", torch.zeros(num_experts - shared, dtype=torch.float32))

    __prepare_scriptable__ = check.refuse_script

    def forward(self, logits: Tensor, **options: Any) -> Routing:
        if isinstance(logits, check.Proxy):
            return check.leaf(self, logits)(logits, **options)  # type: ignore[no-any-return]
        return top_k(logits, self.k, bias=self.bias, **{**self.options, **options})

    def update(self, routing: Routing, rate: float = 1e-3, *, group: Group | None = None) -> None:
        """Moves the bias, see :func:`update_bias`. Data and expert parallelism need ``group``; it is then a collective.

        Example:
            >>> router = ffn_ops.routing.BiasedTopK(num_experts=2, k=1)
            >>> router.update(router(torch.tensor([[1.0, 0.0]])))
            >>> router.bias
            tensor([-0.0010,  0.0010])
        """
        check.routing(routing, self.bias, "bias")
        check.indices("routing.counts", routing.counts, (self._experts(),))
        chosen = routing._replace(counts=routing.counts[: self.bias.shape[0]])  # without the shared experts
        update_bias(self.bias, chosen, rate, group=group)

    def solve(self, logits: Tensor, *, mask: Tensor | None = None, group: Group | None = None) -> None:
        """See :func:`solve_bias`. Not within groups of experts, where a token has more than one threshold.

        Example:
            >>> router = ffn_ops.routing.BiasedTopK(num_experts=2, k=1)
            >>> router.solve(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
            >>> router(torch.tensor([[1.0, 0.0], [3.0, 0.0]])).counts
            tensor([1, 1])
        """
        if self.options.get("num_groups", 1) > 1:
            raise ValueError(f"num_groups: expected 1 for quantiles, got {self.options['num_groups']}")
        z, _ = fold_logits(logits)
        check.tensor("logits", z, ("T", self._experts()))
        if (softcap := self.options.get("softcap")) is not None:
            z = softcap * torch.tanh(wide(z) / softcap)
        options = {name: self.options[name] for name in ("score", "by_logits") if name in self.options}
        solve_bias(self.bias, z[:, : self.bias.shape[0]], self.k, **options, mask=mask, group=group)

    def _experts(self) -> int:
        return self.bias.shape[0] + int(self.options.get("shared", 0))

    def reset_parameters(self) -> None:
        """Sets ``bias`` to 0."""
        nn.init.zeros_(self.bias)

    # The steps of update() would vanish in 16 bits, and a rounded bias sends tokens to other experts.
    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        bias = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype is not torch.float32:
            self.bias = bias.to(self.bias.device, torch.float32)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)  # type: ignore[no-untyped-call]
        self.bias = self.bias.float()  # load_state_dict(assign=True) keeps the dtype of the checkpoint
