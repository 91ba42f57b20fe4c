# SPDX-License-Identifier: BSD-3-Clause
"""Options and fixtures for every test file. No tests, no references."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Inductor takes cpuinfo's word for vectors: else it compiles two programs to see whether the compiler knows them, 6 s.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
import torch

import ffn_ops

# all instruction sets of this machine, or the one in the environment
ISAS = os.environ.get("FFN_OPS_ISA", torch.ops.ffn_ops._isas()).split()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run what takes minutes or many gigabytes")
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where every test creates its tensors")


def pytest_configure(config: pytest.Config) -> None:
    """Sets the device before collection, because some tests make their tensors on import."""
    config.addinivalue_line("markers", "cpu_only(reason): not with --device cuda, because of the reason")
    config.addinivalue_line("markers", "cuda_only: only with --device cuda")
    if config.getoption("--device") == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch.cuda.is_available() is false")
        try:
            ffn_ops.gated_act(torch.ones(1, device="cuda"))
        except RuntimeError as error:
            raise pytest.UsageError(f"--device cuda: {error}\nthe CUDA library: {ffn_ops.info()['cuda']}") from None
        torch.set_default_device("cuda")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrizes tests by the instruction sets of this machine; a GPU has only one."""
    if "isa" in metafunc.fixturenames:
        cuda = metafunc.config.getoption("--device") == "cuda"
        metafunc.parametrize("isa", ["cuda"] if cuda else ISAS, indirect=True)


def proves_nothing_new(item: pytest.Item) -> bool:
    """Whether ``avx512_bf16`` would run the kernels of ``avx512`` again: bfloat16 products alone differ."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    again = params.get("isa") == "avx512_bf16" and "avx512" in ISAS
    return again and params.get("dtype", torch.bfloat16) is not torch.bfloat16


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    elsewhere = "cpu_only" if config.getoption("--device") == "cuda" else "cuda_only"
    gone = [item for item in items if elsewhere in item.keywords or proves_nothing_new(item)]
    if gone:
        config.hook.pytest_deselected(items=gone)
        left = set(items) - set(gone)
        items[:] = [item for item in items if item in left]

    # Runs one case on all instruction sets in a row, so that the rule of accuracy computes its references once.
    place: dict[str, int] = {}

    def case(item: pytest.Item) -> str:
        params = getattr(item, "callspec", None) and item.callspec.params
        return item.nodeid.replace(params["isa"], "", 1) if params and "isa" in params else item.nodeid

    for i, item in enumerate(items):
        place.setdefault(case(item), i)
    items.sort(key=lambda item: place[case(item)])

    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: minutes or many gigabytes; run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Stops after an illegal access: every later call on the GPU would fail with the same error."""
    if report.failed and torch.get_default_device().type == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            pytest.exit(f"the GPU is lost to this process since {report.nodeid}: {first}", returncode=3)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with every instruction set of this machine, or with that of ``FFN_OPS_ISA``."""
    if request.param == "cuda":
        yield request.param
        return
    before = torch.ops.ffn_ops._isa()
    torch.ops.ffn_ops._use_isa(request.param)
    yield request.param
    torch.ops.ffn_ops._use_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads after a test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def dynamo() -> Iterator[None]:
    """Resets the compiler, so that graphs of earlier tests are gone."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
