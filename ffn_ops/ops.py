"""The public functions. One block per operator: public function, fake kernel, autograd.

The kernels see two-dimensional tensors; leading dimensions are folded here, as views where strides allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _checks as check
from ._library import differentiable, fake, vmap_by_loop
from .reference import ACTIVATIONS

_NAMES = tuple(ACTIVATIONS)


def activations() -> tuple[str, ...]:
    """The names that every ``activation=`` takes."""
    return _NAMES


def _rows(x: Tensor) -> Tensor:
    if x.dim() == 2:
        return x
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)  # reshape(-1, ...) fails on a last dimension of 0


def _autocast(x: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Casts what a native matrix product under autocast casts; the rest, right or wrong, is left to the checks."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype is torch.float64:
        return (x, *tensors)
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in _CAST_FROM else t for t in (x, *tensors))


_CAST_FROM = (torch.float32, torch.float16, torch.bfloat16)


def _split(x: Tensor | None, width: int) -> tuple[Any, Any]:
    return (None, None) if x is None else (x[:width], x[width:])


# ---- gated_act ------------------------------------------------------------------------------------------------------


def gated_act(gate: Tensor, up: Tensor | None = None, *, activation: str = "silu", beta: float = 1.0) -> Tensor:
    """``act(gate) * up``, or ``act(gate)`` where ``up`` is None, in one pass over memory.

    Args:
        gate: any shape; float64, float32, float16 or bfloat16.
        up: same shape, dtype and device as ``gate``.
        activation: one of :func:`activations`.
        beta: the factor of ``swish(z) = z * sigmoid(beta * z)``; other activations ignore it.

    Returns:
        A tensor like ``gate``. Arithmetic is float32 (float64 for float64), rounded once.

    Raises:
        TypeError, ValueError: name of the argument, what was expected and what came.

    Source:
        Shazeer, GLU Variants Improve Transformer (2020), equations 5 and 6 without their products.
    """
    check.tensor("gate", gate)
    if up is not None:
        check.tensor("up", up, gate.shape, like=gate)
    check.activation(activation, _NAMES)
    check.number("beta", beta)
    if gate.dim() == 2:
        return _gated_act(gate, up, activation, float(beta))  # type: ignore[no-any-return]
    shape = gate.shape
    if gate.dim() < 2:
        gate = gate.reshape(1, -1)
        up = None if up is None else up.reshape(1, -1)
    else:
        gate = _rows(gate)
        up = None if up is None else _rows(up)
    return _gated_act(gate, up, activation, float(beta)).reshape(shape)  # type: ignore[no-any-return]


def _check_gated_act(gate: Tensor, up: Tensor | None, activation: str, **others: Tensor | None) -> None:
    check.tensor("gate", gate, ("rows", "columns"))
    for name, value in {"up": up, **others}.items():
        if value is not None:
            check.tensor(name, value, gate.shape, like=gate)
    check.activation(activation, _NAMES)


def _dense(like: Tensor, *shape: Any) -> Tensor:
    return like.new_empty(shape)


@fake("gated_act")
def _(gate: Tensor, up: Tensor | None, activation: str, beta: float) -> Tensor:
    _check_gated_act(gate, up, activation)
    return _dense(gate, *gate.shape)


@fake("gated_act_backward")
def _(d_out: Tensor, gate: Tensor, up: Tensor | None, activation: str, beta: float, needs: list[bool]) -> Any:
    _check_gated_act(gate, up, activation, d_out=d_out)
    return (
        _dense(gate, *gate.shape) if needs[0] else _dense(gate, 0),
        _dense(gate, *gate.shape) if needs[1] and up is not None else _dense(gate, 0),
    )


@fake("gated_act_double_backward")
def _(
    dd_gate: Tensor | None,
    dd_up: Tensor | None,
    d_out: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    beta: float,
) -> Any:
    _check_gated_act(gate, up, activation, d_out=d_out, dd_gate=dd_gate, dd_up=dd_up)
    none = _dense(gate, 0)
    return _dense(gate, *gate.shape), _dense(gate, *gate.shape), none if up is None else _dense(gate, *gate.shape)


def _gated_act_setup(ctx: Any, inputs: Any, output: Any) -> None:
    gate, up, ctx.activation, ctx.beta = inputs
    ctx.save_for_backward(gate, up)


def _gated_act_backward_formula(ctx: Any, d_out: Tensor) -> Any:
    gate, up = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1]]
    d_gate, d_up = _gated_act_backward(d_out, gate, up, ctx.activation, ctx.beta, needs)
    return d_gate if needs[0] else None, d_up if needs[1] else None, None, None


def _gated_act_backward_setup(ctx: Any, inputs: Any, output: Any) -> None:
    d_out, gate, up, ctx.activation, ctx.beta, _needs = inputs
    ctx.save_for_backward(d_out, gate, up)
    ctx.set_materialize_grads(False)


def _gated_act_double_backward_formula(ctx: Any, dd_gate: Tensor | None, dd_up: Tensor | None) -> Any:
    d_out, gate, up = ctx.saved_tensors
    if up is None or (dd_up is not None and dd_up.numel() == 0 and gate.numel() != 0):
        dd_up = None
    if dd_gate is not None and dd_gate.numel() == 0 and gate.numel() != 0:
        dd_gate = None
    if dd_gate is None and dd_up is None:
        return None, None, None, None, None, None
    by_d, by_gate, by_up = _gated_act_double_backward(dd_gate, dd_up, d_out, gate, up, ctx.activation, ctx.beta)
    return by_d, by_gate, None if up is None else by_up, None, None, None


def _third_setup(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _third_order(ctx: Any, *grads: Any) -> Any:
    """Without this torch would only warn and drop the third derivative."""
    raise NotImplementedError("ffn_ops: third derivatives are not implemented, gradients and their gradients are")


_gated_act_double_backward = differentiable("gated_act_double_backward", _third_setup, _third_order)
_gated_act_backward = differentiable(
    "gated_act_backward", _gated_act_backward_setup, _gated_act_double_backward_formula
)
_gated_act = differentiable("gated_act", _gated_act_setup, _gated_act_backward_formula)


# ---- gated_linear ---------------------------------------------------------------------------------------------------


def gated_linear(
    x: Tensor,
    w_gate: Tensor | Sequence[Tensor],
    w_up: Tensor | Sequence[Tensor],
    *,
    b_gate: Tensor | Sequence[Tensor] | None = None,
    b_up: Tensor | Sequence[Tensor] | None = None,
    activation: str = "sigmoid",
    beta: float = 1.0,
) -> Tensor:
    """``act(x w_gate^T + b_gate) * (x w_up^T + b_up)``: the GLU layer. With lists of G weights, the sum over branches.

    Args:
        x: ``[..., D]``; float64, float32, float16 or bfloat16.
        w_gate, w_up: ``[F, D]`` each, or equally long sequences of such (one per branch).
        b_gate, b_up: ``[F]`` each, or sequences; None for no bias.
        activation, beta: see :func:`gated_act`.

    Returns:
        ``[..., F]``. The activation and the sum over branches happen on the accumulators; nothing of shape ``[T, F]``
        but the result is written in inference, and two pre-activations per branch are saved for backward.

    Raises:
        TypeError, ValueError: name of the argument, what was expected and what came.

    Source:
        Dauphin et al., Language Modeling with Gated Convolutional Networks (2017), equation 1.
    """
    lists = [_as_list(n, v) for n, v in (("w_gate", w_gate), ("w_up", w_up), ("b_gate", b_gate), ("b_up", b_up))]
    check.tensor("x", x)
    cast = iter(_autocast(x, *(t for each in lists for t in each)))
    x = next(cast)  # type: ignore[assignment]
    lists = [[next(cast) for _ in each] for each in lists]  # type: ignore[misc]
    gates, ups, gate_biases, up_biases = lists
    if x.dim() < 1:
        raise ValueError(f"x: expected shape [..., D], got {list(x.shape)}")
    _check_gated_linear(x, gates, ups, gate_biases, up_biases, activation)
    check.number("beta", beta)
    if _prefers_torch(x):
        parts = [
            gated_act(
                F.linear(x, gates[i], gate_biases[i] if gate_biases else None),
                F.linear(x, ups[i], up_biases[i] if up_biases else None),
                activation=activation,
                beta=beta,
            )
            for i in range(len(gates))
        ]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *gates, *ups, *gate_biases, *up_biases))
    y = _gated_linear(_rows(x), gates, ups, gate_biases, up_biases, activation, float(beta), save)[0]
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]


def _as_list(name: str, value: Any) -> list[Tensor]:
    if value is None:
        return []
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    for each in values:
        if not isinstance(each, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor or a list of them, got {type(each).__name__}")
    return values


def _check_gated_linear(
    x: Tensor,
    w_gate: Sequence[Tensor],
    w_up: Sequence[Tensor],
    b_gate: Sequence[Tensor],
    b_up: Sequence[Tensor],
    activation: str,
) -> None:
    check.tensor("x", x)
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
    check.activation(activation, _NAMES)


@fake("gated_linear")
def _(x: Tensor, w_gate: Any, w_up: Any, b_gate: Any, b_up: Any, activation: str, beta: float, save: bool) -> Any:
    check.tensor("x", x, ("T", "D"))
    _check_gated_linear(x, w_gate, w_up, b_gate, b_up, activation)
    T, F_ = x.shape[0], w_gate[0].shape[0]
    saved = [_dense(x, len(w_gate), T, F_) if save else _dense(x, 0) for _ in range(2)]
    return _dense(x, T, F_), saved[0], saved[1]


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
    beta: float,
    needs: list[bool],
) -> Any:
    check.tensor("x", x, ("T", "D"))
    _check_gated_linear(x, w_gate, w_up, b_gate, b_up, activation)
    G, T, D, F_ = len(w_gate), x.shape[0], x.shape[1], w_gate[0].shape[0]
    check.tensor("d_y", d_y, (T, F_), like=x)
    check.tensor("gate", gate, (G, T, F_), like=x)
    check.tensor("up", up, (G, T, F_), like=x)
    shapes = ((T, D), (G, F_, D), (G, F_, D), (G, F_), (G, F_))
    return tuple(_dense(x, *shape) if need else _dense(x, 0) for shape, need in zip(shapes, needs, strict=True))


def _any(needs: Any) -> bool:
    return any(needs) if isinstance(needs, (list, tuple)) else bool(needs)


def _gated_linear_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, w_gate, w_up, b_gate, b_up, ctx.activation, ctx.beta, save = inputs
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
    none = [[None] * length for length in ctx.lengths]  # torch wants a list for a list, asked for or not
    if d_y is None:
        return None, *none, None, None, None
    if not ctx.save:
        raise RuntimeError("gated_linear: backward needs the pre-activations; call the operator with save=True")
    x, gate, up, *others = ctx.saved_tensors
    needs = [_any(each) for each in ctx.needs_input_grad[:5]]
    lists = _lists(others, ctx.lengths)
    grads = _gated_linear_backward(d_y, x, *lists, gate, up, ctx.activation, ctx.beta, needs)
    lists = [list(g.unbind(0)) if need else n for g, need, n in zip(grads[1:], needs[1:], none, strict=True)]
    return (grads[0] if needs[0] else None, *lists, None, None, None)


def _gated_linear_backward_setup(ctx: Any, inputs: Any, output: Any) -> None:
    d_y, x, w_gate, w_up, b_gate, b_up, gate, up, ctx.activation, ctx.beta, _needs = inputs
    ctx.lengths = [len(each) for each in (w_gate, w_up, b_gate, b_up)]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(d_y, x, gate, up, *w_gate, *w_up)


def _given(grad: Tensor | None) -> Tensor | None:
    """A cotangent of a gradient that was not asked for is empty: the same as none."""
    return None if grad is None or grad.numel() == 0 else grad


def _linear_cotangent(
    x: Tensor, weight: Tensor, dd_x: Tensor | None, dd_w: Tensor | None, dd_b: Tensor | None
) -> Tensor:
    """Of d_z, where d_x = d_z w, d_w = d_z^T x and d_b = sum over tokens of d_z."""
    total = x.new_zeros(x.shape[0], weight.shape[0])
    if dd_x is not None:
        total = total + dd_x @ weight.t()
    if dd_w is not None:
        total = total + x @ dd_w.t()
    return total if dd_b is None else total + dd_b


def _gated_linear_double_backward(ctx: Any, *grads: Tensor | None) -> Any:
    """Differentiates the backward, with gate and up as functions of x, weights and biases."""
    d_y, x, gate, up, *weights = ctx.saved_tensors
    G, _G, gate_biases, up_biases = ctx.lengths
    w_gate, w_up = _lists(weights, (G, G))
    dd_x, dd_w_gate, dd_w_up, dd_b_gate, dd_b_up = (_given(g) for g in grads)
    by_d_y, by_x = torch.zeros_like(d_y), torch.zeros_like(x)
    by_w_gate, by_w_up, by_b_gate, by_b_up = [], [], [], []
    for i in range(G):
        part = [None if t is None else t[i] for t in (dd_w_gate, dd_w_up, dd_b_gate, dd_b_up)]
        dd_g = _linear_cotangent(x, w_gate[i], dd_x, part[0], part[2])
        dd_u = _linear_cotangent(x, w_up[i], dd_x, part[1], part[3])
        d_g, d_u = _gated_act_backward(d_y, gate[i], up[i], ctx.activation, ctx.beta, [True, True])
        by_d, by_g, by_u = _gated_act_double_backward(dd_g, dd_u, d_y, gate[i], up[i], ctx.activation, ctx.beta)
        by_d_y = by_d_y + by_d
        by_x = by_x + by_g @ w_gate[i] + by_u @ w_up[i]
        if part[0] is not None:
            by_x = by_x + d_g @ part[0]
        if part[1] is not None:
            by_x = by_x + d_u @ part[1]
        by_w_gate.append(by_g.t() @ x if dd_x is None else by_g.t() @ x + d_g.t() @ dd_x)
        by_w_up.append(by_u.t() @ x if dd_x is None else by_u.t() @ x + d_u.t() @ dd_x)
        by_b_gate.append(by_g.sum(0))
        by_b_up.append(by_u.sum(0))
    return by_d_y, by_x, by_w_gate, by_w_up, by_b_gate[:gate_biases], by_b_up[:up_biases], *(None,) * 5


_gated_linear_backward = differentiable(
    "gated_linear_backward", _gated_linear_backward_setup, _gated_linear_double_backward
)
_gated_linear = differentiable("gated_linear", _gated_linear_setup, _gated_linear_backward_formula)


# ---- ffn ------------------------------------------------------------------------------------------------------------


def ffn(
    x: Tensor,
    w_in: Tensor,
    w_down: Tensor,
    *,
    w_up: Tensor | None = None,
    gated: bool | None = None,
    b_in: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "silu",
    beta: float = 1.0,
    recompute: bool = False,
) -> Tensor:
    """``(act(x w_in^T + b_in) * (x w_up^T + b_up)) w_down^T + b_down``, or without the gate: the whole FFN in one op.

    Args:
        x: ``[..., D]``; float64, float32, float16 or bfloat16.
        w_in: ``[F, D]``, the gate's weight where ``w_up`` is given and the one input weight of a plain FFN; with
            ``gated=True`` and no ``w_up``, ``[2F, D]``, gate rows first.
        w_down: ``[D_out, F]``.
        w_up: ``[F, D]``: makes the FFN gated.
        gated: None stands for "``w_up`` is given".
        b_in, b_up, b_down: biases of the same widths as their weights' rows, or None.
        activation, beta: see :func:`gated_act`.
        recompute: save x alone for backward and compute the pre-activations again there. Same bits, less memory.

    Returns:
        ``[..., D_out]``. For backward x and the pre-activations (``[T, F]``, two where gated) are saved, no more.

    Raises:
        TypeError, ValueError: name of the argument, what was expected and what came.

    Source:
        Vaswani et al., Attention Is All You Need (2017), equation 2; Shazeer, GLU Variants Improve Transformer (2020),
        equation 6.
    """
    check.tensor("x", x)
    x, w_in, w_up, w_down, b_in, b_up, b_down = _autocast(x, w_in, w_up, w_down, b_in, b_up, b_down)  # type: ignore[assignment]
    if gated is not None:
        check.flag("gated", gated)
        if w_up is not None and not gated:
            raise ValueError("gated: expected None or True where w_up is given, got False")
    check.flag("recompute", recompute)
    gated = bool(gated) or w_up is not None
    if x.dim() < 1:
        raise ValueError(f"x: expected shape [..., D], got {list(x.shape)}")
    check.number("beta", beta)
    by_torch = _prefers_torch(x)
    if by_torch or torch.compiler.is_compiling():
        _check_ffn(x, w_in, w_up, w_down, b_in, b_up, b_down, gated, activation)
    if by_torch:
        return _ffn_by_torch(x, w_in, w_up, w_down, b_in, b_up, b_down, gated, activation, beta)
    refused: Exception | None = None
    try:
        needs_grad = torch.is_grad_enabled() and (
            x.requires_grad
            or w_in.requires_grad
            or w_down.requires_grad
            or any(t is not None and t.requires_grad for t in (w_up, b_in, b_up, b_down))
        )
        save = needs_grad and not recompute
        args = (w_in, w_up, w_down, b_in, b_up, b_down, gated, activation, float(beta), save)
        y = _ffn(_rows(x), *args, grad=needs_grad)[0]
    except Exception as error:
        refused = error
    if refused is not None:  # the operator checks as strictly, and before any work; the words are found here
        _check_ffn(x, w_in, w_up, w_down, b_in, b_up, b_down, gated, activation)
        raise refused
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], w_down.shape[0])  # type: ignore[no-any-return]


def _prefers_torch(x: Tensor) -> bool:
    """16-bit layers on a CPU with AMX: torch's own products are far ahead there, and our gate goes between them."""
    return x.element_size() == 2 and x.device.type == "cpu" and _HAS_AMX


_HAS_AMX: bool = torch.ops.ffn_ops._has_amx()


def _ffn_by_torch(
    x: Tensor,
    w_in: Tensor,
    w_up: Tensor | None,
    w_down: Tensor,
    b_in: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    gated: bool,
    activation: str,
    beta: float,
) -> Tensor:
    pre = F.linear(x, w_in, b_in)
    up = None
    if w_up is not None:
        up = F.linear(x, w_up, b_up)
    elif gated:
        pre, up = pre.chunk(2, -1)
    return F.linear(gated_act(pre, up, activation=activation, beta=beta), w_down, b_down)


def _check_ffn(
    x: Tensor,
    w_in: Tensor,
    w_up: Tensor | None,
    w_down: Tensor,
    b_in: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    gated: bool,
    activation: str,
) -> tuple[Any, Any]:
    """Returns F and the width of the output."""
    check.tensor("w_in", w_in, ("2F" if gated and w_up is None else "F", x.shape[-1]), like=x)
    rows = w_in.shape[0]
    features = rows
    if w_up is not None:
        check.tensor("w_up", w_up, (rows, x.shape[-1]), like=x)
    elif gated:
        if rows % 2:
            raise ValueError(f"w_in: expected an even number of rows, gate rows first, got {list(w_in.shape)}")
        features = rows // 2
    check.tensor("w_down", w_down, ("D_out", features), like=x)
    if b_in is not None:
        check.tensor("b_in", b_in, (rows,), like=x)
    if b_up is not None:
        if w_up is None:
            raise ValueError("b_up: expected None where w_up is None (b_in holds both halves), got a tensor")
        check.tensor("b_up", b_up, (features,), like=x)
    if b_down is not None:
        check.tensor("b_down", b_down, (w_down.shape[0],), like=x)
    check.activation(activation, _NAMES)
    return features, w_down.shape[0]


@fake("ffn")
def _(
    x: Tensor,
    w_in: Tensor,
    w_up: Tensor | None,
    w_down: Tensor,
    b_in: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    gated: bool,
    activation: str,
    beta: float,
    save: bool,
) -> Any:
    check.tensor("x", x, ("T", "D"))
    gated = gated or w_up is not None
    features, out = _check_ffn(x, w_in, w_up, w_down, b_in, b_up, b_down, gated, activation)
    gate = _dense(x, x.shape[0], features) if save else _dense(x, 0)
    up = _dense(x, x.shape[0], features) if save and gated else _dense(x, 0)
    return _dense(x, x.shape[0], out), gate, up


@fake("ffn_backward")
def _(
    d_y: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_up: Tensor | None,
    w_down: Tensor,
    b_in: Tensor | None,
    b_up: Tensor | None,
    gate: Tensor,
    up: Tensor,
    gated: bool,
    activation: str,
    beta: float,
    needs: list[bool],
) -> Any:
    check.tensor("x", x, ("T", "D"))
    gated = gated or w_up is not None
    features, out = _check_ffn(x, w_in, w_up, w_down, b_in, b_up, None, gated, activation)
    check.tensor("d_y", d_y, (x.shape[0], out), like=x)
    in_shape = tuple(w_in.shape)
    shapes: tuple[Any, ...] = (
        tuple(x.shape),
        in_shape,
        (features, x.shape[1]) if w_up is not None else None,
        (out, features),
        (in_shape[0],),
        (features,) if w_up is not None else None,
        (out,),
    )
    return tuple(
        _dense(x, *shape) if need and shape is not None else _dense(x, 0)
        for shape, need in zip(shapes, needs, strict=True)
    )


def _ffn_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, w_in, w_up, w_down, b_in, b_up, _b_down, ctx.gated, ctx.activation, ctx.beta, _save = inputs
    _y, gate, up = output
    ctx.mark_non_differentiable(gate, up)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w_in, w_up, w_down, b_in, b_up, gate, up)


def _ffn_backward_formula(ctx: Any, d_y: Tensor | None, _gate: Any, _up: Any) -> Any:
    if d_y is None:
        return (None,) * 11
    x, w_in, w_up, w_down, b_in, b_up, gate, up = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:7])
    grads = _ffn_backward(d_y, x, w_in, w_up, w_down, b_in, b_up, gate, up, ctx.gated, ctx.activation, ctx.beta, needs)
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None, None)


def _ffn_backward_setup(ctx: Any, inputs: Any, output: Any) -> None:
    d_y, x, w_in, w_up, w_down, b_in, b_up, gate, up, ctx.gated, ctx.activation, ctx.beta, _needs = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(d_y, x, w_in, w_up, w_down, b_in, b_up, gate, up)


def _ffn_double_backward(ctx: Any, *grads: Tensor | None) -> Any:
    """Differentiates the backward, with gate and up as functions of x, weights and biases."""
    d_y, x, w_in, w_up, w_down, b_in, b_up, gate, up = ctx.saved_tensors
    dd_x, dd_w_in, dd_w_up, dd_w_down, dd_b_in, dd_b_up, dd_b_down = (_given(g) for g in grads)
    fused = ctx.gated and w_up is None
    features = w_down.shape[1]
    w_g, w_u = _split(w_in, features) if fused else (w_in, w_up)
    if fused:
        dd_w_in, dd_w_up = _split(dd_w_in, features)
        dd_b_in, dd_b_up = _split(dd_b_in, features)
    if gate.dim() == 1:  # not saved
        b_g, b_u = _split(b_in, features) if fused else (b_in, b_up)
        gate = F.linear(x, w_g, b_g)
        up = None if w_u is None else F.linear(x, w_u, b_u)
    elif w_u is None:
        up = None
    act = (ctx.activation, ctx.beta)

    d_h = d_y @ w_down
    d_g, d_u = _gated_act_backward(d_h, gate, up, *act, [True, True])
    dd_g = _linear_cotangent(x, w_g, dd_x, dd_w_in, dd_b_in)
    dd_u = None if w_u is None else _linear_cotangent(x, w_u, dd_x, dd_w_up, dd_b_up)
    by_d_h, by_g, by_u = _gated_act_double_backward(dd_g, dd_u, d_h, gate, up, *act)
    by_d_y = by_d_h @ w_down.t()
    if dd_w_down is not None:  # d_w_down = d_y^T h
        by_d_y = by_d_y + _gated_act(gate, up, *act) @ dd_w_down.t()
        more_g, more_u = _gated_act_backward(d_y @ dd_w_down, gate, up, *act, [True, True])
        by_g = by_g + more_g
        by_u = by_u if w_u is None else by_u + more_u
    if dd_b_down is not None:
        by_d_y = by_d_y + dd_b_down

    def by_linear(by_z: Tensor, d_z: Tensor, weight: Tensor, dd_w: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        by_x, by_w = by_z @ weight, by_z.t() @ x
        if dd_w is not None:
            by_x = by_x + d_z @ dd_w
        if dd_x is not None:
            by_w = by_w + d_z.t() @ dd_x
        return by_x, by_w, by_z.sum(0)

    by_x, by_w_in, by_b_in = by_linear(by_g, d_g, w_g, dd_w_in)
    by_w_up = by_b_up = None
    if w_u is not None:
        by_x_up, by_w_up, by_b_up = by_linear(by_u, d_u, w_u, dd_w_up)
        by_x = by_x + by_x_up
        if fused:
            by_w_in, by_w_up = torch.cat((by_w_in, by_w_up)), None
            by_b_in, by_b_up = torch.cat((by_b_in, by_b_up)), None
    return (
        by_d_y,
        by_x,
        by_w_in,
        by_w_up,
        d_y.t() @ by_d_h,
        by_b_in if b_in is not None else None,
        by_b_up if b_up is not None else None,
        *(None,) * 6,
    )


_ffn_backward = differentiable("ffn_backward", _ffn_backward_setup, _ffn_double_backward)
_ffn = differentiable("ffn", _ffn_setup, _ffn_backward_formula)

for _name in ("gated_act", "gated_act_backward", "gated_act_double_backward"):
    vmap_by_loop(_name)
for _name in ("gated_linear", "gated_linear_backward", "ffn", "ffn_backward"):
    vmap_by_loop(_name)
