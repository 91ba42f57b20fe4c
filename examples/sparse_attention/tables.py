# SPDX-License-Identifier: BSD-3-Clause
"""The tables of a run, and sentences: what it supports, each from its figures, and what not."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from ffn_ops.compare.advice import signed
from ffn_ops.compare.paired import NOT_SHOWN, summary
from ffn_ops.compare.tables import NONE, Table

from .measure import PARTS
from .model import ARMS, BY_KEY, KINDS, VALUES, ffn_width
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


def losses_table(results: Results) -> Table:
    rows = []
    for arm in ARMS:
        found = list(results.losses(arm.key).values())
        mean = summary(found)
        assert mean is not None
        spread = "" if mean.spread is None else f" ± {mean.spread:.3f}"
        each = ", ".join(f"{loss:.3f}" for loss in found)
        seconds = fmean(run.seconds for run in results.of(arm.key))
        rows.append((arm.name, each, f"{mean.mean:.3f}{spread}", f"{seconds:.0f}"))
    return Table(
        "Validation loss (nats per byte)",
        ("model", "each seed", "mean ± deviation", "s of training"),
        rows,
        "The seconds of the sparse models include their warm-up and their indexers' losses.",
    )


def contrasts_table(results: Results) -> Table:
    rows = []
    for arm, other in CONTRASTS:
        found = results.contrast(arm, other)
        half = "" if found.half_width is None else f" ± {found.half_width:.3f}"
        rows.append((f"{BY_KEY[arm].name} - {BY_KEY[other].name}", signed(found.mean) + half, found.verdict))
    return Table(
        "Differences of the same seed, one thing changed at a time",
        ("models", "difference", "verdict"),
        rows,
        "The mean over the seeds and its 95 % t interval.",
    )


def recall_table(results: Results) -> Table:
    columns = ("model", *map(str, results.plan.recall_lengths))
    needles = [KINDS * results.plan.recall_count(length) for length in results.plan.recall_lengths]
    rows = [(arm.name, *(f"{100 * share:.0f} %" for share in results.recall(arm.key))) for arm in ARMS]
    return Table(
        "Needles recalled, by the length of the context",
        columns,
        rows,
        f"{KINDS} needles at random places, asked for at the end; chance is {100 / VALUES:.0f} %. Trained with"
        f" {results.size.context} tokens: what is longer is beyond it. A share is of"
        f" {', '.join(f'{n:,}' for n in needles)} needles a seed, the same for all models.",
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
         _power(results.growth(arm.key, "indexer")), _power(results.growth(arm.key, "memory")))
        for arm in ARMS
    ]  # fmt: skip
    lengths = [cost.length for cost in results.costs_of(ARMS[0].key)]
    return Table(
        "Powers of the length with which a step grows",
        ("model", "time", "time of attention", "time of the indexer", "memory"),
        rows,
        f"Slopes of the logarithms from {lengths[len(lengths) // 2]:,} to {lengths[-1]:,} tokens: 1 is linear, 2"
        " quadratic. Attention: without the indexer, but with its loss.",
    )


def shares_table(results: Results) -> Table:
    rows = []
    for arm in ARMS:
        costs = results.costs_of(arm.key)
        for cost in (costs[0], costs[-1]) if len(costs) > 1 else costs:
            parts = (f"{100 * cost.step_parts[part] / cost.step_seconds:.0f} %" for part in PARTS)
            rows.append((arm.name, f"{cost.length:,}", *parts))
    names = {"ffn": "experts or SwiGLU"}
    return Table(
        "Where the time of a step goes", ("model", "tokens", *(names.get(part, part) for part in PARTS)), rows,
        "Forward and backward, by ffn_ops.profile. The indexer's loss counts as attention.",
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


def supports(results: Results) -> list[str]:
    lines = []
    for arm, other in CONTRASTS:
        found = results.contrast(arm, other)
        if found.verdict != NOT_SHOWN:
            lines.append(
                f"{BY_KEY[arm].name} has a {found.verdict} than {BY_KEY[other].name}: {signed(found.mean)} ±"
                f" {found.half_width:.3f} nats per byte."
            )
    if not lines:
        lines.append("No difference in validation loss is shown.")
    recalled = {arm: results.recall(arm) for arm in ("dense_moe", "sparse_moe", "window_moe")}
    for at, length in enumerate(results.plan.recall_lengths):
        if length in (results.size.context, results.plan.recall_lengths[-1]):
            shares = ", ".join(f"{BY_KEY[arm].name} {100 * share[at]:.0f} %" for arm, share in recalled.items())
            lines.append(f"Needles recalled in {length:,} tokens: {shares}; chance {100 / VALUES:.0f} %.")
    dense, sparse = results.costs_of("dense_moe"), results.costs_of("sparse_moe")
    ratios = [s.step_seconds / d.step_seconds for d, s in zip(dense, sparse, strict=True)]
    decoded = [s.decode_seconds / d.decode_seconds for d, s in zip(dense, sparse, strict=True)]
    lines.append(
        "Time of the sparse model over the dense one's, from"
        f" {dense[0].length:,} to {dense[-1].length:,} tokens: a step {ratios[0]:.2f} to {ratios[-1]:.2f}, a decoded"
        f" token {decoded[0]:.2f} to {decoded[-1]:.2f}."
    )
    powers = [results.growth("dense_moe", "attention"), results.growth("sparse_moe", "attention")]
    index = results.growth("sparse_moe", "indexer")
    if None not in (*powers, index):
        share = sparse[-1].step_parts["indexer"] / sparse[-1].step_seconds
        lines.append(
            f"At long contexts the time of dense attention grows with the power {powers[0]:.2f} of the length, that of"
            f" attention over chosen keys with {powers[1]:.2f}. The indexer compares every query with every key:"
            f" it grows with {index:.2f}, and takes {100 * share:.0f} % of the step at {sparse[-1].length:,} tokens."
        )
    return lines


def limits(results: Results) -> list[str]:
    plan, size = results.plan, results.size
    tokens = plan.steps * plan.batch * size.context
    seeds = (
        f"{plan.seeds} seeds. A difference counts as shown where the paired 95 % t interval excludes zero; of"
        f" {len(CONTRASTS)} comparisons, chance alone shows one in up to {100 * (1 - 0.95 ** len(CONTRASTS)):.0f} % of"
        " such runs."
    )
    return [
        f"Models of {min(r.parameters for r in results.runs):,} to {max(r.parameters for r in results.runs):,}"
        f" parameters trained on {tokens:,} tokens of one text: nothing follows for large models or long training.",
        seeds,
        f"The active FLOPs are equal at a context of {size.context}, in the forward, in the sparse stage. The dense"
        " stage of the sparse models, their warm-up, their indexers' loss and the blocks that backward gathers again"
        " are not in them. Equal FLOPs are not equal parameters, memory or time.",
        "One learning rate for all, tuned for none. The sparse models have half of their steps to get used to the"
        " choice; DeepSeek's had a trained dense model to begin with.",
        "A needle is one token that occurs in no text, and the models are trained to find it: this shows what the"
        f" attention can reach, not understanding. Beyond {size.context} tokens all models meet positions that they"
        " were not trained with.",
        "Times are those of plain torch on this CPU, of one sequence in float32: the dense attention is torch's fused"
        " kernel, the sparse one gathers rows into memory first. A fused kernel, other widths or more heads move the"
        " length from which sparse is faster.",
        "The indexer's loss is that of the report, over the chosen keys; other ways of training it are not compared."
        " transformers' indexer runs without gradients: the tiny DeepSeek-V3.2 keeps a random one.",
    ]
