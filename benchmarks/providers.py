"""The ways to compute a gated FFN that are compared. Each turns the same weights and inputs into a module to call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ffn_ops

from .verify import rounded_linear
from .workloads import DTYPES, TALL, Row, Shape

EAGER = "eager"
HUGE = "eager, huge pages"
FLOAT32 = "eager via float32"
COMPILE = "torch.compile"
OURS = "ffn_ops"
RECOMPUTE = "ffn_ops recompute"
OURS_FLOAT32 = "ffn_ops in float32"
ENOUGH = 512  # numbers of a result, for its error to be judged
COMPILING = (COMPILE,)  # whose first call is no sample

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}
_Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Eager(nn.Module):
    """LLaMA's feed-forward module as a user writes it."""

    act: Callable[[Tensor], Tensor]

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.D, shape.F, bias=shape.bias)
        self.w2 = nn.Linear(shape.F, shape.D, bias=shape.bias)
        self.w3 = nn.Linear(shape.D, shape.F, bias=shape.bias)
        self.act = _ACTIVATIONS[shape.activation]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.w2(self.act(self.w1(x)) * self.w3(x))
        return y


class EagerWithDropout(Eager):
    """The study guides' module."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(super().forward(x))
        return y


def _empty_layer(shape: Shape) -> Eager:
    with torch.device("meta"):
        layer = EagerWithDropout(shape) if shape.dropout else Eager(shape)
    return layer.to_empty(device="cpu")


class _OtherLinear(nn.Module):
    """The same layer, without dropout, through another linear function."""

    act: Callable[[Tensor], Tensor]
    linear: _Linear

    def __init__(self, layer: Eager, linear: _Linear) -> None:
        super().__init__()
        self.w1, self.w2, self.w3, self.act, self.linear = layer.w1, layer.w2, layer.w3, layer.act, linear

    def forward(self, x: Tensor) -> Tensor:
        gate = self.linear(x, self.w1.weight, self.w1.bias)
        h = self.act(gate) * self.linear(x, self.w3.weight, self.w3.bias)
        return self.linear(h, self.w2.weight, self.w2.bias)


class _ThroughFloat32(_OtherLinear):
    """Casts x and weights to float32, computes, casts back; autograd does the same to the gradients."""

    def __init__(self, layer: Eager) -> None:
        super().__init__(layer, lambda x, w, b: F.linear(x, w.float(), None if b is None else b.float()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


@dataclass(frozen=True)
class Inputs:
    """A module to call; each draw is its input ``[T, D]`` and the gradient ``[T, D]`` of its output."""

    module: nn.Module
    draws: tuple[tuple[Tensor, Tensor], ...]  # the first is timed, all are verified


def eager_inputs(shape: Shape, dtype: str) -> Inputs:
    """The same weights and inputs at every call, in whatever process.

    Draws are so many that every result has some hundred numbers: the errors of 16 differ by more than 1.5 by chance.
    """
    generator = torch.Generator().manual_seed(1)
    layer = _empty_layer(shape)
    with torch.no_grad():
        for parameter in layer.parameters():
            bound = parameter.shape[-1] ** -0.5  # nn.Linear's own range
            parameter.uniform_(-bound, bound, generator=generator)
    kind = DTYPES[dtype]
    fewest = min(shape.T * shape.D, *(parameter.numel() for parameter in layer.parameters()))
    draws = []
    for _ in range(-(-ENOUGH // fewest)):
        x, d_y = (torch.randn(shape.T, shape.D, generator=generator).to(kind) for _ in range(2))
        draws.append((x.requires_grad_(), d_y))
    return Inputs(layer.to(kind), tuple(draws))


def converted(inputs: Inputs, shape: Shape, dtype: torch.dtype) -> Inputs:
    """The same values in a wider dtype."""
    module = _empty_layer(shape).to(dtype)
    with torch.no_grad():
        for wide, narrow in zip(module.parameters(), inputs.module.parameters(), strict=True):
            wide.copy_(narrow)
    draws = tuple((x.detach().to(dtype).requires_grad_(), d_y.to(dtype)) for x, d_y in inputs.draws)
    return Inputs(module, draws)


def limit_inputs(inputs: Inputs) -> Inputs:
    """The layer whose error is the yardstick: eager, in 16 bits with ``rounded_linear``."""
    if inputs.draws[0][0].dtype is torch.float32:
        return inputs
    assert isinstance(inputs.module, Eager)
    return Inputs(_OtherLinear(inputs.module, rounded_linear), inputs.draws)


def _ours(inputs: Inputs, shape: Shape, recompute: bool = False) -> Inputs:
    with torch.device("meta"):
        module = ffn_ops.FeedForward(
            shape.D,
            -(-3 * shape.F // 2),  # two thirds of it, rounded down, are F
            1,
            shape.dropout,
            activation=shape.activation,
            bias=shape.bias,
            recompute=recompute,
        )
    for name in ("w1", "w2", "w3"):
        setattr(module, name, getattr(inputs.module, name))
    return Inputs(module, inputs.draws)


def _through_float32(inputs: Inputs, shape: Shape) -> Inputs:
    assert isinstance(inputs.module, Eager)
    return Inputs(_ThroughFloat32(inputs.module), inputs.draws)


def _compiled(inputs: Inputs, shape: Shape) -> Inputs:
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # no pool of processes beside the samples
    torch._dynamo.reset()  # each row has its own static shape
    return Inputs(cast(nn.Module, torch.compile(inputs.module)), inputs.draws)


def _is_16_bit(row: Row) -> bool:
    return row.dtype != "float32"


@dataclass(frozen=True)
class Provider:
    name: str
    build: Callable[[Inputs, Shape], Inputs]
    serves: Callable[[Row], bool] = lambda row: True


PROVIDERS = (
    Provider(EAGER, lambda inputs, shape: inputs),
    Provider(FLOAT32, _through_float32, lambda row: _is_16_bit(row) and not row.shape.dropout),
    Provider(COMPILE, _compiled),
    Provider(OURS, _ours),
    Provider(RECOMPUTE, lambda i, shape: _ours(i, shape, True), lambda row: row.mode == "training"),
    Provider(
        OURS_FLOAT32,
        lambda inputs, shape: _ours(converted(inputs, shape, torch.float32), shape),
        lambda row: _is_16_bit(row) and row.mode == "training" and row.shape == TALL,
    ),
)
