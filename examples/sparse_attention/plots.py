# SPDX-License-Identifier: BSD-3-Clause
"""The plots of a run as PNG files, in the colours of ``ffn_ops compare``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ffn_ops.compare.plots import COLOURS, DPI, finish, style

from .measure import PARTS
from .model import ARMS, BY_KEY, VALUES
from .results import CONTRASTS, Results

STYLES = {arm.key: style(i) for i, arm in enumerate(ARMS)}


def training(results: Results) -> Figure:
    """Losses while training, on text and on the needles' values, and the paired differences of the end."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    group = max(1, results.plan.steps // 40)
    for arm in ARMS:
        for axes, name in ((left, "losses"), (middle, "answers")):
            curves = [getattr(run, name) for run in results.of(arm.key)]
            mean = [fmean(step) for step in zip(*curves, strict=True)]
            begins = range(0, len(mean), group)
            axes.plot(begins, [fmean(mean[b : b + group]) for b in begins], label=arm.name, **STYLES[arm.key])
    for axes in (left, middle):
        axes.axvline(results.plan.steps // 2, color="#999999", linewidth=0.8)
    finish(left, "Training loss on text (mean of seeds)", "step; line: the sparse stage begins", "nats per byte")
    left.set_ylim(top=2.6)
    left.legend(fontsize=9)
    finish(middle, "Training loss on the needles' values", "step", "nats per value")
    right.axvline(0, color="black", linewidth=1)
    names = []
    for y, (key, other) in enumerate(CONTRASTS):
        names.append(f"{BY_KEY[key].name}\nminus {BY_KEY[other].name}")
        found, colour = results.contrast(key, other), STYLES[key]["color"]
        each = list(found.differences.values())
        right.plot(each, [y] * len(each), "o", color=colour, alpha=0.5)
        right.errorbar(found.mean, y + 0.22, xerr=found.half_width, fmt="D", color=colour, capsize=4, ms=5)
    right.set_yticks(range(len(names)), names, fontsize=8)
    right.set_ylim(len(names) - 0.4, -0.6)
    finish(right, "Validation loss: seeds (dots), mean, 95 % interval", "nats per byte", "")
    return figure


def recall(results: Results) -> Figure:
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    for arm in ARMS:
        axes.plot(results.plan.recall_lengths, results.recall(arm.key), marker="o", label=arm.name, **STYLES[arm.key])
    axes.axhline(1 / VALUES, color="#999999", linewidth=0.8, label="chance")
    axes.axvline(results.size.context, color="black", linewidth=0.8, linestyle=":", label="trained with")
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.02)
    axes.legend(fontsize=9)
    finish(axes, "Needles recalled (mean of seeds)", "tokens of context", "share")
    return figure


def cost(results: Results) -> Figure:
    """Time and memory over the length, and the parts of a step of the three mixtures."""
    figure = Figure(figsize=(15, 8.4), layout="constrained")
    (step, memory, decode), bars = figure.subplots(2, 3)
    panels: list[tuple[Axes, Callable[..., float], str, str]] = [
        (step, lambda c: c.step_seconds, "A training step", "seconds"),
        (memory, lambda c: c.step_mb or float("nan"), "Memory of a step, at most", "MB"),
        (decode, lambda c: 1e3 * c.decode_seconds, "Decoding", "ms per token"),
    ]
    for axes, value, title, unit in panels:
        for arm in ARMS:
            costs = results.costs_of(arm.key)
            axes.plot(
                [c.length for c in costs], [value(c) for c in costs], marker="o", label=arm.name, **STYLES[arm.key]
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        finish(axes, title, "tokens of context", unit)
    step.legend(fontsize=9)
    for axes, key in zip(bars, ("dense_moe", "sparse_moe", "window_moe"), strict=True):
        costs, low = results.costs_of(key), [0.0] * len(results.costs_of(key))
        for part, colour in zip(PARTS, COLOURS, strict=False):
            shares = [100 * c.step_parts[part] / c.step_seconds for c in costs]
            axes.bar([f"{c.length:,}" for c in costs], shares, bottom=low, color=colour, label=part)
            low = [a + b for a, b in zip(low, shares, strict=True)]
        finish(axes, f"Where a step's time goes: {BY_KEY[key].name}", "tokens of context", "%")
    bars[0].legend(fontsize=9)
    return figure


def experts(results: Results) -> Figure:
    arms = [arm for arm in ARMS if arm.mixture]
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axes, arm in zip(figure.subplots(1, len(arms), sharey=True), arms, strict=True):
        layers = list(zip(*(run.loads for run in results.of(arm.key)), strict=True))
        for layer, loads in enumerate(layers):
            shares = [100 * fmean(each) for each in zip(*(sorted(load.shares) for load in loads), strict=True)]
            places = [expert + (layer - 0.5) * 0.4 for expert in range(len(shares))]
            axes.bar(places, shares, width=0.38, color=COLOURS[layer], label=f"layer {layer + 1}")
        axes.axhline(100 / results.size.experts, color="black", linewidth=0.8, linestyle=":")
        finish(axes, arm.name, "experts, in the order of their load", "% of rows")
    figure.axes[0].legend(fontsize=9)
    return figure


def write(results: Results, folder: Path) -> None:
    for draw in (training, recall, cost, experts):
        draw(results).savefig(folder / f"{draw.__name__}.png", dpi=DPI)
