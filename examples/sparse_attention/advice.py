# SPDX-License-Identifier: BSD-3-Clause
"""Sentences: what a run supports, each from its figures, and what it does not."""

from __future__ import annotations

from ffn_ops.compare.advice import signed
from ffn_ops.compare.paired import NOT_SHOWN, UNTESTABLE

from .model import BY_KEY, VALUES
from .results import CONTRASTS, Results


def supports(results: Results) -> list[str]:
    lines = []
    for arm, other in CONTRASTS:
        found = results.contrast(arm, other)
        if found is not None and found.verdict not in (NOT_SHOWN, UNTESTABLE):
            lines.append(
                f"{BY_KEY[arm].name} has a {found.verdict} than {BY_KEY[other].name}: {signed(found.mean)} ±"
                f" {found.half_width:.3f} nats per byte."
            )
    if not lines:
        lines.append("No difference in validation loss is shown.")
    recalled = {arm: results.recall(arm) for arm in ("dense_moe", "sparse_moe", "window_moe")}
    for length in {results.size.context, results.plan.recall_lengths[-1]}:
        if length in results.plan.recall_lengths:
            at = results.plan.recall_lengths.index(length)
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
            f" attention over chosen keys with {powers[1]:.2f}. The choice itself compares every query with every key:"
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
        if plan.seeds > 1
        else "One seed: no spread is known, so no difference between models can be shown."
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
