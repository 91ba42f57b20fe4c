# SPDX-License-Identifier: BSD-3-Clause
"""Balance without a loss: a bias that is added for the choice and moved against the load after every step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from ._group import sum_over
from ._routing import Routing
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


class BiasedTopK(nn.Module):
    """:func:`top_k` with a bias as a buffer: DeepSeek-V3's router. Call ``update(routing)`` after each step, or
    ``update(routing, group=group)`` if several ranks train the model.

    Args:
        num_experts: E.
        k: experts per token.
        options: further options of :func:`top_k`; the defaults are DeepSeek-V3's, sigmoid scores renormalised.

    State: ``bias`` ``[E]``, always float32: casts of the module and of checkpoints do not change its values.

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
        self.register_buffer("bias", torch.zeros(num_experts))

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
        update_bias(self.bias, routing, rate, group=group)

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
