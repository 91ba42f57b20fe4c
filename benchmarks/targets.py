"""The dense layers' targets: what is asked, what a run measured, reached or short by how much.

``python -m benchmarks.targets FILE`` prints them for a saved run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .providers import COMPILE, EAGER, FLOAT32, HUGE, OURS, OURS_FLOAT32, RECOMPUTE
from .report import Record, of_fma, of_read, ratio, table
from .workloads import EXAMPLE, FEW, ONE, TALL, TINY, WIDE, Shape

Measure = Callable[[list[Record]], "float | None"]


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
    Target("float32 training T 2048 512/2048: of the FMA peak", 0.88, _of_row(TALL, "training", _peak)),
    Target("float32 training T 512 1024/2816: of the FMA peak", 0.88, _of_row(WIDE, "training", _peak)),
    *(
        Target(
            f"the same, {shape.label}, 2 threads: x the better of eager and compile",
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
        _of_row(ONE, "inference", lambda row: of_read(row, row["providers"][OURS])),
    ),
    *(
        target
        for dtype in ("bfloat16", "float16")
        for target in (
            Target(
                f"{dtype} training T 2048 512/2048: our float32 time / its time (1 / 1.1)",
                1 / 1.1,
                _of_row(TALL, "training", _against(OURS_FLOAT32), dtype),
            ),
            Target(
                f"{dtype} training T 2048 512/2048: x eager via float32",
                1.0,
                _of_row(TALL, "training", _against(FLOAT32), dtype),
            ),
        )
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
        "step, FeedForward(128, 256, 16, 0.1) (4, 128): x eager", 1.0, _of_row(EXAMPLE, "training", _against(EAGER))
    ),
)

REPORTED = (
    ("T 1 2048/5632 training: x eager with huge pages", _of_row(ONE, "training", _against(HUGE))),
    ("T 16 2048/5632 training: x eager with huge pages", _of_row(FEW, "training", _against(HUGE))),
    (
        "saved, T 2048 512/2048: eager / ours",
        _of_row(TALL, "training", _eager_saves),
    ),
)


def judged(rows: list[Record]) -> list[Record]:
    """For the JSON file: every target with its figure (None: not measured in this run) and verdict."""
    found = []
    for target in TARGETS:
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
    for what, measure in REPORTED:
        value = measure(rows)
        lines.append([what, "", "–" if value is None else f"{value:.3f}", ""])
    return table(["target (one thread unless said; higher is better)", "at least", "measured", "verdict"], lines)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m benchmarks.targets FILE", file=sys.stderr)
        return 2
    results: dict[str, Any] = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    print(targets_text(results["rows"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
