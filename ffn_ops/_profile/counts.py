# SPDX-License-Identifier: BSD-3-Clause
"""What operators do: FLOPs by the formulas of torch.utils.flop_counter, bytes, tokens of each expert. No time.

A call is kept as the shapes of its arguments, and each set of shapes is worked out once, at the end.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

MIXTURES = ("moe", "moe_lora", "moe_quantized")  # one of them for each call of a mixture
# torch 2.11 has no formula for this one.
COUNTS_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu in flop_registry
PRODUCTS = {torch.ops.aten.linear, torch.ops.aten.matmul}  # as inference mode leaves them
# of a table they read the rows that they return
GATHERS = {torch.ops.aten.embedding, torch.ops.aten.index_select, torch.ops.aten.gather, torch.ops.aten.index}
_FOLD = 1024
_STACKED = ("w", "b", "lora")  # of an operator with offsets, arguments that may have a slice for each expert


class Shape(NamedTuple):  # and no dataclass, whose hash is slow
    sizes: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        size = self.dtype.itemsize
        for each in self.sizes:
            size *= each
        return size


def shapes(value: Any) -> Any:
    """Hashable: tensors become shapes, lists tuples."""
    if isinstance(value, Tensor):
        return Shape(value.shape, value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple([shapes(each) for each in value])
    return value if value is None or isinstance(value, (int, float, str, torch.dtype)) else str(value)


class Call(NamedTuple):
    cell: int
    op: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    out: Any

    @property
    def name(self) -> str:
        return self.op._schema.name.split("::")[-1]  # type: ignore[no-any-return]

    @property
    def ours(self) -> bool:
        return bool(self.op.namespace == "ffn_ops")


@dataclass
class Sum:
    """Of the calls with the same shapes."""

    calls: int = 0
    nanoseconds: int = 0
    experts: int = 0  # with rows, over all of the calls
    told: int = 0  # calls whose offsets were read


@dataclass
class Counts:
    """Of one thread."""

    sums: dict[Call, Sum] = field(default_factory=dict)
    tokens: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # by row and number of experts
    _routed: list[tuple[Call, Tensor]] = field(default_factory=list)

    def add(self, call: Call, nanoseconds: int, offsets: Tensor | None) -> None:
        total = self.sums.get(call)
        if total is None:
            total = self.sums[call] = Sum()
        total.calls += 1
        total.nanoseconds += nanoseconds
        if offsets is not None and offsets.device.type != "meta" and type(offsets) is Tensor:
            self._routed.append((call, offsets))
            if len(self._routed) >= _FOLD:
                self.fold()

    def fold(self) -> None:
        """Reads the offsets that were kept: later, as they may be on a GPU."""
        with torch.no_grad():
            for call, offsets in self._routed:
                rows = offsets.diff().cpu()
                self.sums[call].experts += int((rows > 0).sum())
                self.sums[call].told += 1
                if call.name in MIXTURES and not call.cell & 1:
                    key = (call.cell >> 1, len(rows))
                    self.tokens[key] = rows + self.tokens.get(key, 0)
        self._routed.clear()


@functools.cache
def names_of(op: Any) -> tuple[str, ...]:
    return tuple([argument.name for argument in op._schema.arguments])


@functools.cache
def offsets_at(op: Any) -> int | None:
    names = names_of(op)
    return names.index("offsets") if op.namespace == "ffn_ops" and "offsets" in names else None


@functools.cache
def _moves_nothing(op: Any) -> bool:
    """A view, or memory that nobody writes."""
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)
    return views or op._schema.name.split("::")[-1].removeprefix("new_").startswith("empty")


def flops(call: Call) -> int:
    """Of one call."""
    formula = flop_registry.get(call.op.overloadpacket)
    if formula is None:
        return 0

    def rebuilt(value: Any) -> Any:
        if isinstance(value, Shape):
            return torch.empty(value.sizes, dtype=value.dtype, device="meta")
        return [rebuilt(each) for each in value] if isinstance(value, tuple) else value

    kwargs = {name: rebuilt(value) for name, value in call.kwargs}
    return int(formula(*rebuilt(call.args), **kwargs, out_val=rebuilt(call.out)))


def _shapes_in(value: Any) -> Iterator[Shape]:
    if isinstance(value, Shape):
        yield value
    elif isinstance(value, tuple):
        for each in value:
            yield from _shapes_in(each)


def moved(call: Call, total: Sum) -> int:
    """Bytes of all calls: each argument read once, of stacked experts those with rows, each result written once."""
    if _moves_nothing(call.op):
        return 0
    written = sum(shape.nbytes for shape in _shapes_in(call.out))
    if call.op.overloadpacket in GATHERS:
        ids = sum(shape.nbytes for shape in _shapes_in(call.args[1:]))
        return (2 * written + ids) * total.calls
    at = offsets_at(call.op)
    offsets = None if at is None else call.args[at]
    experts = offsets.sizes[0] - 1 if offsets is not None else None
    whole = stacked = 0
    for name, value in (*zip(names_of(call.op), call.args, strict=False), *call.kwargs):
        for shape in _shapes_in(value):
            if experts and name.startswith(_STACKED) and shape.sizes[:1] == (experts,):
                stacked += shape.nbytes
            else:
                whole += shape.nbytes
    if experts:
        read = total.experts + (total.calls - total.told) * experts
        stacked = stacked * read // experts
    return (whole + written) * total.calls + stacked


class TorchOperators(TorchDispatchMode):
    """Hands each of torch's operators, and its result, to ``seen``; inside compiled code it sees none."""

    def __init__(self, seen: Any) -> None:
        super().__init__()
        self._seen = seen

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and func.overloadpacket not in flop_registry and func.namespace == "aten":
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if func.namespace != "ffn_ops":  # which the library hands on itself
            self._seen(func, args, kwargs, out)
        return out


def is_product(op: Any) -> bool:
    return op.overloadpacket in flop_registry or op.overloadpacket in PRODUCTS


def merged(counts: list[Counts]) -> tuple[dict[Call, Sum], dict[int, Counter[int]]]:
    """Of all threads: the calls, and the tokens of each expert in each row."""
    sums: dict[Call, Sum] = {}
    tokens: dict[int, Counter[int]] = {}
    for each in counts:
        each.fold()
        for call, part in each.sums.items():
            total = sums.setdefault(call, Sum())
            total.calls += part.calls
            total.nanoseconds += part.nanoseconds
            total.experts += part.experts
            total.told += part.told
        for (row, experts), rows in each.tokens.items():
            of_row = tokens.setdefault(row, Counter({e: 0 for e in range(experts)}))
            for e, number in enumerate(rows.tolist()):
                of_row[e] += number
    return sums, tokens
