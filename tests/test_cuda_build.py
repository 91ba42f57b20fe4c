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
from routes import ROUTERS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import ffn_ops
from ffn_ops._library import CUDA_ABSENT, CUDA_LIBRARY, cuda_build

ROOT = Path(__file__).parent.parent
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


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_who_calls_it_without_a_library_is_told_why(tmp_path: Path) -> None:
    """The package as it is built without CUDA: the CPU works, and calls on a GPU name the reason."""
    shutil.copytree(ROOT / "ffn_ops" if (ROOT / "ffn_ops").exists() else Path(ffn_ops.__file__).parent,
                    tmp_path / "ffn_ops", ignore=shutil.ignore_patterns("*cuda*", "__pycache__"))  # fmt: skip
    shutil.copy(Path(ffn_ops.__file__).with_name("libffn_ops_cpu.so"), tmp_path / "ffn_ops")
    (tmp_path / "ffn_ops" / "cuda_build.json").write_text(json.dumps({"reason": "no CUDA toolkit found"}))
    code = """
import torch, ffn_ops
assert ffn_ops.info()["cuda"] == "not built: no CUDA toolkit found", ffn_ops.info()
assert ffn_ops.gated_act(torch.ones(3)).shape == (3,)
x = torch.ones(2, 3)
for op, args in (("gated_act", (x, None, "silu", 1.0)), ("ffn", (x, x, None, x.t(), None, None, None, False, "silu", 1.0, True))):
    overload = getattr(torch.ops.ffn_ops, op).default
    try:
        overload.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args)
    except RuntimeError as error:
        assert "no CUDA kernels" in str(error) and "no CUDA toolkit found" in str(error), error
    else:
        raise AssertionError(op)
"""
    python(code, PYTHONPATH=str(tmp_path))


@needs_library
def test_a_library_that_does_not_load_leaves_the_cpu_alone(tmp_path: Path) -> None:
    package = tmp_path / "ffn_ops"
    shutil.copytree(Path(ffn_ops.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "libffn_ops_cuda.so").write_bytes(b"no library")
    code = """
import torch, ffn_ops
assert "does not load on torch" in ffn_ops.info()["cuda"], ffn_ops.info()
assert ffn_ops.gated_act(torch.ones(3)).shape == (3,)
"""
    python(code, PYTHONPATH=str(tmp_path))


@needs_library
@no_gpu
def test_loading_asks_for_no_driver() -> None:
    code = "import ffn_ops; print(sorted(l.split('/')[-1] for l in open('/proc/self/maps') if 'libcuda.so' in l))"
    assert python(code).strip() == "[]"


# ---- shapes ---------------------------------------------------------------------------------------------------------


def flatten(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)]


def same_on_a_fake_gpu(make: Any, call: Any) -> None:
    """`call(*make())`, with its gradients: shapes, dtypes and strides as on the CPU, everything on the GPU."""

    def run(tensors: list[Tensor]) -> list[Tensor]:
        out = flatten(call(*tensors))
        wanted = [t for t in tensors if t.requires_grad]
        total = sum(t.sum() for t in out if t.requires_grad)
        return out + list(torch.autograd.grad(total, wanted, allow_unused=True)) if wanted else out  # type: ignore[arg-type]

    expected = run(make())
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(t).to("cuda").detach().requires_grad_(t.requires_grad) for t in make()]
        actual = run(tensors)
    for e, a in zip(expected, actual, strict=True):
        assert (e is None) == (a is None)
        if e is not None:
            assert a.device.type == "cuda" and (a.shape, a.dtype, a.stride()) == (e.shape, e.dtype, e.stride())


def weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("recompute", [False, True])
def test_dense_layers_on_a_fake_gpu(dtype: torch.dtype, recompute: bool) -> None:
    shapes = ((2, 3, 4), (6, 4), (5, 6), (6, 4), (6,), (6,), (5,))

    def ffn(x: Any, w_in: Any, w_down: Any, w_up: Any, b_in: Any, b_up: Any, b_down: Any) -> Tensor:
        return ffn_ops.ffn(x, w_in, w_down, w_up=w_up, b_in=b_in, b_up=b_up, b_down=b_down, recompute=recompute)

    same_on_a_fake_gpu(lambda: weights(*shapes, dtype=dtype), ffn)
    same_on_a_fake_gpu(lambda: weights((3, 4), (6, 4), (6, 4), dtype=dtype), ffn_ops.gated_linear)
    same_on_a_fake_gpu(lambda: weights((3, 4), (3, 4), dtype=dtype), ffn_ops.gated_act)


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_and_mixtures_on_a_fake_gpu(name: str) -> None:
    def mixture(logits: Tensor, x: Tensor, w_in: Tensor, w_down: Tensor) -> Any:
        routing = ROUTERS[name](logits)
        rows = ffn_ops.moe_dispatch(x, routing)
        return ffn_ops.moe(x, routing, w_in, w_down, gated=True), ffn_ops.moe_combine(rows, routing), *routing

    same_on_a_fake_gpu(lambda: weights((12, 4), (12, 3), (4, 10, 3), (4, 3, 5)), mixture)


def test_devices_that_differ_are_named() -> None:
    with FakeTensorMode():
        x, w = torch.ones(3, 4), torch.ones(6, 4, device="cuda")
        with pytest.raises(ValueError, match="w_in: expected device cpu as x has, got cuda:0"):
            ffn_ops.ffn(x, w, torch.ones(4, 6))
        with pytest.raises(ValueError, match="routing.token: expected device cuda:0 as x has, got cpu"):
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
