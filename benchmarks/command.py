# SPDX-License-Identifier: BSD-3-Clause
"""A suite of rows as a command: measures them, prints the tables, writes JSON and a plot."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import ffn_ops
from ffn_ops import _peak as peak
from ffn_ops._files import file_name, whole
from ffn_ops._timing import Timed

from . import gpu, gpu_report, report
from .commits import commit_of, package_of, slower_rows
from .harness import QUICK, Budget, Cpu, Harness, Machine
from .providers import COMPILING, EAGER, HUGE, OURS, OURS_FLOAT32, OURS_HUGE, RECOMPUTE, Provider
from .report import Record
from .targets import judged, targets_text
from .worker import OtherProcess
from .workloads import Row, in_order

ROOT = Path(__file__).parents[1]
ALL_OURS = (OURS, RECOMPUTE, OURS_FLOAT32, OURS_HUGE)
HELP = (
    "With FFN_OPS_ISA=avx2 set ATEN_CPU_CAPABILITY=avx2, MKL_ENABLE_INSTRUCTIONS=AVX2 and ONEDNN_MAX_CPU_ISA=AVX2 too:"
    " they hold the other providers to AVX2."
)

Rows = Callable[[int], list[Row]]  # of a number of threads


@dataclass(frozen=True)
class Suite:
    name: str
    all_rows: Rows
    target_rows: Rows
    quick_rows: Rows
    gpu_rows: Callable[[], list[Row]]
    providers: tuple[Provider, ...]
    huge: bool  # whether eager runs in a process on huge pages too


def machine(threads: set[int]) -> Record:
    """Facts about the machine, with the limits of every instruction set, measured before the rows run."""
    info = ffn_ops.info()
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", setting.read_text()) if setting.exists() else None
    limits = {
        str(count): {
            isa: {
                "fma_gflops": max(peak.fma(isa, count) for _ in range(3)),
                "read_gbs": max(peak.read(isa, count) for _ in range(2)),
            }
            for isa in peak.isas()
        }
        for count in sorted(threads)
    }
    return {
        **{key: info[key] for key in ("cpu", "isa", "isas", "torch", "version")},
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "last_level_cache": peak.last_level_cache(),
        "huge_pages": chosen.group(1) if chosen else "unknown",
        "date": datetime.date.today().isoformat(),
        "limits": limits,
    }


def chosen_rows(suite: Suite, options: argparse.Namespace) -> list[Row]:
    """Of a GPU always all: they are few, and the targets read them."""
    if options.device == "cuda":
        every = rows = suite.gpu_rows()
    else:
        kind = suite.quick_rows if options.quick else suite.target_rows if options.targets else suite.all_rows
        rows, every = in_order(kind(options.threads)), in_order(suite.all_rows(options.threads))
    rows = [row for row in rows if all(word in row.name for word in options.only)]
    if not rows:
        names = "\n  ".join(row.name for row in every)
        raise SystemExit(f"--only {' '.join(options.only)}: no row has all of these in its name. Rows:\n  {names}")
    return rows


def huge_pages() -> OtherProcess:
    """Eager with torch's huge-page switch."""
    return OtherProcess(HUGE, EAGER, lambda row: row.dtype == "float32", {"THP_MEM_ALLOC_ENABLE": "1"})


def two_commits(commit: str) -> tuple[OtherProcess, OtherProcess]:
    """The present package and that of another commit, both in processes of their own: neither has an advantage."""
    return OtherProcess(OURS, OURS), OtherProcess(at(commit), OURS, folder=package_of(commit, ROOT))


def at(commit: str) -> str:
    return f"{OURS} at {commit}"


def default_file(suite: Suite, options: argparse.Namespace, facts: Record) -> Path:
    """Only a complete run is kept in the repository."""
    if options.against:
        return ROOT / "out" / "benchmarks" / f"{suite.name}-against-{options.against}.json"
    if options.quick or options.targets or options.only or options.no_compile:
        return ROOT / "out" / "benchmarks" / f"{suite.name}.json"
    on_gpu = options.device == "cuda"
    name = re.sub(r"[^a-z0-9]+", "-", facts["gpu" if on_gpu else "cpu"].lower()).strip("-")
    kind = "" if on_gpu else f"-{facts['isa']}-{options.threads}"
    return ROOT / "benchmarks" / "results" / f"{suite.name}-{name}{kind}.json"


def save(file: Path, results: dict[str, Any]) -> None:
    with whole(file) as fresh:
        fresh.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def positive(text: str) -> int:
    """A number of threads or rounds, of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def row_options(name: str, rounds: int) -> argparse.ArgumentParser:
    """The options of a suite that measures its rows by itself."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="rows whose name has every TEXT")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=positive, default=rounds)
    parser.add_argument("--out", type=file_name, help="the JSON file")
    return parser


def run_rows(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    rows: Sequence[Any],
    measure: Callable[[Any], tuple[Sequence[Timed], str, Record]],
) -> int:
    """Measures the rows that are asked for, and prints and saves each as it ends: what each provider took, the row's
    table, and what else its record holds. Returns 1 if a provider was refused."""
    chosen = [row for row in rows if all(word in row.name for word in options.only)]
    if not chosen:
        parser.error(f"--only {' '.join(options.only)}: no row has all of these in its name")
    info = ffn_ops.info()
    facts = {
        **{key: info[key] for key in ("cpu", "isa", "torch", "version")},
        "torch_isa": torch.backends.cpu.get_cpu_capability(), "cpus": os.cpu_count(),
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    print(" · ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    records: list[Record] = []
    refused = False
    for row in chosen:
        found, text, more = measure(row)
        print(f"\n{text}", flush=True)
        providers = {t.provider: t.record() for t in found}
        records.append({**asdict(row), "name": row.name, **more, "providers": providers})
        refused = refused or any(t.refused for t in found)
        if options.out:
            save(options.out, {"machine": facts, "rows": records})
    return 1 if refused else 0


def _shown(file: Path) -> str:
    return str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else str(file)


def run(rows: list[Row], harness: Harness, facts: Record, file: Path, against: str = "") -> int:
    """Measures the rows, and prints and saves each as it ends. Returns 1 if a provider was refused or ours failed, or
    if ours is slower in a row than the library of the commit ``against``."""
    on_gpu = facts.get("device") == "cuda"
    texts = gpu_report if on_gpu else report
    print(texts.machine_text(facts), flush=True)
    start = time.perf_counter()
    results: dict[str, Any] = {"machine": facts, "rows": []}
    refused = []
    try:
        for number, row in enumerate(rows, 1):
            measured = harness.measure(row)
            record = measured.record()
            refused += [
                f"{row.name}: {each.provider}: {each.note}"
                for each in measured.timed
                if each.refused or (each.provider in ALL_OURS and each.note.startswith("failed"))
            ]
            results["rows"].append(record)
            elapsed = time.perf_counter() - start
            print(f"\n[{number}/{len(rows)}, {elapsed:.0f} s] {texts.row_text(record)}", flush=True)
            save(file, {**results, "targets": judged(results["rows"])})
    except KeyboardInterrupt:
        print("\ninterrupted: the rows so far", flush=True)
    finally:
        harness.close()
    results["targets"] = judged(results["rows"])
    print(f"\n{texts.LEGEND}\n\n{texts.summary_text(results['rows'])}\n\n{targets_text(results['rows'])}\n")
    save(file, results)
    written = [_shown(file)]
    if not on_gpu and not against:
        try:
            from .plot import plot
        except ImportError as missing:
            print(f"no plot: {missing}")
        else:
            plot(results, file.with_suffix(".png"))
            written.append(_shown(file.with_suffix(".png")))
    print(f"{' and '.join(written)} written after {time.perf_counter() - start:.0f} s")
    slower = slower_rows(results["rows"], OURS, at(against)) if against else []
    for word, lines in (("REFUSED", refused), ("SLOWER", slower)):
        for line in lines:
            print(f"{word} {line}", file=sys.stderr)
    return 1 if refused or slower else 0


def main(suite: Suite, arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{suite.name}", epilog=HELP)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="a minute: most targets with few samples")
    which.add_argument("--targets", action="store_true", help="only the rows that the targets read")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: its own rows, in bfloat16")
    parser.add_argument("--threads", type=positive, default=1, help="of every row (default 1, and some rows with 2)")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="rows whose name has every TEXT")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument(
        "--against",
        metavar="COMMIT",
        default="",
        help="only our library and that of another commit, in turns; status 1 if a row became slower",
    )
    parser.add_argument("--out", type=file_name, help="the JSON file; the plot stands beside it")
    options = parser.parse_args(arguments)
    if options.against:
        if options.device == "cuda":
            parser.error("--against compares on the CPU")
        try:
            options.against = commit_of(options.against, ROOT)
        except ValueError as unknown:
            parser.error(f"--against: {unknown}")
    rows = chosen_rows(suite, options)
    on: Machine
    if options.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda: torch.cuda.is_available() is false")
        facts, on = gpu.machine(), gpu.Gpu()
    else:
        facts = machine({row.threads for row in rows} | {options.threads})
        on = Cpu(facts["isa"])
    providers = [p for p in suite.providers if not (options.no_compile and p.name in COMPILING)]
    with tempfile.TemporaryDirectory() as folder:
        if not options.quick:  # a fresh cache, so that a first call says what compilation takes
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        others: tuple[OtherProcess, ...] = (huge_pages(),) if suite.huge and options.device == "cpu" else ()
        if options.against:
            providers, others = [], two_commits(options.against)
        harness = Harness(QUICK if options.quick else Budget(), on, providers, others)
        return run(rows, harness, facts, options.out or default_file(suite, options, facts), options.against)
