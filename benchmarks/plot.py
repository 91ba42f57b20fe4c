"""The plot of a run: for every row, which share of the machine's nearer limit each provider reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .providers import COMPILE, EAGER, FLOAT32, HUGE, OURS, RECOMPUTE
from .report import Record, of_limit

# Colours that stay apart for colour-blind readers (Okabe and Ito); ours alone is saturated blue.
COLOURS = {
    EAGER: "#999999",
    HUGE: "#56b4e9",
    FLOAT32: "#e69f00",
    COMPILE: "#d55e00",
    OURS: "#0072b2",
    RECOMPUTE: "#009e73",
}


LEAST_WIDTH = 512  # D


def _shape_text(row: Record) -> str:
    shape = row["shape"]
    act = "" if shape["activation"] == "silu" else f" {shape['activation']}"
    return f"T {shape['T']}\n{shape['D']}/{shape['F']}{act}" + ("\n2 threads" if row["threads"] == 2 else "")


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
                low.append(share - share * found["median"] / max(found["seconds"]))
                high.append(share * found["median"] / found["min"] - share)
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


def plot(results: dict[str, Any], file: Path) -> None:
    """One panel for each dtype and mode, without the rows that measure the overhead of a call."""
    shown = [row for row in results["rows"] if row["shape"]["D"] >= LEAST_WIDTH]
    kinds = sorted({(row["dtype"], row["mode"]) for row in shown}, key=lambda k: (k[0] != "float32", k))
    groups = [[row for row in shown if (row["dtype"], row["mode"]) == kind] for kind in kinds]
    columns = max([7, *(len(group) for group in groups)])
    figure, all_axes = plt.subplots(
        max(1, len(kinds)),
        1,
        figsize=(1.5 + 1.2 * columns, 1 + 2.6 * max(1, len(kinds))),
        squeeze=False,
        layout="constrained",
    )
    for axes, kind, rows in zip(all_axes[:, 0], kinds, groups, strict=True):
        _panel(axes, rows, f"{kind[0]} {kind[1]}", columns)
    facts = results["machine"]
    threads = min((row["threads"] for row in results["rows"]), default=1)
    figure.suptitle(
        f"Gated FFN, T tokens, D/F, {threads} thread{'s' * (threads > 1)} unless said: share of the float32 FMA peak\n"
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
    figure.savefig(file, dpi=130)
    plt.close(figure)
