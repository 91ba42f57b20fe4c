# SPDX-License-Identifier: BSD-3-Clause
"""Prints what the harness found. Works on the records that the JSON file holds, so that a saved run prints alike."""

from __future__ import annotations

import statistics
from typing import Any

from .providers import COMPILE, EAGER, GROUPED, GROUPED_COMPILE, HUGE, LOOP, OURS, TORCH_ROUTING

Record = dict[str, Any]

STREAMING_ROWS = 16  # up to so many that a weight multiplies its traffic bounds a row: bytes per second are shown
PEERS = (EAGER, HUGE, COMPILE, TORCH_ROUTING, LOOP, GROUPED, GROUPED_COMPILE)  # of the summary


def ratio(row: Record, slow: str, fast: str) -> float | None:
    """How many times faster ``fast`` is: the median of the quotients of the same round, which share their noise."""
    first, second = (row["providers"].get(name, {}).get("seconds") or [] for name in (slow, fast))
    quotients = [float(a) / float(b) for a, b in zip(first, second, strict=False)]
    return statistics.median(quotients) if quotients else None


def gflops(row: Record, provider: Record) -> float:
    return float(row["flops"]) / float(provider["median"]) * 1e-9


def gbs(row: Record, provider: Record) -> float:
    return float(row["least_bytes"]) / float(provider["median"]) * 1e-9


def of_fma(row: Record, provider: Record) -> float:
    """Fraction of the float32 FMA peak."""
    return gflops(row, provider) / float(row["fma_gflops"])


def of_read(row: Record, provider: Record) -> float:
    """Fraction of the read bandwidth; above 1 where the weights stay in a cache."""
    return gbs(row, provider) / float(row["read_gbs"])


def of_limit(row: Record, provider: Record) -> float:
    """Fraction of whichever limit is nearer, arithmetic or memory."""
    return max(of_fma(row, provider), of_read(row, provider))


def is_streaming(row: Record) -> bool:
    shape = row["shape"]
    return bool(shape["T"] * shape.get("K", 1) / shape.get("E", 1) <= STREAMING_ROWS)


def time_text(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1 or unit == "µs":
            return f"{seconds * scale:.3g} {unit}" if seconds * scale < 100 else f"{seconds * scale:.0f} {unit}"
    raise AssertionError


def number_text(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def table(heads: list[str], lines: list[list[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]

    def text(line: list[str]) -> str:
        cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([text(heads), text(["-" * width for width in widths]), *(text(line) for line in lines)])


def machine_text(machine: Record) -> str:
    lines = [
        f"{machine['cpu']} · {machine['cpus']} logical CPUs · torch {machine['torch']} ({machine['torch_isa']})"
        f" · ffn_ops {machine['isa']} of {', '.join(machine['isas'])}",
        f"last-level cache {machine['last_level_cache'] >> 20} MiB · transparent huge pages {machine['huge_pages']}"
        f" · {machine['date']}",
    ]
    lines += [
        f"{count} thread{'s' * (int(count) > 1)}: "
        + " · ".join(f"{isa} {limit['fma_gflops']:.0f} GFLOP/s" for isa, limit in by_isa.items())
        + f" · read {max(limit['read_gbs'] for limit in by_isa.values()):.1f} GB/s"
        for count, by_isa in machine["limits"].items()
    ]
    return "\n".join(lines)


def row_text(row: Record) -> str:
    """One row: every provider's times, rates and shares, its error and what it saves for backward."""
    head = (
        f"{row['name']}" + (f"  (configuration {row['configuration']})" if row["configuration"] else "") + "\n"
        f"  {row['flops'] * 1e-9:.3g} GFLOP, at least {row['least_bytes'] * 1e-6:.3g} MB · in this row: FMA"
        f" {row['fma_gflops']:.1f} GFLOP/s ({row['isa']}), read {row['read_gbs']:.1f} GB/s"
    )
    heads = ["  provider", "median", "min", "spread", "n", "GFLOP/s", "of peak", "GB/s", "of read"]
    base = next(iter(row["providers"]))
    heads += [f"x {base}", "error", "saved MB", "first call"]
    lines, notes = [], []
    for name, found in row["providers"].items():
        if found["note"]:
            notes.append(f"  {name}: {found['note']}")
        if not found["seconds"]:
            lines.append(["  " + name, *["–"] * (len(heads) - 1)])
            continue
        streaming = is_streaming(row)
        saved = found["saved_bytes"]
        lines.append(
            [
                "  " + name,
                time_text(found["median"]),
                time_text(found["min"]),
                f"{found['spread']:.0%}",
                str(found["n"]),
                f"{gflops(row, found):.3g}" if row["flops"] else "–",
                f"{of_fma(row, found):.0%}" if row["flops"] else "–",
                f"{gbs(row, found):.3g}" if streaming else "–",
                f"{of_read(row, found):.0%}" if streaming else "–",
                number_text(ratio(row, base, name), ".2f"),
                number_text(found["error"], ".2f"),
                number_text(None if saved is None else saved * 1e-6, ".4g"),
                time_text(found["first_call"]),
            ]
        )
    return "\n".join([head, table(heads, lines), *notes])


def summary_text(rows: list[Record]) -> str:
    """A line for each row: ours, in shares and against the others."""
    names = {name for row in rows for name in row["providers"]}
    peers = [name for name in PEERS if name in names] + sorted(n for n in names if n.startswith(f"{OURS} at "))
    heads = ["row", "ffn_ops", "of peak", "of read", *(f"x {name}" for name in peers)]
    lines = []
    for row in rows:
        found = row["providers"].get(OURS, {})
        if not found.get("seconds"):
            lines.append([row["name"], *["–"] * (len(heads) - 1)])
            continue
        lines.append(
            [
                row["name"],
                time_text(found["median"]),
                f"{of_fma(row, found):.0%}" if row["flops"] else "–",
                f"{of_read(row, found):.0%}" if is_streaming(row) else "–",
                *(number_text(ratio(row, name, OURS), ".2f") for name in peers),
            ]
        )
    return table(heads, lines)


LEGEND = (
    "median, min, spread (quartiles' distance / median) and n are over rounds, in which the providers take turns ·"
    " of peak: the products' FLOPs (a gated layer: 6TDF forward, 18TDF with backward) against the FMA peak · of read:"
    " least traffic against the read bandwidth (above 100 %: the weights stay in a cache); of experts those that are"
    " chosen · x: median over rounds of their time / this time ·"
    " error: worst tensor's error against float64 / what is allowed (1.5 x eager's own) · saved: kept for backward,"
    " parameters not counted · first call: with compilation where there is one (in an empty cache but for --quick;"
    " the first row pays for the compiler's headers)"
)
