# SPDX-License-Identifier: BSD-3-Clause
"""The plot of a run: which share of the machine's nearer limit each provider reaches, and how cost grows by experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ffn_ops._files import whole

from .providers import (
    COMPILE,
    EAGER,
    FLOAT32,
    GROUPED,
    GROUPED_COMPILE,
    GROUPED_FLOAT32,
    HUGE,
    LOOP,
    LOOP_FLOAT32,
    OURS,
    RECOMPUTE,
)
from .report import Record, of_limit
from .workloads import GROWING

# Colours that stay apart for colour-blind readers (Okabe and Ito); ours alone is saturated blue.
COLOURS = {
    EAGER: "#999999",
    HUGE: "#56b4e9",
    FLOAT32: "#e69f00",
    COMPILE: "#d55e00",
    LOOP: "#999999",
    LOOP_FLOAT32: "#e69f00",
    GROUPED: "#56b4e9",
    GROUPED_FLOAT32: "#f0e442",
    GROUPED_COMPILE: "#d55e00",
    OURS: "#0072b2",
    RECOMPUTE: "#009e73",
}


LEAST_WIDTH = 512  # D


def _shape_text(row: Record) -> str:
    shape = row["shape"]
    act = "" if shape["activation"] == "silu" else f" {shape['activation']}"
    experts = f"\nE {shape['E']} K {shape['K']}" if "E" in shape else ""
    return f"T {shape['T']}\n{shape['D']}/{shape['F']}{act}{experts}" + ("\n2 threads" if row["threads"] == 2 else "")


def _panel(axes: Any, rows: list[Record], title: str, columns: int) -> None:
    names = [name for name in COLOURS if any(name in row["providers"] for row in rows)]
    width = 0.8 / max(1, len(names))
    top = 0.0
    for i, name in enumerate(names):
        places, shares, low, high = [], [], [], []
        for place, row in enumerate(rows):
            found = row["providers"].get(name)
            if found and found["seconds"]:
                share = of_limit(row, found) * 100
                places.append(place + (i - (len(names) - 1) / 2) * width)
                shares.append(share)
                low.append(max(0.0, share - share * found["median"] / max(found["seconds"])))
                high.append(max(0.0, share * found["median"] / found["min"] - share))
        if not places:
            continue
        top = max([top, *(s + h for s, h in zip(shares, high, strict=True))])
        axes.bar(places, shares, width, color=COLOURS[name], label=name)
        axes.errorbar(places, shares, yerr=(low, high), fmt="none", ecolor="black", elinewidth=0.6)
    axes.axhline(100, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(0, max(110, min(top * 1.05, 250)))
    axes.set_xticks(range(len(rows)), [_shape_text(row) for row in rows], fontsize=8)
    axes.set_ylabel("% of the nearer limit")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="y", linewidth=0.3)
    axes.set_axisbelow(True)


def _growth_panel(axes: Any, rows: list[Record]) -> None:
    """Time against the number of experts, as a multiple of that with the fewest."""
    for mode, style in (("inference", "o-"), ("training", "s--")):
        found = sorted(
            (row["shape"]["E"], row["providers"][OURS]["median"])
            for row in rows
            if row["mode"] == mode and row["providers"].get(OURS, {}).get("seconds")
        )
        if found:
            axes.plot([e for e, _ in found], [t / found[0][1] for _, t in found], style, color=COLOURS[OURS])
            end = (found[-1][0], found[-1][1] / found[0][1])
            axes.annotate(mode, end, xytext=(5, 5 if mode == "inference" else -9), textcoords="offset points")
    axes.set_xscale("log", base=2)
    ticks = sorted({row["shape"]["E"] for row in rows})
    axes.set_xticks(ticks, [str(e) for e in ticks])
    axes.set_xlim(ticks[0] * 0.9, ticks[-1] * 1.6)
    axes.margins(y=0.15)
    axes.set_ylim(bottom=0)
    axes.axhline(1.5, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("experts E")
    axes.set_ylabel("x the time with fewest experts")
    shape = rows[0]["shape"]
    axes.set_title(
        f"float32, T {shape['T']}, K {shape['K']}, {shape['D']}/{shape['F']}: the same rows, more experts", fontsize=10
    )
    axes.grid(linewidth=0.3)


def plot(results: dict[str, Any], file: Path) -> None:
    """One panel for each dtype and mode, without the rows that measure the overhead of a call, and one of growth."""
    growing = [row for row in results["rows"] if row["configuration"] == GROWING]
    shown = [row for row in results["rows"] if row["shape"]["D"] >= LEAST_WIDTH]
    kinds = sorted({(row["dtype"], row["mode"]) for row in shown}, key=lambda k: (k[0] != "float32", k))
    groups = [[row for row in shown if (row["dtype"], row["mode"]) == kind] for kind in kinds]
    columns = max([7, *(len(group) for group in groups)])
    panels = len(kinds) + bool(growing)
    figure, all_axes = plt.subplots(
        max(1, panels),
        1,
        figsize=(1.5 + 1.2 * columns, 1 + 2.6 * max(1, panels)),
        squeeze=False,
        layout="constrained",
    )
    for axes, kind, rows in zip(all_axes[:, 0], kinds, groups, strict=False):
        _panel(axes, rows, f"{kind[0]} {kind[1]}", columns)
    if growing:
        _growth_panel(all_axes[-1, 0], growing)
    facts = results["machine"]
    threads = min((row["threads"] for row in results["rows"]), default=1)
    mixtures = any("E" in row["shape"] for row in results["rows"])
    layer = "Mixture of E experts, K a token" if mixtures else "Gated FFN"
    figure.suptitle(
        f"{layer}, T tokens, D/F, {threads} thread{'s' * (threads > 1)} unless said: share of the float32 FMA peak\n"
        "or of the read bandwidth, whichever limit is nearer. Bars: median; lines: slowest and fastest round.\n"
        "Above 100 %: weights stay in a cache, or 16-bit arithmetic.\n"
        f"{facts['cpu']}, ffn_ops {facts['isa']}, torch {facts['torch']}",
        fontsize=9,
    )
    handles = {
        text: bar for axes in all_axes[:, 0] for bar, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    named = [name for name in COLOURS if name in handles]
    figure.legend([handles[n] for n in named], named, fontsize=8, ncols=6, loc="outside lower center")
    with whole(file) as fresh:
        figure.savefig(fresh, dpi=130)
    plt.close(figure)
