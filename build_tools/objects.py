# SPDX-License-Identifier: BSD-3-Clause
"""Runs the commands of a build whose results are not there yet. A step is up to date if its command, the compiler's and
torch's versions and the contents of all files that it read are those of its last run: times and places of files, such
as of headers in pip's isolated environment, do not count. It knows nothing of this project's sources and flags."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from build_tools.environment import BuildError


@dataclass(frozen=True)
class Step:
    """``command`` makes ``output`` out of ``inputs``; compilers add to these the headers that they read. ``versions``
    are of all that does not lie in the tree."""

    output: str
    command: tuple[str, ...]
    inputs: tuple[str, ...]
    versions: Mapping[str, str]
    compiles: bool = True


@dataclass(frozen=True)
class Build:
    """``root`` holds the sources, and steps name files relative to it. ``places`` are folders that may lie elsewhere
    next time: commands name them as ``{key}``."""

    root: Path
    places: Mapping[str, str]
    jobs: int

    def run(self, steps: Sequence[Step]) -> list[str]:
        """Side by side, in the order given. Returns the outputs that were not up to date and were made."""
        stale = [step for step in steps if not self._up_to_date(step)]
        with ThreadPoolExecutor(max(1, self.jobs)) as pool:
            runs = [pool.submit(self._make, step) for step in stale]
            try:
                for number, (step, each) in enumerate(zip(stale, runs, strict=True), 1):
                    print(f"[{number}/{len(stale)}] {step.output} ({each.result():.1f} s)", flush=True)
            except BuildError:
                for each in runs:
                    each.cancel()
                raise
        return [step.output for step in stale]

    @contextmanager
    def alone(self, lock: str) -> Iterator[None]:
        """Once another build of the same in this tree has ended."""
        (self.root / lock).parent.mkdir(parents=True, exist_ok=True)
        with (self.root / lock).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _record(self, step: Step) -> Path:
        return self.root / f"{step.output}.json"

    def _contents(self, files: Sequence[str]) -> dict[str, str]:
        return {file: hashlib.sha256((self.root / file).read_bytes()).hexdigest() for file in sorted(set(files))}

    def _facts(self, step: Step, files: dict[str, str]) -> dict[str, object]:
        return {"command": list(step.command), "versions": dict(step.versions), "files": files}

    def _up_to_date(self, step: Step) -> bool:
        try:
            record = json.loads(self._record(step).read_text())
            files = self._contents([*step.inputs, *record["files"]])
            return (self.root / step.output).exists() and bool(record == self._facts(step, files))
        except (OSError, ValueError, KeyError, TypeError):  # never made, cut short, or a file that it read is gone
            return False

    def _make(self, step: Step) -> float:
        output, began = self.root / step.output, time.monotonic()
        output.parent.mkdir(parents=True, exist_ok=True)
        self._record(step).unlink(missing_ok=True)
        read = f"{step.output}.d"
        command = [re.sub(r"\{(\w+)\}", lambda m: self.places[str(m[1])], word) for word in step.command]
        command += ["-MMD", "-MF", read] if step.compiles else []
        before = self._contents(step.inputs)
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True)
        log = done.stdout + done.stderr
        output.with_name(f"{output.name}.log").write_text(log)
        if done.returncode != 0:
            raise BuildError(f"{' '.join(command)}\n{log}")
        if log:
            print(log, end="" if log.endswith("\n") else "\n", flush=True)
        files = self._contents([*step.inputs, *(self._below_root(read) if step.compiles else [])])
        if before.items() <= files.items():  # else a source changed meanwhile: made anew next time
            fresh = self._record(step).with_suffix(".new")
            fresh.write_text(json.dumps(self._facts(step, files), indent=1))
            os.replace(fresh, self._record(step))
        return time.monotonic() - began

    def _below_root(self, read: str) -> list[str]:
        """The files of a compiler's list that the tree has: those elsewhere are a version's, and named absolutely."""
        text = (self.root / read).read_text().replace("\\\n", " ").partition(": ")[2]
        names = [re.sub(r"\\(.)", r"\1", name) for name in re.findall(r"(?:\\.|[^\s\\])+", text)]
        return [os.path.normpath(name) for name in names if not os.path.isabs(name)]
