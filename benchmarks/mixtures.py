# SPDX-License-Identifier: BSD-3-Clause
"""The ways to compute a mixture of experts that are compared, over the same stacked weights, routing included."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ffn_ops

from .workloads import Mixture

Linear = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
Weights = dict[str, Tensor]


def empty_weights(shape: Mixture, dtype: torch.dtype, device: str | torch.device) -> Weights:
    pre = 2 * shape.F if shape.gated else shape.F
    sizes: dict[str, tuple[int, ...]] = {"w_in": (shape.E, pre, shape.D), "w_down": (shape.E, shape.D, shape.F)}
    if shape.bias:
        sizes |= {"b_in": (shape.E, pre), "b_down": (shape.E, shape.D)}
    return {name: torch.empty(size, dtype=dtype, device=device) for name, size in sizes.items()}


class Experts(nn.Module):
    """``weights`` are shared by all of a row's modules; each has leaves of its own over them."""

    def __init__(self, shape: Mixture, weights: Weights, wide: bool = False) -> None:
        super().__init__()
        self.shape, self.weights = shape, weights
        self.wide = wide  # casts x and weights to float32, computes, casts back
        for name, weight in weights.items():
            self._register(name, weight)

    def _register(self, name: str, weight: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(weight))

    def activate(self, pre: Tensor) -> Tensor:
        if not self.shape.gated:
            return F.gelu(pre)
        gate, up = pre.chunk(2, -1)
        return F.silu(gate) * up


class Loop(Experts):
    """As a user writes it: separate parameters of every expert, one expert after the other."""

    def __init__(self, shape: Mixture, weights: Weights, linear: Linear = F.linear, wide: bool = False) -> None:
        super().__init__(shape, weights, wide)
        self.linear = linear

    def _register(self, name: str, weight: Tensor) -> None:
        setattr(self, name, nn.ParameterList(weight.unbind()))

    def groups(self) -> dict[str, tuple[Tensor, ...]]:
        """The parameters that belong to one stacked weight."""
        return {name: tuple(getattr(self, name)) for name in self.weights}

    def _parameter(self, name: str, expert: int) -> Tensor | None:
        if name not in self.weights:
            return None
        parameter: Tensor = getattr(self, name)[expert]
        return parameter.float() if self.wide else parameter

    def _linear(self, x: Tensor, name: str, expert: int) -> Tensor:
        weight = self._parameter(f"w_{name}", expert)
        assert weight is not None
        return self.linear(x, weight, self._parameter(f"b_{name}", expert))

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        weights, ids = torch.softmax(logits, -1).topk(self.shape.K, -1)
        rows = x.float() if self.wide else x
        y = torch.zeros_like(rows)
        for expert in range(self.shape.E):
            tokens, slots = torch.where(ids == expert)
            if tokens.numel():
                out = self._linear(self.activate(self._linear(rows[tokens], "in", expert)), "down", expert)
                y = y.index_add(0, tokens, (out * weights[tokens, slots].unsqueeze(1)).to(y.dtype))
        return y.to(x.dtype)


class Grouped(Experts):
    """Rows sorted by expert, ``grouped_mm`` over the stacked weights, one addition into the tokens."""

    def _product(self, rows: Tensor, name: str, sorted_ids: Tensor, ends: Tensor) -> Tensor:
        weight: Tensor = getattr(self, f"w_{name}")
        y = F.grouped_mm(rows, weight.to(rows.dtype).transpose(1, 2), offs=ends)
        if self.shape.bias:
            bias: Tensor = getattr(self, f"b_{name}")
            y = y + bias.float()[sorted_ids].to(rows.dtype)  # gathered in 16 bits, its gradient would be summed in them
        return y

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        weights, ids = torch.softmax(logits, -1).topk(self.shape.K, -1)
        sorted_ids, order = ids.flatten().sort(stable=True)
        ends = torch.searchsorted(sorted_ids, torch.arange(self.shape.E, device=x.device), right=True, out_int32=True)
        tokens = order // self.shape.K
        rows = x.float() if self.wide else x
        h = self.activate(self._product(rows[tokens], "in", sorted_ids, ends))
        out = self._product(h, "down", sorted_ids, ends) * weights.flatten()[order].unsqueeze(1)
        return torch.zeros_like(rows).index_add(0, tokens, out.to(rows.dtype)).to(x.dtype)


class Ours(Experts):
    w_in: Tensor
    w_down: Tensor
    b_in: Tensor
    b_down: Tensor

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        return ffn_ops.moe(
            x,
            ffn_ops.routing.top_k(logits, self.shape.K),
            self.w_in,
            self.w_down,
            gated=self.shape.gated,
            b_in=self.b_in if self.shape.bias else None,
            b_down=self.b_down if self.shape.bias else None,
            activation=self.shape.activation,
        )


class Route(nn.Module):
    """Routing alone: the experts' weights and the order that sorts the rows by expert."""

    def __init__(self, shape: Mixture) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, ids = torch.softmax(logits, -1).topk(self.shape.K, -1)
        ids = ids.flatten()
        return weights, ids.sort(stable=True).indices, torch.bincount(ids, minlength=self.shape.E)

    def compared(self, weights: Tensor, order: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
        """Not timed: in the form in which a routing holds them, the integers exactly."""
        return weights.flatten()[order], (order // self.shape.K).double(), counts.double()


class OurRoute(Route):
    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        routing = ffn_ops.routing.top_k(logits, self.shape.K)
        return routing.weight, routing.token, routing.counts

    def compared(self, weights: Tensor, tokens: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
        return weights, tokens.double(), counts.double()
