"""The library as a binary: linked to torch's stable C interface and the C and C++ run-time libraries, nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from ffn_ops._library import LIBRARY

pytestmark = pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")

# Mangled names, without their version. What torch keeps for libraries built against an older version of it:
STABLE = re.compile(r"(aoti_torch|torch)_\w+$")
TORCH_CPP = re.compile(r"_ZT?[A-Z]*K?R?(3c10|2at|5torch|6caffe2)")
PYTHON = re.compile(r"_?Py[A-Z_]\w*$")
STANDARD_CPP = re.compile(
    r"_Z(T[VIS])?(N?K?[RO]?S[tabsiod]|n[wa]|d[la]|NK?10__cxxabiv1|N10__cxxabiv1)|__cxa_|__gxx_|_Unwind_"
)
WEAK_HOOK = re.compile(r"_ITM_\w+TMCloneTable$|__gmon_start__$")


def symbols(which: str) -> list[tuple[str, str]]:
    """Name and version."""
    out = subprocess.run(["nm", "-D", which, str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    return [
        (s.rstrip("@"), version) for s, _, version in (line.split()[-1].partition("@") for line in out.splitlines())
    ]


def known(name: str, version: str) -> bool:
    libc = version.lstrip("@").startswith("GLIBC_")
    return libc or any(p.match(name) is not None for p in (STABLE, STANDARD_CPP, WEAK_HOOK))


def test_only_the_stable_interface_of_torch() -> None:
    undefined = symbols("--undefined-only")
    assert any(STABLE.match(name) for name, _ in undefined), "no call into torch at all: not the operator library"
    assert [name for name, _ in undefined if TORCH_CPP.match(name)] == []
    assert [name for name, version in undefined if not known(name, version)] == []


def test_no_python() -> None:
    assert [name for name, _ in symbols("--undefined-only") if PYTHON.match(name)] == []


def test_nothing_of_ours_is_visible() -> None:
    """Two versions of the library can be loaded into one process."""
    assert [name for name, _ in symbols("--defined-only") if "ffn_ops" in name] == []


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
