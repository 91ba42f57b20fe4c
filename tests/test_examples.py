# SPDX-License-Identifier: BSD-3-Clause
"""The scripts in examples/, with few steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.cpu_only("the scripts run on the CPU")
EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lora(capsys: pytest.CaptureFixture[str]) -> None:
    """The adapters learn, and each report says what is fused."""
    pytest.importorskip("peft")
    before, after = example("lora").main(["--steps", "16"])
    assert after < before - 0.03
    reports = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "LlamaMLP" in line]
    assert reports == ["replaced", "replaced", "replaced"]


def test_qlora(capsys: pytest.CaptureFixture[str]) -> None:
    """Both bases learn alike, and the adapter that was saved gives the loss of the one that was trained."""
    pytest.importorskip("peft")
    losses = example("qlora").main(["--quick"])
    assert abs(losses["bfloat16"][0] - losses["mxfp4"][0]) < 0.02 and losses["mxfp4"][0] < 5.3
    assert "saved and loaded: 'def __init__(self, " in capsys.readouterr().out


def test_generate(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    untouched, replaced = example("generate").main(["--steps", "8", "--tokens", "12"])
    assert untouched == replaced and untouched.startswith("The statement ")
    assert "same text: True" in capsys.readouterr().out
