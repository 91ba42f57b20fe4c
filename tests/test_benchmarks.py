"""The benchmark harness: what it refuses to time, its formulas, its budgets and its verdicts."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tolerance
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import dense, peak, targets, verify
from benchmarks.harness import Budget, Case, Harness, Local, Measured, Timed
from benchmarks.providers import COMPILE, EAGER, HUGE, OURS, PROVIDERS, RECOMPUTE, Inputs, Provider, eager_inputs
from benchmarks.workloads import DTYPES, EXAMPLE, TALL, TINY, Row, Shape, all_rows, in_order, quick_rows, target_rows

SMALL = Shape(64, 32, 48)
SHORT = Budget(seconds=10.0, most_rounds=2, least_sample=1e-5)
RUNNING = tuple(provider for provider in PROVIDERS if provider.name != COMPILE)  # the compiler takes seconds a row


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def quick_limits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two constants, but where the test is of the limits themselves: they need a compiler and a large buffer."""
    if request.node.name != "test_limits_of_this_machine":
        monkeypatch.setattr(peak, "fma", lambda *a: 100.0)
        monkeypatch.setattr(peak, "read", lambda *a: 10.0)


class Changed(nn.Module):
    """Eager with something done to its output."""

    def __init__(self, layer: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.layer(x))


def changed(change: Callable[[Tensor], Tensor], name: str = "changed") -> Provider:
    return Provider(name, lambda inputs, shape: Inputs(Changed(inputs.module, change), inputs.draws))


def _without_last_column(y: Tensor) -> Tensor:
    return torch.cat((y[:, :-1], torch.zeros_like(y[:, -1:])), 1)


WRONG: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "zero": (torch.zeros_like, "failed"),  # without a gradient
    "times zero": (lambda y: y * 0, "refused: y"),
    "one column lost": (_without_last_column, "refused: y"),
    "off by a few epsilons": (lambda y: y * (1 + 2**-6), "refused: y"),
    "not finite": (lambda y: y / 0, "refused: y"),
    "shape": (lambda y: y[:-1], "failed"),
    "gradient doubled": (lambda y: y + (y - y.detach()), "refused: d_x"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_provider_is_not_timed(wrong: str, dtype: str) -> None:
    change, note = WRONG[wrong]
    harness = Harness(SHORT, "baseline", [PROVIDERS[0], changed(change)], huge=False)
    eager, other = harness.measure(Row(SMALL, dtype, "training")).timed
    assert len(eager.seconds) == 2
    assert other.seconds == [] and other.note.startswith(note)
    assert other.refused == note.startswith("refused")


def test_unchanged_is_timed() -> None:
    harness = Harness(SHORT, "baseline", [PROVIDERS[0], changed(lambda y: y)], huge=False)
    _, other = harness.measure(Row(SMALL, "float32", "training")).timed
    assert len(other.seconds) == 2 and not other.note


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [SMALL, TINY, Shape(64, 33, 47, activation="gelu", bias=True)], ids=lambda s: s.label)
def test_every_provider_is_right(shape: Shape, dtype: str) -> None:
    case = Case(shape, dtype)
    for provider in RUNNING:
        for mode in ("training", "inference"):
            if provider.serves(Row(shape, dtype, mode)):
                assert case.worst(Local(provider.build(case.inputs, shape), shape, mode).results()) <= 1, provider.name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_yardstick_of_16_bits_is_eagers_error(dtype: str) -> None:
    case = Case(Shape(96, 64, 80), dtype)
    native = Local(case.inputs, case.shape, "training").results()
    for name, result, exact, limit in zip(case.names, native, case.exact, case.limits, strict=True):
        again = verify.limit(result, exact)
        assert again.rms == pytest.approx(limit.rms, rel=0.1), name
        assert again.largest == pytest.approx(limit.largest, rel=0.5), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [0.5, 1.4, 1.6, 2.5, 5.0])
def test_rule_is_the_tests_own(dtype: torch.dtype, factor: float) -> None:
    g = torch.Generator().manual_seed(0)
    exact = torch.randn(40, 50, generator=g, dtype=torch.float64)
    error = torch.randn(40, 50, generator=g, dtype=torch.float64) * 40 * torch.finfo(dtype).eps
    eager, actual = (exact + error).to(dtype), (exact + factor * error).to(dtype)
    theirs = tolerance._Errors(dtype)
    theirs.add(actual.double(), exact, eager.double() - exact)

    def passes(check: Callable[[], Any], wrong: type[Exception]) -> bool:
        try:
            check()
        except wrong:
            return False
        return True

    ours = passes(lambda: verify.worst(["y"], [actual], [exact], [verify.limit(eager, exact)]), verify.WrongResultError)
    assert ours == passes(lambda: theirs.check("y"), AssertionError) == (factor <= 1.5)


def test_flops_are_those_of_the_products() -> None:
    inputs = eager_inputs(SMALL, "float32")
    x, d_y = inputs.draws[0]
    with FlopCounterMode(display=False) as counter:
        y = inputs.module(x)
        assert Row(SMALL, "float32", "inference").flops == counter.get_total_flops()
        y.backward(d_y)
    assert Row(SMALL, "float32", "training").flops == counter.get_total_flops()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [False, True])
def test_bytes_are_those_of_the_tensors(dtype: str, bias: bool) -> None:
    shape = dataclasses.replace(SMALL, bias=bias)
    inputs = eager_inputs(shape, dtype)
    weights = sum(p.nbytes for p in inputs.module.parameters())
    tokens = inputs.draws[0][0].nbytes
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


def test_budget() -> None:
    budget = Budget(seconds=1.0, least_rounds=3, most_rounds=5)
    seconds = (0.001, 0.24, 0.3, 0.9, 1.4, 2.9, 30.0)
    assert [budget.rounds(sample) for sample in seconds] == [5, 5, 4, 3, 2, 1, 1]


def test_slow_provider_gets_few_samples_and_is_predicted() -> None:
    def slow(y: Tensor) -> Tensor:
        time.sleep(0.03 * len(y) / SMALL.T)
        return y

    budget = Budget(seconds=0.01, least_rounds=3, most_rounds=6, least_sample=1e-5, longest_call=0.2)
    harness = Harness(budget, "baseline", [PROVIDERS[0], changed(slow)], huge=False)
    eager, other = harness.measure(Row(SMALL, "float32", "inference")).timed
    assert len(eager.seconds) >= 3 and len(other.seconds) == 1
    more = dataclasses.replace(SMALL, T=10 * SMALL.T)
    eager, other = harness.measure(Row(more, "float32", "inference")).timed
    assert eager.seconds and not other.seconds and other.note.startswith("not run")


def test_very_slow_provider_is_called_once() -> None:
    calls = []

    def slow(y: Tensor) -> Tensor:
        calls.append(1)
        time.sleep(0.03)
        return y

    budget = Budget(seconds=0.002, most_rounds=6)
    harness = Harness(budget, "baseline", [changed(slow)], huge=False)
    (timed,) = harness.measure(Row(SMALL, "float32", "inference")).timed
    assert len(timed.seconds) == len(calls) == 1 and "one call" in timed.note


def _record(row: Row, **seconds: list[float]) -> dict[str, Any]:
    names = {"eager": EAGER, "compiled": COMPILE, "ours": OURS}
    timed = [Timed(names[key], value, error=0.5, first_call=1.0) for key, value in seconds.items()]
    return Measured(row, "avx2", [100.0], [10.0], timed).record()


def test_targets() -> None:
    judged = {t["what"]: t for t in targets.judged([])}
    assert all(each["measured"] is None and each["reached"] is None for each in judged.values())
    row = Row(TALL, "float32", "training")
    at_90 = row.flops / 90e9
    pair = dataclasses.replace(row, threads=2)
    rows = [
        _record(row, eager=[1.0], ours=[at_90, at_90, 9.0]),
        _record(pair, eager=[2.0, 3.0], compiled=[1.0, 1.5], ours=[1.0, 1.25]),
    ]
    one, two = [t for t in targets.judged(rows) if t["measured"] is not None]
    assert one["measured"] == pytest.approx(0.9) and one["reached"]
    assert two["measured"] == pytest.approx(1.1) and two["reached"]  # of the same round: 1 and 1.2
    rows = [_record(row, ours=[2 * at_90]), _record(pair, eager=[2.0], ours=[1.0])]
    text = targets.targets_text(rows)
    assert "short by 48.9%" in text and "nan" not in text
    assert [t["what"] for t in targets.judged(rows) if t["measured"] is not None] == [one["what"]]  # compile is missing


def test_rows() -> None:
    rows = in_order(all_rows())
    assert len({row.name for row in rows}) == len(rows)
    kept = {(r.shape, r.dtype, r.mode, r.threads) for r in rows}
    assert kept >= {(r.shape, r.dtype, r.mode, r.threads) for r in target_rows()}
    assert {row.configuration for row in rows} >= set("1234567")
    assert [row.shape.T for row in rows] == sorted(row.shape.T for row in rows)
    assert len(quick_rows()) < len(target_rows()) < len(rows)


def test_command_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the process on huge pages, a refused provider, JSON and plot."""
    shape = dataclasses.replace(SMALL, D=512)
    rows = [
        Row(shape, "float32", "training"),
        Row(shape, "bfloat16", "inference"),
        Row(EXAMPLE, "bfloat16", "training"),
    ]
    harness = Harness(SHORT, "baseline", [*RUNNING, changed(lambda y: y * 0, "nothing")])
    file = tmp_path / "new" / "results.json"
    assert dense.run(rows, harness, dense.machine({1}), file) == 1
    captured = capsys.readouterr()
    assert captured.err.count("REFUSED") == 3
    results = json.loads(file.read_text(encoding="utf-8"))
    found = results["rows"][0]["providers"]
    assert [found[name]["n"] for name in (EAGER, OURS, RECOMPUTE, HUGE)] == [2] * 4
    assert found["nothing"]["refused"] and found["nothing"]["seconds"] == []
    assert str(tmp_path) not in file.read_text(encoding="utf-8")
    assert targets.main([str(file)]) == 0
    pytest.importorskip("matplotlib")
    assert file.with_suffix(".png").stat().st_size > 10_000


def test_command_names_its_rows() -> None:
    with pytest.raises(SystemExit, match="no row has all of these"):
        dense.main(["--only", "T 5 "])


@pytest.mark.skipif(shutil.which("c++") is None, reason="the limits' kernels are compiled")
def test_limits_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "last_level_cache", lambda: 1 << 20)
    monkeypatch.setattr(peak, "LEAST_BUFFER", 32 << 20)
    peak._buffer.cache_clear()
    try:
        assert peak.isas()[0] == "baseline"
        for isa in peak.isas():
            assert 0.1 < peak.fma(isa, 1, 0.002) < 1e4
            assert 0.01 < peak.read(isa, 2) < 1e4
        if "avx2" in peak.isas():
            wide, narrow = (max(peak.fma(isa, 1, 0.005) for _ in range(5)) for isa in ("avx2", "baseline"))
            assert wide > 1.3 * narrow
        assert peak.isa_index(peak.isas()[-1] + "_bf16") == len(peak.isas()) - 1
    finally:
        peak._buffer.cache_clear()
