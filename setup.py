# SPDX-License-Identifier: BSD-3-Clause
"""What the operator libraries are built from. Every compiler flag of the project stands here; metadata is in
pyproject.toml, and build_tools/ finds torch and compilers and runs what is not up to date.

Environment: CXX; FFN_OPS_CUDA = 1 (the CUDA library or an error), 0 (none) or unset (where an NVIDIA GPU is visible,
for that GPU); CUDA_HOME; TORCH_CUDA_ARCH_LIST; MAX_JOBS; FFN_OPS_CXXFLAGS and FFN_OPS_NVCCFLAGS, which are added.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT))

from build_tools import environment  # noqa: E402
from build_tools.environment import BuildError, require  # noqa: E402
from build_tools.objects import Build, Step  # noqa: E402

# The stable ABI of this version: what is built here loads on it and on every later one, under every Python.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
TORCH_HEADERS = ["-isystem", "{torch}/include"]
NO_BUILD_PATH = "-fmacro-prefix-map={torch}/=torch/"  # in messages; sources are named relative to the tree
# No contraction: a product and a sum are fused where the source says so, in every path alike. Never -march=native,
# never -ffast-math.
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fPIC",
    "-fwrapv",
    "-DNDEBUG",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
    NO_BUILD_PATH,
    STABLE_ABI,
]
NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "--threads=1",  # files are compiled side by side
    "--fmad=false",
    "--expt-relaxed-constexpr",
    "-Werror=all-warnings",
    *(f"-Xcompiler={flag}" for flag in ("-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", NO_BUILD_PATH)),
    "-DUSE_CUDA",  # shows the CUDA part of torch's C interface
    STABLE_ABI,
]
SLOWEST_FIRST = ("csrc/cpu/isa/avx", "csrc/cuda/gemm", "csrc/cpu/isa/")
NVCC_ENVIRONMENT = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")
OBJECTS = "build/objects"
PACKAGE, CPU_LIBRARY, CUDA_LIBRARY = "ffn_ops", "libffn_ops_cpu", "libffn_ops_cuda"


def sources(folder, pattern="**/*.cpp"):
    found = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob(pattern))
    return sorted(found, key=lambda path: [not path.startswith(first) for first in SLOWEST_FIRST])


def words(variable, default=""):
    return (os.environ.get(variable) or default).split()


def version_of(program):
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout


def library(name, files, compiler, link_flags, versions):
    """The steps that compile it, and the one that links it."""
    objects = [f"{OBJECTS}/{file}.o" for file in files]
    compiled = [
        Step(output, (*compiler, "-c", file, "-o", output), (file,), versions)
        for file, output in zip(files, objects, strict=True)
    ]
    output = f"{OBJECTS}/{name}.so"
    command = (*words("CXX", "c++"), "-shared", *words("LDFLAGS"), *objects, "-o", output, *link_flags)
    return compiled, Step(output, command, tuple(objects), versions, compiles=False)


def cpu_library(versions):
    compiler = [*words("CXX", "c++"), *TORCH_HEADERS, *CXX_FLAGS, *words("FFN_OPS_CXXFLAGS")]
    files = [*sources("csrc/cpu"), "csrc/registration.cpp"]
    return library(CPU_LIBRARY, files, compiler, ["-L{torch}/lib", "-ltorch_cpu", "-ltorch", "-lc10"], versions)


def cuda_library(versions, archs):
    compiler = ["{cuda}/bin/nvcc", *TORCH_HEADERS, *NVCC_FLAGS, *environment.arch_flags(archs)]
    torch = ["-L{torch}/lib", "-ltorch_cuda", "-ltorch_cpu", "-ltorch", "-lc10"]
    runtime = ["-L{cuda}/lib64", "-L{cuda}/lib", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    flags = [*torch, *runtime, "-Wl,--exclude-libs,ALL"]  # its own copy of the runtime, seen by nobody else
    return library(
        CUDA_LIBRARY, sources("csrc/cuda", "**/*.cu"), [*compiler, *words("FFN_OPS_NVCCFLAGS")], flags, versions
    )


class AnyPythonWheel(bdist_wheel):
    """The libraries are not linked to Python: one wheel serves every Python 3 on this platform."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class BuildLibraries(build_ext):
    """Makes what is not up to date below build/objects and puts it into the package, and beside it a record of what was
    built, for `ffn_ops.info()`."""

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + ".so"

    def run(self):
        try:
            made, record = self.make()
        except BuildError as error:
            sys.exit(f"\nffn_ops cannot be built: {error}\n")
        folders = [Path(self.build_lib, PACKAGE), *([ROOT / PACKAGE] if self.inplace or self.editable_mode else [])]
        for folder in folders:
            self.install(folder, made, record)
        if "reason" in record:
            print(f"\nffn_ops: built WITHOUT CUDA kernels: {record['reason']}\n", file=sys.stderr)

    def make(self):
        """The libraries that were built, and what there is to know about the CUDA library."""
        torch, oldest = environment.find_torch(), "{}.{}".format(*environment.OLDEST_TORCH)
        require(torch is not None, f"torch is not installed. Without build isolation, install torch >= {oldest} first.")
        require(
            torch.release >= environment.OLDEST_TORCH,
            f"torch >= {oldest} is needed for its stable ABI, found {torch.version}.",
        )
        toolkit = environment.find_toolkit(os.environ)
        choice = environment.choose_cuda(os.environ, torch, toolkit, environment.visible_gpus())
        environment.check_compiler(" ".join(words("CXX", "c++")))
        versions = {"torch": torch.version, "compiler": version_of(words("CXX", "c++")[0])}
        places, record, libraries = {"torch": str(torch.folder)}, {"reason": choice.reason}, [cpu_library(versions)]
        if choice.archs is not None:
            record = {"archs": choice.archs, "nvcc": "{}.{}".format(*toolkit.version), "torch": torch.version}
            places["cuda"] = str(toolkit.home)
            versions = {**versions, "nvcc": version_of(str(toolkit.home / "bin" / "nvcc"))}
            versions.update({name: os.environ.get(name, "") for name in NVCC_ENVIRONMENT})
            libraries.append(cuda_library(versions, choice.archs))
        build = Build(ROOT, places, int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0))))
        for compile_steps, link in libraries:
            with build.alone(f"{link.output}.lock"):
                compiled = build.run(compile_steps)
                build.run([link])
            print(f"ffn_ops: {len(compiled)} of {len(compile_steps)} objects of {Path(link.output).name} compiled")
        return [ROOT / link.output for _, link in libraries], record

    def install(self, folder, made, record):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("libffn_ops_*.so"):
            if old.name not in [each.name for each in made]:
                old.unlink()  # of an earlier build
        for each in made:
            fresh = folder / f"{each.name}.new"  # never written over: a process may have it in use
            shutil.copy2(each, fresh)
            os.replace(fresh, folder / each.name)
        # Sizes, as a library that was cut short on its way dies inside the loader.
        sizes = {each.name: each.stat().st_size for each in made}
        fresh = folder / "cuda_build.new"
        fresh.write_text(json.dumps({**record, "bytes": sizes}, indent=1) + "\n")
        os.replace(fresh, folder / "cuda_build.json")


setup(
    ext_modules=[Extension(f"{PACKAGE}.{CPU_LIBRARY}", [])],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": AnyPythonWheel},
)
