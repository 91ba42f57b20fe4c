# SPDX-License-Identifier: BSD-3-Clause
"""The targets: what is asked, what a run measured, reached or short by how much.

``python -m benchmarks.targets FILE`` prints them for a saved run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import gpu_report, gpu_rows
from .providers import (
    COMPILE,
    EAGER,
    FLOAT32,
    GROUPED_COMPILE,
    HUGE,
    OURS,
    OURS_FLOAT32,
    OURS_HUGE,
    RECOMPUTE,
    TORCH_ROUTING,
)
from .report import Record, of_fma, of_read, ratio, table
from .workloads import (
    BRIEF,
    EXAMPLE,
    FEW,
    FINE,
    FINE_GELU,
    GROWTH,
    MANY,
    MOE_FEW,
    MOE_ONE,
    MOE_PAIRED,
    MOE_TALL,
    ONE,
    PAIRED,
    ROUTING,
    TALL,
    TINY,
    WIDE,
    Mode,
    Shape,
)

Measure = Callable[[list[Record]], "float | None"]
NATIVE_BFLOAT16 = ("avx512_bf16",)


@dataclass(frozen=True)
class Target:
    what: str
    least: float  # the measured figure reaches it, or is short of it
    measure: Measure


def _row(rows: list[Record], shape: Shape, dtype: str, mode: str, threads: int) -> Record | None:
    wanted = {"shape": asdict(shape), "dtype": dtype, "mode": mode, "threads": threads}
    return next((row for row in rows if all(row[key] == value for key, value in wanted.items())), None)


def _of_row(
    shape: Shape, mode: str, figure: Callable[[Record], float | None], dtype: str = "float32", threads: int = 1
) -> Measure:
    def measure(rows: list[Record]) -> float | None:
        row = _row(rows, shape, dtype, mode, threads)
        found = None if row is None else row["providers"].get(OURS)
        return None if row is None or not found or not found["seconds"] else figure(row)

    return measure


def against_best(row: Record, others: tuple[str, ...] = (EAGER, COMPILE)) -> float | None:
    """How many times faster ours is than the fastest of the others; all of them must have run."""
    ratios = [ratio(row, other, OURS) for other in others]
    return None if None in ratios else min(r for r in ratios if r is not None)


def _best_peer(row: Record, ours: str = OURS) -> float | None:
    """Of those that ran: native 16 bits or a compiler may be missing."""
    ratios = [ratio(row, name, ours) for name in row["providers"] if not name.startswith(OURS)]
    return min((r for r in ratios if r is not None), default=None)


def _read_share(row: Record, ours: str = OURS) -> float | None:
    found = row["providers"].get(ours)
    return of_read(row, found) if found and found["seconds"] else None


def _two_threads(shape: Shape, mode: Mode) -> Target:
    def measure(rows: list[Record]) -> float | None:
        found = [_row(rows, shape, "float32", mode, threads) for threads in (1, 2)]
        one, two = (None if row is None else row["providers"].get(OURS, {}).get("median") for row in found)
        return one / two if one and two else None

    return Target(f"{shape.label} {mode}: speed on 2 threads / on 1", 1.85, measure)


def _bfloat16(shape: Shape, label: str) -> tuple[Target, Target]:
    """Whose least depends on whether the instruction set multiplies it."""

    def measure(native: bool) -> Measure:
        def of_isa(row: Record) -> float | None:
            return ratio(row, OURS_FLOAT32, OURS) if (row.get("isa") in NATIVE_BFLOAT16) == native else None

        return _of_row(shape, "training", of_isa, "bfloat16")

    what = f"bfloat16 training {label}: our float32 time / its time"
    return (
        Target(f"{what}, with AVX-512 BF16 or AMX", 1.6, measure(True)),
        Target(f"{what}, without (1 / 1.1)", 1 / 1.1, measure(False)),
    )


def _growth(mode: str) -> Measure:
    def measure(rows: list[Record]) -> float | None:
        found = [_row(rows, shape, "float32", mode, 1) for shape in (GROWTH[0], GROWTH[-1])]
        few, many = (None if row is None else row["providers"].get(OURS, {}).get("median") for row in found)
        return few / many if few and many else None

    return measure


def _against(other: str, ours: str = OURS) -> Callable[[Record], float | None]:
    return lambda row: ratio(row, other, ours)


def _saved(provider: str) -> Callable[[Record], float | None]:
    def figure(row: Record) -> float | None:
        saved = row["providers"].get(provider, {}).get("saved_bytes")
        size = {"float32": 4}.get(row["dtype"], 2)
        lean = row["lean_saved_bytes"] if provider == OURS else size * row["shape"]["T"] * row["shape"]["D"]
        return lean / saved if saved else None

    return figure


def _eager_saves(row: Record) -> float | None:
    eager, ours = (row["providers"].get(name, {}).get("saved_bytes") for name in (EAGER, OURS))
    return eager / ours if eager and ours else None


def _peak(row: Record) -> float:
    return of_fma(row, row["providers"][OURS])


TARGETS = (
    *(
        Target(f"float32 training {shape.label}: of the FMA peak", 0.8, _of_row(shape, "training", _peak))
        for shape in (TALL, WIDE)
    ),
    Target(
        "float32 training T 64 512/2048: x the better of eager and compile",
        1.2,
        _of_row(BRIEF, "training", against_best),
    ),
    *(_two_threads(shape, "training") for shape in PAIRED),
    *(
        Target(
            f"float32 training {shape.label}, 2 threads: x the better of eager and compile",
            1.05,
            _of_row(shape, "training", against_best, threads=2),
        )
        for shape in (TALL, WIDE)
    ),
    *(
        Target(f"T 16 2048/5632 {mode}: x the better of eager and compile", 2.0, _of_row(FEW, mode, against_best))
        for mode in ("inference", "training")
    ),
    Target("T 1 2048/5632 training: x eager", 2.5, _of_row(ONE, "training", _against(EAGER))),
    Target(
        "T 1 2048/5632 inference: of the read bandwidth",
        0.9,
        _of_row(ONE, "inference", _read_share),
    ),
    Target(
        "the same after use_huge_pages",
        0.9,
        _of_row(ONE, "inference", lambda row: _read_share(row, OURS_HUGE)),
    ),
    *_bfloat16(TALL, "T 2048 512/2048"),
    Target(
        "float16 training T 2048 512/2048: our float32 time / its time (1 / 1.05)",
        1 / 1.05,
        _of_row(TALL, "training", _against(OURS_FLOAT32), "float16"),
    ),
    Target(
        "bfloat16 training T 2048 512/2048: x the best peer", 1.0, _of_row(TALL, "training", _best_peer, "bfloat16")
    ),
    Target(
        "float16 training T 2048 512/2048: x eager via float32",
        1.0,
        _of_row(TALL, "training", _against(FLOAT32), "float16"),
    ),
    Target("saved, T 2048 512/2048: x and two pre-activations / ours", 1.0, _of_row(TALL, "training", _saved(OURS))),
    Target("saved with recompute: x / ours", 1.0, _of_row(TALL, "training", _saved(RECOMPUTE))),
    Target(
        "time with recompute, T 2048 512/2048: without / with (1 / 1.3)",
        1 / 1.3,
        _of_row(TALL, "training", _against(OURS, RECOMPUTE)),
    ),
    Target("call, T 1 16/16 inference: x eager", 1.0, _of_row(TINY, "inference", _against(EAGER))),
    Target(
        "step, FeedForward(128, 256, 16, 0.1) (4, 128): x eager", 1.3, _of_row(EXAMPLE, "training", _against(EAGER))
    ),
)

MOE_TARGETS = (
    Target("float32 training T 2048 512/2048 E 8 K 2: of the FMA peak", 0.75, _of_row(MOE_TALL, "training", _peak)),
    *(
        target
        for s in (FINE_GELU, FINE)
        for target in (
            Target(f"float32 training {s.label}: of the FMA peak", 0.65, _of_row(s, "training", _peak)),
            Target(f"float32 training {s.label}: x the best peer", 1.5, _of_row(s, "training", _best_peer)),
        )
    ),
    *(
        Target(f"T {s.T} 512/2048 E 8 K 2 {mode}: x the best peer", least, _of_row(s, mode, _best_peer))
        for s, mode, least in ((MOE_FEW, "inference", 2.3), (MOE_FEW, "training", 2.0), (MOE_ONE, "inference", 1.4))
    ),
    Target(
        "T 1 512/2048 E 8 K 2 inference after use_huge_pages: x the best peer",
        1.4,
        _of_row(MOE_ONE, "inference", lambda row: _best_peer(row, OURS_HUGE)),
    ),
    *(_two_threads(shape, mode) for shape, mode in MOE_PAIRED),
    Target(
        "bfloat16 T 64 2048/768 E 128 K 8 inference, 2 threads: of the read bandwidth",
        0.7,
        _of_row(MANY, "inference", _read_share, "bfloat16", 2),
    ),
    *_bfloat16(MOE_TALL, "T 2048 512/2048 E 8 K 2"),
    *(
        Target(f"bfloat16 training {s.label}: x the best peer", 1.0, _of_row(s, "training", _best_peer, "bfloat16"))
        for s in (MOE_TALL, FINE)
    ),
    Target("routing T 4096 E 64 K 8: x torch", 5.0, _of_row(ROUTING, "inference", _against(TORCH_ROUTING))),
    Target(
        "saved, bfloat16 T 1024 512/256 E 64 K 8: x, two pre-activations and the routing / ours",
        1.0,
        _of_row(FINE, "training", _saved(OURS), "bfloat16"),
    ),
    Target("growth, T 1024 128/64 K 8 inference: time with E 8 / E 256 (1 / 1.5)", 1 / 1.5, _growth("inference")),
)

MOE_REPORTED = (
    ("float32 training T 2048 512/2048 E 8 K 2: x the best peer", _of_row(MOE_TALL, "training", _best_peer)),
    ("growth, T 1024 128/64 K 8 training: time with E 8 / E 256", _growth("training")),
)


def _of_configurations(names: Iterable[str], figure: Callable[[Record], float | None]) -> Measure:
    """The least figure of these rows of a GPU; all of them must have run."""

    def measure(rows: list[Record]) -> float | None:
        found = {row["configuration"]: row for row in rows if row["providers"].get(OURS, {}).get("seconds")}
        figures = [figure(found[name]) if name in found else None for name in names]
        return None if None in figures else min(f for f in figures if f is not None)

    return measure


def _of_copy(place: int) -> Callable[[Record], float | None]:
    return lambda row: gpu_report.of_limit(row, row["providers"][OURS])[place]


GPU_TARGETS = (
    *(
        Target(f"gated_act {which}: of the copy bandwidth", 0.85, _of_configurations(["act"], _of_copy(place)))
        for place, which in enumerate(("forward", "backward"))
    ),
    Target(
        "dense bf16 forward + backward: x torch.compile, the least row",
        1.0,
        _of_configurations(gpu_rows.DENSE, _against(COMPILE)),
    ),
)
GPU_MOE_TARGETS = tuple(
    Target(
        f"{name}: {gpu_rows.MIXTURES[name].label}, forward + backward: x stacked grouped_mm compiled",
        1.0,
        _of_configurations([name], _against(GROUPED_COMPILE)),
    )
    for name in (str(number) for number in range(1, 13))
)

REPORTED = (
    ("T 1 2048/5632 training: x eager with huge pages", _of_row(ONE, "training", _against(HUGE))),
    ("T 16 2048/5632 training: x eager with huge pages", _of_row(FEW, "training", _against(HUGE))),
    (
        "saved, T 2048 512/2048: eager / ours",
        _of_row(TALL, "training", _eager_saves),
    ),
)


def _of_mixtures(rows: list[Record]) -> bool:
    return any("E" in row["shape"] for row in rows)


def _on_gpu(rows: list[Record]) -> bool:
    return any(row.get("device") == "cuda" for row in rows)


def _targets(rows: list[Record]) -> tuple[Target, ...]:
    if _on_gpu(rows):
        return GPU_MOE_TARGETS if _of_mixtures(rows) else GPU_TARGETS
    return MOE_TARGETS if _of_mixtures(rows) else TARGETS


def judged(rows: list[Record]) -> list[Record]:
    """For the JSON file: every target with its figure (None: not measured in this run) and verdict."""
    found = []
    for target in _targets(rows):
        value = target.measure(rows)
        reached = None if value is None else value >= target.least
        found.append({"what": target.what, "least": target.least, "measured": value, "reached": reached})
    return found


def targets_text(rows: list[Record]) -> str:
    lines = []
    for each in judged(rows):
        value, least = each["measured"], each["least"]
        if value is None:
            verdict = "not measured"
        else:
            verdict = "reached" if each["reached"] else f"short by {1 - value / least:.1%}"
        lines.append([each["what"], f"{least:.2f}", "–" if value is None else f"{value:.3f}", verdict])
    reported = () if _on_gpu(rows) else MOE_REPORTED if _of_mixtures(rows) else REPORTED
    for what, measure in reported:
        value = measure(rows)
        lines.append([what, "", "–" if value is None else f"{value:.3f}", ""])
    heads = ["target (on a CPU one thread unless said; higher is better)", "at least", "measured", "verdict"]
    return table(heads, lines)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m benchmarks.targets FILE", file=sys.stderr)
        return 2
    results: dict[str, Any] = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    print(targets_text(results["rows"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
