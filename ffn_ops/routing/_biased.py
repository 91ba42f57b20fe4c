"""Balance without a loss: a bias on the choice, moved against the load after every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from ._routing import Routing
from ._top_k import top_k


@torch.no_grad()
def update_bias(bias: Tensor, routing: Routing, rate: float = 1e-3) -> None:
    """In place ``bias += rate * sign(mean load - load)``, with the load before dropping. ``bias`` [E] has no gradient.

    Source: DeepSeek-V3 (2024), section 2.1.2; Wang et al., Auxiliary-Loss-Free Load Balancing (2024), algorithm 1.
    """
    check.tensor("bias", bias)
    check.routing(routing, bias, "bias")
    check.tensor("bias", bias, (routing.counts.shape[0],))
    check.number("rate", rate)
    load = routing.counts.to(bias.dtype)
    bias += rate * torch.sign(load.mean() - load)


class BiasedTopK(nn.Module):
    """:func:`top_k` with a bias as a buffer: DeepSeek-V3's router. ``update(routing)`` after each step moves it.

    Args:
        num_experts: E.
        k: experts per token.
        options: further options of :func:`top_k`; the defaults are DeepSeek-V3's, sigmoid scores renormalised.

    State: ``bias`` ``[E]``, float32 whatever the model's dtype.
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

    def update(self, routing: Routing, rate: float = 1e-3) -> None:
        update_bias(self.bias, routing, rate)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.bias.dtype is not torch.float32:  # model.bfloat16() must not lower it: its steps would vanish
            self.bias = self.bias.float()
        return self
