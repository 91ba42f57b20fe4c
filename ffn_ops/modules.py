# SPDX-License-Identifier: BSD-3-Clause
"""The study guides' layers as modules: parameters and one operator call each; no kernel is chosen here.

Child layers are real ``nn.Linear`` modules, so checkpoints load with ``strict=True`` and a seed gives PyTorch's own
initialisation. The whole layer is fused only while every child is a plain ``nn.Linear``, or one in PEFT's plain LoRA,
or while every child is a linear layer on a quantised weight: other adapters, hooks and parametrisations wrap or
replace children, and an operator that read their ``weight`` would ignore them. Then the children are called and only
the gate is fused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

from . import _checks as check
from . import ops
from ._gate import Gate, as_gate
from ._quantized import QuantizedWeight
from ._quantized.foreign import is_compressed
from ._quantized.linear import weight_of
from .ops._ffn import ffn_then_dropout

# A small layer feels every look-up by nn.Module.__getattr__, so forward reads _modules and _parameters directly.
# FakeTensor: torch.export. DTensors and other subclasses have behaviour of their own
PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor)


def has_own_forward(module: nn.Module) -> bool:
    """True if the instance ``module`` has no ``forward`` but its class's. A library that removes its own may leave the
    class's bound method there, as accelerate does."""
    forward = module.__dict__.get("forward")
    return forward is None or (
        getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module
    )


def is_unhooked(module: nn.Module) -> bool:
    """True if calling ``module`` runs only its class's forward."""
    return (
        ("forward" not in module.__dict__ or has_own_forward(module))
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )


def is_plain_linear(layer: nn.Module) -> bool:
    """True if calling ``layer`` computes only ``F.linear(x, layer.weight, layer.bias)``."""
    if type(layer) is not nn.Linear:
        return False
    weight: Any = layer._parameters.get("weight")
    return type(weight) in PLAIN_TENSORS and weight.layout is torch.strided and is_unhooked(layer)


def quantized(*layers: Any) -> list[tuple[QuantizedWeight, Tensor | None]] | None:
    """Weights and biases of linear layers on quantised weights; None if a call of one of ``layers`` computes more or
    something else."""
    found = [weight_of(layer) if is_unhooked(layer) or is_compressed(layer) else None for layer in layers]
    return None if None in found else found  # type: ignore[return-value]


def called(name: str, child: Any, x: Tensor) -> Tensor:
    """Returns ``child(x)``. Refuses weights on meta, with which torch would return uninitialised memory; hooks may load
    them first."""
    looks = isinstance(x, Tensor) and not torch.compiler.is_compiling()  # torch.fx.symbolic_trace passes proxies
    if looks and not x.is_meta and is_unhooked(child):
        for path, part in child.named_modules(prefix=name):
            for each, p in part._parameters.items():
                if p is not None and p.is_meta and is_unhooked(part):
                    raise ValueError(f"{path}.{each}: expected device {x.device} as x has, got meta")
    return child(x)  # type: ignore[no-any-return]


def fused_ffn(
    x: Tensor, gate: nn.Module, up: nn.Module | None, down: nn.Module, activation: str | Gate, recompute: bool
) -> Tensor | None:
    """The layer of children that are not plain as one operator, or None; see there."""
    from . import _adapters  # which asks this file what is plain

    return _adapters.fused_ffn(x, gate, up, down, activation, recompute)


def is_idle(dropout: nn.Module) -> bool:
    """True if calling ``dropout`` only returns its input."""
    kind = type(dropout)
    idle = kind is nn.Identity or (kind is nn.Dropout and not (dropout.training and dropout.p != 0))  # type: ignore[operator]
    return idle and is_unhooked(dropout)


def plain_probability(dropout: nn.Module) -> float:
    """The ``p`` of ``dropout``, if calling it computes only ``F.dropout`` with p below 1; else 0."""
    if type(dropout) is not nn.Dropout or not dropout.training or not is_unhooked(dropout) or _has_any_global_hook():
        return 0.0
    return dropout.p if 0 < dropout.p < 1 else 0.0


def _alike(layers: list[nn.Linear]) -> bool:
    """True if all have a bias or none has, as the operator needs it."""
    return len({layer.bias is None for layer in layers}) == 1


def reset(module: nn.Module) -> None:
    """Initialises all of ``module``, by its own ``reset_parameters`` or child by child."""
    own = getattr(module, "reset_parameters", None)
    if callable(own):
        own()
    else:
        for child in module.children():
            reset(child)


class _OfLinears(nn.Module):
    """Base of layers whose parameters are those of their children."""

    def reset_parameters(self) -> None:
        """Initialises the parameters in the constructor's order; for use after ``to_empty``."""
        for child in self.children():
            reset(child)


def _check_dropout(value: object) -> None:
    check.number("dropout", value)
    if not 0.0 <= float(value) <= 1.0:  # type: ignore[arg-type]
        raise ValueError(f"dropout: expected a probability between 0 and 1, got {value}")


def _gated_width(hidden_dim: int | None, multiple_of: int, d_ff: int | None) -> int:
    if d_ff is not None:
        check.positive("d_ff", d_ff)
        if hidden_dim is not None or multiple_of != 1:
            given = f"{d_ff} with hidden_dim {hidden_dim} and multiple_of {multiple_of}"
            raise ValueError(f"d_ff: expected it alone or hidden_dim and multiple_of in its place, got {given}")
        return d_ff
    check.positive("hidden_dim", hidden_dim)
    check.positive("multiple_of", multiple_of)
    width: int = multiple_of * ((2 * hidden_dim // 3 + multiple_of - 1) // multiple_of)  # type: ignore[operator]
    if width < 1:
        raise ValueError(f"hidden_dim: expected at least 2, so that two thirds of it are a width, got {hidden_dim}")
    return width


class FeedForward(_OfLinears):
    """``dropout(w2(act(w1 x) * w3 x))``: SwiGLU by default; ``activation=`` gives GeGLU, GLU and the others.

    Args:
        dim: width D of input and output.
        hidden_dim: width of the plain FFN that this one replaces; two thirds of it, rounded up to a multiple of
            ``multiple_of``, is the width F here, so that the number of parameters stays.
        multiple_of: F is a multiple of it.
        dropout: probability of the dropout after ``w2``.
        activation: a name or a :class:`ffn_ops.Gate`.
        d_ff: the width F itself, in place of ``hidden_dim`` and ``multiple_of``.
        bias: whether the three layers have biases.
        recompute: save x alone for backward, see :func:`ffn_ops.ffn`.

    Shapes: x ``[..., dim]`` to ``[..., dim]``. State: ``w1``, ``w2``, ``w3``.

    Raises: TypeError, ValueError for sizes, names and inputs that do not fit.

    Source: Shazeer, GLU Variants Improve Transformer (2020), equation 6; Touvron et al., LLaMA (2023), section 2.2.

    Example:
        >>> layer = ffn_ops.FeedForward(dim=8, hidden_dim=48, multiple_of=16, dropout=0.0)
        >>> layer.w1.out_features  # two thirds of 48
        32
        >>> layer(torch.randn(4, 8)).shape
        torch.Size([4, 8])
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int | None = None,
        multiple_of: int = 1,
        dropout: float = 0.0,
        *,
        d_ff: int | None = None,
        activation: str | Gate = "silu",
        bias: bool = True,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        check.positive("dim", dim)
        hidden = _gated_width(hidden_dim, multiple_of, d_ff)
        _check_dropout(dropout)
        as_gate(activation, gated=True)
        check.flag("recompute", recompute)
        self.w1 = nn.Linear(dim, hidden, bias=bias)
        self.w2 = nn.Linear(hidden, dim, bias=bias)
        self.w3 = nn.Linear(dim, hidden, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.activation, self.recompute = activation, recompute

    __prepare_scriptable__ = check.refuse_script

    def forward(self, x: Tensor) -> Tensor:
        children: dict[str, Any] = self._modules
        w1, w2, w3, dropout = children["w1"], children["w2"], children["w3"], children["dropout"]
        if is_plain_linear(w1) and is_plain_linear(w2) and is_plain_linear(w3):
            p1, p2, p3 = w1._parameters, w2._parameters, w3._parameters
            if isinstance(x, Tensor) and (p := plain_probability(dropout)):
                return ffn_then_dropout(
                    x, p1["weight"], p2["weight"], p3["weight"], None, p1["bias"], p3["bias"], p2["bias"],
                    self.activation, self.recompute, None, p,
                )  # fmt: skip
            y = ops.ffn(
                x, p1["weight"], p2["weight"], w_up=p3["weight"], b_in=p1["bias"], b_up=p3["bias"], b_down=p2["bias"],
                recompute=self.recompute, activation=self.activation,
            )  # fmt: skip
        elif (fused := fused_ffn(x, w1, w3, w2, self.activation, self.recompute)) is not None:
            y = fused
        else:
            h = ops.gated_act(called("w1", w1, x), called("w3", w3, x), activation=self.activation)
            y = called("w2", w2, h)
        # Under torch.fx.symbolic_trace y is a proxy; the graph keeps the call, because the mode may change later.
        return y if is_idle(dropout) and isinstance(y, Tensor) else dropout(y)  # type: ignore[no-any-return]


class PlainFFN(_OfLinears):
    """``linear2(act(linear1 x))``; ``bias`` says whether the two layers have biases.

    Shapes: x ``[..., d_model]`` to ``[..., d_model]``, width F = ``d_ff`` between. State: ``linear1``, ``linear2``.

    Raises: TypeError, ValueError for sizes, names and inputs that do not fit.

    Source: Vaswani et al., Attention Is All You Need (2017), equation 2.

    Example:
        >>> ffn_ops.PlainFFN(8, 32, activation="silu")(torch.randn(4, 8)).shape
        torch.Size([4, 8])
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        activation: str | Gate = "gelu",
        bias: bool = True,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        check.positive("d_model", d_model)
        check.positive("d_ff", d_ff)
        as_gate(activation, gated=False)
        for name, flag in (("bias", bias), ("recompute", recompute)):
            check.flag(name, flag)
        self.linear1 = nn.Linear(d_model, d_ff, bias=bias)
        self.linear2 = nn.Linear(d_ff, d_model, bias=bias)
        self.activation, self.recompute = activation, recompute

    __prepare_scriptable__ = check.refuse_script

    def forward(self, x: Tensor) -> Tensor:
        children: dict[str, Any] = self._modules
        first, second = children["linear1"], children["linear2"]
        if is_plain_linear(first) and is_plain_linear(second):
            p1, p2 = first._parameters, second._parameters
            return ops.ffn(
                x, p1["weight"], p2["weight"], b_in=p1["bias"], b_down=p2["bias"],
                recompute=self.recompute, activation=self.activation,
            )  # fmt: skip
        fused = fused_ffn(x, first, None, second, self.activation, self.recompute)
        if fused is not None:
            return fused
        h = ops.gated_act(called("linear1", first, x), activation=self.activation)
        return called("linear2", second, h)


class ReLUFFN(PlainFFN):
    """``linear2(relu(linear1 x))``, the FFN of the original Transformer. See :class:`PlainFFN`.

    Example:
        >>> ffn_ops.ReLUFFN(8, 32)(torch.randn(4, 8)).shape
        torch.Size([4, 8])
    """

    def __init__(self, d_model: int, d_ff: int, *, recompute: bool = False) -> None:
        super().__init__(d_model, d_ff, activation="relu", recompute=recompute)


class GELUFFN(PlainFFN):
    """``linear2(gelu(linear1 x))`` with the erf form of GELU, as in BERT. See :class:`PlainFFN`.

    Example:
        >>> ffn_ops.GELUFFN(8, 32)(torch.randn(4, 8)).shape
        torch.Size([4, 8])
    """

    def __init__(self, d_model: int, d_ff: int, *, recompute: bool = False) -> None:
        super().__init__(d_model, d_ff, activation="gelu", recompute=recompute)


class SwishFFN(PlainFFN):
    """``linear2(swish(linear1 x))`` with ``swish(z) = z * sigmoid(beta * z)``. See :class:`PlainFFN`.

    Example:
        >>> ffn_ops.SwishFFN(8, 32, beta=1.5)(torch.randn(4, 8)).shape
        torch.Size([4, 8])
    """

    def __init__(self, d_model: int, d_ff: int, beta: float = 1.0, *, recompute: bool = False) -> None:
        super().__init__(d_model, d_ff, activation=Gate("swish", beta=beta), recompute=recompute)


class GLU(_OfLinears):
    """``linear_value(x) * sigmoid(linear_gate(x))``; ``activation=`` replaces the sigmoid.

    Shapes: x ``[..., d_in]`` to ``[..., d_out]``. State: ``linear_value``, ``linear_gate``.

    Raises: TypeError, ValueError for sizes, names and inputs that do not fit.

    Source: Dauphin et al., Language Modeling with Gated Convolutional Networks (2017), equation 1.

    Example:
        >>> ffn_ops.GLU(8, 32)(torch.randn(4, 8)).shape
        torch.Size([4, 32])
    """

    def __init__(self, d_in: int, d_out: int, *, activation: str | Gate = "sigmoid") -> None:
        super().__init__()
        check.positive("d_in", d_in)
        check.positive("d_out", d_out)
        as_gate(activation, gated=True)
        self.linear_value = nn.Linear(d_in, d_out)
        self.linear_gate = nn.Linear(d_in, d_out)
        self.activation = activation

    __prepare_scriptable__ = check.refuse_script

    def forward(self, x: Tensor) -> Tensor:
        children: dict[str, Any] = self._modules
        value, gate = children["linear_value"], children["linear_gate"]
        if is_plain_linear(value) and is_plain_linear(gate):
            p1, p2 = gate._parameters, value._parameters
            return ops.gated_linear(
                x, p1["weight"], p2["weight"], b_gate=p1["bias"], b_up=p2["bias"],
                activation=self.activation,
            )  # fmt: skip
        parts = called("linear_gate", gate, x), called("linear_value", value, x)
        return ops.gated_act(*parts, activation=self.activation)


class GatedFFN(_OfLinears):
    """``sum over g of value_g(x) * sigmoid(gate_g(x))``, of width ``d_ff``; ``out_proj=True`` projects back.

    Shapes: x ``[..., d_model]`` to ``[..., d_ff]``, or ``[..., d_model]`` with the projection. State:
    ``value_layers.{g}``, ``gate_layers.{g}`` and, with the projection, ``out_proj``.

    Raises: TypeError, ValueError for sizes, names and inputs that do not fit.

    Source: the multi-gate FFN of the two guides (see the documentation, Getting started); each branch is Dauphin et
        al. (2017), equation 1.

    Example:
        >>> ffn_ops.GatedFFN(8, 32, num_gates=2, out_proj=True)(torch.randn(4, 8)).shape
        torch.Size([4, 8])
    """

    def __init__(
        self, d_model: int, d_ff: int, num_gates: int = 4, *, out_proj: bool = False,
        activation: str | Gate = "sigmoid",
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("d_model", d_model), ("d_ff", d_ff), ("num_gates", num_gates)):
            check.positive(name, value)
        check.flag("out_proj", out_proj)
        as_gate(activation, gated=True)
        self.value_layers = nn.ModuleList([nn.Linear(d_model, d_ff) for _ in range(num_gates)])
        self.gate_layers = nn.ModuleList([nn.Linear(d_model, d_ff) for _ in range(num_gates)])
        self.out_proj = nn.Linear(d_ff, d_model) if out_proj else None
        self.activation = activation

    __prepare_scriptable__ = check.refuse_script

    def forward(self, x: Tensor) -> Tensor:
        values: list[Any] = list(self.value_layers)
        gates: list[Any] = list(self.gate_layers)
        if all(is_plain_linear(layer) for layer in (*values, *gates)) and _alike(values) and _alike(gates):
            y = ops.gated_linear(
                x,
                [g.weight for g in gates],
                [v.weight for v in values],
                b_gate=[g.bias for g in gates if g.bias is not None],
                b_up=[v.bias for v in values if v.bias is not None],
                activation=self.activation,
            )
        else:
            for g in range(len(gates)):
                parts = called(f"gate_layers.{g}", gates[g], x), called(f"value_layers.{g}", values[g], x)
                h = ops.gated_act(*parts, activation=self.activation)
                y = y + h if g else h
        return y if self.out_proj is None else called("out_proj", self.out_proj, y)
