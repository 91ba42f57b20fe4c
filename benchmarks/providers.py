# SPDX-License-Identifier: BSD-3-Clause
"""The ways to compute a layer that are compared. Each turns the same weights and inputs into a module to call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ffn_ops

from . import mixtures
from .mixtures import Experts, Loop
from .workloads import DTYPES, GROWING, MOE_TALL, TALL, Elementwise, Mixture, Row, Shape, drawn_logits

EAGER = "eager"
HUGE = "eager, huge pages"
FLOAT32 = "eager via float32"
COMPILE = "torch.compile"
OURS = "ffn_ops"
RECOMPUTE = "ffn_ops recompute"
OURS_FLOAT32 = "ffn_ops in float32"
OURS_HUGE = "ffn_ops, huge pages"
LOOP = "loop"
LOOP_FLOAT32 = "loop via float32"
GROUPED = "grouped_mm"
GROUPED_FLOAT32 = "grouped_mm via float32"
GROUPED_COMPILE = "grouped_mm compiled"
TORCH_ROUTING = "torch"
ENOUGH = 512  # least number of elements of a result for which its error can be judged
COMPILING = (COMPILE, GROUPED_COMPILE)  # whose first call is no sample

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


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
    """The module of the two study guides."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(super().forward(x))
        return y


class Activation(nn.Module):
    """The element-wise part alone."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.act(gate) * up


class OurActivation(nn.Module):
    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return ffn_ops.gated_act(gate, up, activation=self.activation)


def _empty_layer(shape: Shape, dtype: torch.dtype, device: str | torch.device) -> nn.Module:
    if isinstance(shape, Elementwise):
        return Activation(_ACTIVATIONS[shape.activation])
    if isinstance(shape, Mixture):
        return Loop(shape, mixtures.empty_weights(shape, dtype, device)) if shape.D else mixtures.Route(shape)
    with torch.device("meta"):
        layer = EagerWithDropout(shape) if shape.dropout else Eager(shape)
    return layer.to(dtype).to_empty(device=device)


def groups(module: nn.Module) -> dict[str, tuple[Tensor, ...]]:
    """The parameters, those together that are one tensor to other providers."""
    return module.groups() if isinstance(module, Loop) else {name: (p,) for name, p in module.named_parameters()}


class _OtherLinear(nn.Module):
    """The same layer, without dropout, through another linear function."""

    act: Callable[[Tensor], Tensor]
    linear: mixtures.Linear

    def __init__(self, layer: Eager, linear: mixtures.Linear) -> None:
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
    """A module to call; each draw is its inputs (x ``[T, D]``, logits ``[T, E]``; gate and up ``[T, F]``) and the
    gradient of its output, None where only the output is asked for."""

    module: nn.Module
    draws: tuple[tuple[tuple[Tensor, ...], Tensor | None], ...]  # the first is timed, all are verified
    slack: float = 1.0  # of the limits of error


def eager_inputs(shape: Shape, dtype: str, device: str = "cpu") -> Inputs:
    """The same weights and inputs at every call on a device, in whatever process.

    Draws are so many that every result has some hundred numbers: the errors of 16 differ by more than 1.5 by chance.
    """
    generator = torch.Generator(device).manual_seed(1)
    layer = _empty_layer(shape, torch.float32, device)
    with torch.no_grad():
        for parameter in layer.parameters():
            bound = parameter.shape[-1] ** -0.5  # nn.Linear's own range
            parameter.uniform_(-bound, bound, generator=generator)
    sizes = [sum(p.numel() for p in group) for group in groups(layer).values()]
    sizes += [shape.T * shape.D] if shape.D else []
    sizes += [shape.T * shape.F] if isinstance(shape, Elementwise) else []
    sizes += [shape.T * shape.E] if isinstance(shape, Mixture) else []
    count = -(-ENOUGH // min(sizes))
    args: list[tuple[Tensor, ...]] = [()] * count
    d_ys: list[Tensor | None] = [None] * count
    wide = shape.F if isinstance(shape, Elementwise) else shape.D
    if wide:
        tensors = 3 if isinstance(shape, Elementwise) else 2  # the last is d_y
        drawn = [
            [torch.randn(shape.T, wide, generator=generator, device=device) for _ in range(tensors)]
            for _ in range(count)
        ]
        args, d_ys = [tuple(each[:-1]) for each in drawn], [each[-1] for each in drawn]
    if isinstance(shape, Mixture):
        logits = drawn_logits(shape.T, shape.E, count)
        args = [(*a, z.to(device)) for a, z in zip(args, logits, strict=True)]
    return converted(Inputs(layer, tuple(zip(args, d_ys, strict=True))), shape, DTYPES[dtype])


def converted(inputs: Inputs, shape: Shape, dtype: torch.dtype) -> Inputs:
    """The same values in another dtype; logits are at least float32."""
    module = inputs.module
    if any(parameter.dtype is not dtype for parameter in module.parameters()):
        module = _empty_layer(shape, dtype, next(inputs.module.parameters()).device)
        with torch.no_grad():
            for to, value in zip(module.parameters(), inputs.module.parameters(), strict=True):
                to.copy_(value)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    dtypes = [wide if name == "logits" else dtype for name in shape.inputs]
    draws = [
        (
            tuple(a.detach().to(kind).requires_grad_() for a, kind in zip(args, dtypes, strict=True)),
            None if d_y is None else d_y.to(dtype),
        )
        for args, d_y in inputs.draws
    ]
    return Inputs(module, tuple(draws))


class _RoundedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias = bias is not None
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        (d_y,) = grads
        wide = d_y.float()
        d_x, d_weight = wide @ weight.float(), wide.t() @ x.float()
        return d_x.to(x.dtype), d_weight.to(x.dtype), wide.sum(0).to(x.dtype) if ctx.bias else None


def rounded_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of a 16-bit dtype and its gradients with float32 sums and one rounding each, where eager rounds.
    Native 16-bit backward takes 20 s for one step on a CPU without 16-bit arithmetic."""
    y: Tensor = _RoundedLinear.apply(x, weight, bias)
    return y


def limit_inputs(inputs: Inputs) -> Inputs:
    """The layer whose error is the yardstick: eager, in 16 bits on a CPU with ``rounded_linear``."""
    layer, x = inputs.module, inputs.draws[0][0][0]
    if x.dtype is torch.float32 or x.is_cuda or isinstance(layer, Activation):
        return inputs
    if isinstance(layer, Loop):
        return Inputs(Loop(layer.shape, layer.weights, rounded_linear), inputs.draws)
    assert isinstance(layer, Eager)
    return Inputs(_OtherLinear(layer, rounded_linear), inputs.draws)


def _ours(inputs: Inputs, shape: Shape, recompute: bool = False) -> Inputs:
    if isinstance(shape, Elementwise):
        return Inputs(OurActivation(shape.activation), inputs.draws)
    with torch.device("meta"):
        module = ffn_ops.FeedForward(
            shape.D,
            d_ff=shape.F,
            dropout=shape.dropout,
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
    return replace(inputs, module=cast(nn.Module, torch.compile(inputs.module)))


def _on_huge_pages(build: Callable[[Inputs, Shape], Inputs]) -> Callable[[Inputs, Shape], Inputs]:
    """With weights of its own."""

    def moved(inputs: Inputs, shape: Shape) -> Inputs:
        built = build(inputs, shape)
        module = copy.deepcopy(built.module)
        ffn_ops.use_huge_pages(module)
        return replace(built, module=module)

    return moved


def _reads_weights(row: Row) -> bool:
    """Inference whose time is that of reading the weights."""
    return row.mode == "inference" and row.device == "cpu" and row.shape.D >= 512 and row.shape.T <= 16


def _through_wide(row: Row) -> bool:
    """Where float32 is the faster way to a 16-bit result."""
    return row.dtype != "float32" and row.device == "cpu"


@dataclass(frozen=True)
class Provider:
    name: str
    build: Callable[[Inputs, Shape], Inputs]
    serves: Callable[[Row], bool] = lambda row: True


PROVIDERS = (
    Provider(EAGER, lambda inputs, shape: inputs),
    Provider(FLOAT32, _through_float32, lambda row: _through_wide(row) and not row.shape.dropout),
    Provider(COMPILE, _compiled),
    Provider(OURS, _ours),
    Provider(RECOMPUTE, lambda i, shape: _ours(i, shape, True), lambda row: row.mode == "training" and row.shape.D > 0),
    Provider(
        OURS_FLOAT32,
        lambda inputs, shape: _ours(converted(inputs, shape, torch.float32), shape),
        lambda row: _through_wide(row) and row.mode == "training" and row.shape == TALL,
    ),
    Provider(OURS_HUGE, _on_huge_pages(_ours), _reads_weights),
)


def _experts(kind: type[Experts], wide: bool = False, slack: float = 1.0) -> Callable[[Inputs, Shape], Inputs]:
    def build(inputs: Inputs, shape: Shape) -> Inputs:
        assert isinstance(inputs.module, Loop) and isinstance(shape, Mixture)
        return Inputs(kind(shape, inputs.module.weights, wide=wide), inputs.draws, slack)

    return build


def _our_mixture(inputs: Inputs, shape: Shape) -> Inputs:
    assert isinstance(shape, Mixture)
    return _experts(mixtures.Ours)(inputs, shape) if shape.D else Inputs(mixtures.OurRoute(shape), inputs.draws)


def _has_peers(row: Row) -> bool:
    return row.shape.D > 0 and row.configuration != GROWING


# torch sums a gathered bias's gradient row after row, with a larger error than the loop's sum.
_GROUPED_SLACK = 4.0
_grouped = _experts(mixtures.Grouped, False, _GROUPED_SLACK)
_wide_grouped = _experts(mixtures.Grouped, True, _GROUPED_SLACK)

_GROUPED = (
    Provider(GROUPED, _grouped, _has_peers),
    Provider(GROUPED_FLOAT32, _wide_grouped, lambda row: _has_peers(row) and _through_wide(row)),
    Provider(GROUPED_COMPILE, lambda inputs, shape: _compiled(_grouped(inputs, shape), shape), _has_peers),
)

MOE_PROVIDERS = (
    Provider(TORCH_ROUTING, lambda inputs, shape: inputs, lambda row: row.shape.D == 0),
    Provider(LOOP, lambda inputs, shape: inputs, _has_peers),
    Provider(LOOP_FLOAT32, _experts(Loop, True), lambda row: _has_peers(row) and _through_wide(row)),
    *(_GROUPED if hasattr(F, "grouped_mm") else ()),
    Provider(OURS, _our_mixture),
    Provider(
        OURS_FLOAT32,
        lambda inputs, shape: _our_mixture(converted(inputs, shape, torch.float32), shape),
        lambda row: _through_wide(row) and row.mode == "training" and row.shape == MOE_TALL,
    ),
    Provider(OURS_HUGE, _on_huge_pages(_our_mixture), _reads_weights),
)
