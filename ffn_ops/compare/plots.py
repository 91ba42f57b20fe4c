# SPDX-License-Identifier: BSD-3-Clause
"""The plots as PNG files, without pyplot's global state. Imported only once matplotlib is known to be there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .activations import Curve
from .architectures import ARCHITECTURES, BASELINE, EXPERTS
from .mixtures import MIXTURES, NAMES, LayerLoad
from .results import Results, trained
from .train import Run

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8B4513")
DASHES = ("-", "--", "-.", ":")
PROVIDER_COLOURS = {"eager": "#999999", "compile": "#E69F00", "fused": "#0072B2"}
DPI = 110


def style(index: int) -> dict[str, str]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}


STYLES = {a.key: style(i) for i, a in enumerate(ARCHITECTURES)}
STYLES |= {m.key: style(i + 2) for i, m in enumerate(MIXTURES)}  # their plots hold no other layer than the baseline


def _runs(runs: Sequence[Run], key: str) -> list[Run]:
    return [r for r in runs if r.architecture == key]


Band = tuple[list[float], list[float], list[float]]


def _over_seeds(runs: Sequence[Run], values: Callable[[Run], list[float]]) -> Band:
    """Mean, lowest and highest per point, over the points that every run reached."""
    columns = list(zip(*(values(r) for r in runs), strict=False))
    return [fmean(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns]


def finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)


def loss(results: Results) -> Figure:
    return _loss(results.runs)


def mixtures(results: Results) -> Figure:
    return _loss(results.equal_flops)


def _loss(every: Sequence[Run]) -> Figure:
    """From the second evaluation on, because the first drop would flatten the rest of the curve."""
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for key in STYLES:
        if not (runs := [r for r in _runs(every, key) if len(r.steps) > 1]):
            continue
        mean, low, high = _over_seeds(runs, lambda r: r.validation[1:])
        steps = runs[0].steps[1 : len(mean) + 1]
        left.plot(steps, mean, label=NAMES[key], **STYLES[key])
        left.fill_between(steps, low, high, color=STYLES[key]["color"], alpha=0.1, linewidth=0)
        if differences := _differences(every, key):
            width = 1.0 if key == BASELINE else 1.6
            middle.plot(steps[: len(differences)], differences, linewidth=width, **STYLES[key])
    finish(left, "Validation loss (mean; band: range of seeds)", "step", "loss (nats per byte)")
    left.legend(fontsize=9)
    name = NAMES[BASELINE]
    finish(middle, f"Minus {name} of the same seed, mean", "step", f"loss minus {name}'s (nats per byte)")

    rows = [t for t in trained(every) if t.architecture != BASELINE and t.paired is not None]
    right.axvline(0, color="black", linewidth=1)
    for y, t in enumerate(rows):
        assert t.paired is not None
        colour = STYLES[t.architecture]["color"]
        right.plot(list(t.paired.differences.values()), [y] * len(t.paired.differences), "o", color=colour, alpha=0.5)
        right.errorbar(t.paired.mean, y + 0.22, xerr=t.paired.half_width, fmt="D", color=colour, capsize=4, ms=5)
    right.set_yticks(range(len(rows)), [NAMES[t.architecture] for t in rows])
    right.set_ylim(len(rows) - 0.4, -0.6)
    right.locator_params(axis="x", nbins=6)
    finish(right, "End: seeds (dots), mean, 95 % interval", f"final loss minus {name}'s (nats per byte)", "")
    return figure


def _differences(every: Sequence[Run], key: str) -> list[float]:
    """Per evaluation after the first: mean over the seeds of the loss minus the baseline's of the same seed."""
    baseline = {r.seed: r.validation[1:] for r in _runs(every, BASELINE)}
    pairs = [(r.validation[1:], baseline[r.seed]) for r in _runs(every, key) if r.seed in baseline]
    per_seed = [[a - b for a, b in zip(mine, other, strict=False)] for mine, other in pairs]
    return [fmean(column) for column in zip(*per_seed, strict=False)]


def gradients(results: Results) -> Figure:
    keys = [key for key in STYLES if _runs(results.runs, key)]
    columns = 4
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(12, 2.9 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(keys) :]:
        axes.set_axis_off()
    for index, (axes, key) in enumerate(zip(grid.flat, keys, strict=False)):
        runs = _runs(results.runs, key)
        for layer in range(results.settings.model.layers):

            def norms(run: Run, layer: int = layer) -> list[float]:
                return [at_step[layer] for at_step in run.gradient_norms]

            mean, _, _ = _over_seeds(runs, norms)
            axes.plot(runs[0].gradient_steps[: len(mean)], mean, label=f"block {layer + 1}", **style(layer))
        axes.set_yscale("log")
        below = index + columns >= len(keys)
        finish(axes, NAMES[key], "step" if below else "", "gradient norm" if index % columns == 0 else "")
        axes.xaxis.set_tick_params(labelbottom=below)
    grid.flat[0].legend(fontsize=9)
    figure.suptitle("Gradient norm of each feed-forward layer, before clipping (log scale, mean over seeds)")
    return figure


def dead(results: Results) -> Figure:
    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    rate = results.settings.learning_rate
    stress = f"stress: peak learning rate {rate * results.settings.stress_factor:g}, one seed"
    titles = (f"peak learning rate {rate:g}, mean and range of seeds", stress)
    for axes, runs, title in zip(panels, (results.runs, results.stress), titles, strict=True):
        for key in STYLES:
            if not (mine := _runs(runs, key)):
                continue
            mean, low, high = _over_seeds(mine, lambda r: [100 * fmean(shares) for shares in r.dead_share])
            steps = mine[0].steps[: len(mean)]
            axes.plot(steps, mean, label=NAMES[key], **STYLES[key])
            axes.fill_between(steps, low, high, color=STYLES[key]["color"], alpha=0.12, linewidth=0)
        finish(axes, title, "step", "dead units (% of all blocks' units)")
        axes.set_ylim(bottom=0, top=max(1.0, axes.get_ylim()[1]))
    panels[0].legend(fontsize=9)
    return figure


def experts(results: Results) -> Figure:
    """Blocks by mixtures, for the first seed: experts of different seeds or blocks cannot be averaged."""
    runs = [r for m in MIXTURES for r in _runs(results.mixtures, m.key)[:1]]
    blocks = results.settings.model.layers
    figure = Figure(figsize=(15, 3 * blocks + 0.8), layout="constrained")
    grid = figure.subplots(blocks, max(1, len(runs)), sharex=True, sharey=True, squeeze=False)
    for column, run in enumerate(runs):
        for block in range(blocks):
            _load_panel(grid[block, column], run, block)
            title = f"{NAMES[run.architecture]}, block {block + 1}"
            y = "share of choices (%)" if column == 0 else ""
            finish(grid[block, column], title, "step" if block == blocks - 1 else "", y)
    grid[0, 0].set_ylim(bottom=0)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=9)
    figure.suptitle("Share of each expert in the tokens' choices, before dropping (first seed)")
    return figure


def _load_panel(axes: Axes, run: Run, block: int) -> None:
    def shares(points: list[list[LayerLoad]], e: int) -> list[float]:
        return [100 * layers[block].shares[e] for layers in points]

    for e in range(EXPERTS):
        colour = COLOURS[e]
        training = shares(run.training_loads, e)
        axes.plot(run.gradient_steps[: len(training)], training, color=colour, linewidth=1, label=f"expert {e + 1}")
        validation = shares(run.validation_loads, e)
        label = "the same on validation" if e == 0 else None
        axes.plot(run.steps[: len(validation)], validation, "o", color=colour, markersize=3.5, alpha=0.8, label=label)
    axes.axhline(100 / EXPERTS, color="black", linewidth=0.8, linestyle=":", label="uniform")
    dropped = [100 * layers[block].dropped for layers in run.training_loads]
    axes.plot(
        run.gradient_steps[: len(dropped)],
        dropped,
        "k--",
        linewidth=1.4,
        label="dropped in training (% of all choices)",
    )


def _grouped(results: Results, axes: Axes, value: Callable[[str, str], tuple[float, float, float] | None]) -> None:
    """Bars per architecture, one per provider; ``value`` gives height and the whisker's ends."""
    layers = [r for r in results.layers if r.providers]
    width = 0.8 / len(PROVIDER_COLOURS)
    for offset, (provider, colour) in enumerate(PROVIDER_COLOURS.items()):
        found = [(i, v) for i, r in enumerate(layers) if (v := value(r.architecture, provider)) is not None]
        if not found:
            continue
        heights = [v[0] for _, v in found]
        at = [i + (offset - 1) * width for i, _ in found]
        bars = axes.bar(at, heights, width * 0.92, color=colour, label=provider)
        whiskers = [[v[0] - v[1] for _, v in found], [v[2] - v[0] for _, v in found]]
        if any(map(any, whiskers)):
            axes.errorbar(at, heights, yerr=whiskers, fmt="none", capsize=2, ecolor="#333333")
        else:
            axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(layers)), [NAMES[r.architecture].replace(" ", "\n") for r in layers], fontsize=9)
    axes.grid(axis="x", visible=False)


def speed(results: Results) -> Figure:
    figure = Figure(figsize=(12, 5), layout="constrained")
    by_key = {r.architecture: r for r in results.layers}
    size = results.settings.layer
    for axes, field in zip(figure.subplots(1, 2), ("forward", "forward_backward"), strict=True):

        def value(key: str, provider: str, field: str = field) -> tuple[float, float, float] | None:
            if (found := by_key[key].providers.get(provider)) is None:
                return None
            timing = found.forward if field == "forward" else found.forward_backward
            return timing.milliseconds

        finish(axes, field.replace("_", " + "), "", "time (ms)")
        _grouped(results, axes, value)
    figure.axes[0].legend()
    figure.suptitle(f"{size.tokens} tokens, d_model {size.d_model}, d_ff {size.d_ff}, float32; median and quartiles")
    return figure


def memory(results: Results) -> Figure:
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    by_key = {r.architecture: r for r in results.layers}
    size = results.settings.layer

    def value(key: str, provider: str) -> tuple[float, float, float] | None:
        found = by_key[key].providers.get(provider)
        mib = 0.0 if found is None else found.saved_bytes / 2**20
        return None if found is None else (mib, mib, mib)

    title = f"{size.tokens} tokens, d_model {size.d_model}, d_ff {size.d_ff}, float32; input included, parameters not"
    finish(axes, title, "", "kept for backward (MiB)")
    _grouped(results, axes, value)
    axes.legend()
    return figure


def _curves(x: list[float], curves: list[Curve], top: float, names: tuple[str, str]) -> Figure:
    figure = Figure(figsize=(12, 5), layout="constrained")
    for axes, title, slope in zip(figure.subplots(1, 2), names, (False, True), strict=True):
        for index, curve in enumerate(curves):
            width = 3.2 - 2.2 * index / len(curves)  # later curves are thinner, so that covered curves stay visible
            axes.plot(x, curve.slope if slope else curve.value, label=curve.label, linewidth=width, **style(index))
        finish(axes, title, "x", "d act / dx" if slope else "act(x)")
        axes.set_xlim(x[0], x[-1])
        axes.set_ylim((-0.6, 2.2) if slope else (-1.3, top))
        axes.axhline(0, color="black", linewidth=0.6)
        axes.axvline(0, color="black", linewidth=0.6)
    figure.axes[0].legend(fontsize=9, loc="upper left")
    return figure


def activations(results: Results) -> Figure:
    found = results.activations
    assert found is not None
    return _curves(found.x, found.curves, 4.0, ("Activation functions", "Their derivatives"))


def swish(results: Results) -> Figure:
    found = results.activations
    assert found is not None
    return _curves(found.x, found.swish, 4.0, ("Swish: x * sigmoid(beta x)", "Its derivative"))


PLOTS: tuple[Callable[[Results], Figure], ...] = (
    *(loss, gradients, dead, mixtures, experts),
    *(speed, memory, activations, swish),
)


def write(results: Results, folder: Path) -> dict[str, str]:
    """Write every plot; gives its file name by its function's name."""
    names = {}
    for plot in PLOTS:
        names[plot.__name__] = f"{plot.__name__}.png"
        plot(results).savefig(folder / names[plot.__name__], dpi=DPI)
    return names
