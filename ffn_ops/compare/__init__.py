# SPDX-License-Identifier: BSD-3-Clause
"""``python -m ffn_ops compare``: the feed-forward layers of two Chinese study guides, counted, timed
and trained side by side.

Importing this package needs only torch; ``run`` first checks for matplotlib and rich (the ``compare`` extra).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .._files import file_name
from .settings import CompareError, Settings

if TYPE_CHECKING:
    from .results import Results

LOG_WIDTH = 140  # width of the tables if the output is a file or a pipe
COMPILE_CHOICES = ("some", "all", "none")


# An upper bound: a run of so many steps takes days.
MOST_STEPS, MOST_SEEDS, MOST_REPEATS = 100_000, 1000, 10_000


def _up_to(most: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        value = int(text) if text.strip().isdecimal() and len(text.strip()) <= len(str(most)) else 0
        if not 1 <= value <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least 1 and at most {most}, got {text!r}")
        return value

    return whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to train on (default: one shipped with Python)")
    parser.add_argument("--out", type=file_name, default=Path("ffn_compare"), metavar="DIR", help="for the report")
    parser.add_argument("--steps", type=_up_to(MOST_STEPS), default=Settings.steps, help="of training (%(default)s)")
    parser.add_argument("--seeds", type=_up_to(MOST_SEEDS), default=Settings.seeds, help="paired seeds (%(default)s)")
    parser.add_argument(
        "--repeats", type=_up_to(MOST_REPEATS), default=Settings.repeats, help="of timing (%(default)s)"
    )
    parser.add_argument(
        "--compile",
        choices=COMPILE_CHOICES,
        default=Settings.compile,
        help="which layers torch.compile is timed on; some: one plain, one gated, one multi-gate (%(default)s)",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda where the fused layers run on it)")


def run(args: argparse.Namespace) -> int:
    """Runs the command. Returns 0; 2, with one line on stderr, for a caller's mistake; 1 if a layer was refused."""
    try:
        require_extras()
        from .machine import choose_device

        settings = Settings(
            out=args.out,
            text=args.text,
            device=choose_device(args.device),
            steps=args.steps,
            seeds=args.seeds,
            repeats=args.repeats,
            compile=args.compile,
        )
        return compare(settings)
    except CompareError as error:
        print(f"ffn_ops compare: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nffn_ops compare: interrupted, nothing is written", file=sys.stderr)
        return 1


def require_extras() -> None:
    missing = [name for name in ("matplotlib", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        raise CompareError(f"{' and '.join(missing)} not installed: pip install 'ffn_ops[compare]'")


def prepare_folder(path: Path) -> None:
    """Makes the folder and writes into it once, so that an error shows before any work."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, ValueError) as error:
        raise CompareError(f"--out {path}: {getattr(error, 'strerror', None) or error}") from None


@contextmanager
def move_into(out: Path) -> Iterator[Path]:
    """Gives a fresh folder, and moves its files to ``out`` when all are complete."""
    with tempfile.TemporaryDirectory(prefix=".", dir=out) as folder:
        yield Path(folder)
        for file in sorted(Path(folder).iterdir()):
            os.replace(file, out / file.name)


def write(results: Results, out: Path) -> None:
    from . import plots, report
    from .results import write_json

    with move_into(out) as fresh:
        began = time.perf_counter()
        written = plots.write(results, fresh)
        results.seconds["writing"] = round(time.perf_counter() - began, 1)
        report.write(results, written, fresh / "report.md")
        write_json(results, fresh / "results.json")


def compare(settings: Settings) -> int:
    """Checks the text and the folder, runs every stage and writes the report."""
    from rich.console import Console

    from . import activations, counts, layers, tables, terminal, text, train
    from .advice import choice, limits
    from .architectures import ARCHITECTURES, LAYERS
    from .machine import facts
    from .mixtures import MIXTURES
    from .results import Results, TextFacts

    data = text.load(settings.text, settings.model.context)
    prepare_folder(settings.out)
    console = Console()
    if not console.is_terminal:
        console.width = LOG_WIDTH
    about = TextFacts(data.name, len(data.train), len(data.validation), data.truncated)
    results = Results(facts(settings.device), settings, about)

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        results.seconds[name] = round(time.perf_counter() - began, 1)

    with stage("counting"):
        results.counts = counts.count(settings.layer)
        results.mixture_counts = counts.count_mixtures(settings.model)
    terminal.show(console, tables.counts_table(results))
    compiled = len(layers.compiled_keys(settings.compile))
    if compiled:
        console.print(f"torch.compile is timed on {compiled} of {len(LAYERS)} layers; --compile all|some|none")
    with terminal.progress_bar(console) as progress:
        with stage("timing"):
            task = progress.add_task("timing", total=layers.progress_length(settings))
            results.activations = activations.measure(settings)
            results.layers = layers.measure(settings, lambda: progress.advance(task))
        with stage("training"):
            mixtures = {m.key for m in MIXTURES}
            trained = settings.seeds * len(ARCHITECTURES) + settings.mixture_seeds * len(MIXTURES)
            task = progress.add_task("training", total=trained * settings.steps)
            for seed in range(settings.seeds):
                progress.update(task, description=f"training, seed {seed}")
                runs = train.train_together(
                    (*ARCHITECTURES, *MIXTURES) if seed < settings.mixture_seeds else ARCHITECTURES,
                    data,
                    settings,
                    seed=seed,
                    steps=settings.steps,
                    learning_rate=settings.learning_rate,
                    advance=lambda: progress.advance(task),
                )
                results.runs += [r for r in runs if r.architecture not in mixtures]
                results.mixtures += [r for r in runs if r.architecture in mixtures]
        with stage("stress"):
            stress = progress.add_task("high rate", total=len(ARCHITECTURES) * settings.stress_steps)
            results.stress = train.train_together(
                ARCHITECTURES,
                data,
                settings,
                seed=0,
                steps=settings.stress_steps,
                learning_rate=settings.learning_rate * settings.stress_factor,
                advance=lambda: progress.advance(stress),
            )
    shown = (tables.layers_table, tables.training_table, tables.dead_table)
    for table in (*shown, tables.mixtures_table, tables.loads_table, tables.advice_table):
        terminal.show(console, table(results))
    terminal.show_list(console, "From this run's figures", choice(results))
    terminal.show_list(console, "What this run does not support", limits(results))

    write(results, settings.out)
    console.print(f"Report: {settings.out / 'report.md'}", markup=False, soft_wrap=True)
    refused = [r.architecture for r in results.layers if r.refused]
    if refused:
        print(
            f"ffn_ops compare: error: fused layer disagrees with float64 or fails, see its notes: {', '.join(refused)}",
            file=sys.stderr,
        )
    return 1 if refused else 0
