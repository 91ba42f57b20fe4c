# SPDX-License-Identifier: BSD-3-Clause
"""Prints what the harness found on a GPU, from the records of the JSON file: forward and backward apart, in TFLOP/s or
for what only moves memory in GB/s, and beside them what others published."""

from __future__ import annotations

from typing import Any

from .gpu_rows import PUBLISHED, SOURCE
from .providers import COMPILE, EAGER, GROUPED, GROUPED_COMPILE, LOOP, OURS
from .report import Record, number_text, ratio, table, time_text

PEERS = (EAGER, COMPILE, LOOP, GROUPED, GROUPED_COMPILE)


def rates(row: Record, provider: Record) -> tuple[float, float]:
    """Of forward and of backward: FLOP/s of the products, bytes/s where a row has none."""
    if row["flops"]:
        forward, whole = row["flops"] / 3, row["flops"]  # backward takes twice those of forward
    else:
        forward, whole = row["forward_bytes"], row["least_bytes"]
    return forward / provider["forward"], (whole - forward) / provider["backward"]


def of_limit(row: Record, provider: Record) -> tuple[float, float]:
    """Forward and backward as fractions of what cuBLAS, or a copy, reached in this row."""
    limit = row["matmul_gflops"] if row["flops"] else row["copy_gbs"]
    forward, backward = rates(row, provider)
    return forward / limit * 1e-9, backward / limit * 1e-9


def _pair(values: tuple[float, float | None], form: str) -> str:
    return " / ".join(number_text(value, form) for value in values)


def _scaled(row: Record, provider: Record) -> tuple[float, float]:
    scale = 1e-12 if row["flops"] else 1e-9
    forward, backward = rates(row, provider)
    return forward * scale, backward * scale


def machine_text(machine: Record) -> str:
    clocks = f" · {machine['sm_mhz']:.0f} of {machine['most_sm_mhz']:.0f} MHz" if "sm_mhz" in machine else ""
    return (
        f"{machine['gpu']} · sm_{machine['capability'].replace('.', '')} · {machine['sms']} SMs ·"
        f" {machine['memory_bytes'] / 1e9:.0f} GB, L2 {machine['l2_bytes'] >> 20} MiB{clocks}\n"
        f"driver {machine.get('driver', 'unknown')} · CUDA {machine['cuda']} · torch {machine['torch']} ·"
        f" ffn_ops {machine['version']} · {machine['date']}"
    )


def _clocks_text(clocks: dict[str, Any]) -> str:
    return f" · {clocks['sm_mhz']:.0f} MHz, {clocks['celsius']:.0f} °C before" if clocks else ""


def row_text(row: Record) -> str:
    """One row: every provider's times and rates, its error and what it saves for backward."""
    unit = "TFLOP/s" if row["flops"] else "GB/s"
    head = (
        f"{row['name']}  (row {row['configuration']})\n"
        f"  {row['flops'] * 1e-12:.3g} TFLOP, at least {row['least_bytes'] * 1e-9:.3g} GB · in this row: cuBLAS"
        f" {row['matmul_gflops'] * 1e-3:.0f} TFLOP/s, copy {row['copy_gbs']:.0f} GB/s"
        f"{_clocks_text(row['clocks'])}"
    )
    base = next(iter(row["providers"]))
    heads = ["  provider", "median", "spread", "n", "forward", "backward", f"{unit} fwd / bwd", "of limit"]
    heads += [f"x {base}", "error", "saved MB", "first call"]
    lines, notes = [], []
    for name, found in row["providers"].items():
        if found["note"]:
            notes.append(f"  {name}: {found['note']}")
        if not found.get("forward"):
            lines.append(["  " + name, *["–"] * (len(heads) - 1)])
            continue
        saved = found["saved_bytes"]
        lines.append(
            [
                "  " + name,
                time_text(found["median"]),
                f"{found['spread']:.0%}",
                str(found["n"]),
                time_text(found["forward"]),
                time_text(found["backward"]),
                _pair(_scaled(row, found), ".0f"),
                _pair(of_limit(row, found), ".0%"),
                number_text(ratio(row, base, name), ".2f"),
                number_text(found["error"], ".2f"),
                number_text(None if saved is None else saved * 1e-6, ".4g"),
                time_text(found["first_call"]),
            ]
        )
    others = PUBLISHED.get(row["configuration"], {})
    if others:
        notes.append("  " + " · ".join(f"{name} {_pair(rate, '.0f')}" for name, rate in others.items()) + " *")
    return "\n".join([head, table(heads, lines), *notes])


def summary_text(rows: list[Record]) -> str:
    """A line for each row: ours, in rates and against the others, measured here and published."""
    peers = [name for name in PEERS if any(name in row["providers"] for row in rows)]
    best = next(iter(PUBLISHED["1"]))
    heads = ["row", "ffn_ops", "fwd / bwd", "of limit", *(f"x {name}" for name in peers), f"{best} *"]
    lines = []
    for row in rows:
        found = row["providers"].get(OURS, {})
        label = f"{row['configuration']}: {row['name']}"
        if not found.get("forward"):
            lines.append([label, *["–"] * (len(heads) - 1)])
            continue
        unit = "TFLOP/s" if row["flops"] else "GB/s"
        published = PUBLISHED.get(row["configuration"], {}).get(best)
        lines.append(
            [
                label,
                time_text(found["median"]),
                f"{_pair(_scaled(row, found), '.0f')} {unit}",
                _pair(of_limit(row, found), ".0%"),
                *(number_text(ratio(row, name, OURS), ".2f") for name in peers),
                "–" if published is None else _pair(published, ".0f"),
            ]
        )
    return table(heads, lines)


LEGEND = (
    "times by CUDA events, L2 flushed before each call; median and spread (quartiles' distance / median) over rounds,"
    " in which the providers take turns · rates: 6TDF forward (6TKDF of a mixture), twice that backward; of gated_act"
    " the bytes of its tensors, once each · of limit: of a large cuBLAS product of the same dtype, or of a copy, both"
    " measured in the row · x: median over rounds of their time / this time · error: worst tensor's error / what is"
    " allowed (1.5 x eager's own) · saved: kept for backward, parameters not counted\n"
    f"* {SOURCE}"
)
