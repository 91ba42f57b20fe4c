# SPDX-License-Identifier: BSD-3-Clause
"""The vector functions' ULP bounds over every float32, on every instruction set: what `make kernels` samples."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = ("-std=c++20", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
KERNELS = ("-include", "tests/cpp/vector_table.h", '-DFFN_OPS_KERNELS="../../../tests/cpp/vector_kernels.h"')
ISAS = [str(path) for path in sorted((ROOT / "csrc/cpu/isa").glob("*.cpp"))]
SOURCES = ("tests/cpp/vector_test.cpp", "csrc/cpu/dispatch.cpp", *ISAS)


@pytest.mark.cpu_only("vectors of instruction sets")
@pytest.mark.slow
def test_every_float32(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no compiler {compiler}")
    program = tmp_path / "vector_test"
    subprocess.run([compiler, *FLAGS, *KERNELS, "-o", str(program), *SOURCES], check=True, cwd=ROOT)
    done = subprocess.run([str(program), "--all"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
