# SPDX-License-Identifier: BSD-3-Clause
"""``python -m benchmarks.passes``: the passes between products, which memory limits, beside a copy and eager PyTorch.

The copy is ``Tensor.copy_`` between tensors that exist; the operators and eager write memory that they have just been
given. A column sum writes next to nothing: beside it stands a loop that only reads the same matrix.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import ffn_ops
from ffn_ops._accuracy import limit, worst
from ffn_ops._timing import Timed, ready, take_turns

from .command import row_options, run_rows
from .harness import threads
from .report import Record, number_text, ratio, table, time_text

COPY, READ, OURS, EAGER = "copy", "read", "ffn_ops", "eager"
EXPERTS = 64
K = 8


@dataclass(frozen=True)
class Row:
    kind: str
    T: int
    width: int
    threads: int

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.T} x {self.width}, {self.threads} thread{'s' * (self.threads > 1)}"


@dataclass(frozen=True)
class Pass:
    """One pass of a row: what it reads and writes at least, in numbers, and two ways to compute it."""

    moved: int
    ours: Callable[[], Sequence[Tensor]]
    eager: Callable[[torch.dtype], Sequence[Tensor]]  # arithmetic in this dtype, from the same inputs
    only_read: Tensor | None = None  # where next to nothing is written


def rows(count: int) -> list[Row]:
    sizes = {"gated_act": (8192, 2816), "gated_act backward": (8192, 2816), "column sum": (8192, 4096)}
    sizes |= {"dispatch": (4096, 1024), "combine": (4096, 1024)}
    return [Row(kind, *size, threads) for kind, size in sizes.items() for threads in sorted({1, count})]


def _activation(row: Row, backward: bool) -> Pass:
    gate, up, d_y = (torch.randn(row.T, row.width) for _ in range(3))

    def forward(dtype: torch.dtype) -> Sequence[Tensor]:
        return [F.silu(gate.to(dtype)) * up.to(dtype)]

    def gradients(dtype: torch.dtype) -> Sequence[Tensor]:
        g, s = gate.to(dtype), torch.sigmoid(gate.to(dtype))
        d = d_y.to(dtype)
        return [d * up.to(dtype) * (s * (1 + g * (1 - s))), d * (g * s)]

    if not backward:
        return Pass(3 * gate.numel(), lambda: [ffn_ops.gated_act(gate, up)], forward)
    operator = torch.ops.ffn_ops.gated_act_backward
    return Pass(
        5 * gate.numel(), lambda: operator(d_y, gate, up, "silu", ffn_ops.Gate("silu").params, [True, True]), gradients
    )


def _column_sum(row: Row) -> Pass:
    d, x, w = torch.randn(row.T, row.width), torch.empty(row.T, 1), torch.empty(row.width, 1)
    operator = torch.ops.ffn_ops.route_linear_backward  # of it the bias's gradient alone
    return Pass(
        d.numel(),
        lambda: [operator(d, x, w, [False, False, True])[2]],
        lambda dtype: [d.to(dtype).sum(0, dtype=dtype)],
        d.view(-1),
    )


def _rows(row: Row, combine: bool) -> Pass:
    routing = ffn_ops.routing.top_k(torch.randn(row.T, EXPERTS), K)
    x = torch.randn(row.T * K if combine else row.T, row.width)
    where = (routing.token, routing.weight if combine else None)
    order = (routing.offsets, routing.row, routing.slot_offsets)

    def eager(dtype: torch.dtype) -> Sequence[Tensor]:
        wide = x.to(dtype)
        if not combine:
            return [wide[routing.token]]
        zero = torch.zeros(row.T, row.width, dtype=dtype)
        return [zero.index_add_(0, routing.token, wide * routing.weight.to(dtype)[:, None])]

    operator = torch.ops.ffn_ops.moe_combine if combine else torch.ops.ffn_ops.moe_dispatch
    return Pass((1 + K) * row.T * row.width, lambda: [operator(x, *where, *order)], eager)


def pass_of(row: Row) -> Pass:
    torch.manual_seed(0)
    if row.kind == "column sum":
        return _column_sum(row)
    if row.kind.startswith("gated_act"):
        return _activation(row, row.kind.endswith("backward"))
    return _rows(row, row.kind == "combine")


def _bound(row: Row, each: Pass) -> tuple[str, Callable[[], object]]:
    """What moves the same bytes and computes nothing."""
    if each.only_read is not None:
        operators = torch.ops.ffn_ops
        return READ, functools.partial(operators._peak_read, each.only_read, operators._isa(), row.threads)
    half, to = torch.zeros(2, each.moved // 2)
    return COPY, lambda: to.copy_(half)


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure(row: Row, rounds: int) -> tuple[list[Timed], str, dict[str, Any]]:
    """Bytes per second, and the share of what the copy, or the read, reaches in the same rounds."""
    with threads(row.threads):
        each = pass_of(row)
        exact, eager = each.eager(torch.float64), each.eager(torch.float32)
        limits = [limit(e, x) for e, x in zip(eager, exact, strict=True)]
        bound, move = _bound(row, each)
        calls: dict[str, Callable[[], object]] = {
            bound: move, OURS: each.ours, EAGER: lambda: each.eager(torch.float32),
        }  # fmt: skip
        found = [Timed(name) for name in calls]

        def prepared(timed: Timed) -> Callable[[], float]:
            if timed.provider == OURS:
                timed.error = worst([f"result {i}" for i in range(len(exact))], each.ours(), exact, limits)
            _timed(calls[timed.provider])
            return functools.partial(_timed, calls[timed.provider])

        take_turns(ready(found, prepared, rounds))
    record = {"bytes": 4 * each.moved, "providers": {t.provider: t.record() for t in found}}
    return found, _text(row, found, record, bound), {"bytes": record["bytes"]}


def _text(row: Row, found: Sequence[Timed], record: Record, bound: str) -> str:
    lines = []
    for t in found:
        if t.seconds:
            share = number_text(ratio(record, bound, t.provider), ".2f")
            lines.append(
                [t.provider, time_text(t.median), f"{t.spread:.0%}", f"{1e-9 * record['bytes'] / t.median:.1f}", share]
            )
        else:
            lines.append([t.provider, t.note, "", "", ""])
    return f"{row.name}\n{table(['provider', 'median', 'spread', 'GB/s', f'of {bound}'], lines)}"


def main(arguments: list[str] | None = None) -> int:
    parser = row_options("passes", rounds=15)
    options = parser.parse_args(arguments)
    return run_rows(parser, options, rows(options.threads), functools.partial(measure, rounds=options.rounds))


if __name__ == "__main__":
    sys.exit(main())
