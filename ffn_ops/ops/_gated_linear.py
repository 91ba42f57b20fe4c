# SPDX-License-Identifier: BSD-3-Clause
"""gated_linear: public function, fakes, autograd to second order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _checks as check
from .._gate import Gate, as_gate, check_gate
from .._library import differentiable, fake, vmap_by_loop
from .._quantized import QuantizedWeight
from ._gated_act import act_tangent, gated_act
from ._moe_quantized import quantized_gated_linear
from ._shared import (
    autocast,
    backward_tangents,
    checked,
    dense,
    double_backward,
    fold,
    given,
    linear_cotangent,
    needs_grad,
    not_asked_for,
    plus,
    prefers_torch,
)


def gated_linear(
    x: Tensor,
    w_gate: Tensor | QuantizedWeight | Sequence[Tensor | QuantizedWeight],
    w_up: Tensor | QuantizedWeight | Sequence[Tensor | QuantizedWeight],
    *,
    b_gate: Tensor | Sequence[Tensor] | None = None,
    b_up: Tensor | Sequence[Tensor] | None = None,
    activation: str | Gate = "sigmoid",
) -> Tensor:
    """``act(x w_gate^T + b_gate) * (x w_up^T + b_up)``: the GLU layer. With lists of G weights, the sum over branches.

    Args:
        x: ``[..., D]``; float64, float32, float16 or bfloat16.
        w_gate, w_up: ``[F, D]`` each, or equally long sequences of such (one per branch). Either all or none are a
            :class:`ffn_ops.QuantizedWeight`.
        b_gate, b_up: ``[F]`` each, or sequences; None for no bias.
        activation: a name or a :class:`ffn_ops.Gate`, of every branch.

    Returns:
        ``[..., F]``. The activation and the sum over branches are computed on the accumulators. Inference writes
        nothing of shape ``[T, F]`` but the result; training saves two pre-activations per branch for backward.

    Raises:
        TypeError, ValueError: with the argument, what was expected and what came.

    Source:
        Dauphin et al., Language Modeling with Gated Convolutional Networks (2017), equation 1.

    Example:
        >>> x, w_gate, w_up = torch.randn(4, 8), torch.randn(16, 8), torch.randn(16, 8)
        >>> y = ffn_ops.gated_linear(x, w_gate, w_up)
        >>> torch.testing.assert_close(y, torch.sigmoid(x @ w_gate.T) * (x @ w_up.T))
    """
    lists = [_as_list(n, v) for n, v in (("w_gate", w_gate), ("w_up", w_up), ("b_gate", b_gate), ("b_up", b_up))]
    check.first("x", x)
    cast = iter(autocast(x, *(t for each in lists for t in each)))
    x = next(cast)  # type: ignore[assignment]
    lists = [[next(cast) for _ in each] for each in lists]
    gates, ups, gate_biases, up_biases = lists
    kind = as_gate(activation, gated=True)
    if any(isinstance(w, QuantizedWeight) for w in (*gates, *ups)):
        return quantized_gated_linear(x, gates, ups, gate_biases, up_biases, kind)
    if prefers_torch(x):
        _check_gated_linear(x, gates, ups, gate_biases, up_biases)
        parts = [
            gated_act(
                F.linear(x, gates[i], gate_biases[i] if gate_biases else None),
                F.linear(x, ups[i], up_biases[i] if up_biases else None),
                activation=kind,
            )
            for i in range(len(gates))
        ]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    if torch.compiler.is_exporting():  # AOTInductor's packages do not take empty lists
        gate_biases, up_biases = (b or [w.new_zeros(len(w)) for w in gates] for b in (gate_biases, up_biases))

    def operator() -> Tensor:
        grad = needs_grad(x, *gates, *ups, *gate_biases, *up_biases)
        form = (kind.activation, kind.params, grad)
        return _gated_linear(fold(x), gates, ups, gate_biases, up_biases, *form, grad=grad)[0]  # type: ignore[no-any-return]

    y = checked(operator, lambda: _check_gated_linear(x, gates, ups, gate_biases, up_biases))
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]


def _as_list(name: str, value: Any) -> list[Any]:
    if value is None:
        return []
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    for each in values:
        if not isinstance(each, (Tensor, QuantizedWeight) if name.startswith("w") else Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor or a list of them, got {type(each).__name__}")
    return values


def _check_gated_linear(
    x: Tensor,
    w_gate: Sequence[Tensor],
    w_up: Sequence[Tensor],
    b_gate: Sequence[Tensor],
    b_up: Sequence[Tensor],
) -> None:
    check.leading("x", x)
    if not w_gate:
        raise ValueError("w_gate: expected at least one weight, got none")
    check.tensor("w_gate", w_gate[0], ("F", x.shape[-1]), like=x)
    features = w_gate[0].shape[0]
    if len(w_up) != len(w_gate):
        raise ValueError(f"w_up: expected as many weights as w_gate has ({len(w_gate)}), got {len(w_up)}")
    for name, weights in (("w_gate", w_gate), ("w_up", w_up)):
        for weight in weights:
            check.tensor(name, weight, (features, x.shape[-1]), like=x)
    for name, biases in (("b_gate", b_gate), ("b_up", b_up)):
        if biases and len(biases) != len(w_gate):
            raise ValueError(f"{name}: expected none or one for each weight ({len(w_gate)}), got {len(biases)}")
        for bias in biases:
            check.tensor(name, bias, (features,), like=x)


@fake("gated_linear")
def _(
    x: Tensor, w_gate: Any, w_up: Any, b_gate: Any, b_up: Any, activation: str, params: list[float], save: bool
) -> Any:
    check.tensor("x", x, ("T", "D"))
    _check_gated_linear(x, w_gate, w_up, b_gate, b_up)
    check_gate(activation, params, gated=True)
    T, F_ = x.shape[0], w_gate[0].shape[0]
    saved = [dense(x, len(w_gate), T, F_) if save else dense(x, 0) for _ in range(2)]
    return dense(x, T, F_), saved[0], saved[1]


@fake("gated_linear_backward")
def _(
    d_y: Tensor,
    x: Tensor,
    w_gate: Any,
    w_up: Any,
    b_gate: Any,
    b_up: Any,
    gate: Tensor,
    up: Tensor,
    activation: str,
    params: list[float],
    needs: list[bool],
) -> Any:
    check.tensor("x", x, ("T", "D"))
    _check_gated_linear(x, w_gate, w_up, b_gate, b_up)
    check_gate(activation, params, gated=True)
    G, T, D, F_ = len(w_gate), x.shape[0], x.shape[1], w_gate[0].shape[0]
    check.tensor("d_y", d_y, (T, F_), like=x)
    check.tensor("gate", gate, (G, T, F_), like=x)
    check.tensor("up", up, (G, T, F_), like=x)
    shapes = ((T, D), (G, F_, D), (G, F_, D), (G, F_), (G, F_))
    return tuple(dense(x, *shape) if need else dense(x, 0) for shape, need in zip(shapes, needs, strict=True))


def _any(needs: Any) -> bool:
    return any(needs) if isinstance(needs, (list, tuple)) else bool(needs)


def _gated_linear_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, w_gate, w_up, b_gate, b_up, *ctx.form, save = inputs
    _y, gate, up = output
    ctx.mark_non_differentiable(gate, up)
    ctx.set_materialize_grads(False)
    ctx.save = save
    ctx.lengths = [len(each) for each in (w_gate, w_up, b_gate, b_up)]
    ctx.save_for_backward(x, gate, up, *w_gate, *w_up, *b_gate, *b_up)


def _lists(tensors: Sequence[Any], lengths: Sequence[int]) -> list[list[Any]]:
    ends = list(accumulate(lengths))
    return [list(tensors[end - length : end]) for length, end in zip(lengths, ends, strict=True)]


def _gated_linear_backward_formula(ctx: Any, d_y: Tensor | None, _gate: Any, _up: Any) -> Any:
    # torch expects a list for a list, whether or not gradients are needed
    none = [[None] * length for length in ctx.lengths]
    if d_y is None:
        return None, *none, None, None, None
    x, gate, up, *others = ctx.saved_tensors
    needs = [_any(each) for each in ctx.needs_input_grad[:5]]
    lists = _lists(others, ctx.lengths)
    if not ctx.save:  # a graph cannot know whether another level of torch.func needs them
        _, gate, up = _gated_linear(x, *lists, *ctx.form, True)
    grads = _gated_linear_backward(d_y, x, *lists, gate, up, *ctx.form, needs)
    lists = [list(g.unbind(0)) if need else n for g, need, n in zip(grads[1:], needs[1:], none, strict=True)]
    return (grads[0] if needs[0] else None, *lists, None, None, None)


def _gated_linear_backward_setup(ctx: Any, inputs: Any, output: Any) -> None:
    d_y, x, w_gate, w_up, b_gate, b_up, gate, up, *ctx.form, ctx.needs = inputs
    not_asked_for(ctx, output)
    ctx.lengths = [len(each) for each in (w_gate, w_up, b_gate, b_up)]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(d_y, x, gate, up, *w_gate, *w_up, *b_gate, *b_up)


def _gated_linear_double_backward(ctx: Any, *grads: Tensor | None) -> Any:
    d_y, x, _gate, _up, *others = ctx.saved_tensors
    x_t, *stacked = (given(grad) for grad in grads)
    lists_t: list[list[Any]] = [
        [None] * n if t is None else list(t.unbind(0)) for t, n in zip(stacked, ctx.lengths, strict=True)
    ]

    def along(inputs: Sequence[Any]) -> Tensor:
        return _along(inputs[0], _lists(inputs[1:], ctx.lengths), x_t, lists_t, ctx.form)

    needs = [ctx.needs_input_grad[1]]
    for each, length in zip(ctx.needs_input_grad[2:6], ctx.lengths, strict=True):
        needs.extend(each if isinstance(each, list) else [each] * length)
    by_d_y, (by_x, *by_others) = double_backward(ctx, along, d_y, [x, *others], [x_t, *stacked], needs)
    return by_d_y, by_x, *_lists(by_others, ctx.lengths)


def _gated_linear_backward_tangent(ctx: Any, d_t: Tensor | None, *tangents: Any) -> Any:
    _d_y, x, gate, up, *weights = ctx.saved_tensors
    lists = _lists(weights, ctx.lengths)

    def again(d: Tensor) -> Any:
        return _gated_linear_backward(d, x, *lists, gate, up, *ctx.form, ctx.needs)

    def second(ctx: Any, *stacked: Any) -> Any:
        by = _gated_linear_double_backward(ctx, *stacked)[:6]
        return [torch.stack(each) if isinstance(each, list) and each else each for each in by]

    stacked = [_stacked(t, like) for t, like in zip(tangents[1:5], lists, strict=True)]
    return backward_tangents(ctx, (d_t, tangents[0], *stacked), again, second, (1, 2, 3, 4, 5))


def _stacked(tangents: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor | None:
    if all(t is None for t in tangents):
        return None
    return torch.stack([torch.zeros_like(w) if t is None else t for t, w in zip(tangents, like, strict=True)])


def _gated_linear_tangent(ctx: Any, x_t: Tensor | None, *lists_t: Any) -> Any:
    x, _gate, _up, *others = ctx.saved_tensors
    return _along(x, _lists(others, ctx.lengths), x_t, lists_t[:4], ctx.form), None, None


def _along(x: Tensor, lists: Sequence[Any], x_t: Tensor | None, lists_t: Sequence[Any], form: Sequence[Any]) -> Any:
    """The tangent of the output. It computes the pre-activations again: the saved ones are constants to autograd."""
    w_gate, w_up, b_gate, b_up = lists
    w_gate_t, w_up_t, b_gate_t, b_up_t = lists_t
    y_t = None
    for i in range(len(w_gate)):
        gate = F.linear(x, w_gate[i], b_gate[i] if b_gate else None)
        up = F.linear(x, w_up[i], b_up[i] if b_up else None)
        gate_t = linear_cotangent(x, w_gate[i], x_t, w_gate_t[i], b_gate_t[i] if b_gate else None)
        up_t = linear_cotangent(x, w_up[i], x_t, w_up_t[i], b_up_t[i] if b_up else None)
        y_t = plus(y_t, act_tangent(gate, up, form, gate_t, up_t))
    return y_t


_gated_linear_backward = differentiable(
    "gated_linear_backward",
    _gated_linear_backward_setup,
    _gated_linear_double_backward,
    _gated_linear_backward_tangent,
)
_gated_linear = differentiable(
    "gated_linear", _gated_linear_setup, _gated_linear_backward_formula, _gated_linear_tangent
)

for _name in ("gated_linear", "gated_linear_backward"):
    vmap_by_loop(_name)
