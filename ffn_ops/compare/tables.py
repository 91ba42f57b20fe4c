# SPDX-License-Identifier: BSD-3-Clause
"""The tables, once: the terminal and the report render the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .._timing import Timed
from .advice import guide_advice, signed
from .architectures import BASELINE, EXPERTS
from .counts import CountRow
from .layers import LayerResult
from .mixtures import MIXTURES, NAMES, Load
from .paired import speed_ratio
from .results import Results, Trained, trained

NONE = "-"
PROVIDERS = ("eager", "compile", "fused")


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


def _millions(value: float) -> str:
    return f"{value / 1e6:.2f}M"


def _multiple(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}x"


def counts_table(results: Results) -> Table:
    size = results.settings.layer
    columns = ("layer", "d_ff", "parameters", "active", "MFLOP / token", "multiple", "guide's", "guide's x", "verdict")
    return Table(
        f"Parameters and FLOPs at d_model {size.d_model}, d_ff {size.d_ff}, beside the guides' claims",
        columns,
        [_count_row(row) for row in results.counts],
        "Counted from the modules, biases included; multiple: of the ReLU FFN's parameters. FLOPs: matrix products of"
        " the forward, 2 per multiply-add. guide's x: the lookup table / the growth list, which contradict each other.",
    )


def _count_row(row: CountRow) -> tuple[str, ...]:
    claim = row.claim
    parameters = NONE if claim.parameters_millions is None else f"{claim.parameters_millions}M"
    multiples = NONE
    if claim.lookup_multiple is not None:
        multiples = f"{_multiple(claim.lookup_multiple)} / {_multiple(claim.growth_multiple)}"
    return (
        row.name,
        str(row.d_ff),
        f"{row.parameters:,}",
        _millions(row.active_parameters),
        f"{row.flops_per_token / 1e6:.2f}",
        f"{row.multiple:.2f}x",
        parameters,
        multiples,
        row.verdict,
    )


def counted_table(results: Results) -> Table:
    rows = [(row.name, row.counted) for row in results.counts]
    return Table("What is counted", ("layer", "counted"), rows)


def _time(timed: Timed) -> str:
    return "{:.1f} ({:.1f}-{:.1f})".format(*timed.milliseconds)


def layers_table(results: Results) -> Table:
    size = results.settings.layer
    columns = ("layer", "provider", "forward ms", "forward+backward ms", "x eager", "kept for backward MiB")
    rows = [row for layer in results.layers for row in _layer_rows(layer)]
    notes = [f"{NAMES[r.architecture]}: {note}." for r in results.layers for note in r.notes]
    return Table(
        f"Fused, eager, torch.compile: {size.tokens} tokens, d_model {size.d_model}, d_ff {size.d_ff}, float32",
        columns,
        rows,
        "Median (quartiles) of interleaved rounds, after each output and input gradient agreed with float64 within"
        " 1.5 times eager's own error (3 times for the worst number). x eager: speed, forward+backward, median of the"
        " rounds' ratios"
        " (95 % interval). Kept: distinct storages saved for backward, input included, parameters not. "
        + " ".join(notes),
    )


def _ratio(timed: Timed, eager: Timed) -> str:
    if timed is eager:
        return "1"
    found = speed_ratio(timed.seconds, eager.seconds)
    return f"{found.median:.2f}" + (f" ({found.interval[0]:.2f}-{found.interval[1]:.2f})" if found.interval else "")


def _layer_rows(layer: LayerResult) -> Sequence[tuple[str, ...]]:
    rows = []
    eager = layer.providers.get("eager")
    for name in PROVIDERS:
        if (found := layer.providers.get(name)) is None:
            continue
        ratio = NONE if eager is None else _ratio(found.forward_backward, eager.forward_backward)
        kept = f"{found.saved_bytes / 2**20:.1f}"
        label = NAMES[layer.architecture]
        rows.append((label, name, _time(found.forward), _time(found.forward_backward), ratio, kept))
    return rows or [(NAMES[layer.architecture], "refused", NONE, NONE, NONE, NONE)]


def training_table(results: Results) -> Table:
    settings = results.settings
    baseline = NAMES[BASELINE]
    columns = ("layer", "d_ff", "FFN parameters", "validation loss", f"minus {baseline}", "reading", "ms / step")
    return Table(
        f"Language model, {settings.steps} steps, {settings.seeds} paired seed(s), equal FFN parameters",
        columns,
        [_training_row(t) for t in trained(results.runs)],
        "Loss in nats per byte (uniform: 5.545), mean ± sample standard deviation over seeds; difference: mean ± half"
        " the 95 % t interval of the per-seed differences. Same seed: same batches, same initial weights outside"
        " the FFN.",
    )


def _training_row(t: Trained) -> tuple[str, ...]:
    parameters = f"{t.ffn_parameters:,} ({100 * t.budget_deviation:+.1f} %)"
    return (NAMES[t.architecture], str(t.d_ff), parameters, *_loss_cells(t))


def _loss_cells(t: Trained) -> tuple[str, ...]:
    """Loss, difference to the baseline, its reading, time of a step."""
    loss = "diverged" if t.loss is None else f"{t.loss.mean:.3f}"
    if t.loss is not None and t.loss.spread is not None:
        loss += f" ± {t.loss.spread:.3f}"
    if t.diverged and t.loss is not None:
        loss += f" ({t.diverged} diverged)"
    difference, reading = NONE, "baseline"
    if t.architecture != BASELINE:
        reading = NONE if t.paired is None else t.paired.verdict
        if t.paired is not None:
            half = "" if t.paired.half_width is None else f" ± {t.paired.half_width:.3f}"
            difference = signed(t.paired.mean) + half
    return (loss, difference, reading, f"{t.step_ms:.1f}")


def mixtures_table(results: Results) -> Table:
    settings, baseline = results.settings, NAMES[BASELINE]
    counts = {row.name: row for row in results.mixture_counts}
    leaking = {m.key for m in MIXTURES if m.leaks}
    sizes = ("layer", "d_ff", "parameters", "active", "kFLOP / token")
    rows = []
    for t in trained(results.equal_flops):
        row = counts[NAMES[t.architecture]]
        counted = (f"{row.parameters:,}", f"{row.active_parameters:,}", f"{row.flops_per_token / 1e3:.1f}")
        loss, difference, reading, step = _loss_cells(t)
        reading = "not comparable" if t.architecture in leaking else reading
        rows.append((row.name, str(row.d_ff), *counted, loss, difference, reading, step))
    return Table(
        f"Mixtures of {EXPERTS} experts at equal active FLOPs per token, {settings.steps} steps,"
        f" {settings.mixture_seeds} paired seed(s)",
        (*sizes, "validation loss", f"minus {baseline}", "reading", "ms / step"),
        rows,
        "Parameters, active parameters and FLOPs of one feed-forward layer; d_ff: of one expert. Loss and difference as"
        " above. Expert Choice compares a byte with later ones, in validation too: its loss is that of a model that"
        " sees what it should predict. Loss is validation cross-entropy alone, without the balancing loss.",
    )


def routers_table(results: Results) -> Table:
    rows = [(row.name, row.counted) for row in results.mixture_counts]
    return Table("What each mixture routes by", ("layer", "routing"), rows)


def loads_table(results: Results) -> Table:
    rows = [_load_row(t) for t in trained(results.mixtures)]
    at = ("entropy", "max / mean", "dropped", "no expert")
    columns = [f"{where}: {each}" for where in ("training", "validation") for each in at]
    return Table(
        "Expert load in training and at its end",
        ("layer", "all batches: max / mean", *columns, "dead units"),
        rows,
        "Mean over blocks and seeds, after dropping. all batches: of training, as recorded; training: the last of them;"
        " validation: the windows watched. Entropy: of the experts' loads, divided by log of their number; 1 is"
        " uniform. dropped: of the choices, for want of capacity. no expert: tokens that none computes. Dead: as in the"
        " table of dead units, on the tokens that reach the expert. BASE balances in training alone.",
    )


def _load_row(t: Trained) -> tuple[str, ...]:
    dead = f"{100 * t.dead_at_end / t.units:.1f} %" if t.units else "diverged"
    whole = NONE if t.training_max_over_mean is None else f"{t.training_max_over_mean:.2f}"
    return (NAMES[t.architecture], whole, *_load_cells(t.training_load), *_load_cells(t.validation_load), dead)


def _load_cells(load: Load | None) -> tuple[str, ...]:
    if load is None:
        return (NONE,) * 4
    shares = (f"{100 * load.dropped:.1f} %", f"{100 * load.unreached:.1f} %")
    return (f"{load.entropy:.3f}", f"{load.max_over_mean:.2f}", *shares)


def seeds_table(results: Results) -> Table:
    rows = trained(results.runs)
    seeds = sorted({seed for t in rows for seed in t.losses})
    columns = ("layer", *(f"seed {s}: loss" for s in seeds), *(f"seed {s}: difference" for s in seeds))
    cells = []
    for t in rows:
        loss = [f"{t.losses[s]:.4f}" if s in t.losses else NONE for s in seeds]
        differences = {} if t.paired is None else t.paired.differences
        pairs = [f"{differences[s]:+.4f}" if s in differences else NONE for s in seeds]
        cells.append((NAMES[t.architecture], *loss, *pairs))
    return Table(f"Per seed: final validation loss and difference to {NAMES[BASELINE]}", columns, cells)


def dead_table(results: Results) -> Table:
    """Both learning rates, one row per layer."""
    columns = ("layer", "units", "dead at start", "peak", "dead at end", "died", "revived", "stress: dead", "after")
    stress = {t.architecture: t for t in trained(results.stress)}
    rows = [_dead_row(t, stress.get(t.architecture)) for t in trained(results.runs)]
    return Table(
        "Dead units: activation output within ±0.001 on the whole validation batch",
        columns,
        rows,
        "Sums over seeds and blocks. peak: largest share in one run. died: alive at the start, dead at the end."
        " revived: dead at some evaluation, alive at the end."
        f" stress: {results.settings.stress_factor:g} times the learning rate, one seed,"
        f" {results.settings.stress_steps} steps.",
    )


def _dead_row(t: Trained, stress: Trained | None) -> tuple[str, ...]:
    share = 100 * t.dead_at_end / t.units if t.units else 0.0
    stressed = NONE
    if stress is not None:
        stressed = f"{100 * stress.dead_at_end / stress.units:.1f} %" if stress.units else "diverged"
    return (
        NAMES[t.architecture],
        str(t.units),
        str(t.dead_at_start),
        f"{100 * t.peak_dead_share:.1f} %",
        f"{t.dead_at_end} ({share:.1f} %)",
        str(t.died),
        str(t.revived),
        stressed,
        "diverged" if not t.units else f"{t.dead_at_end} dead" if t.dead_at_end else "all alive",
    )


def activations_table(results: Results) -> Table:
    size = results.settings.layer
    found = results.activations
    rows = [] if found is None else [(n, _ms(t["eager"]), _ms(t["fused"])) for n, t in found.times.items()]
    return Table(
        f"The activation alone, forward+backward on {size.tokens} x {size.d_ff} float32",
        ("activation", "eager ms", "fused ms"),
        rows,
        "Median (quartiles) of interleaved rounds.",
    )


def _ms(timed: Timed) -> str:
    return "{:.2f} ({:.2f}-{:.2f})".format(*timed.milliseconds)


def advice_table(results: Results) -> Table:
    rows = [(a.guide, a.measured, a.verdict) for a in guide_advice(results)]
    return Table("The guides' advice beside this run", ("the guides say", "measured here", "verdict"), rows)
