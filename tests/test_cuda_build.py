# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA library without a GPU: what was built and why not, loading, registration, shapes. Kernels are tested on the
host by tests/simt, and on a GPU by the other tests with ``--device cuda``."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from operator_calls import CALLS
from routes import ROUTERS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import ffn_ops
from ffn_ops import _info, _library
from ffn_ops._library import CUDA_ABSENT, CUDA_LIBRARY, HOW_TO_GET_CUDA, cuda_build

OPERATORS = sorted(
    name
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("ffn_ops::") and not name.startswith("ffn_ops::_")
)
needs_library = pytest.mark.skipif(CUDA_ABSENT is not None, reason=f"CUDA library: {CUDA_ABSENT}")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def test_info_says_what_was_built() -> None:
    text, build = ffn_ops.info()["cuda"], cuda_build()
    if CUDA_ABSENT is None:
        assert build["archs"] in text and build["nvcc"] in text
    else:
        assert text == CUDA_ABSENT and ("not built: " in text or "does not load" in text)
        assert CUDA_LIBRARY.exists() or build["reason"] in text


@needs_library
def test_code_for_every_listed_architecture() -> None:
    tool = shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("cuobjdump is not installed")
    out = subprocess.run([tool, "--list-elf", "--list-ptx", str(CUDA_LIBRARY)], capture_output=True, text=True).stdout
    for arch in re.split("[; ]", cuda_build()["archs"]):
        number = arch.removesuffix("+PTX").replace(".", "")
        assert f"sm_{number}.cubin" in out
        assert f"sm_{number}.ptx" in out or not arch.endswith("+PTX")


@needs_library
def test_every_operator_has_a_kernel() -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert len(OPERATORS) > 15
    assert [name for name in OPERATORS if not has(name, "CUDA")] == []
    assert [name for name in OPERATORS if not has(name, "CPU")] == []


def test_every_operator_has_sources_for_both() -> None:
    """Where no CUDA library is built, too."""
    csrc = Path(__file__).parents[1] / "csrc"
    if not csrc.exists():
        pytest.skip("needs the sources")
    for device in ("cpu", "cuda"):
        sources = (csrc / device).glob("*.cpp" if device == "cpu" else "*.cu")
        names = {
            f"ffn_ops::{name}" for source in sources for name in re.findall(r'm\.impl\("(\w+)"', source.read_text())
        }
        assert set(OPERATORS) - names == set()


def python(code: str, folder: Path, *arguments: str) -> str:
    """In a folder whose package comes before the installed one."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def copied_package(folder: Path) -> Path:
    package = folder / "ffn_ops"
    shutil.copytree(Path(ffn_ops.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    return package


def test_who_calls_it_without_a_library_is_told_why(tmp_path: Path) -> None:
    """The package as it is built without CUDA: the CPU works, and calls on a GPU name the reason."""
    package = copied_package(tmp_path)
    (package / "libffn_ops_cuda.so").unlink(missing_ok=True)
    (package / "cuda_build.json").write_text(json.dumps({"reason": "no CUDA toolkit found"}))
    code = """
import sys, torch, ffn_ops
assert ffn_ops.info()["cuda"] == "not built: no CUDA toolkit found. " + sys.argv[1], ffn_ops.info()
assert ffn_ops.gated_act(torch.ones(3)).shape == (3,)
x, none, act = torch.ones(2, 3), (None, None, None), ("silu", [0.0, 0.0])
for op, args in (("gated_act", (x, None, *act)), ("ffn", (x, x, None, x.t(), *none, False, False, *act, True))):
    overload = getattr(torch.ops.ffn_ops, op).default
    try:
        overload.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args)
    except RuntimeError as error:
        assert "no CUDA kernels" in str(error) and "no CUDA toolkit found. " + sys.argv[1] in str(error), error
    else:
        raise AssertionError(op)
"""
    python(code, tmp_path, HOW_TO_GET_CUDA)


@needs_library
def test_a_library_that_does_not_load_leaves_the_cpu_alone(tmp_path: Path) -> None:
    """Too short for what the build wrote down, and of the right size."""
    library = copied_package(tmp_path) / "libffn_ops_cuda.so"
    sizes = _library.cuda_build().get("bytes", {})
    code = """
import sys, torch, ffn_ops
assert sys.argv[1] in ffn_ops.info()["cuda"], ffn_ops.info()
assert ffn_ops.gated_act(torch.ones(3)).shape == (3,)
"""
    library.write_bytes(b"no library")
    python(code, tmp_path, "10 bytes, the build wrote" if library.name in sizes else "does not load on torch")
    with library.open("wb") as file:
        file.truncate(sizes.get(library.name, 10))
    python(code, tmp_path, "does not load on torch")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "3",
        "null",
        '"text"',
        "{",
        "\xff",
        "[" * 100_000,
        '{"reason": [1]}',
        '{"bytes": [1]}',
        '{"bytes": {"x": 1}}',
    ],
)
def test_a_record_of_another_shape_is_no_reason_not_to_work(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cuda_build.json").write_text(text, encoding="latin-1")
    monkeypatch.setattr(_library, "CUDA_BUILD", tmp_path / "cuda_build.json")
    monkeypatch.setattr(_library, "CUDA_LIBRARY", tmp_path / "libffn_ops_cuda.so")
    known = "[1]" if "reason" in text else "nothing is known about the build"
    assert _library._load_cuda() == f"not built: {known}. {HOW_TO_GET_CUDA}"
    assert _library._wrong_size(_library.LIBRARY) is None
    monkeypatch.setattr(_info, "CUDA_ABSENT", None)
    assert ffn_ops.info()["cuda"].startswith("built for ?")


def test_a_library_that_was_cut_short_is_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The loader itself would end the process. Without the CUDA library the CPU works."""
    size = _library.LIBRARY.stat().st_size
    for kind in ("LIBRARY", "CUDA_LIBRARY"):
        name = getattr(_library, kind).name
        (tmp_path / name).write_bytes(_library.LIBRARY.read_bytes()[: size // 2])
        (tmp_path / "cuda_build.json").write_text(json.dumps({"bytes": {name: size}}))
        monkeypatch.setattr(_library, "CUDA_BUILD", tmp_path / "cuda_build.json")
        monkeypatch.setattr(_library, kind, tmp_path / name)
        message = f"{name} has {size // 2} bytes, the build wrote {size}"
        if kind == "LIBRARY":
            with pytest.raises(ImportError, match=message):
                _library._load()
        else:
            assert _library._load_cuda() == f"does not load: {message}"


def test_what_is_no_library_is_an_import_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / _library.LIBRARY.name).write_bytes(b"no library")
    monkeypatch.setattr(_library, "LIBRARY", tmp_path / _library.LIBRARY.name)
    monkeypatch.setattr(_library, "CUDA_BUILD", tmp_path / "none")
    with pytest.raises(ImportError, match="does not load on torch"):
        _library._load()


def test_the_build_wrote_sizes_down() -> None:
    sizes = cuda_build().get("bytes", {})
    assert sizes[_library.LIBRARY.name] == _library.LIBRARY.stat().st_size


@needs_library
@no_gpu
def test_loading_asks_for_no_driver(tmp_path: Path) -> None:
    copied_package(tmp_path)
    code = "import ffn_ops; print([line for line in open('/proc/self/maps') if 'libcuda.so' in line])"
    assert python(code, tmp_path).strip() == "[]"


@pytest.mark.parametrize("name", CALLS)
def test_fakes_on_a_gpu(name: str) -> None:
    """What compilers see of each operator, forward and backward: as on the CPU, and everything on the GPU."""
    op, args = CALLS[name]

    def results(result: Any) -> list[Tensor]:
        return [result] if isinstance(result, Tensor) else list(result)

    with torch.no_grad():
        expected = results(op(*args))
        with FakeTensorMode() as mode:
            fakes = pytree.tree_map_only(Tensor, lambda t: mode.from_tensor(t).to("cuda"), args)
            actual = results(op(*fakes))
    for e, a in zip(expected, actual, strict=True):
        assert a.device.type == "cuda" and (a.shape, a.dtype, a.stride()) == (e.shape, e.dtype, e.stride())


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_and_mixtures_on_a_fake_gpu(name: str) -> None:
    """No step of a router falls back to the CPU or asks what is in a tensor."""

    def mixture() -> list[Tensor]:
        logits, x, w_in, w_down = (torch.ones(s) for s in ((12, 4), (12, 3), (4, 10, 3), (4, 3, 5)))
        routing = ROUTERS[name](logits)
        y = ffn_ops.moe(x, routing, w_in, w_down, gated=True)
        return [y, ffn_ops.moe_combine(ffn_ops.moe_dispatch(x, routing), routing), *routing, *routing.statistics()]

    expected = mixture()
    with FakeTensorMode(), torch.device("cuda"):
        actual = mixture()
    for e, a in zip(expected, actual, strict=True):
        assert a.device.type == "cuda" and (a.shape, a.dtype) == (e.shape, e.dtype)


def test_devices_that_differ_are_named() -> None:
    with FakeTensorMode():
        x, w = torch.ones(3, 4), torch.ones(6, 4, device="cuda")
        with pytest.raises(ValueError, match="w_in: expected device cpu as x has, got cuda:0"):
            ffn_ops.ffn(x, w, torch.ones(4, 6))
        with pytest.raises(ValueError, match=r"routing\.token: expected device cuda:0 as x has, got cpu"):
            routing = ffn_ops.routing.top_k(torch.ones(3, 2), 1)
            ffn_ops.moe(x.to("cuda"), routing, torch.ones(2, 6, 4, device="cuda"), torch.ones(2, 4, 6, device="cuda"))


# What cuBLAS is asked for goes through linear.out, as addmm's factors cannot be passed; it must stay what addmm is.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_out_adds_a_whole_matrix_in_place(dtype: torch.dtype) -> None:
    a, b = torch.randn(5, 7, dtype=dtype), torch.randn(7, 3, dtype=dtype)
    out = torch.randn(5, 3, dtype=dtype)
    expected = torch.addmm(out, a, b)
    torch.ops.aten.linear.out(a, b.t(), out, out=out)
    assert torch.equal(out, expected)
    bias = torch.randn(3, dtype=dtype)
    torch.ops.aten.linear.out(a, b.t(), bias, out=out)
    assert torch.equal(out, torch.addmm(bias, a, b))
