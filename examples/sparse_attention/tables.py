# SPDX-License-Identifier: BSD-3-Clause
"""The tables of a run, and what it supports and what not. The terminal and the report show the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from ffn_ops.compare.advice import signed
from ffn_ops.compare.paired import Paired, summary
from ffn_ops.compare.tables import NONE, Table

from .measure import PARTS
from .model import ARMS, BASELINE, BY_KEY, KINDS, VALUES, ffn_width
from .results import CONTRASTS, Results


def models_table(results: Results) -> Table:
    size, rows = results.size, []
    for arm in ARMS:
        run = results.of(arm.key)[0]
        flops = results.mean_flops(arm)
        width = ffn_width(size, arm)
        ffn = f"{size.experts} experts of {width}, {size.top_k} a token" if arm.mixture else f"{width}"
        rows.append((arm.name, ffn, f"{run.parameters:,}", f"{flops / 1e6:.4f}"))
    return Table(
        "The models",
        ("model", "d_ff", "parameters", "active MFLOP / token"),
        rows,
        f"FLOPs of the forward, 2 per multiply-add, of the mean token of a context of {size.context}; attention over"
        f" {size.keys} keys saves FLOPs there, which a wider feed-forward layer spends.",
    )


def _difference(found: Paired | None) -> tuple[str, str]:
    if found is None:
        return NONE, NONE
    half = "" if found.half_width is None else f" ± {found.half_width:.3f}"
    return signed(found.mean) + half, found.verdict


def losses_table(results: Results) -> Table:
    rows = []
    for arm in ARMS:
        found = results.losses(arm.key)
        mean = summary(list(found.values()))
        assert mean is not None
        spread = "" if mean.spread is None else f" ± {mean.spread:.3f}"
        difference = ("baseline", NONE) if arm is BASELINE else _difference(results.contrast(arm.key, BASELINE.key))
        seconds = fmean(run.seconds for run in results.of(arm.key))
        each = ", ".join(f"{loss:.3f}" for loss in found.values())
        rows.append((arm.name, each, f"{mean.mean:.3f}{spread}", *difference, f"{seconds:.0f}"))
    columns = ("model", "each seed", "mean", f"minus {BASELINE.name}", "verdict", "s of training")
    return Table(
        "Validation loss (nats per byte)",
        columns,
        rows,
        "Differences of the same seed: mean and its 95 % t interval. The seconds of the sparse models include their"
        " warm-up and their indexers' losses.",
    )


def contrasts_table(results: Results) -> Table:
    rows = [
        (f"{BY_KEY[a].name} - {BY_KEY[b].name}", *_difference(results.contrast(a, b)))
        for a, b in CONTRASTS
        if results.contrast(a, b) is not None
    ]
    return Table("One thing changed at a time", ("models", "difference", "verdict"), rows)


def recall_table(results: Results) -> Table:
    columns = ("model", *map(str, results.plan.recall_lengths))
    rows = [(arm.name, *(f"{100 * share:.0f} %" for share in results.recall(arm.key))) for arm in ARMS]
    return Table(
        "Needles recalled, by the length of the context",
        columns,
        rows,
        f"{KINDS} needles at random places, asked for at the end; chance is {100 / VALUES:.0f} %. Trained with"
        f" {results.size.context} tokens: what is longer is beyond it.",
    )


def indexer_table(results: Results) -> Table:
    rows = []
    for arm in ARMS:
        runs = [run for run in results.of(arm.key) if run.covered is not None]
        if runs:
            warm = results.plan.warmup
            means = [fmean(run.index_losses[at] for run in runs) for at in (0, warm - 1, -1)]
            shares = [fmean(run.covered[at] for run in runs if run.covered is not None) for at in (0, 1)]
            rows.append((arm.name, *(f"{m:.3f}" for m in means), *(f"{100 * share:.1f} %" for share in shares)))
    columns = ("model", "first", "after the warm-up", "last", "probability covered", "by the last keys")
    return Table(
        "The indexers' loss (KL, nats a query) and what they choose",
        columns,
        rows,
        f"Covered: the share of the dense attention's probability on the {results.size.keys} keys that are chosen, and"
        f" on the last {results.size.keys} keys, on validation text. The last loss is over the chosen keys alone.",
    )


def loads_table(results: Results) -> Table:
    rows = []
    for arm in ARMS:
        loads = [load for run in results.of(arm.key) for load in run.loads]
        if loads:
            means = (fmean(load.entropy for load in loads), fmean(load.max_over_mean for load in loads))
            least = min(min(load.shares) for load in loads)
            rows.append((arm.name, f"{means[0]:.3f}", f"{means[1]:.2f}", f"{100 * least:.1f} %"))
    columns = ("model", "entropy / log E", "largest / mean", "least share of an expert")
    return Table("Load of the experts on validation text", columns, rows, "Mean over layers and seeds; 1 is even.")


def costs_table(results: Results) -> Table:
    rows = []
    for arm in ARMS:
        for cost in results.costs_of(arm.key):
            memory = NONE if cost.step_mb is None else f"{cost.step_mb:.0f}"
            rows.append(
                (arm.name, f"{cost.length:,}", f"{1e3 * cost.step_seconds:.0f}", memory,
                 f"{1e3 * cost.decode_seconds:.2f}", f"{cost.cache_mb:.2f}")
            )  # fmt: skip
    columns = ("model", "tokens", "step, ms", "step, MB", "decode, ms / token", "cache, MB")
    return Table(
        "Time and memory by the length of the context",
        columns,
        rows,
        "Step: forward and backward of one sequence, the fastest of a few; MB: at most, above what the process held.",
    )


def _power(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def growth_table(results: Results) -> Table:
    rows = [
        (arm.name, _power(results.growth(arm.key)), _power(results.growth(arm.key, "attention")),
         _power(results.growth(arm.key, "indexer")), _power(results.memory_growth(arm.key)))
        for arm in ARMS
    ]  # fmt: skip
    lengths = [cost.length for cost in results.costs_of(ARMS[0].key)]
    return Table(
        "Powers of the length with which a step grows",
        ("model", "time", "time of attention", "time of the indexer", "memory"),
        rows,
        f"Slopes of the logarithms from {lengths[len(lengths) // 2]:,} to {lengths[-1]:,} tokens: 1 is linear, 2"
        " quadratic. Attention: without the indexer's scores and choice.",
    )


def shares_table(results: Results) -> Table:
    rows = []
    for arm in ARMS:
        costs = results.costs_of(arm.key)
        for cost in (costs[0], costs[-1]) if len(costs) > 1 else costs:
            parts = (f"{100 * cost.step_parts[part] / cost.step_seconds:.0f} %" for part in PARTS)
            rows.append((arm.name, f"{cost.length:,}", *parts))
    names = {"FFN": "experts or SwiGLU", "indexer": "indexer: scores and choice"}
    return Table(
        "Where the time of a step goes", ("model", "tokens", *(names.get(part, part) for part in PARTS)), rows,
        "Forward and backward. The indexer's loss counts as attention.",
    )  # fmt: skip


def deepseek_table(results: Results) -> Table:
    rows = [
        (v.name, f"{100 * v.same_tokens:.0f} %", f"{100 * v.same_choice:.1f} %", f"{v.loss:.4f}", f"{v.prompt_ms:.0f}",
         f"{v.token_ms:.1f}", f"{v.expert_mb:.2f}")
        for v in results.deepseek
    ]  # fmt: skip
    columns = ("experts", "same tokens", "same likeliest byte", "loss", "prompt, ms", "token, ms", "experts, MB")
    return Table(
        "DeepSeek-V3.2 of transformers, tiny, bfloat16",
        columns,
        rows,
        "Greedy tokens, and the likeliest byte at each place of held-out text, beside the untouched model's, which"
        " differs from ffn_ops in the last bits.",
    )


def tables(results: Results) -> Sequence[Table]:
    every = [models_table, losses_table, contrasts_table, recall_table, indexer_table, loads_table, costs_table]
    return [table(results) for table in (*every, growth_table, shares_table, deepseek_table)]
