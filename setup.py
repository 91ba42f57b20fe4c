"""Builds the operator libraries. Every compiler flag of the project stands here; metadata is in pyproject.toml."""

import os
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
    f"-fmacro-prefix-map={Path(__file__).parent.resolve()}/=",  # no build path in messages
    STABLE_ABI,
]


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
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    require(False, f"torch is not importable ({error}). Without build isolation, install torch >= 2.11 first.")

require(
    tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= OLDEST_TORCH,
    f"torch >= 2.11 is needed for its stable ABI, found {torch.__version__}.",
)
if not {"clean", "egg_info", "sdist", "dist_info"} & set(sys.argv):
    check_compiler()


class AnyPythonWheel(bdist_wheel):
    """The libraries are not linked to Python: one wheel serves every Python 3 on this platform."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def sources(folder: str, pattern: str = "**/*.cpp") -> list[str]:
    return sorted(str(path) for path in Path(folder).glob(pattern))


extensions = [
    CppExtension(
        "ffn_ops.libffn_ops_cpu",
        ["csrc/registration.cpp", *sources("csrc/cpu")],
        extra_compile_args=[*CXX_FLAGS, *os.environ.get("FFN_OPS_CXXFLAGS", "").split()],
        py_limited_api=True,  # keeps libtorch_python out
        depends=sources("csrc", "**/*.h"),
    )
]

setup(
    ext_modules=extensions,
    cmdclass={
        "build_ext": BuildExtension.with_options(no_python_abi_suffix=True),
        "bdist_wheel": AnyPythonWheel,
    },
)
