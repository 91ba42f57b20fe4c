# SPDX-License-Identifier: BSD-3-Clause
"""What the build finds on this machine: torch, compilers, the CUDA toolkit, GPUs. It compiles nothing and does not
import torch."""

from __future__ import annotations

import ctypes
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

OLDEST_TORCH = (2, 11)
FIND = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"


class BuildError(Exception):
    """The message is for the person who builds."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise BuildError(message)


@dataclass(frozen=True)
class Torch:
    folder: Path
    version: str
    cuda: str | None  # such as 13.0

    @property
    def release(self) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", self.version)[:2])


def find_torch() -> Torch | None:
    """Of this interpreter; in pip's isolated build environment (PYTHONPATH, which -I ignores) that of the environment
    around it."""
    for isolated in ([], ["-I"]):
        found = subprocess.run([sys.executable, *isolated, "-c", FIND], capture_output=True, text=True, check=False)
        folder = Path(found.stdout.strip()).parent
        if (folder / "version.py").is_file() and (folder / "include").is_dir():
            facts = runpy.run_path(str(folder / "version.py"))
            return Torch(folder, str(facts["__version__"]), facts.get("cuda"))
    return None


def check_compiler(compiler: str) -> None:
    require(
        shutil.which(compiler.split()[0]) is not None,
        f"no C++ compiler {compiler!r} on PATH. Install g++ >= 11 or clang++ >= 14, or set CXX.",
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(
            "#include <concepts>\n#include <bit>\ntemplate <std::integral T> T f(T t) { return t; }\nint x = f(1);\n"
        )
        probe = subprocess.run(
            [*compiler.split(), "-std=c++20", "-c", str(source), "-o", str(source.with_suffix(".o"))],
            capture_output=True,
            text=True,
        )
    require(probe.returncode == 0, f"{compiler!r} does not compile C++20 (g++ >= 11, clang++ >= 14):\n{probe.stderr}")


@dataclass(frozen=True)
class Toolkit:
    home: Path
    version: tuple[int, int]
    archs: tuple[str, ...] = ()  # that its nvcc compiles for, such as 90


def find_toolkit(environ: Mapping[str, str]) -> Toolkit | None:
    """CUDA_HOME, else that of nvcc on PATH, else /usr/local/cuda."""
    on_path = shutil.which("nvcc", path=environ.get("PATH"))
    home = environ.get("CUDA_HOME") or (Path(on_path).resolve().parent.parent if on_path else "/usr/local/cuda")
    nvcc = Path(home, "bin", "nvcc")
    if not nvcc.exists():
        return None
    about, archs = (
        subprocess.run([str(nvcc), option], capture_output=True, text=True, check=False).stdout
        for option in ("--version", "--list-gpu-arch")
    )
    found = re.search(r"release (\d+)\.(\d+)", about)
    if found is None:
        return None
    return Toolkit(Path(home), (int(found[1]), int(found[2])), tuple(re.findall(r"compute_(\d+)\b", archs)))


def visible_gpus() -> list[tuple[int, int]]:
    """The architecture of each GPU that the driver shows, with CUDA_VISIBLE_DEVICES heeded."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, found = ctypes.c_int(), []
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    for device in range(count.value):
        major, minor = ctypes.c_int(), ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        found.append((major.value, minor.value))
    return found


# Ampere and Hopper, and for whatever comes later code that the driver compiles when it loads it.
DEFAULT_ARCHS = "8.0+PTX;9.0a"
ARCH = re.compile(r"(\d+)\.(\d+)([af]?)(\+PTX)?")


def usable_archs(archs: str) -> str:
    """Of a list as torch takes it, those from Ampere on: the kernels need its bfloat16 and asynchronous copies."""
    every = archs.replace(" ", ";").split(";")
    wrong = [arch for arch in every if not ARCH.fullmatch(arch)]
    require(not wrong, f"TORCH_CUDA_ARCH_LIST: expected a list such as {DEFAULT_ARCHS}, got {archs!r}.")
    usable = [arch for arch in every if int(arch.split(".")[0]) >= 8]
    require(bool(usable), f"TORCH_CUDA_ARCH_LIST: expected an architecture from 8.0 on, got {archs!r}.")
    if len(usable) < len(every):
        print(f"ffn_ops: CUDA kernels need architecture 8.0: built for {';'.join(usable)}", file=sys.stderr)
    return ";".join(usable)


@dataclass(frozen=True)
class CudaChoice:
    """Either the architectures that the CUDA library is built for, or why it is not built."""

    archs: str | None = None
    reason: str = ""


def choose_cuda(
    environ: Mapping[str, str], torch: Torch, toolkit: Toolkit | None, gpus: Sequence[tuple[int, int]]
) -> CudaChoice:
    """FFN_OPS_CUDA: 1 the library or an error, 0 none, unset: where a GPU is visible, for that GPU."""
    wish = environ.get("FFN_OPS_CUDA", "")
    require(wish in ("", "0", "1"), f"FFN_OPS_CUDA: expected 1, 0 or nothing, got {wish!r}.")
    if wish == "0":
        return CudaChoice(reason="FFN_OPS_CUDA=0")
    if wish == "" and not gpus:
        return CudaChoice(reason="no NVIDIA GPU was visible to the build")
    asked = environ.get("TORCH_CUDA_ARCH_LIST") or ""
    fitting = sorted(gpu for gpu in set(gpus) if gpu >= (8, 0))
    unknown = [f"{a}.{b}" for a, b in fitting if toolkit and toolkit.archs and f"{a}{b}" not in toolkit.archs]
    if torch.cuda is None:
        reason = f"torch {torch.version} of the build environment has no CUDA"
    elif toolkit is None:
        reason = "no CUDA toolkit found (CUDA_HOME, nvcc on PATH, /usr/local/cuda)"
    elif toolkit.version[0] != int(torch.cuda.split(".")[0]):
        found = "{}.{}".format(*toolkit.version)
        reason = f"nvcc {found} does not fit torch {torch.version}, which needs CUDA {torch.cuda}"
    elif wish == "1":
        return CudaChoice(usable_archs(asked or DEFAULT_ARCHS))
    elif asked:
        return CudaChoice(usable_archs(asked))
    elif not fitting:
        reason = "the GPU is older than architecture 8.0, which the kernels need"
    elif unknown:
        reason = "nvcc {}.{} does not know the GPU's architecture {}".format(*toolkit.version, ", ".join(unknown))
    else:
        return CudaChoice(";".join("9.0a" if gpu == (9, 0) else "{}.{}".format(*gpu) for gpu in fitting))
    require(wish != "1", f"FFN_OPS_CUDA=1, but {reason}.")
    return CudaChoice(reason=reason)


def arch_flags(archs: str) -> list[str]:
    """Kernels with wgmma are compiled for 9.0a alone; a GPU of 9.0 must not meet code of plain 9.0 in its place."""
    flags = []
    for arch in archs.split(";"):
        found = ARCH.fullmatch(arch)
        assert found is not None  # of usable_archs
        number = "".join(found.group(1, 2, 3))
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if found[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    every = archs.split(";")
    return [*flags, "-DFFN_OPS_HOPPER"] if "9.0a" in every and "9.0" not in every else flags
