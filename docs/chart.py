# SPDX-License-Identifier: BSD-3-Clause
"""Draws README's chart from the benchmarks' results: the speed, where PyTorch's fastest form has 1.

python docs/chart.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
GPU, CPU = "H200, bfloat16", "2 cores of an EPYC"
MOE = "moe-nvidia-h200"
BARS = [  # label, machine, file, row, peers: the fastest counts
    ("mixture, 128 experts, training", GPU, MOE, "T 40960 768/256 E 128 K 8", ["grouped_mm"]),
    ("mixture, 32 experts, training", GPU, MOE, "T 40960 768/1024 E 32 K 2", ["grouped_mm"]),
    ("dense, 4096/14336, training", GPU, "dense-nvidia-h200", "T 8192 4096/14336", ["eager"]),
    *(
        (f"{model}, {mode}, {dtype}", CPU, "models-epyc-zen5-avx512-bf16", f"{key} {mode} {dtype}", peers)
        for key, model, peers in [
            ("moe", "MoE model", ["eager", "batched_mm", "grouped_mm"]),
            ("llama", "Llama", ["untouched"]),
        ]
        for mode in ("training", "decode")
        for dtype in ("bfloat16", "float32")
    ),
]  # fmt: skip


def ratio(file: str, row: str, peers: list[str]) -> float:
    """Median over rounds of the fastest peer's time by ours, as both ran side by side."""
    rows = json.loads((RESULTS / f"{file}.json").read_text())["rows"]
    found = next(each for each in rows if each["name"].startswith(row))["providers"]
    best = min((found[name] for name in peers if "median" in found[name]), key=lambda each: each["median"])
    pairs = zip(best["seconds"], found["ffn_ops"]["seconds"], strict=True)
    return statistics.median(theirs / ours for theirs, ours in pairs)


def svg() -> str:
    left, unit, step = 340, 140, 24
    width, height = left + int(2.9 * unit), 62 + step * len(BARS)
    text = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        'font-family="sans-serif" font-size="13" role="img">',
        "<title>Speed against PyTorch's fastest form of the same layer or model</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        '<text x="12" y="22" font-weight="bold">Speed in eager mode (dashed line: PyTorch\'s fastest form)</text>',
    ]
    labels = []
    for i, (label, machine, file, row, peers) in enumerate(BARS):
        value, y = ratio(file, row, peers), 38 + step * i
        colour = "#0072b2" if value >= 1 else "#d55e00"
        text.append(
            f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{label} <tspan fill="#666">({machine})</tspan></text>'
        )
        text.append(f'<rect x="{left}" y="{y}" width="{value * unit:.0f}" height="17" fill="{colour}"/>')
        labels.append(f'<text x="{left + max(value, 1) * unit + 5:.0f}" y="{y + 13}">{value:.2f}</text>')
    bottom = 38 + step * len(BARS)
    text.append(
        f'<line x1="{left + unit}" x2="{left + unit}" y1="32" y2="{bottom}" stroke="#000" stroke-dasharray="3 3"/>'
    )
    text += [*labels, "</svg>\n"]
    return "\n".join(text)


if __name__ == "__main__":
    (Path(__file__).parent / "speed.svg").write_text(svg(), encoding="utf-8")
