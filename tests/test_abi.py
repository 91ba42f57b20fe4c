# SPDX-License-Identifier: BSD-3-Clause
"""The libraries as binaries: linked to torch's stable C interface and the C and C++ run-time libraries, nothing else.
The CUDA library carries its own CUDA runtime, and needs neither a driver nor cuBLAS."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ffn_ops._library import CUDA_LIBRARY, LIBRARY

LIBRARIES = [library for library in (LIBRARY, CUDA_LIBRARY) if library.exists()]
pytestmark = pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
each_library = pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)

# Mangled names, without their version. What torch keeps for libraries built against an older version of it:
STABLE = re.compile(r"(aoti_torch|torch)_\w+$")
TORCH_CPP = re.compile(r"_ZT?[A-Z]*K?R?(3c10|2at|5torch|6caffe2)")
PYTHON = re.compile(r"_?Py[A-Z_]\w*$")
STANDARD_CPP = re.compile(
    r"_Z(T[VIS])?(N?K?[RO]?S[tabsiod]|n[wa]|d[la]|NK?10__cxxabiv1|N10__cxxabiv1)|__cxa_|__gxx_|_Unwind_"
)
WEAK_HOOK = re.compile(r"_ITM_\w+TMCloneTable$|__gmon_start__$")


def symbols(library: Path, which: str) -> list[tuple[str, str]]:
    """Name and version."""
    out = subprocess.run(["nm", "-D", which, str(library)], capture_output=True, text=True, check=True).stdout
    return [
        (s.rstrip("@"), version) for s, _, version in (line.split()[-1].partition("@") for line in out.splitlines())
    ]


def known(name: str, version: str) -> bool:
    libc = version.lstrip("@").startswith("GLIBC_")
    return libc or any(p.match(name) is not None for p in (STABLE, STANDARD_CPP, WEAK_HOOK))


@each_library
def test_only_the_stable_interface_of_torch(library: Path) -> None:
    undefined = symbols(library, "--undefined-only")
    assert any(STABLE.match(name) for name, _ in undefined), "no call into torch at all: not the operator library"
    assert [name for name, _ in undefined if TORCH_CPP.match(name)] == []
    assert [name for name, version in undefined if not known(name, version)] == []


@each_library
def test_no_python(library: Path) -> None:
    assert [name for name, _ in symbols(library, "--undefined-only") if PYTHON.match(name)] == []


@each_library
def test_nothing_of_ours_is_visible(library: Path) -> None:
    """Two versions of the library can be loaded into one process; its CUDA runtime is its own."""
    names = [name for name, _ in symbols(library, "--defined-only")]
    assert [name for name in names if "ffn_ops" in name or name.startswith("cuda")] == []


@each_library
def test_what_it_is_linked_to(library: Path) -> None:
    out = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*?)\]", out)
    allowed = re.compile(r"lib(c10|torch|torch_cpu|torch_cuda|stdc\+\+|gcc_s|m|c|dl|rt|pthread|gomp)\.so|ld-linux")
    assert [name for name in needed if not allowed.match(name)] == []
    assert ("libtorch_cuda.so" in needed) == (library == CUDA_LIBRARY)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("_ZN3c1014impl11cow_deleterEPv", TORCH_CPP),
        ("_ZN2at4_ops2mm4callERKNS_6TensorES4_", TORCH_CPP),
        ("_ZTVN5torch7LibraryE", TORCH_CPP),
        ("PyObject_Call", PYTHON),
        ("_Py_Dealloc", PYTHON),
    ],
)
def test_the_audit_would_notice(name: str, pattern: re.Pattern[str]) -> None:
    assert pattern.match(name) and not known(name, "")
