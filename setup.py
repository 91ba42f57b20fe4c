"""Builds the operator libraries. Every compiler flag of the project stands here; metadata is in pyproject.toml.

Environment: CXX; FFN_OPS_CUDA = 1 (the CUDA library or an error), 0 (none) or unset (where a CUDA toolkit is found);
CUDA_HOME; TORCH_CUDA_ARCH_LIST; MAX_JOBS; FFN_OPS_CXXFLAGS and FFN_OPS_NVCCFLAGS, which are added.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

OLDEST_TORCH = (2, 11)
# The stable ABI of this version: what is built here loads on it and on every later one, under every Python.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
SOURCE_PREFIX = f"-fmacro-prefix-map={Path(__file__).parent.resolve()}/="  # no build path in messages
# No contraction: a product and a sum are fused where the source says so, in every path alike. Never -march=native,
# never -ffast-math.
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
    SOURCE_PREFIX,
    STABLE_ABI,
]
NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "--threads=1",  # files are compiled side by side
    "--fmad=false",
    "--expt-relaxed-constexpr",
    "-Werror=all-warnings",
    *(f"-Xcompiler={flag}" for flag in ("-fvisibility=hidden", "-ffp-contract=off", "-Wall", SOURCE_PREFIX)),
    "-DUSE_CUDA",  # shows the CUDA part of torch's C interface
    STABLE_ABI,
]
# Ampere and Hopper, and for whatever comes later code that the driver compiles when it loads it.
DEFAULT_ARCHS = "8.0+PTX;9.0a"


def require(condition: bool, message: str) -> None:
    if not condition:
        sys.exit(f"\nffn_ops cannot be built: {message}\n")


def check_compiler() -> None:
    compiler = os.environ.get("CXX", "c++")
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


try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension
except ImportError as error:
    require(False, f"torch is not importable ({error}). Without build isolation, install torch >= 2.11 first.")

require(
    tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= OLDEST_TORCH,
    f"torch >= 2.11 is needed for its stable ABI, found {torch.__version__}.",
)
if not {"clean", "egg_info", "sdist", "dist_info"} & set(sys.argv):
    check_compiler()


def nvcc_version() -> tuple[int, int] | None:
    """Of the toolkit that torch's build tools use: CUDA_HOME, else of nvcc on PATH, else /usr/local/cuda."""
    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    if CUDA_HOME is None or not nvcc.exists():
        return None
    text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def reason_against_cuda() -> str | None:
    """Why the CUDA library is not built, or None. A GPU is not asked for: machines that build often have none."""
    wish = os.environ.get("FFN_OPS_CUDA", "")
    require(wish in ("", "0", "1"), f"FFN_OPS_CUDA: expected 1, 0 or nothing, got {wish!r}.")
    if wish == "0":
        return "FFN_OPS_CUDA=0"
    nvcc, of_torch = nvcc_version(), torch.version.cuda
    if of_torch is None:
        reason = f"torch {torch.__version__} of the build environment has no CUDA"
    elif nvcc is None:
        reason = "no CUDA toolkit found (CUDA_HOME, nvcc on PATH, /usr/local/cuda)"
    elif nvcc[0] != int(of_torch.split(".")[0]):
        reason = f"nvcc {nvcc[0]}.{nvcc[1]} does not fit torch {torch.__version__}, which needs CUDA {of_torch}"
    else:
        return None
    require(wish != "1", f"FFN_OPS_CUDA=1, but {reason}.")
    return reason


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


def hopper_flags(archs: str) -> list[str]:
    """Kernels with wgmma are compiled for 9.0a alone; a GPU of 9.0 must not meet code of plain 9.0 in its place."""
    every = archs.split(";")
    return ["-DFFN_OPS_HOPPER"] if "9.0a" in every and "9.0" not in every else []


def arch_flags(archs: str) -> list[str]:
    flags = []
    for arch in archs.split(";"):
        found = ARCH.fullmatch(arch)
        number = "".join(found.group(1, 2, 3))
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if found[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class AnyPythonWheel(bdist_wheel):
    """The libraries are not linked to Python: one wheel serves every Python 3 on this platform."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class BuildLibraries(BuildExtension):
    """Writes down beside the libraries what was built, for `ffn_ops.info()`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, no_python_abi_suffix=True, **kwargs)

    def run(self):
        super().run()
        folder = Path(self.get_ext_fullpath(CPU_LIBRARY)).parent
        if "reason" in CUDA_BUILD:
            (folder / "libffn_ops_cuda.so").unlink(missing_ok=True)  # of an earlier build
            print(f"\nffn_ops: built WITHOUT CUDA kernels: {CUDA_BUILD['reason']}\n", file=sys.stderr)
        # Sizes, as a library that was cut short on its way dies inside the loader.
        sizes = {library.name: library.stat().st_size for library in sorted(folder.glob("libffn_ops_*.so"))}
        fresh = folder / "cuda_build.new"
        fresh.write_text(json.dumps({**CUDA_BUILD, "bytes": sizes}, indent=1) + "\n")
        os.replace(fresh, folder / "cuda_build.json")


def sources(folder: str, pattern: str = "**/*.cpp") -> list[str]:
    return sorted(str(path) for path in Path(folder).glob(pattern))


def added_flags(variable: str) -> list[str]:
    return os.environ.get(variable, "").split()


CPU_LIBRARY, CUDA_LIBRARY = "ffn_ops.libffn_ops_cpu", "ffn_ops.libffn_ops_cuda"
extensions = [
    CppExtension(
        CPU_LIBRARY,
        ["csrc/registration.cpp", *sources("csrc/cpu")],
        extra_compile_args=[*CXX_FLAGS, *added_flags("FFN_OPS_CXXFLAGS")],
        py_limited_api=True,  # keeps libtorch_python out
        depends=sources("csrc", "**/*.h"),
    )
]
against_cuda = reason_against_cuda()
if against_cuda is not None:
    CUDA_BUILD = {"reason": against_cuda}
else:
    archs = usable_archs(os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS)
    CUDA_BUILD = {"archs": archs, "nvcc": "{}.{}".format(*nvcc_version()), "torch": torch.__version__}
    extensions.append(
        CppExtension(
            CUDA_LIBRARY,
            sources("csrc/cuda", "**/*.cu"),
            include_dirs=[str(Path(CUDA_HOME, "include"))],
            library_dirs=[str(Path(CUDA_HOME, folder)) for folder in ("lib64", "lib")],
            libraries=["torch_cuda", "cudart_static", "rt", "dl", "pthread"],
            extra_link_args=["-Wl,--exclude-libs,ALL"],  # its own copy of the runtime, seen by nobody else
            extra_compile_args={
                "nvcc": [*NVCC_FLAGS, *arch_flags(archs), *hopper_flags(archs), *added_flags("FFN_OPS_NVCCFLAGS")]
            },
            py_limited_api=True,
            depends=[*sources("csrc", "**/*.h"), *sources("csrc", "**/*.cuh")],
        )
    )

setup(ext_modules=extensions, cmdclass={"build_ext": BuildLibraries, "bdist_wheel": AnyPythonWheel})
