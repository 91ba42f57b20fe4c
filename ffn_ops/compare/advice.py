# SPDX-License-Identifier: BSD-3-Clause
"""Compares the guides' advice with what this run measured. Every sentence comes from a measured figure."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from .._timing import Timed
from .architectures import ARCHITECTURES, BASELINE, EXPERTS
from .mixtures import CAUSAL_MIXTURES, MIXTURES, NAMES, Load
from .paired import FASTER, HIGHER, LOWER, NOT_SHOWN, SLOWER, UNTESTABLE, Paired, paired, speed_ratio
from .results import Results, Trained, losses, trained

SUPPORTED, CONTRADICTED, MIXED, OPEN = "supported", "contradicted", "partly", "not shown"
NOT_TESTED, NOT_CONTRADICTED, BEATEN = "not tested", "not contradicted", "beaten in this run"
GATED = ("glu", "geglu", "swiglu")


@dataclass(frozen=True)
class Advice:
    guide: str
    measured: str
    verdict: str


def signed(value: float) -> str:
    return f"{value:+.3f}"


def describe(key: str, other: str, difference: Paired | None) -> str:
    names = f"{NAMES[key]} - {NAMES[other]}"
    if difference is None:
        return f"{names}: no pair of finished runs"
    interval = "" if difference.half_width is None else f" ± {difference.half_width:.3f}"
    return f"{names}: {signed(difference.mean)}{interval} nats/byte ({difference.verdict})"


def _difference(results: Results, key: str, other: str) -> Paired | None:
    runs = results.runs + results.mixtures
    return paired(losses(runs, key), losses(runs, other))


def _claim_lower(results: Results, guide: str, pairs: list[tuple[str, str]]) -> Advice:
    """The guides say that the first of each pair does better than the second."""
    differences = [_difference(results, *pair) for pair in pairs]
    verdicts = [d.verdict if d is not None else UNTESTABLE for d in differences]
    texts = [describe(a, b, d) for (a, b), d in zip(pairs, differences, strict=True)]
    return Advice(guide, "; ".join(texts), _combine(verdicts))


def _combine(verdicts: list[str]) -> str:
    if all(v == UNTESTABLE for v in verdicts):
        return NOT_TESTED
    lower, higher = verdicts.count(LOWER), verdicts.count(HIGHER)
    if lower == len(verdicts):
        return SUPPORTED
    if higher and not lower:
        return CONTRADICTED
    return MIXED if lower else OPEN


def _best(results: Results) -> Trained | None:
    rows = [t for t in trained(results.runs) if t.loss is not None]
    return min(rows, key=lambda t: t.loss.mean if t.loss is not None else float("inf")) if rows else None


def _good_enough(results: Results, guide: str, keys: tuple[str, ...]) -> Advice:
    """The guides recommend ``keys``: is any of them worse than the best layer of this run?"""
    best = _best(results)
    if best is None:
        return Advice(guide, "no finished run", NOT_TESTED)
    pairs = [(key, best.architecture) for key in keys if key != best.architecture]
    differences = [_difference(results, *pair) for pair in pairs]
    verdicts = [UNTESTABLE if d is None else d.verdict for d in differences]
    texts = [describe(a, b, d) for (a, b), d in zip(pairs, differences, strict=True)]
    if best.architecture in keys:
        texts.append(f"{NAMES[best.architecture]} has the lowest mean loss itself")
    measured = "against this run's lowest mean: " + "; ".join(texts)
    if UNTESTABLE in verdicts:
        return Advice(guide, measured, NOT_TESTED)
    worse = verdicts.count(HIGHER)
    return Advice(guide, measured, NOT_CONTRADICTED if not worse else BEATEN if worse == len(keys) else MIXED)


def _dead(rows: list[Trained], guide: str, where: str) -> Advice:
    by_key = {t.architecture: t for t in rows if t.units}
    if "relu" not in by_key or BASELINE not in by_key:
        return Advice(guide, f"{where}: no finished run", NOT_TESTED)
    share = {k: t.dead_at_end / t.units for k, t in by_key.items()}
    parts = [f"{NAMES[k]} {100 * s:.1f} %" for k, s in share.items()]
    smooth = max(share.get(k, 0.0) for k in ("gelu", "silu"))
    if share["relu"] == 0 and smooth == 0:
        verdict = OPEN
    elif smooth < share["relu"] / 2:
        verdict = SUPPORTED
    else:
        verdict = CONTRADICTED if smooth > share["relu"] else MIXED
    return Advice(guide, f"{where}, dead after training: " + ", ".join(parts), verdict)


def _gradients(rows: list[Trained]) -> Advice:
    guide = "Gradient flow: ReLU dies, GELU smooth, GLU good, Gated-FFN very good, MoE excellent"
    ratios = {t.architecture: t.gradient_ratio for t in rows if t.gradient_ratio is not None}
    if not {"relu", "gelu", "glu", "gated_ffn"} <= ratios.keys():
        return Advice(guide, "not every layer was trained", NOT_TESTED)
    parts = ", ".join(f"{NAMES[k]} {r:.2f}" for k, r in ratios.items())
    lowest = min(ratios.values())
    measured = f"first block's gradient norm / last block's: {parts}. "
    if lowest < 0.1:
        return Advice(guide, measured + "A ratio under 0.1 means that little gradient reaches the first block", MIXED)
    return Advice(guide, measured + "None under 0.1: no layer starved the first block, so no ranking follows", OPEN)


def _speed(results: Results) -> Advice:
    """Checks one claim at three levels: the activation alone (eager), the eager layer, the fused layer."""
    guide = "Speed: ReLU fastest, Swish next, GELU slower"
    order = ("relu", "silu", "gelu")
    layers = {r.architecture: r.providers for r in results.layers}
    alone = {} if results.activations is None else results.activations.times
    groups: dict[str, list[Timed]] = {}
    if all(k in alone for k in order):
        groups["activation alone, eager"] = [alone[k]["eager"] for k in order]
    for provider in ("eager", "fused"):
        if all(provider in layers.get(k, {}) for k in order):
            groups[f"whole layer, {provider}"] = [layers[k][provider].forward_backward for k in order]
    parts, verdicts = [], []
    for label, times in groups.items():
        listed = " / ".join(f"{t.milliseconds[0]:.2f}" for t in times)
        steps = [speed_ratio(a.seconds, b.seconds).verdict for a, b in pairwise(times)]
        resolved = " (order not resolved)" if NOT_SHOWN in steps or UNTESTABLE in steps else ""
        parts.append(f"{label} {listed} ms{resolved}")
        verdicts += [{FASTER: LOWER, SLOWER: HIGHER}.get(step, step) for step in steps]
    if not groups:
        return Advice(guide, "a layer was not timed", NOT_TESTED)
    return Advice(guide, "ReLU / Swish / GELU, forward+backward: " + "; ".join(parts), _combine(verdicts))


def guide_advice(results: Results) -> list[Advice]:
    rows = trained(results.runs)
    factor = results.settings.stress_factor
    dead = "ReLU units die; GELU and Swish avoid it"
    return [
        _good_enough(results, "Small task or little compute: ReLU or Swish first", ("relu", "silu")),
        _good_enough(results, "Standard transformer: GELU", ("gelu",)),
        _claim_lower(results, "In NLP, GELU and Swish often do better than ReLU", [("gelu", "relu"), ("silu", "relu")]),
        _claim_lower(
            results,
            "Gating raises expressiveness (small data: gain may not show)",
            [(k, BASELINE) for k in GATED],
        ),
        _claim_lower(
            results, "GELU or Swish as the gate beats the sigmoid gate", [("geglu", "glu"), ("swiglu", "glu")]
        ),
        _claim_lower(
            results,
            "More expressive power: Gated-FFN with 4 to 8 branches",
            [("gated_ffn", BASELINE), ("gated_ffn", "glu")],
        ),
        _dead(rows, dead, "at the training rate"),
        _dead(trained(results.stress), dead, f"at {factor:g}x that rate, one seed, so no spread"),
        _gradients(rows + trained(results.mixtures)),
        _speed(results),
        Advice(
            "Compute for the same quality: GLU 0.8-0.9x, Gated-FFN 1.2-1.5x, MoE 0.25-0.5x",
            "needs training to equal loss; here parameters, or a mixture's active FLOPs per token, are equal instead",
            NOT_TESTED,
        ),
        _sparse(results),
        _claim_lower(
            results,
            "Very large models: MoE (here a small one: more parameters at equal active FLOPs per token)",
            [(m.key, BASELINE) for m in CAUSAL_MIXTURES],
        ),
        _switch(results),
        _balance(results),
        _leak(results),
    ]


def _sparse(results: Results) -> Advice:
    """Compares the guides' two figures for compute with those of their code."""
    guide = "MoE: 8x the parameters, 25 % active, compute only 25 to 50 % more"
    rows = {row.name: row for row in results.counts}
    if not {NAMES["relu"], NAMES["moe"]} <= rows.keys():
        return Advice(guide, "not counted", NOT_TESTED)
    moe, dense = rows[NAMES["moe"]], rows[NAMES["relu"]]
    active, compute = moe.active_parameters / moe.parameters, moe.flops_per_token / dense.flops_per_token
    measured = (
        f"{moe.name} at d_ff {moe.d_ff}: {moe.multiple:.2f}x {dense.name}'s parameters,"
        f" {100 * active:.1f} % of them active for a token, {100 * (compute - 1):+.0f} % FLOPs per token"
    )
    agreeing = [round(moe.multiple, 1) == 8.0, round(active, 2) == 0.25, compute <= 1.5]
    return Advice(guide, measured, SUPPORTED if all(agreeing) else MIXED if any(agreeing) else CONTRADICTED)


def _switch(results: Results) -> Advice:
    guide = "Switch: top-1, simple and efficient (here: a step's time at equal active FLOPs)"
    rows = {t.architecture: t for t in trained(results.equal_flops)}
    switch, top2 = rows.get("switch"), rows.get("top2")
    if switch is None or top2 is None or len(switch.step_times) != len(top2.step_times) or not switch.step_times:
        return Advice(guide, "no pair of finished runs", NOT_TESTED)
    ratio = speed_ratio(switch.step_times, top2.step_times)
    measured = (
        f"training step, {NAMES['top2']} / {NAMES['switch']}: {ratio.median:.2f} ({ratio.verdict}), with"
        f" {switch.ffn_parameters / top2.ffn_parameters:.1f}x its parameters;"
        f" {describe('switch', 'top2', _difference(results, 'switch', 'top2'))}"
    )
    verdicts = {FASTER: SUPPORTED, SLOWER: CONTRADICTED, UNTESTABLE: NOT_TESTED}
    return Advice(guide, measured, verdicts.get(ratio.verdict, OPEN))


def _balance(results: Results) -> Advice:
    """No run is without a means of balance, so no run shows that it is the cause."""
    guide = "Dynamic choice of experts (BASE), top-k with a balancing loss: experts share the work"
    parts = []
    for t in trained(results.mixtures):
        if t.training_load is not None and t.validation_load is not None:
            loads = f"{_load(t.training_load)} in training, {_load(t.validation_load)} on validation"
            parts.append(f"{NAMES[t.architecture]} {loads}")
    if not parts:
        return Advice(guide, "no finished run", NOT_TESTED)
    return Advice(guide, f"fullest expert / mean of {EXPERTS}, at the end: " + "; ".join(parts), OPEN)


def _load(load: Load) -> str:
    return f"{load.max_over_mean:.2f}" + (f" and {100 * load.dropped:.1f} % dropped" if load.dropped else "")


def _leak(results: Results) -> Advice:
    guide = "Expert Choice: many-to-many assignment"
    found = {t.architecture: t for t in trained(results.mixtures)}.get("expert_choice")
    if found is None or found.validation_load is None:
        return Advice(guide, "no finished run", NOT_TESTED)
    measured = (
        f"loads equal by construction; {100 * found.validation_load.unreached:.1f} % of the validation bytes reach no"
        " expert. Its choice compares a byte with later ones: in a causal language model its loss is not comparable"
    )
    return Advice(guide, measured, NOT_TESTED)


def choice(results: Results) -> list[str]:
    """Which layer this run supports, and how strongly."""
    rows = [t for t in trained(results.runs) if t.loss is not None]
    lines: list[str] = []
    best = _best(results)
    if best is not None:
        name = NAMES[best.architecture]
        rivals = []
        for t in rows:
            difference = _difference(results, t.architecture, best.architecture)
            if t.architecture != best.architecture and (difference is None or difference.verdict != HIGHER):
                rivals.append(t)
        assert best.loss is not None
        lines.append(f"Quality at equal parameters: {name} has the lowest mean loss, {best.loss.mean:.3f} nats/byte. ")
        if len(best.losses) < 2:
            lines[-1] += "One seed cannot tell a difference from luck: no ranking follows; use --seeds 3 or more."
        elif rivals:
            others = ", ".join(NAMES[t.architecture] for t in rivals)
            lines[-1] += f"Its lead is not shown (95 % paired interval contains zero) over: {others}."
        else:
            lines[-1] += "Its lead over every other layer is outside the 95 % paired interval."
        lines.append(_step_line(rows, "parameters"))
    lines.append(_mixture_line(results))
    lines.append(_step_line(trained(results.equal_flops), "active FLOPs per token"))
    lines += [_fused_line(results), _memory_line(results)]
    return [line for line in lines if line]


def _mixture_line(results: Results) -> str:
    """The mixtures with a meaningful loss, against the dense baseline."""
    counts = {row.name: row for row in results.mixture_counts}
    pairs = [(m.key, _difference(results, m.key, BASELINE)) for m in CAUSAL_MIXTURES]
    texts = [
        f"{describe(key, BASELINE, d)} with {counts[NAMES[key]].multiple:.1f}x the parameters" for key, d in pairs if d
    ]
    return f"Mixtures of experts at equal active FLOPs per token: {'; '.join(texts)}." if texts else ""


def _step_line(rows: list[Trained], equal: str) -> str:
    """Training steps alternate between the layers, so their times pair up round by round."""
    baseline = next((t for t in rows if t.architecture == BASELINE), None)
    if baseline is None or not baseline.step_times:
        return ""
    paired_rows = [t for t in rows if len(t.step_times) == len(baseline.step_times)]
    ratios = [(NAMES[t.architecture], speed_ratio(baseline.step_times, t.step_times)) for t in paired_rows]
    parts = [
        f"{name} {ratio.median:.2f}" + (f" ({ratio.interval[0]:.2f}-{ratio.interval[1]:.2f})" if ratio.interval else "")
        for name, ratio in sorted(ratios, key=lambda each: each[1].median)
    ]
    return (
        f"Time of a training step of the whole model at equal {equal}, relative to"
        f" {NAMES[BASELINE]}'s {baseline.step_ms:.1f} ms: {', '.join(parts)}; median of the steps' ratios (95 %"
        " interval)."
    )


def _fused_line(results: Results) -> str:
    found: dict[str, list[str]] = {FASTER: [], SLOWER: [], NOT_SHOWN: [], UNTESTABLE: []}
    for layer in results.layers:
        eager, fused = layer.providers.get("eager"), layer.providers.get("fused")
        if eager is not None and fused is not None:
            ratio = speed_ratio(fused.forward_backward.seconds, eager.forward_backward.seconds)
            found[ratio.verdict].append(f"{NAMES[layer.architecture]} ({ratio.median:.2f}x)")
    parts = [f"{label}: {', '.join(names)}" for label, names in found.items() if names]
    return f"Fused against eager, forward+backward: {'; '.join(parts)}." if parts else ""


def _memory_line(results: Results) -> str:
    parts = []
    for layer in results.layers:
        eager, fused = layer.providers.get("eager"), layer.providers.get("fused")
        if eager is not None and fused is not None and eager.saved_bytes:
            parts.append(f"{NAMES[layer.architecture]} {fused.saved_bytes / eager.saved_bytes:.2f}")
    return f"Memory kept for backward, fused / eager: {', '.join(parts)}." if parts else ""


def limits(results: Results) -> list[str]:
    """What the run does not show."""
    settings, runs = results.settings, results.runs
    model = runs[0].model_parameters if runs else 0
    comparisons = len(ARCHITECTURES) - 1 + len(CAUSAL_MIXTURES)
    lines = [
        f"A model of {model:,} parameters trained on {settings.steps * settings.batch * settings.model.context:,} bytes"
        f" of one text ({results.text.name}): nothing follows for large models or long training.",
        "One learning rate for all, tuned for none: a layer may do better at its own.",
        "Equal parameters narrow the gated layers; the guides' sizes (same d_ff, more parameters) are not compared.",
        "Mixtures: equal active FLOPs are not equal parameters, memory or time. Each expert sees a part of the tokens,"
        f" and {settings.steps} steps are few for that; the guide means very large models.",
        "No mixture was trained without its means of balance (loss, capacity or assignment): what each one does is not"
        " shown. In validation BASE takes each byte's best expert, which it was not trained for alone.",
        f"{', '.join(m.name for m in MIXTURES if m.leaks)}: the experts choose among all bytes of the batch, so a"
        " byte's output depends on later bytes. Its loss measures a leak of the future and supports no comparison.",
        f"Dead means: activation output within ±0.001 on all {settings.validation_windows} validation windows watched.",
    ]
    if settings.seeds > 1:
        chance = 100 * (1 - 0.95**comparisons)
        lines.insert(
            1,
            f"{settings.seeds} seeds ({settings.mixture_seeds} for mixtures). A difference counts as shown where the"
            f" paired 95 % t interval excludes zero; in {comparisons} comparisons, chance alone shows at least one in"
            f" up to {chance:.0f} % of such runs. The layer with the lowest mean was picked after the fact, which"
            " flatters it.",
        )
    else:
        lines.insert(1, "One seed: no spread is known, so no difference between layers can be shown.")
    if results.text.truncated:
        lines.append("The text was longer than 64 MiB; the rest was not used.")
    return lines
