# SPDX-License-Identifier: BSD-3-Clause
"""The library of another commit, built beside this one, and what a run against it says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from .report import Record, ratio

SLOWER = 0.95  # of the other commit's speed: a row below is a regression


def commit_of(name: str, root: Path) -> str:
    """The short hash of what ``name`` names. Raises ValueError where it names no commit."""
    ask = ["git", "rev-parse", "--verify", "--quiet", "--short=12", f"{name}^{{commit}}"]
    found = subprocess.run(ask, capture_output=True, text=True, cwd=root)
    if found.returncode:
        raise ValueError(f"expected a commit of this repository, got {name!r}")
    return found.stdout.strip()


def package_of(commit: str, root: Path) -> Path:
    """A folder with the package of ``commit``, its CPU library built, and the present benchmarks beside it: the same
    code measures both. Kept below ``out/``, for the next run."""
    folder = root / "out" / "benchmarks" / "commits" / commit
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        tree = Path(scratch) / commit
        with tempfile.TemporaryFile() as packed:
            subprocess.run(["git", "archive", commit], stdout=packed, cwd=root, check=True)
            packed.seek(0)
            # Python before 3.10.12 and 3.11.4 has no filters.
            safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            with tarfile.open(fileobj=packed) as archive:
                archive.extractall(tree, **safely)
        print(f"building the library of {commit}", flush=True)
        built = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=tree, env={**os.environ, "FFN_OPS_CUDA": "0"}, capture_output=True, text=True,
        )  # fmt: skip
        if built.returncode:
            raise RuntimeError(f"the library of {commit} does not build:\n{built.stdout[-2000:]}{built.stderr[-2000:]}")
        shutil.rmtree(tree / "build")
        shutil.rmtree(tree / "benchmarks")
        (tree / "benchmarks").symlink_to(root / "benchmarks")
        tree.rename(folder)
    return folder


def slower_rows(rows: list[Record], present: str, other: str) -> list[str]:
    """The rows in which ``present`` has lost speed: the median over rounds of the other's time over its own is below
    :data:`SLOWER`."""
    found = [(row["name"], ratio(row, other, present)) for row in rows]
    return [f"{name}: {speed:.2f} of the speed of {other}" for name, speed in found if speed and speed < SLOWER]
