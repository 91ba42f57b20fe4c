# SPDX-License-Identifier: BSD-3-Clause
"""ONNX: translates the operators to ONNX's own, for ``torch.onnx.export``. Inference only."""

# ruff: noqa: UP045

import math
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch.nn import functional as F

from .._gate import gate_from
from ..reference import ACTIVATIONS, gated_act

# Without `from __future__ import annotations`, and with Optional: torch reads the types of arguments to tell attributes
# from tensors. Tensors have type Any, because they arrive as values of the graph.

_FLOAT, _INT64 = 1, 7  # ONNX's dtype numbers


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Returns the translations for ``torch.onnx.export(..., dynamo=True,
    custom_translation_table=translation_table())``.

    They cover inference: gates, dense layers, mixtures and their parts, top-k and the sort, for every T. Arithmetic is
    float32 (float64 for float64) and rounded once, like the operators'. Sums are in the runtime's order. NaN logits
    rank as -inf. onnxruntime has no ``Erf`` in float64, so that it runs every gate but ``gelu`` there. ONNX cannot
    express BASE's assignment, rounding to tiles, drops by weight and rows given as pairs (Expert Choice): these raise
    ``NotImplementedError``.

    Raises:
        ImportError: without onnxscript (``pip install "ffn_ops[onnx]"``).

    Example:
        >>> from ffn_ops.integrations.onnx import translation_table
        >>> layer = ffn_ops.GELUFFN(8, 16).eval().requires_grad_(False)
        >>> options = {"dynamo": True, "custom_translation_table": translation_table(), "verbose": False}
        >>> program = torch.onnx.export(layer, (torch.randn(4, 8),), **options)
    """
    import onnxscript  # noqa: F401  (torch's exporter needs it as well)

    ops = torch.ops.ffn_ops
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        ops.gated_act.default: _gated_act,
        ops.learned_act.default: _learned_act,
        ops.gated_linear.default: _gated_linear,
        ops.ffn.default: _ffn,
        ops.route_linear.default: _route_linear,
        ops.moe.default: _moe,
        ops.moe_dispatch.default: _moe_dispatch,
        ops.moe_combine.default: _moe_combine,
        ops.route_top_k.default: _route_top_k,
        ops.moe_sort.default: _moe_sort,
        ops.balanced_assignment.default: _balanced_assignment,
        ops.round_tokens.default: _round_tokens,
    }
    return table


def _op() -> Any:
    from onnxscript import opset18

    return opset18


def _numbers(values: Sequence[int]) -> Any:
    return _op().Constant(value_ints=list(values))


def _number(value: float, like: Any) -> Any:
    import onnx_ir

    op = _op()  # value_float would round to float32
    return op.CastLike(op.Constant(value=onnx_ir.tensor(float(value), onnx_ir.DataType.DOUBLE)), like)


def _wide(t: Any) -> Any:
    """Casts to the dtype of the arithmetic: float32, or float64 for float64."""
    return t if str(t.dtype) in ("DOUBLE", "FLOAT") else _op().Cast(t, to=_FLOAT)


def _none(like: Any) -> Any:
    """A placeholder for a pre-activation that is not saved."""
    op = _op()
    return op.Expand(_number(0.0, like), _numbers([0]))


class _Recorder:
    """A value of the graph in the place of a tensor, for the formulas of reference.py: what they do to it is written
    into the graph."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def _do(self, name: str, *others: Any) -> "_Recorder":
        values = [o.value if isinstance(o, _Recorder) else _number(o, self.value) for o in (self, *others)]
        return _Recorder(getattr(_op(), name)(*values))

    def __add__(self, other: Any) -> "_Recorder":
        return self._do("Add", other)

    def __mul__(self, other: Any) -> "_Recorder":
        return self._do("Mul", other)

    def __truediv__(self, other: Any) -> "_Recorder":
        return self._do("Div", other)

    def __sub__(self, other: Any) -> "_Recorder":
        return self._do("Sub", other)

    def __gt__(self, other: Any) -> "_Recorder":
        return self._do("Greater", other)

    __radd__, __rmul__ = __add__, __mul__

    def square(self) -> "_Recorder":
        return self * self

    def clamp(self, min: float | None = None, max: float | None = None) -> "_Recorder":
        held = self if max is None else self._do("Min", max)
        return held if min is None else held._do("Max", min)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any, kwargs: Any = None) -> "_Recorder":
        z, *branches = args
        if function is torch.where:
            return z._do("Where", *branches)  # type: ignore[no-any-return]
        if function is torch.expm1:
            return z._do("Exp") - 1  # type: ignore[no-any-return]
        if function in (torch.relu, torch.sigmoid, torch.tanh):
            return z._do({torch.relu: "Relu", torch.sigmoid: "Sigmoid", torch.tanh: "Tanh"}[function])  # type: ignore[no-any-return]
        if function is F.silu:
            return z * z._do("Sigmoid")  # type: ignore[no-any-return]
        if function is F.gelu and (kwargs or {}).get("approximate") == "tanh":
            cubic = z * z * (z * 0.044715)
            return z * 0.5 * (((z + cubic) * math.sqrt(2 / math.pi))._do("Tanh") + 1)  # type: ignore[no-any-return]
        if function is F.gelu:
            return z * 0.5 * ((z * math.sqrt(0.5))._do("Erf") + 1)  # type: ignore[no-any-return]
        raise NotImplementedError(f"ffn_ops: {function.__name__} has no translation to ONNX")


def _gate(gate: Any, up: Any, activation: str, params: Sequence[float]) -> Any:
    form = gate_from(activation, params)
    recorders: list[Any] = [_Recorder(gate), None if up is None else _Recorder(up)]
    h: Any = gated_act(*recorders, activation=form)
    return h.value


def _linear(x: Any, w: Any, b: Any) -> Any:
    op = _op()
    y = op.MatMul(x, op.Transpose(op.CastLike(w, x), perm=[1, 0]))  # x is wide; a value's own dtype may be unknown
    return y if b is None else op.Add(y, op.CastLike(b, x))


def _route_linear(x: Any, weight: Any, bias: Optional[Any]) -> Any:
    return _linear(_wide(x), weight, bias)


def _gated_act(gate: Any, up: Optional[Any], activation: str, params: Sequence[float]) -> Any:
    h = _gate(_wide(gate), None if up is None else _wide(up), activation, params)
    return _op().CastLike(h, gate)


def _learned_act(x: Any, own: Any, activation: str) -> Any:
    op = _op()
    values: list[Any] = [op.Slice(own, _numbers([k]), _numbers([k + 1]), _numbers([0])) for k in range(own.shape[0])]
    formula: Any = ACTIVATIONS[activation]
    h: Any = formula(_Recorder(_wide(x)), *map(_Recorder, values))
    return op.CastLike(h.value, x)


def _gated_linear(
    x: Any, w_gate: Sequence[Any], w_up: Sequence[Any], b_gate: Sequence[Any], b_up: Sequence[Any],
    activation: str, params: Sequence[float], save: bool,
) -> Any:  # fmt: skip
    op = _op()
    rows, total = _wide(x), None
    for g in range(len(w_gate)):
        gate = _linear(rows, w_gate[g], b_gate[g] if b_gate else None)
        h = _gate(gate, _linear(rows, w_up[g], b_up[g] if b_up else None), activation, params)
        total = h if total is None else op.Add(total, h)
    return op.CastLike(total, x), _none(x), _none(x)


def _expert(
    x: Any, w_in: Any, w_up: Any, w_down: Any, b_in: Any, b_up: Any, b_down: Any, gated: bool, interleaved: bool,
    form: tuple[str, Sequence[float]],
) -> Any:  # fmt: skip
    op = _op()
    pre, up = _linear(x, w_in, b_in), None
    if w_up is not None:
        up = _linear(x, w_up, b_up)
    elif gated and interleaved:
        ends, axis, step = _numbers([2**62]), _numbers([1]), _numbers([2])
        pre, up = (op.Slice(pre, _numbers([begin]), ends, axis, step) for begin in (0, 1))
    elif gated:
        pre, up = op.Split(pre, num_outputs=2, axis=1)
    return _linear(_gate(pre, up, *form), w_down, b_down)


def _ffn(
    x: Any, w_in: Any, w_up: Optional[Any], w_down: Any, b_in: Optional[Any], b_up: Optional[Any],
    b_down: Optional[Any], gated: bool, interleaved: bool, activation: str, params: Sequence[float], save: bool,
) -> Any:  # fmt: skip
    form = (activation, params)
    y = _expert(_wide(x), w_in, w_up, w_down, b_in, b_up, b_down, gated, interleaved, form)
    return _op().CastLike(y, x), _none(x), _none(x)


def _moe(
    x: Any, token: Optional[Any], weight: Optional[Any], offsets: Any, row: Optional[Any],
    slot_offsets: Optional[Any], w_in: Any, w_down: Any, b_in: Optional[Any], b_down: Optional[Any], gated: bool,
    interleaved: bool, activation: str, params: Sequence[float], save: bool,
) -> Any:  # fmt: skip
    """Computes each expert on its rows. The graph has one product for each expert."""
    op = _op()
    rows = _wide(x) if token is None else op.Gather(_wide(x), _inside(token, x))
    axis, parts = _numbers([0]), []

    def of(t: Any, e: int) -> Any:
        return None if t is None else op.Gather(t, op.Constant(value_int=e), axis=0)

    for e in range(w_in.shape[0]):
        begin, end = (op.Gather(offsets, _numbers([i])) for i in (e, e + 1))
        each = (of(w_in, e), None, of(w_down, e), of(b_in, e), None, of(b_down, e), gated, interleaved)
        parts.append(_expert(op.Slice(rows, begin, end, axis), *each, (activation, params)))
    out = op.Concat(*parts, axis=0)  # the rows that are not dropped
    if token is None:
        missing = op.Sub(op.Shape(rows, start=0, end=1), op.Shape(out, start=0, end=1))
        zeros = op.Expand(_number(0.0, out), op.Concat(missing, op.Shape(out, start=1), axis=0))
        y = op.Concat(out, zeros, axis=0)
    else:
        y = _summed(out, token, weight, slot_offsets)
    return op.CastLike(y, x), _none(x), _none(x)


def _inside(token: Any, x: Any) -> Any:
    """The token of dropped rows may be out of range."""
    op = _op()
    last = op.Sub(op.Shape(x, start=0, end=1), _numbers([1]))
    return op.Max(op.Min(token, last), _numbers([0]))


def _summed(rows: Any, token: Any, weight: Any, slot_offsets: Any) -> Any:
    """The weighted sum of each token's rows, over the first rows of a routing."""
    op = _op()
    kept, zero = op.Shape(rows, start=0, end=1), _numbers([0])
    if weight is not None:
        rows = op.Mul(rows, op.Unsqueeze(op.CastLike(op.Slice(weight, zero, kept, zero), rows), _numbers([1])))
    tokens = op.Sub(op.Shape(slot_offsets), _numbers([1]))
    empty = op.Expand(_number(0.0, rows), op.Concat(tokens, op.Shape(rows, start=1), axis=0))
    return op.ScatterND(empty, op.Unsqueeze(op.Slice(token, zero, kept, zero), _numbers([1])), rows, reduction="add")


def _last(offsets: Any) -> Any:
    return _op().Slice(offsets, _numbers([-1]), _numbers([2**62]), _numbers([0]))


def _moe_dispatch(x: Any, token: Any, weight: Optional[Any], offsets: Any, row: Any, slot_offsets: Any) -> Any:
    op = _op()
    rows = op.Gather(_wide(x), _inside(token, x))
    if weight is not None:
        rows = op.Mul(rows, op.Unsqueeze(op.CastLike(weight, rows), _numbers([1])))
    kept = op.Less(_range(op.Shape(token)), _last(offsets))
    return op.CastLike(op.Where(op.Unsqueeze(kept, _numbers([1])), rows, _number(0.0, rows)), x)


def _moe_combine(rows: Any, token: Any, weight: Optional[Any], offsets: Any, row: Any, slot_offsets: Any) -> Any:
    op = _op()
    kept = op.Slice(_wide(rows), _numbers([0]), _last(offsets), _numbers([0]))
    return op.CastLike(_summed(kept, token, weight, slot_offsets), rows)


def _range(count: Any) -> Any:
    op = _op()
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    return op.Range(zero, op.Squeeze(count), one)


def _route_top_k(
    logits: Any, bias: Optional[Any], ids: Optional[Any], k: int, shared: int, score: str, renormalize: bool,
    by_logits: bool, num_groups: int, top_groups: int, group_best: int, scale: float,
) -> Any:  # fmt: skip
    op = _op()
    z = _wide(logits)
    after = by_logits and score == "softmax"
    scores = z if after else _score(z, score)
    if ids is None:
        choice = z if by_logits or (bias is None and num_groups == 1) else scores
        ids = _chosen(choice, logits.shape[1] - shared, bias, k, num_groups, top_groups, group_best)
        if shared:
            each = op.Expand(_numbers(range(logits.shape[1] - shared, logits.shape[1])), op.Concat(
                op.Shape(ids, start=0, end=1), _numbers([shared]), axis=0))  # fmt: skip
            ids = op.Concat(ids, each, axis=1)
    weights = op.GatherElements(scores, ids, axis=1)
    if after:
        weights = op.Softmax(weights, axis=1)
    elif renormalize:
        total = op.Add(op.ReduceSum(weights, _numbers([1])), _number(1e-20, weights))
        weights = op.Div(weights, total)
    return op.Mul(weights, _number(scale, weights)), op.Identity(ids)


def _score(z: Any, name: str) -> Any:
    op = _op()
    if name == "softmax":
        return op.Softmax(z, axis=1)
    return op.Sigmoid(z) if name == "sigmoid" else op.Sqrt(op.Softplus(z))


def _chosen(
    choice: Any, experts: int, bias: Optional[Any], k: int, num_groups: int, top_groups: int, group_best: int
) -> Any:
    """Of the first ``experts`` columns."""
    op = _op()
    choice = op.Slice(choice, _numbers([0]), _numbers([experts]), _numbers([1]))
    if bias is not None:
        choice = op.Add(choice, op.CastLike(bias, choice))
    least = _number(-math.inf, choice)
    choice = op.Where(op.IsNaN(choice), least, choice)
    if num_groups > 1:
        each = experts // num_groups
        groups = op.Reshape(choice, _numbers([-1, num_groups, each]))
        best, _ = op.TopK(groups, _numbers([min(group_best, each)]), axis=2)
        _, chosen = op.TopK(op.ReduceSum(best, _numbers([2]), keepdims=0), _numbers([top_groups]), axis=1)
        is_group = op.Equal(op.Unsqueeze(chosen, _numbers([2])), _numbers(range(num_groups)))  # [T, top, groups]
        open_ = op.ReduceMax(op.Cast(is_group, to=_INT64), _numbers([1]), keepdims=0)
        open_ = op.Cast(op.Unsqueeze(open_, _numbers([2])), to=9)  # bool
        choice = op.Reshape(op.Where(open_, groups, least), _numbers([-1, num_groups * each]))
    _, ids = op.TopK(choice, _numbers([k]), axis=1)
    return ids


def _moe_sort(
    expert: Any, token: Optional[Any], weight: Any, num_experts: Any, num_tokens: Any, capacity: Any, by_weight: bool
) -> Any:
    if token is not None or by_weight:
        what = "rows given as pairs of token and expert" if token is not None else 'drop="weight"'
        raise NotImplementedError(f"ffn_ops: moe_sort of {what} has no translation to ONNX")
    op = _op()
    experts, K = num_experts, expert.shape[1]
    flat = op.Reshape(expert, _numbers([-1]))
    count = op.Shape(flat)
    outside = op.Or(op.Less(flat, _numbers([0])), op.GreaterOrEqual(flat, _numbers([experts])))
    flat = op.Where(outside, _numbers([experts]), flat)
    place = _range(count)

    def counts_of(chosen: Any) -> tuple[Any, Any]:
        """Counts [E], and offsets [E + 1]."""
        is_expert = op.Equal(op.Unsqueeze(chosen, _numbers([1])), _numbers(range(experts)))
        counts = op.ReduceSum(op.Cast(is_expert, to=_INT64), _numbers([0]), keepdims=0)
        return counts, op.Concat(_numbers([0]), op.CumSum(counts, op.Constant(value_int=0)), axis=0)

    def sorted_by(chosen: Any, then: Any) -> Any:
        """Sorts places by expert and, within an expert, by ``then``, whose numbers differ and lie below the count."""
        keys = op.Add(op.Mul(chosen, count), then)
        _, order = op.TopK(keys, count, axis=0, largest=0)
        return order

    def rank_of(order: Any) -> Any:
        """The inverse of a permutation."""
        return op.ScatterElements(place, order, place, axis=0)

    counts, offsets = counts_of(flat)
    if not (isinstance(capacity, int) and capacity < 0):
        limit = _numbers([capacity]) if isinstance(capacity, int) else op.Reshape(capacity, _numbers([1]))
        tokens = op.Div(count, _numbers([K]))
        turn = op.Add(op.Mul(op.Mod(place, _numbers([K])), tokens), op.Div(place, _numbers([K])))  # slot, then token
        begins = op.Gather(offsets, flat)
        kept = op.Less(op.Sub(rank_of(sorted_by(flat, turn)), begins), limit)
        flat = op.Where(kept, flat, _numbers([experts]))
        _, offsets = counts_of(flat)
    order = sorted_by(flat, place)
    slots = op.Mul(_range(op.Add(op.Div(count, _numbers([K])), _numbers([1]))), _numbers([K]))
    weights = op.Gather(op.Reshape(weight, _numbers([-1])), order)
    none = op.Slice(count, _numbers([0]), _numbers([0]), _numbers([0]))
    return weights, op.Div(order, _numbers([K])), offsets, rank_of(order), slots, counts, none


def _balanced_assignment(scores: Any, mask: Optional[Any] = None) -> Any:
    raise NotImplementedError(
        "ffn_ops: BASE's balanced assignment has no translation to ONNX; call eval(), where it takes the best expert"
    )


def _round_tokens(scores: Any, ids: Any, tile: int) -> Any:
    raise NotImplementedError("ffn_ops: token rounding has no translation to ONNX")
