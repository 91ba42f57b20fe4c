# SPDX-License-Identifier: BSD-3-Clause
"""Sparse attention and mixtures of experts together, trained and measured on a CPU.

    pip install "ffn_ops[compare,transformers]" && python -m examples.sparse_attention

Trains five small causal language models at equal active FLOPs per token on a text that ships with Python: dense
attention and learned sparse attention, each with SwiGLU and with a mixture of experts, and a sliding window with a
mixture. The sparse attention is DeepSeek-V3.2's: a lightning indexer scores all keys, ffn_ops' top-k chooses some, and
a loss towards the dense attention's probabilities trains it. Then it measures time and memory up to 16,384 tokens, and
runs a tiny DeepSeek-V3.2 of transformers. It writes report.md, plots and results.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ffn_ops._files import file_name
from ffn_ops.compare import LOG_WIDTH, move_into, prepare_folder, require_extras, text
from ffn_ops.compare.machine import facts
from ffn_ops.compare.report import bullets, markdown
from ffn_ops.compare.settings import CompareError

from . import deepseek
from .measure import cost
from .model import ARMS, Size
from .results import Results
from .tables import limits, supports, tables
from .train import Plan, Trainer

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
QUICK = Plan(steps=4, warmup=2, batch=2, seeds=2, windows=4, recall_lengths=(128, 256), recall_tokens=512)
QUICK_SIZE = Size(d_model=32, d_ff=64, width=16, index_width=8, keys=16, context=128)


def write(results: Results, out: Path) -> None:
    from . import plots

    plots.write(results, out)
    images = [f"![{name}]({name}.png)" for name in ("training", "recall", "cost", "experts")]
    machine = [f"{key}: {value}" for key, value in results.machine.items()]
    seconds = ", ".join(f"{stage} {spent:.0f}" for stage, spent in results.seconds.items())
    sections = [
        "# Sparse attention and mixtures of experts",
        f"Text: {results.text}. Model: {results.size}. Training: {results.plan}.",
        "## What this run supports",
        bullets(supports(results)),
        "## What it does not support",
        bullets(limits(results)),
        "## Figures",
        *map(markdown, tables(results)),
        "## Plots",
        *images,
        "## Machine",
        bullets([*machine, f"seconds of each stage: {seconds}"]),
    ]
    (out / "report.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    results.write(out / "results.json")


def main(arguments: list[str] | None = None) -> Results:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models and few steps, to see that all of it runs")
    parser.add_argument("--out", type=file_name, default="sparse_attention", metavar="DIR", help="for the report")
    options = parser.parse_args(arguments)
    try:
        return run(options.quick, options.out)
    except CompareError as error:
        sys.exit(f"sparse_attention: error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nsparse_attention: interrupted, nothing is written")


def run(quick: bool, out: Path) -> Results:
    """Checks everything that can be missing before any work."""
    size, plan = (QUICK_SIZE, QUICK) if quick else (Size(), Plan())
    lengths, repeats = ((128, 256), 1) if quick else (LENGTHS, 3)
    require_extras()
    try:
        from transformers import DeepseekV32Config  # noqa: F401
    except ImportError:
        raise CompareError("transformers lacks DeepSeek-V3.2: pip install 'ffn_ops[transformers]'") from None
    data = text.load(None, size.context)
    prepare_folder(out)
    from rich.console import Console

    from ffn_ops.compare import terminal

    console = Console()
    if not console.is_terminal:
        console.width = LOG_WIDTH
    results = Results(facts("cpu"), size, plan, data.name)

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        results.seconds[name] = round(time.perf_counter() - began, 1)
        console.print(f"{name}: {results.seconds[name]:.0f} s")

    with stage("training"):
        for seed in range(plan.seeds):
            trainers = [Trainer(size, arm, plan, data, seed) for arm in ARMS]
            for trainer in trainers if seed % 2 == 0 else reversed(trainers):
                trainer.train()
            results.runs += [trainer.evaluate() for trainer in trainers]
    with stage("time and memory"):
        for length in lengths:
            results.costs += [cost(size, arm, length, repeats if length < 8192 else 1) for arm in ARMS]
    with stage("DeepSeek-V3.2"):
        sizes = (64, 8, 2, 4) if quick else (256, 32, 60, 32)  # width, experts, steps, tokens
        results.deepseek = deepseek.compare(data, *sizes)
    for table in tables(results):
        terminal.show(console, table)
    terminal.show_list(console, "What this run supports", supports(results))
    terminal.show_list(console, "What it does not support", limits(results))
    with move_into(out) as fresh:
        write(results, fresh)
    console.print(f"Report: {out / 'report.md'}", markup=False, soft_wrap=True)
    return results


if __name__ == "__main__":
    main()
