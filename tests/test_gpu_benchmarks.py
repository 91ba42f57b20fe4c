# SPDX-License-Identifier: BSD-3-Clause
"""The harness's part for GPUs, as far as a machine without one can run it: events are clocks of the host here."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import command, dense, gpu, gpu_report, gpu_rows, moe, targets
from benchmarks.harness import Budget, Harness, Measured
from benchmarks.providers import COMPILE, COMPILING, EAGER, GROUPED_COMPILE, LOOP, MOE_PROVIDERS, OURS, PROVIDERS
from benchmarks.workloads import Elementwise, Mixture, Row, Shape
from ffn_ops._timing import Timed

pytestmark = pytest.mark.cpu_only("its sizes and its clock are a CPU's")

SHORT = Budget(seconds=10.0, most_rounds=2, least_sample=1e-5)
SMALL = Shape(64, 32, 48, "gelu", bias=True)
MIXED = Mixture(64, 32, 48, E=4)
ACTIVATION = Elementwise(T=33, F=50)


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


class SmallGpu(gpu.Gpu):
    def __init__(self) -> None:
        self.cold = torch.empty(1000, dtype=torch.uint8)
        self._copied = torch.empty(2, gpu.COPIED, dtype=torch.uint8)
        self._factors = ("bfloat16", torch.randn(3, gpu.MATRIX, gpu.MATRIX).bfloat16())


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> gpu.Gpu:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(gpu, "MATRIX", 64)
    monkeypatch.setattr(gpu, "COPIED", 1 << 16)
    return SmallGpu()


@pytest.mark.parametrize("shape", [SMALL, MIXED, ACTIVATION], ids=lambda shape: shape.label)
def test_rows_are_verified_and_timed(shape: Shape, machine: gpu.Gpu) -> None:
    providers = [p for p in (MOE_PROVIDERS if isinstance(shape, Mixture) else PROVIDERS) if p.name not in COMPILING]
    row = Row(shape, "bfloat16", "training", configuration="1")
    measured = Harness(SHORT, machine, providers).measure(row)
    record = {**measured.record(), "device": "cuda"}
    ours = record["providers"][OURS]
    assert ours["n"] == 2 and ours["error"] <= 1 and ours["note"] == ""
    assert ours["forward"] > 0 and ours["backward"] > 0
    assert all(f < whole for f, whole in zip(ours["forward_seconds"], ours["seconds"], strict=True))
    assert record["matmul_gflops"] > 0 and record["copy_gbs"] > 0 and record["clocks"] == {}
    text = gpu_report.row_text(record)
    assert f"x {EAGER}" in text or f"x {LOOP}" in text
    assert "SonicMoE 336 / 363" in text and text.endswith("*")
    assert row.name in gpu_report.summary_text([record])


def test_inference_has_no_backward(machine: gpu.Gpu) -> None:
    row = Row(SMALL, "bfloat16", "inference")
    (eager,) = Harness(SHORT, machine, PROVIDERS[:1]).measure(row).timed
    assert eager.forward_seconds and all(
        f <= whole < 2 * f for f, whole in zip(eager.forward_seconds, eager.seconds, strict=True)
    )


def record(row: Row, **seconds: tuple[float, float]) -> dict[str, Any]:
    """Of providers with one round: seconds of forward and of the whole."""
    names = {"compiled": COMPILE, "grouped": GROUPED_COMPILE, "ours": OURS}
    timed = [
        Timed(names[key], [whole], [forward], error=0.5, first_call=1.0) for key, (forward, whole) in seconds.items()
    ]
    limits = {"matmul_gflops": [700_000.0], "copy_gbs": [3000.0]}
    return json.loads(json.dumps(Measured(row, {"clocks": {}}, limits, timed).record()))


def test_rates() -> None:
    (row, *_) = gpu_rows.moe_rows()
    flops = 6 * 40960 * 8 * 768 * 256
    assert row.flops == 3 * flops
    found = record(row, ours=(1e-3, 3e-3))
    forward, backward = gpu_report.rates(found, found["providers"][OURS])
    assert forward == pytest.approx(flops / 1e-3) and backward == pytest.approx(2 * flops / 2e-3)
    assert gpu_report.of_limit(found, found["providers"][OURS])[0] == pytest.approx(flops / 1e-3 / 700e12)


def test_bytes_of_the_activation() -> None:
    act = gpu_rows.dense_rows()[0]
    one = 2 * act.shape.T * act.shape.F
    assert (act.forward_bytes, act.least_bytes) == (3 * one, 8 * one)
    found = record(act, ours=(3 * one / 2700e9, 3 * one / 2700e9 + 5 * one / 1500e9))
    assert gpu_report.of_limit(found, found["providers"][OURS]) == pytest.approx((0.9, 0.5))
    judged = {t["what"]: t for t in targets.judged([found])}
    assert judged["gated_act forward: of the copy bandwidth"]["reached"]
    assert not judged["gated_act backward: of the copy bandwidth"]["reached"]
    assert "short by 41.2%" in targets.targets_text([found])


def test_targets_of_dense_rows_need_all_of_them() -> None:
    rows = [record(row, compiled=(1.0, 3.0), ours=(1.0, 2.0)) for row in gpu_rows.dense_rows()[1:]]
    assert [t["measured"] for t in targets.judged(rows)][-1] == 1.5
    assert [t["measured"] for t in targets.judged(rows[1:])][-1] is None


def test_targets_of_mixtures() -> None:
    rows = [record(row, grouped=(1.0, 3.0), ours=(1.0, 4.0)) for row in gpu_rows.moe_rows()[:2]]
    judged = targets.judged(rows)
    assert len(judged) == 12 and [t["measured"] for t in judged[:3]] == [0.75, 0.75, None]


def test_rows_of_the_list() -> None:
    assert [row.configuration for row in gpu_rows.moe_rows()] == [str(number) for number in range(1, 16)]
    rows = [*gpu_rows.moe_rows(), *gpu_rows.dense_rows()]
    assert len({row.name for row in rows}) == len(rows) and all(row.name.endswith("training cuda") for row in rows)
    assert set(gpu_rows.PUBLISHED) == set(gpu_rows.MIXTURES)
    most = max(row.shape.parameters for row in rows)
    assert 3 * 4 * most < 40e9  # verified in float32: weights, their gradients, and one copy


def options(*arguments: str) -> argparse.Namespace:
    off = dict.fromkeys(("quick", "targets", "no_compile"), False)
    return argparse.Namespace(**off, device="cuda", threads=1, against="", only=list(arguments))


def test_chosen_rows_and_file() -> None:
    assert len(command.chosen_rows(moe.SUITE, options())) == 15
    (row,) = command.chosen_rows(dense.SUITE, options("8192/16384"))
    assert row.shape.bias and row.shape.activation == "gelu"
    with pytest.raises(SystemExit, match="no row has all of these"):
        command.chosen_rows(moe.SUITE, options("T 5 "))
    file = command.default_file(moe.SUITE, options(), {"gpu": "NVIDIA H100 80GB HBM3"})
    assert file.name == "moe-nvidia-h100-80gb-hbm3.json" and file.parent.name == "results"


def test_end_to_end(machine: gpu.Gpu, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {
        "device": "cuda", "gpu": "a GPU", "capability": "9.0", "sms": 132, "memory_bytes": 80e9, "l2_bytes": 50 << 20,
        "cuda": "13.0", "torch": "2", "version": "0", "date": "today",
    }  # fmt: skip
    providers = [p for p in PROVIDERS if p.name not in COMPILING]
    file = tmp_path / "gpu.json"
    rows = [Row(ACTIVATION, "bfloat16", "training", configuration="act")]
    assert command.run(rows, Harness(SHORT, machine, providers), facts, file) == 0
    printed = capsys.readouterr().out
    assert "a GPU · sm_90 · 132 SMs" in printed and "GB/s fwd / bwd" in printed and gpu_rows.SOURCE in printed
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert saved["rows"][0]["providers"][OURS]["forward"] > 0 and not file.with_suffix(".png").exists()


def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main(moe.SUITE, ["--device", "cuda"])
    assert "torch.cuda.is_available() is false" in capsys.readouterr().err


def test_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers as numbers; nothing where the tool is missing, fails or says something else."""
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for script, expected in (
        ("echo '1980, 1980, 2619, 41, 120.5, 0x0000000000000004'", 1980.0),
        ("echo broken; exit 9", None),
        ("echo one, two", None),
    ):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        found = gpu.nvidia_smi(gpu.CLOCKS)
        assert found.get("sm_mhz") == expected
    assert expected is None and found == {}
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert gpu.nvidia_smi(gpu.CLOCKS) == {}
