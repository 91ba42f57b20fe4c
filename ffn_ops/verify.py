# SPDX-License-Identifier: BSD-3-Clause
"""``python -m ffn_ops verify``: tests, sanitizers and benchmarks on one device, in steps that each save their result.

_verify_steps.py says which tool a step runs and how it reads the output.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import _verify_steps as steps
from ._files import file_name, whole
from ._info import info
from ._verify_steps import Place, Record, Say, Step
from .ops import gated_act

# Most valuable first, for runs that are cut short.
STEPS = (
    Step("facts", "machine, build, clocks", 0.5, steps.facts),
    Step(
        "kernels",
        "accuracy, gradients, determinism, batch invariance, memory of every operator, form and dtype",
        4.0,
        steps.tests_of(
            "test_accuracy.py", "test_gate.py", "test_gate_forms.py", "test_gradients.py", "test_determinism.py",
            "test_memory.py", "test_learned_act.py",
        ),
    ),
    Step(
        "mixtures",
        "routers, sorts, mixtures of experts",
        3.0,
        steps.tests_of(
            "test_moe.py", "test_top_k.py", "test_routing.py", "test_assignment.py", "test_moe_ffn.py",
            "test_routing_errors.py", "test_router.py", "test_mask.py", "test_lora.py",
            "test_lora_bases.py", "test_quantized.py", "test_quantized_weight.py",
        ),
    ),
    Step("cuda", "graphs, streams, no waiting, TF32, the CPU's results", 3.0, steps.tests_of("test_cuda.py")),
    Step("memcheck", "compute-sanitizer: accesses", 2.0, steps.sanitizer("memcheck", few=False)),
    Step("dense", "benchmark rows of gated_act and dense layers", 4.0, steps.benchmark("dense")),
    Step("moe", "benchmark rows of mixtures of experts", 10.0, steps.benchmark("moe")),
    Step(
        "torch",
        "opcheck, compile, export, autocast, torch.func, modules, errors, whatever hypothesis finds",
        4.0,
        steps.tests_of(
            "test_torch_integration.py", "test_transforms.py", "test_compile.py", "test_modules.py", "test_errors.py",
            "test_raw_operators.py",
            "test_properties.py", "test_module_state.py", "test_export.py", "test_tracing.py", "test_docs.py",
        ),
    ),
    Step(
        "models",
        "replace on layers, models of transformers, adapters and quantised weights; routers and mixtures of models",
        4.0,
        steps.tests_of(
            "test_replace.py", "test_replace_alike.py", "test_replace_changes.py", "test_replace_inputs.py",
            "test_replace_models.py", "test_replace_part_changes.py", "test_replace_parts.py", "test_replace_peft.py",
            "test_replace_report.py", "test_replace_learned.py", "test_libraries.py", "test_router_models.py",
            "test_moe_models.py",
        ),
    ),
    Step("racecheck", "compute-sanitizer: races in shared memory", 1.5, steps.sanitizer("racecheck", few=True)),
    Step("synccheck", "compute-sanitizer: barriers", 1.0, steps.sanitizer("synccheck", few=True)),
    Step("large", "more than 2^31 elements", 2.0, steps.tests_of("test_large.py", slow=True)),
)  # fmt: skip
BY_NAME = {step.name: step for step in STEPS}
SAME = ("device", "gpu", "cpu", "version", "torch", "cuda")  # facts that must be the same for all steps of a report
ENDED = ("passed", "failed", "skipped")  # not repeated unless named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=file_name, default=Path("report.json"), help="goes on where that ended")
    parser.add_argument("--minutes", type=float, default=30.0, help="for all steps together (default 30)")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="these, even if the report has them")
    parser.add_argument("--list", action="store_true", help="print the steps")
    parser.add_argument("--tests", type=Path, help="the repository's folder of tests; found beside ffn_ops or here")


def run(options: argparse.Namespace) -> int:
    """Returns 0 if everything passed, 1 if something failed or had no time, 2 if it could not begin."""
    if options.list:
        for step in STEPS:
            print(f"{step.name:10} {step.what}")
        return 0
    problem, place = _ready(options)
    if place is None:
        print(f"verify: {problem}", file=sys.stderr)
        return 2
    report: dict[str, Any] = {"steps": {}}
    if options.out.exists():
        try:
            report = json.loads(options.out.read_text(encoding="utf-8"))
            report["steps"].items()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            print(f"verify: --out {options.out}: there is a file that is no report of verify", file=sys.stderr)
            return 2
    try:
        return _run_steps(place, options, report)
    except KeyboardInterrupt:
        print(f"\nverify: interrupted; the same command goes on from {options.out}", file=sys.stderr)
        return 1


def _ready(options: argparse.Namespace) -> tuple[str, Place | None]:
    """Returns the place, or what is missing."""
    unknown = [name for name in options.steps or () if name not in BY_NAME]
    if unknown:
        return f"--steps {unknown[0]}: expected some of {', '.join(BY_NAME)}", None
    if not options.minutes > 0:
        return f"--minutes: expected a positive number, got {options.minutes}", None
    folders = [options.tests] if options.tests else [Path(__file__).parents[1] / "tests", Path("tests")]
    tests = next((f.resolve() for f in folders if (f / "conftest.py").exists() and (f / "problems.py").exists()), None)
    if tests is None:
        looked = " and ".join(str(folder.resolve()) for folder in folders)
        return f"the repository's tests are not in {looked}: say where with --tests DIR", None
    if importlib.util.find_spec("pytest") is None:
        return 'pytest is not installed: pip install "ffn_ops[test]"', None
    if options.device == "cuda":
        if not torch.cuda.is_available():
            return "--device cuda: torch.cuda.is_available() is false: no GPU, no driver, or a torch without CUDA", None
        try:
            gated_act(torch.ones(1, device="cuda"))
        except RuntimeError as error:
            return f"--device cuda: {error}\nthe CUDA library: {info()['cuda']}", None
    return "", Place(options.device, tests)


def _run_steps(place: Place, options: argparse.Namespace, report: dict[str, Any]) -> int:
    before = report["steps"].get("facts", {})
    chosen = [step for step in STEPS if _is_due(step, options, report)]
    end = time.monotonic() + 60 * options.minutes
    with _progress() as say:
        for number, step in enumerate(chosen):
            left = end - time.monotonic()
            if left <= 0:
                break
            seconds = left * step.share / sum(later.share for later in chosen[number:])
            record = _run_step(step, place, seconds, say, report, options.out)
            differing = [
                name for name in SAME if step.name == "facts" and before and before.get(name) != record.get(name)
            ]
            if differing:
                name = differing[0]
                report["steps"]["facts"] = before
                _save(report, options.out)
                print(
                    f"verify: --out {options.out} is of another run ({name} {before.get(name)}, here"
                    f" {record.get(name)}): give another file",
                    file=sys.stderr,
                )
                return 2
    print(_summary(report))
    print(f"{options.out} written")
    named = [BY_NAME[name] for name in options.steps] if options.steps else STEPS
    return 0 if all(report["steps"].get(s.name, {}).get("status") in ("passed", "skipped") for s in named) else 1


def _is_due(step: Step, options: argparse.Namespace, report: dict[str, Any]) -> bool:
    if options.steps:
        return step.name == "facts" or step.name in options.steps
    return step.name == "facts" or report["steps"].get(step.name, {}).get("status") not in ENDED


def _run_step(step: Step, place: Place, seconds: float, say: Say, report: dict[str, Any], out: Path) -> Record:
    """Saves the step before it begins, so that a killed run repeats it, and when it ends."""
    start = time.monotonic()
    begun = {"started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), "limit": round(seconds)}
    if step.name != "facts":
        report["steps"][step.name] = {"status": "interrupted", **begun}
        _save(report, out)
    try:
        record = step.run(place, seconds, lambda text: say(f"{step.name}: {text}"))
    except Exception as error:  # unexpected output of a tool must not stop the later steps
        record = {"status": "failed", "why": f"{type(error).__name__}: {error}"}
    record = {**record, **begun, "seconds": round(time.monotonic() - start, 1)}
    report["steps"][step.name] = record
    _save(report, out)
    say(f"{step.name}: {record['status']} after {record['seconds']:.0f} s")
    return record


def _save(report: dict[str, Any], out: Path) -> None:
    with whole(out) as fresh:
        fresh.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- printing -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress() -> Iterator[Say]:
    """Shows the latest line: updated in place on a terminal with rich, else one every ten seconds."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.markup import escape

        with Console().status("") as status:
            yield lambda text: status.update(escape(text))
        return
    last: list[Any] = ["", 0.0]

    def say(text: str) -> None:
        step = text.partition(":")[0]
        if step != last[0] or " after " in text or time.monotonic() > last[1] + 10:
            print(text, flush=True)
            last[:] = [step, time.monotonic()]

    yield say


def _summary(report: dict[str, Any]) -> str:
    lines = []
    for step in STEPS:
        record = report["steps"].get(step.name, {"status": "no time"})
        seconds = f"{record['seconds']:.0f} s" if "seconds" in record else ""
        lines.append(f"{step.name:10} {record['status']:12} {seconds:>7}  {_found(record)}".rstrip())
        lines += [f"           {each['test']}: {each['message']}" for each in record.get("failures", [])[:10]]
    return "\n".join(lines)


def _found(record: Record) -> str:
    """The step in one line."""
    parts = [f"{count} {name}" for name, count in record.get("counts", {}).items()]
    parts += [f"{len(record['rows'])} rows"] if "rows" in record else []
    targets: Sequence[Record] = [t for t in record.get("targets", []) if t["measured"] is not None]
    parts += [f"{sum(bool(t['reached']) for t in targets)} of {len(targets)} targets reached"] if targets else []
    parts += [str(record["gpu"])] if "gpu" in record else []
    parts += [str(record["why"])] if "why" in record else []
    return ", ".join(parts)
