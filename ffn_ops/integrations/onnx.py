"""ONNX: what the operators compute, in ONNX's own, for ``torch.onnx.export``. Backward operators are not there."""

# ruff: noqa: UP045

import math
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch

# No `from __future__ import annotations` here, and Optional: torch reads the types of arguments to tell attributes
# from tensors. A tensor is Any: what arrives is a value of the graph.

_FLOAT, _INT64 = 1, 7  # ONNX's numbers of dtypes


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``torch.onnx.export(model, args, dynamo=True, custom_translation_table=translation_table())``.

    Inference only: gates, dense layers, mixtures and their parts, top-k and the sort, for every T. Arithmetic is
    float32 (float64 for float64), rounded once, as the operators'; sums are in the runtime's order. NaN logits rank as
    -inf. What ONNX cannot express raises a ``NotImplementedError`` that says so: BASE's assignment, rounding to tiles,
    drops by weight, rows given as pairs (Expert Choice).

    Raises:
        ImportError: without onnxscript (``pip install "ffn_ops[onnx]"``).
    """
    import onnxscript  # noqa: F401  (torch's exporter needs it as well)

    ops = torch.ops.ffn_ops
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        ops.gated_act.default: _gated_act,
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
    op = _op()
    return op.CastLike(op.Constant(value_float=float(value)), like)


def _wide(t: Any) -> Any:
    """What is computed in: float32, float64 for float64."""
    return t if str(t.dtype) in ("DOUBLE", "FLOAT") else _op().Cast(t, to=_FLOAT)


def _none(like: Any) -> Any:
    """In the place of a saved pre-activation."""
    op = _op()
    return op.Expand(_number(0.0, like), _numbers([0]))


def _activate(z: Any, name: str, beta: float) -> Any:
    op = _op()

    def c(value: float) -> Any:
        return _number(value, z)

    if name == "relu":
        return op.Relu(z)
    if name == "relu_squared":
        return op.Mul(op.Relu(z), op.Relu(z))
    if name == "sigmoid":
        return op.Sigmoid(z)
    if name == "tanh":
        return op.Tanh(z)
    if name == "gelu":
        return op.Mul(op.Mul(z, c(0.5)), op.Add(op.Erf(op.Mul(z, c(math.sqrt(0.5)))), c(1)))
    if name == "gelu_tanh":
        cubic = op.Mul(op.Mul(z, z), op.Mul(z, c(0.044715)))
        inner = op.Mul(op.Add(z, cubic), c(math.sqrt(2 / math.pi)))
        return op.Mul(op.Mul(z, c(0.5)), op.Add(op.Tanh(inner), c(1)))
    if name in ("silu", "swish"):
        return op.Mul(z, op.Sigmoid(z if name == "silu" else op.Mul(z, c(beta))))
    if name == "identity":
        return z
    raise NotImplementedError(f"ffn_ops: activation {name} has no translation to ONNX")


def _gate(gate: Any, up: Any, activation: str, beta: float, limit: float | None, up_shift: float) -> Any:
    op = _op()
    if up is not None and limit is not None:
        gate = op.Min(gate, _number(limit, gate))
        up = op.Max(op.Min(up, _number(limit, up)), _number(-limit, up))
    h = _activate(gate, activation, beta)
    if up is None:
        return h
    return op.Mul(h, op.Add(up, _number(up_shift, up)) if up_shift else up)


def _linear(x: Any, w: Any, b: Any) -> Any:
    op = _op()
    y = op.MatMul(x, op.Transpose(_wide(w), perm=[1, 0]))
    return y if b is None else op.Add(y, _wide(b))


def _route_linear(x: Any, weight: Any, bias: Optional[Any]) -> Any:
    return _linear(_wide(x), weight, bias)


def _gated_act(
    gate: Any, up: Optional[Any], activation: str, beta: float, limit: Optional[float] = None, up_shift: float = 0.0
) -> Any:
    h = _gate(_wide(gate), None if up is None else _wide(up), activation, beta, limit, up_shift)
    return _op().CastLike(h, gate)


def _gated_linear(
    x: Any, w_gate: Sequence[Any], w_up: Sequence[Any], b_gate: Sequence[Any], b_up: Sequence[Any],
    activation: str, beta: float, save: bool,
) -> Any:  # fmt: skip
    op = _op()
    rows, total = _wide(x), None
    for g in range(len(w_gate)):
        gate = _linear(rows, w_gate[g], b_gate[g] if b_gate else None)
        h = _gate(gate, _linear(rows, w_up[g], b_up[g] if b_up else None), activation, beta, None, 0.0)
        total = h if total is None else op.Add(total, h)
    return op.CastLike(total, x), _none(x), _none(x)


def _expert(
    x: Any, w_in: Any, w_up: Any, w_down: Any, b_in: Any, b_up: Any, b_down: Any, gated: bool, interleaved: bool,
    form: tuple[str, float, float | None, float],
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
    b_down: Optional[Any], gated: bool, activation: str, beta: float, limit: Optional[float] = None,
    up_shift: float = 0.0, save: bool = False,
) -> Any:  # fmt: skip
    form = (activation, beta, limit, up_shift)
    y = _expert(_wide(x), w_in, w_up, w_down, b_in, b_up, b_down, gated, False, form)
    return _op().CastLike(y, x), _none(x), _none(x)


def _moe(
    x: Any, token: Optional[Any], weight: Optional[Any], offsets: Any, row: Optional[Any],
    slot_offsets: Optional[Any], w_in: Any, w_down: Any, b_in: Optional[Any], b_down: Optional[Any], gated: bool,
    interleaved: bool, activation: str, beta: float, limit: Optional[float] = None, up_shift: float = 0.0,
    save: bool = False,
) -> Any:  # fmt: skip
    """Expert by expert, each on its rows: as many products as there are experts stand in the graph."""
    op = _op()
    rows = _wide(x) if token is None else op.Gather(_wide(x), _inside(token, x))
    axis, parts = _numbers([0]), []

    def of(t: Any, e: int) -> Any:
        return None if t is None else op.Gather(t, op.Constant(value_int=e), axis=0)

    for e in range(w_in.shape[0]):
        begin, end = (op.Gather(offsets, _numbers([i])) for i in (e, e + 1))
        each = (of(w_in, e), None, of(w_down, e), of(b_in, e), None, of(b_down, e), gated, interleaved)
        parts.append(_expert(op.Slice(rows, begin, end, axis), *each, (activation, beta, limit, up_shift)))
    out = op.Concat(*parts, axis=0)  # the rows that are not dropped
    if token is None:
        missing = op.Sub(op.Shape(rows, start=0, end=1), op.Shape(out, start=0, end=1))
        zeros = op.Expand(_number(0.0, out), op.Concat(missing, op.Shape(out, start=1), axis=0))
        y = op.Concat(out, zeros, axis=0)
    else:
        y = _summed(out, token, weight, slot_offsets)
    return op.CastLike(y, x), _none(x), _none(x)


def _inside(token: Any, x: Any) -> Any:
    """Dropped rows may name no token."""
    op = _op()
    last = op.Sub(op.Shape(x, start=0, end=1), _numbers([1]))
    return op.Max(op.Min(token, last), _numbers([0]))


def _summed(rows: Any, token: Any, weight: Any, slot_offsets: Any) -> Any:
    """Of each token, over the first rows of a routing, weighted."""
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
        """[E], and [E + 1] where rows begin."""
        is_expert = op.Equal(op.Unsqueeze(chosen, _numbers([1])), _numbers(range(experts)))
        counts = op.ReduceSum(op.Cast(is_expert, to=_INT64), _numbers([0]), keepdims=0)
        return counts, op.Concat(_numbers([0]), op.CumSum(counts, op.Constant(value_int=0)), axis=0)

    def sorted_by(chosen: Any, then: Any) -> Any:
        """Places by expert and, within it, by ``then``: different numbers below the count."""
        keys = op.Add(op.Mul(chosen, count), then)
        _, order = op.TopK(keys, count, axis=0, largest=0)
        return order

    def rank_of(order: Any) -> Any:
        """Where each place stands in an order."""
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
        "ffn_ops: BASE's balanced assignment has no translation to ONNX; in eval it takes the best"
    )


def _round_tokens(scores: Any, ids: Any, tile: int) -> Any:
    raise NotImplementedError("ffn_ops: token rounding has no translation to ONNX")
