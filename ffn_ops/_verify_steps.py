# SPDX-License-Identifier: BSD-3-Clause
"""The steps of ``python -m ffn_ops verify``: each runs one tool in a process of its own and turns what it prints or
writes into a record. This file knows neither the budget nor the report's file."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ._info import info

Record = dict[str, Any]
Say = Callable[[str], None]  # one line of progress

TAIL = 60  # lines of a process's output that a report keeps where it failed
GRACE = 10.0  # seconds from interrupting a process that is out of time to killing it
OUTCOME = re.compile(r"^(?:tests/|\S*/)?(\S+\.py::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
REASON = re.compile(r"^(?:FAILED|ERROR) (?:tests/|\S*/)?(\S+\.py(?:::.+?)?) - (.*)$")
SANITIZED = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")


@dataclass(frozen=True)
class Place:
    """Where a verification runs, and what it verifies."""

    device: str
    tests: Path
    variables: tuple[tuple[str, str], ...] = ()  # added to the environment

    @property
    def root(self) -> Path:
        return self.tests.parent

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every process: it imports this package whatever its working directory."""
        paths = [str(Path(__file__).parents[1]), str(self.tests), os.environ.get("PYTHONPATH", "")]
        own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        return {**os.environ, **own, **dict(self.variables)}


@dataclass(frozen=True)
class Step:
    name: str
    what: str
    share: float  # share of the time left for it and the later steps
    run: Callable[[Place, float, Say], Record]  # runs for at most so many seconds; its record has ``status``


@dataclass
class Ended:
    """The result of a process that ended or was killed."""

    code: int | None  # None: out of time
    lines: list[str]

    def failure(self) -> str:
        return "out of time" if self.code is None else f"exit status {self.code}"


def run_process(command: list[str], place: Place, seconds: float, each: Callable[[str], None]) -> Ended:
    """Reads the output line by line. A process that is out of time is interrupted, so that it can save, then killed."""
    process = subprocess.Popen(
        command,
        cwd=place.root,
        env=place.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that its children end with it
        # A shell's background job ignores SIGINT, and its children inherit that: an interrupt could not tell them to
        # save.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    lines: list[str] = []
    rest, end, late = b"", time.monotonic() + seconds, False
    try:
        while True:
            ended = process.poll() is not None
            ready, _, _ = select.select([process.stdout], [], [], 0.0 if ended else 0.2)
            data = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
            *whole, rest = (rest + data).split(b"\n")
            for line in (each_line.decode(errors="replace") for each_line in whole):
                lines.append(line)
                each(line)
            if not data and ended:  # does not wait for the end of the pipe: a compiler's worker may hold it open
                break
            if time.monotonic() > end:
                os.killpg(process.pid, signal.SIGKILL if late else signal.SIGINT)
                late, end = True, time.monotonic() + GRACE
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    return Ended(None if late else process.returncode, [*lines, *([rest.decode(errors="replace")] if rest else [])])


# ---- facts ----------------------------------------------------------------------------------------------------------


def facts(place: Place, seconds: float, say: Say) -> Record:
    """The machine and the build; with a GPU also what nvidia-smi says."""
    found: Record = {"status": "passed", "device": place.device, **info(), "torch_cuda": torch.version.cuda}
    if place.device == "cuda":
        properties = torch.cuda.get_device_properties()
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "sms": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "gpus": torch.cuda.device_count(),
        }
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "-q", "-d", "CLOCK,PERFORMANCE,POWER,TEMPERATURE"]
            found["nvidia_smi"] = run_process(query, place, min(20.0, seconds), lambda line: None).lines
    say(found.get("gpu") or found["cpu"])
    return found


# ---- tests ----------------------------------------------------------------------------------------------------------


def tests_of(*files: str, slow: bool = False) -> Callable[[Place, float, Say], Record]:
    """Runs one process for each file, so that a broken GPU context or a hang costs only that file."""

    def run(place: Place, seconds: float, say: Say) -> Record:
        end = time.monotonic() + seconds
        found: Record = {"counts": {}, "failures": [], "files": {}}
        for file in files:
            left = end - time.monotonic()
            found["files"][file] = _one_file(place, file, slow, left, found, say) if left > 0 else "no time"
        complete = set(found["files"].values()) == {"complete"}
        found["status"] = "failed" if found["failures"] else "passed" if complete else "incomplete"
        if complete and not found["counts"]:
            found |= {"status": "skipped", "why": f"no test of these files is for {place.device}"}
        return found

    return run


def _one_file(place: Place, file: str, slow: bool, seconds: float, found: Record, say: Say) -> str:
    """Adds to the counts and failures; returns how the file ended."""
    reasons: dict[str, str] = {}
    failed: list[str] = []

    def each(line: str) -> None:
        if match := OUTCOME.match(line):
            test, outcome = match[1], match[2].lower()
            found["counts"][outcome] = found["counts"].get(outcome, 0) + 1
            if outcome in ("failed", "error"):
                failed.append(test)
            say(f"{file} · " + " · ".join(f"{count} {name}" for name, count in found["counts"].items()))
        elif match := REASON.match(line):
            reasons[match[1]] = match[2]

    command = [sys.executable, "-m", "pytest", "-vv", "--tb=short", "-rfE", "-p", "no:cacheprovider", "--color=no"]
    command += ["--device", place.device, *(["--slow"] if slow else []), str(place.tests / file)]
    ended = run_process(command, place, seconds, each)
    found["failures"] += [{"test": test, "message": reasons.get(test, "see the output")} for test in failed]
    if ended.code in (0, 5) and not failed:  # 5: no test of this file is for this device
        return "complete"
    found.setdefault("output", {})[file] = ended.lines[-TAIL:]
    if ended.code not in (0, 1, 5) and ended.code is not None:
        found["failures"].append({"test": file, "message": f"{ended.failure()}: {_last(ended.lines)}"})
    return "complete" if ended.code in (0, 1) else ended.failure()


def _last(lines: list[str]) -> str:
    return next((line for line in reversed(lines) if line.strip()), "no output")


# ---- compute-sanitizer ----------------------------------------------------------------------------------------------


def sanitizer(tool: str, few: bool) -> Callable[[Place, float, Say], Record]:
    def run(place: Place, seconds: float, say: Say) -> Record:
        if place.device != "cuda":
            return {"status": "skipped", "why": "of GPUs; the CPU's sanitizers run under make sanitize"}
        program = shutil.which("compute-sanitizer")
        if program is None:
            return {"status": "skipped", "why": "no compute-sanitizer on PATH (it is part of the CUDA toolkit)"}
        command = [program, "--tool", tool, "--error-exitcode", "99", sys.executable]
        command += [str(place.tests / "sanitized_run.py"), place.device, *(["few"] if few else [])]
        # torch's memory pool would hide accesses between tensors.
        uncached = replace(place, variables=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),))
        ended = run_process(command, uncached, seconds, say)
        errors = [int(m[1] or m[2]) for line in ended.lines if (m := SANITIZED.search(line))]
        clean = ended.code == 0 and errors == [0]
        return {
            "status": "passed" if clean else "incomplete" if ended.code is None else "failed",
            "errors": sum(errors) if errors else None,
            **({} if clean else {"why": ended.failure(), "output": ended.lines[-TAIL:]}),
        }

    return run


# ---- benchmarks -----------------------------------------------------------------------------------------------------


def benchmark(suite: str) -> Callable[[Place, float, Say], Record]:
    """The finished rows, in the form in which ``python -m benchmarks.SUITE`` saves them."""

    def run(place: Place, seconds: float, say: Say) -> Record:
        if not (place.root / "benchmarks" / f"{suite}.py").exists():
            return {"status": "skipped", "why": f"no benchmarks beside {place.tests}"}
        file = place.root / "out" / "verify" / f"{suite}.json"
        file.unlink(missing_ok=True)
        command = [sys.executable, "-m", f"benchmarks.{suite}", "--device", place.device, "--out", str(file)]
        command += ["--quick", "--no-compile"] if place.device == "cpu" else []
        ended = run_process(command, place, seconds, lambda line: say(line) if line.startswith("[") else None)
        found: Record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": []}
        if ended.code == 0:
            return {"status": "passed", **found}
        status = "incomplete" if ended.code is None else "failed"
        return {"status": status, "why": ended.failure(), "output": ended.lines[-TAIL:], **found}

    return run
