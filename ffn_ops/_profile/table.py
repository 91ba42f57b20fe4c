# SPDX-License-Identifier: BSD-3-Clause
"""A profile as text: identical layers are one row, and below each table stands what was fused, and why."""

from __future__ import annotations

import re
from typing import Any

_HEADS = (
    "rows", "calls", "forward ms", "backward ms", "of time", "GFLOP", "of FMA", "MB moved", "of read", "MB kept",
)  # fmt: skip


def text(found: dict[str, Any]) -> str:
    total = found["total_seconds"] + found["other_threads_seconds"]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in found["rows"]:
        layer = row["layer"] or {}
        pattern = re.sub(r"\b\d+\b", "*", row["path"])
        about = [layer.get(name, "") for name in ("status", "computes", "why")]
        groups.setdefault((pattern, row["module"], row["kind"], *about), []).append(row)
    lines = [list(_HEADS)]
    first, *rest = groups.items()
    ordered = [*rest, first]  # what runs outside of the model comes last
    lines += [_line(_name(key, alike), alike, total) for key, alike in ordered]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADS))]
    table = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    limits = found["limits"]
    below = [f"total {1e3 * found['total_seconds']:.1f} ms"]
    if found["other_threads_seconds"]:
        below[0] += f", in other threads {1e3 * found['other_threads_seconds']:.1f} ms"
    if limits is not None:
        below[0] += (
            f"; {limits['threads']} threads, {limits['isa']}: {limits['fma_gflops']:.0f} GFLOP/s,"
            f" {limits['read_gbs']:.1f} GB/s"
        )
    for key, alike in ordered:
        below += _about(_name(key, alike), alike)
    return "\n".join([table[0].rstrip(), *table[1:], "", *below, *(f"note: {note}" for note in found["notes"])])


def _name(key: tuple[str, ...], alike: list[dict[str, Any]]) -> str:
    pattern, module, kind, *_ = key
    if kind == "outside":
        return "outside the model"
    where = (alike[0]["path"] or "the model itself") if len(alike) == 1 else f"{len(alike)} x {pattern}"
    return f"{where} ({module}){', ' + kind if kind != 'other' else ''}"


def _seconds(row: dict[str, Any]) -> float:
    return float(row["forward_seconds"] + row["backward_seconds"])


def _line(name: str, alike: list[dict[str, Any]], total: float) -> list[str]:
    forward, backward = (sum(row[f"{way}_seconds"] for row in alike) for way in ("forward", "backward"))
    calls, again = (sum(row[name] for row in alike) for name in ("calls", "recomputed"))
    seconds = forward + backward
    cells = [name, f"{calls}" + (f"+{again}" if again else ""), f"{1e3 * forward:.1f}", f"{1e3 * backward:.1f}"]
    cells.append(f"{100 * seconds / total:.1f} %" if total else "-")
    least = ">" if any(row["counted"] == "ffn_ops" for row in alike) else ""
    for work, share, unit in (("flops", "of_fma_peak", 1e9), ("bytes", "of_read_bandwidth", 1e6)):
        if any(row[work] is None for row in alike):
            cells += ["-", "-"]
            continue
        amount = sum(sum(row[work].values()) for row in alike)
        cells.append(f"{least}{amount / unit:.3g}" if amount < 1e3 * unit else f"{least}{amount / unit:.0f}")
        rates = [row[share] for row in alike if row[share] is not None]
        part = sum(
            rate * (row["forward_seconds"] + row["backward_seconds"]) for rate, row in zip(rates, alike, strict=False)
        )
        cells.append(f"{least}{100 * part / seconds:.1f} %" if len(rates) == len(alike) and seconds else "-")
    kept = [row["saved_bytes"] for row in alike if row["saved_bytes"] is not None]
    cells.append(f"{sum(kept) / 1e6:.2f}" if kept else "-")
    return cells


def _about(name: str, alike: list[dict[str, Any]]) -> list[str]:
    lines = []
    layer = alike[0]["layer"]
    if layer is not None:
        said = f"{layer['status']}{': ' if layer['computes'] else ''}{layer['computes']}"
        lines.append(f"  {said}{'; ' if layer['why'] else ''}{layer['why']}")
        fused, own = (sum(row["layer"][each] for row in alike) for each in ("fused_calls", "own_calls"))
        if own:
            lines.append(f"  fused in {fused} of {fused + own} calls")
    operators: dict[str, list[float]] = {}
    for row in alike:
        for op, each in row["operators"].items():
            total = operators.setdefault(op, [0, 0.0])
            total[0] += each["calls"]
            total[1] += each["seconds"]
    if operators:
        each = (f"{op} {int(calls)} ({1e3 * seconds:.1f} ms)" for op, (calls, seconds) in operators.items())
        lines.append("  operators: " + ", ".join(each))
    counts = [row["tokens"] for row in alike if row["tokens"]]
    if counts:
        flat = sorted(number for row in counts for number in row)
        shown = f": {' '.join(map(str, counts[0]))}" if len(counts) == 1 and len(flat) <= 32 else ""
        spread = f"{flat[0]} to {flat[-1]}, mean {sum(flat) / len(flat):.1f}"
        lines.append(f"  tokens of each expert{shown or ' ' + spread}; {flat.count(0)} of {len(flat)} experts had none")
    if any(row["counted"] == "ffn_ops" for row in alike):
        lines.append("  torch computes products in it, which operators=True counts too" if layer else "")
    lines = [line for line in lines if line]
    return [name, *lines] if lines else []
