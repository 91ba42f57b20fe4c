# SPDX-License-Identifier: BSD-3-Clause
"""FLOPs and bytes that benchmarks report, against tensors counted here; and the benchmark of busy cores."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_benchmarks import FEW_CHOSEN, MIXED, MIXED_BIAS, MOE_RUNNING, RUNNING, SMALL

import ffn_ops
from benchmarks import busy, workloads
from benchmarks.providers import (
    EAGER,
    OURS,
    RECOMPUTE,
    eager_inputs,
)
from benchmarks.runners import Local
from benchmarks.workloads import Mixture, Row, Shape

pytestmark = pytest.mark.cpu_only("of what runs on the CPU; the rest stands in test_gpu_benchmarks.py")


@pytest.mark.parametrize("shape", [SMALL, MIXED, MIXED_BIAS], ids=lambda s: s.label)
def test_flops_are_those_of_the_products(shape: Shape) -> None:
    inputs = eager_inputs(shape, "float32")
    args, d_y = inputs.draws[0]
    with FlopCounterMode(display=False) as counter:
        y = inputs.module(*args)
        assert Row(shape, "float32", "inference").flops == counter.get_total_flops()
        y.backward(d_y)
    assert Row(shape, "float32", "training").flops == counter.get_total_flops()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [False, True])
def test_bytes_are_those_of_the_tensors(dtype: str, bias: bool) -> None:
    shape = dataclasses.replace(SMALL, bias=bias)
    inputs = eager_inputs(shape, dtype)
    weights = sum(p.nbytes for p in inputs.module.parameters())
    tokens = inputs.draws[0][0][0].nbytes
    pre = 2 * Local(inputs, shape, "training").results()[0].element_size() * shape.T * shape.F
    forward = weights + tokens + tokens  # x, y
    assert Row(shape, dtype, "inference").least_bytes == forward
    backward = weights + pre + tokens + tokens + weights + tokens  # x, d_y read; d_w, d_x written
    assert Row(shape, dtype, "training").least_bytes == forward + pre + backward


def test_saved_bytes() -> None:
    row = Row(SMALL, "float32", "training")
    inputs = eager_inputs(SMALL, "float32")
    saved = {p.name: Local(p.build(inputs, SMALL), SMALL, "training").saved_bytes() for p in RUNNING}
    x = SMALL.T * SMALL.D * 4
    assert saved[EAGER] == x + 4 * SMALL.T * SMALL.F * 4
    assert saved[OURS] == row.saved_bytes == x + 2 * SMALL.T * SMALL.F * 4
    assert saved[RECOMPUTE] == x


def test_measuring_what_is_saved_keeps_nothing() -> None:
    """A regression: the hook held tensors, they the graph, and that the hook: a row's memory was never freed."""
    runner = Local(eager_inputs(MIXED, "float32"), MIXED, "training")

    def of_a_graph() -> list[Tensor]:
        gc.collect()
        return [o for o in gc.get_objects() if isinstance(o, Tensor) and o.grad_fn is not None]

    before = of_a_graph()  # other tests may leave some, which may go meanwhile
    known = {id(t) for t in before}
    runner.saved_bytes()
    assert not [t for t in of_a_graph() if id(t) not in known]


@pytest.mark.parametrize("shape", [FEW_CHOSEN, MIXED_BIAS], ids=lambda s: s.label)
def test_bytes_of_mixtures_are_those_of_the_chosen_experts(shape: Mixture) -> None:
    inputs = eager_inputs(shape, "float32")
    (x, logits), _ = inputs.draws[0]
    chosen = logits.topk(shape.K).indices.unique().tolist()
    weights = sum(leaves[e].nbytes for leaves in inputs.module.groups().values() for e in chosen)
    assert Row(shape, "float32", "inference").least_bytes == weights + 2 * x.nbytes
    assert len(chosen) == workloads.chosen_experts(shape.T, shape.E, shape.K)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [MIXED, MIXED_BIAS], ids=lambda s: s.label)
def test_saved_bytes_of_mixtures(shape: Mixture, dtype: str) -> None:
    inputs = eager_inputs(shape, dtype)
    (ours,) = (p for p in MOE_RUNNING if p.name == OURS)
    found = Local(ours.build(inputs, shape), shape, "training").saved_bytes()
    assert found is not None and found <= Row(shape, dtype, "training").saved_bytes


def test_busy_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A small row in each state: verified, sampled, saved; another process runs where one should, and only then. A
    layer that computes something else is refused."""
    others: list[int] = []
    start = busy.subprocess.Popen

    def counted(*args: Any, **kwargs: Any) -> Any:
        process = start(*args, **kwargs)
        others.append(process.pid)
        return process

    monkeypatch.setattr(busy.subprocess, "Popen", counted)
    monkeypatch.setattr(
        busy, "rows", lambda count: [busy.Row(20, 16, 24, "training", state, count) for state in busy.STATES]
    )
    file = tmp_path / "busy.json"
    assert busy.main(["--threads", "1", "--rounds", "3", "--out", str(file)]) == 0
    found = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["state"] for row in found] == list(busy.STATES)
    assert all(len(each["seconds"]) == 3 and each["error"] <= 1 for row in found for each in row["providers"].values())
    assert len(others) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in others)
    monkeypatch.setattr(ffn_ops.FeedForward, "forward", lambda self, x: self.w2(self.w1(x) * self.w3(x)))
    (ours, _) = busy.measure(busy.Row(20, 16, 24, "training", busy.STATES[0], 1), 1)
    assert ours.refused and "y: " in ours.note and not ours.seconds
