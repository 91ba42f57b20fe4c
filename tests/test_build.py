# SPDX-License-Identifier: BSD-3-Clause
"""What a build compiles, on sources of some lines, and what it decides about the CUDA library. No kernel is
compiled."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.cpu_only("no tensor is made")
if not (ROOT / "build_tools").exists():
    pytest.skip("the sources are not there", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from build_tools import backend, environment  # noqa: E402
from build_tools.environment import BuildError, CudaChoice, Toolkit, Torch, choose_cuda  # noqa: E402
from build_tools.objects import Build, Step  # noqa: E402

CXX = os.environ.get("CXX", "c++").split()
needs_compiler = pytest.mark.skipif(shutil.which(CXX[0]) is None, reason="no C++ compiler")


class Tree:
    """Two sources, of which one includes a header of the tree and one of a library that lies elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.root, self.elsewhere = folder / "tree", folder / "headers"
        self.root.mkdir()
        self.write("own.h", "inline int own() { return 1; }")
        self.write("one.cpp", '#include "own.h"\nint one() { return own(); }')
        self.write("two.cpp", "#include <other.h>\nint two() { return other(); }")
        self.elsewhere.mkdir()
        (self.elsewhere / "other.h").write_text("inline int other() { return 2; }\n")

    def write(self, name: str, text: str) -> None:
        (self.root / name).write_text(text + "\n")

    def build(self, flags: tuple[str, ...] = (), version: str = "2.11.0") -> list[str]:
        def compiled(name: str) -> Step:
            command = (*CXX, "-fPIC", *flags, "-isystem", "{torch}", "-c", f"{name}.cpp", "-o", f"build/{name}.o")
            return Step(f"build/{name}.o", command, (f"{name}.cpp",), {"torch": version})

        objects = ("build/one.o", "build/two.o")
        link = Step("build/lib.so", (*CXX, "-shared", *objects, "-o", "build/lib.so"), objects, {}, compiles=False)
        build = Build(self.root, {"torch": str(self.elsewhere)}, jobs=2)
        with build.alone("build/lock"):
            return [Path(made).name for made in build.run([compiled("one"), compiled("two")]) + build.run([link])]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    tree = Tree(tmp_path)
    assert tree.build() == ["one.o", "two.o", "lib.so"]
    return tree


@needs_compiler
def test_a_second_build_compiles_nothing(tree: Tree) -> None:
    assert tree.build() == []


@needs_compiler
def test_headers_that_lie_elsewhere_with_new_times_compile_nothing(tree: Tree) -> None:
    """As torch's do in a new isolated environment; a new version of them compiles everything."""
    moved = tree.elsewhere.rename(tree.elsewhere.with_name("moved"))
    tree.elsewhere = moved
    for file in (moved / "other.h", tree.root / "one.cpp", tree.root / "own.h"):
        os.utime(file)
    assert tree.build() == []
    assert tree.build(version="2.12.0") == ["one.o", "two.o"]


@needs_compiler
def test_a_change_compiles_what_reads_it(tree: Tree) -> None:
    tree.write("two.cpp", "#include <other.h>\nint two() { return other() + 1; }")
    assert tree.build() == ["two.o", "lib.so"]
    tree.write("own.h", "inline int own() { return 3; }")
    assert tree.build() == ["one.o", "lib.so"]
    tree.write("one.cpp", '#include "own.h" // the same object\nint one() { return own(); }')
    assert tree.build() == ["one.o"]
    assert tree.build() == []


@needs_compiler
def test_other_flags_compile_everything(tree: Tree) -> None:
    assert tree.build(("-DNDEBUG",))[:2] == ["one.o", "two.o"]


@needs_compiler
def test_what_was_lost_or_cut_short_is_made_again(tree: Tree) -> None:
    (tree.root / "build/one.o").unlink()
    (tree.root / "build/two.o.json").write_text("{")
    assert tree.build()[:2] == ["one.o", "two.o"]
    (tree.root / "build/lib.so").unlink()
    assert tree.build() == ["lib.so"]


@needs_compiler
def test_a_source_that_does_not_compile_is_named_and_tried_again(tree: Tree) -> None:
    tree.write("one.cpp", "int one() { return nothing; }")
    for _ in range(2):
        with pytest.raises(BuildError, match=r"one\.cpp(.|\n)*nothing"):
            tree.build()
    tree.write("one.cpp", "int one() { return 4; }")
    assert tree.build() == ["one.o", "lib.so"]


TORCH, CPU_TORCH = Torch(Path("torch"), "2.15.0+cu130", "13.0"), Torch(Path("torch"), "2.15.0+cpu", None)
NVCC = Toolkit(Path("cuda"), (13, 0), ("80", "86", "90", "100"))


@pytest.mark.parametrize(
    ("environ", "torch", "toolkit", "gpus", "archs"),
    [
        ({"FFN_OPS_CUDA": "1"}, TORCH, NVCC, [], "8.0+PTX;9.0a"),  # wheels
        ({"FFN_OPS_CUDA": "1"}, TORCH, NVCC, [(9, 0)], "8.0+PTX;9.0a"),
        ({"FFN_OPS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "7.5 9.0a"}, TORCH, NVCC, [], "9.0a"),
        ({}, TORCH, NVCC, [(9, 0)], "9.0a"),
        ({}, TORCH, NVCC, [(8, 6), (9, 0), (8, 6), (7, 5)], "8.6;9.0a"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0"}, TORCH, NVCC, [(9, 0)], "8.0"),
    ],
)  # fmt: skip
def test_architectures(environ: dict[str, str], torch: Torch, toolkit: Toolkit, gpus: Any, archs: str) -> None:
    assert choose_cuda(environ, torch, toolkit, gpus) == CudaChoice(archs)


@pytest.mark.parametrize(
    ("environ", "torch", "toolkit", "gpus", "reason"),
    [
        ({}, TORCH, NVCC, [], "no NVIDIA GPU was visible to the build"),
        ({"TORCH_CUDA_ARCH_LIST": "9.0a"}, TORCH, NVCC, [], "no NVIDIA GPU was visible to the build"),
        ({"FFN_OPS_CUDA": "0"}, TORCH, NVCC, [(9, 0)], "FFN_OPS_CUDA=0"),
        ({}, CPU_TORCH, NVCC, [(9, 0)], r"torch 2\.15\.0\+cpu of the build environment has no CUDA"),
        ({}, TORCH, None, [(9, 0)], "no CUDA toolkit found"),
        ({}, TORCH, Toolkit(Path("cuda"), (12, 4)), [(9, 0)], r"nvcc 12\.4 does not fit .* needs CUDA 13\.0"),
        ({}, TORCH, NVCC, [(7, 5)], r"the GPU is older than architecture 8\.0"),
        ({}, TORCH, NVCC, [(12, 1)], r"nvcc 13\.0 does not know the GPU's architecture 12\.1"),
    ],
)  # fmt: skip
def test_reasons_for_no_cuda_library(environ: Any, torch: Torch, toolkit: Any, gpus: Any, reason: str) -> None:
    choice = choose_cuda(environ, torch, toolkit, gpus)
    assert choice.archs is None and re.match(reason, choice.reason), choice
    if not environ and gpus and gpus[0] == (9, 0):  # asked for, it is an error
        with pytest.raises(BuildError, match=f"FFN_OPS_CUDA=1, but {reason}"):
            choose_cuda({"FFN_OPS_CUDA": "1"}, torch, toolkit, gpus)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"FFN_OPS_CUDA": "yes"}, "FFN_OPS_CUDA: expected 1, 0 or nothing, got 'yes'"),
        ({"FFN_OPS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9;8"}, "TORCH_CUDA_ARCH_LIST: expected a list such as"),
        ({"FFN_OPS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "7.5"}, "expected an architecture from 8.0 on"),
    ],
)  # fmt: skip
def test_wishes_that_cannot_be(environ: dict[str, str], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        choose_cuda(environ, TORCH, NVCC, [])


def test_the_build_says_why_it_cannot_be() -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext"], cwd=ROOT, env={**os.environ, "FFN_OPS_CUDA": "yes"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0 and "ffn_ops cannot be built: FFN_OPS_CUDA: expected" in done.stderr, done.stderr


def test_kernels_for_hopper_meet_no_plain_code() -> None:
    assert environment.arch_flags("8.0+PTX;9.0a") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-DFFN_OPS_HOPPER",
    ]
    assert "-DFFN_OPS_HOPPER" not in environment.arch_flags("9.0;9.0a")


@pytest.mark.parametrize(
    ("torch", "asked"),
    [(None, ["torch>=2.11"]), (Torch(Path("torch"), "2.10.1", None), ["torch>=2.11"]), (TORCH, [])],
)
def test_the_backend_asks_for_torch_where_there_is_none(
    torch: Any, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "find_torch", lambda: torch)
    assert backend._torch() == asked


def test_torch_is_found_from_an_isolated_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pip's hides the packages around it with a sitecustomize on PYTHONPATH."""
    import torch

    hide = "import sys, importlib.abc\nclass Hide(importlib.abc.MetaPathFinder):\n"
    hide += "    def find_spec(self, name, *_):\n        if name == 'torch': raise ImportError(name)\n"
    (tmp_path / "sitecustomize.py").write_text(hide + "sys.meta_path.insert(0, Hide())\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = environment.find_torch()
    assert found == Torch(Path(torch.__file__).parent, str(torch.__version__), torch.version.cuda)


def test_pre_commit_runs_the_pinned_linters() -> None:
    pins = (ROOT / "pyproject.toml").read_text()
    hooks = dict(re.findall(r"repo: \S+/(\S+)\n\s+rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text()))
    assert hooks.keys() == {"ruff-pre-commit", "mirrors-clang-format"}
    assert f'"ruff=={hooks["ruff-pre-commit"]}"' in pins
    assert f'"clang-format=={hooks["mirrors-clang-format"]}"' in pins
