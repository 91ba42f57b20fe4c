# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark harness: what it refuses to time, its budgets and its verdicts."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tolerance
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import command, dense, moe, quantized, targets, workloads
from benchmarks.harness import Budget, Case, Cpu, Harness, Measured
from benchmarks.providers import (
    COMPILE,
    COMPILING,
    EAGER,
    GROUPED,
    HUGE,
    LOOP,
    MOE_PROVIDERS,
    OURS,
    OURS_FLOAT32,
    PROVIDERS,
    RECOMPUTE,
    TORCH_ROUTING,
    Inputs,
    Provider,
)
from benchmarks.runners import Local
from benchmarks.worker import OtherProcess
from benchmarks.workloads import (
    DTYPES,
    EXAMPLE,
    GROWING,
    GROWTH,
    TALL,
    TINY,
    Mixture,
    Row,
    Shape,
    in_order,
)
from ffn_ops import _accuracy
from ffn_ops import _peak as peak
from ffn_ops._timing import Timed

pytestmark = pytest.mark.cpu_only("of what runs on the CPU; the rest stands in test_gpu_benchmarks.py")

SMALL = Shape(64, 32, 48)
SHORT = Budget(seconds=10.0, most_rounds=2, least_sample=1e-5)
MIXED = Mixture(64, 32, 48, E=4)
MIXED_BIAS = Mixture(24, 40, 32, "gelu", bias=True, E=16, K=3)
FEW_CHOSEN = Mixture(1, 24, 16, "gelu", bias=True, E=8)
ROUTED = Mixture(50, 0, 0, E=8, K=3)
RUNNING = tuple(provider for provider in PROVIDERS if provider.name != COMPILE)  # the compiler takes seconds a row
MOE_RUNNING = tuple(provider for provider in MOE_PROVIDERS if provider.name not in COMPILING)


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def quick_limits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two constants, but where the test is of the limits themselves: they need a large buffer."""
    if request.node.name != "test_limits_of_this_machine":
        monkeypatch.setattr(peak, "fma", lambda *a: 100.0)
        monkeypatch.setattr(peak, "read", lambda *a: 10.0)


class Changed(nn.Module):
    """Eager with a changed output."""

    def __init__(self, layer: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, *args: Tensor) -> Tensor:
        return self.change(self.layer(*args))


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


@pytest.mark.parametrize(
    ("wrong", "dtype"), [*((wrong, "float32") for wrong in WRONG), ("off by a few epsilons", "bfloat16")]
)
def test_wrong_provider_is_not_timed(wrong: str, dtype: str) -> None:
    change, note = WRONG[wrong]
    harness = Harness(SHORT, Cpu("baseline"), [PROVIDERS[0], changed(change)])
    eager, other = harness.measure(Row(SMALL, dtype, "training")).timed
    assert len(eager.seconds) == 2
    assert other.seconds == [] and other.note.startswith(note)
    assert other.refused == note.startswith("refused")


def test_unchanged_is_timed() -> None:
    harness = Harness(SHORT, Cpu("baseline"), [PROVIDERS[0], changed(lambda y: y)])
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [MIXED, MIXED_BIAS, FEW_CHOSEN, ROUTED], ids=lambda s: s.label)
def test_every_mixture_is_right(shape: Mixture, dtype: str) -> None:
    case = Case(shape, dtype)
    assert case.names[-1] == ("d_b_down" if shape.bias else "d_w_down" if shape.D else "y2")
    for provider in MOE_RUNNING:
        for mode in ("training", "inference"):
            if provider.serves(Row(shape, dtype, mode)):
                assert case.worst(Local(provider.build(case.inputs, shape), shape, mode).results()) <= 1, provider.name


@pytest.mark.parametrize("wrong", ["one column lost", "gradient doubled"])
def test_wrong_mixture_is_not_timed(wrong: str) -> None:
    change, note = WRONG[wrong]
    ours = next(provider for provider in MOE_PROVIDERS if provider.name == OURS)

    def build(inputs: Inputs, shape: Shape) -> Inputs:
        return Inputs(Changed(ours.build(inputs, shape).module, change), inputs.draws)

    harness = Harness(SHORT, Cpu("baseline"), [Provider("changed", build)])
    (timed,) = harness.measure(Row(MIXED, "float32", "training")).timed
    assert timed.refused and timed.note.startswith(note)


def test_slack_widens_the_limit() -> None:
    exact, off = torch.ones(8, dtype=torch.float64), torch.full((8,), 1.02)
    limits = [_accuracy.Limit(0.01, 0.01)]
    with pytest.raises(_accuracy.WrongResultError, match=r"allowed 0\.01"):
        _accuracy.worst(["y"], [off], [exact], limits)
    assert _accuracy.worst(["y"], [off], [exact], limits, slack=3.0) == pytest.approx(2.0, rel=1e-3)


def test_wrong_order_of_rows_is_not_timed() -> None:
    class Unsorted(nn.Module):
        def forward(self, logits: Tensor) -> tuple[Tensor, ...]:
            weights, ids = torch.softmax(logits, -1).topk(ROUTED.K, -1)
            tokens = torch.arange(ROUTED.T).repeat_interleave(ROUTED.K).double()
            return weights.flatten(), tokens, torch.bincount(ids.flatten(), minlength=ROUTED.E).double()

    unordered = Provider("unsorted", lambda i, s: Inputs(Unsorted(), i.draws))
    harness = Harness(SHORT, Cpu("baseline"), [unordered, *MOE_RUNNING])
    unsorted, torchs, ours = harness.measure(Row(ROUTED, "float32", "inference")).timed
    assert unsorted.refused and not unsorted.seconds
    assert (torchs.provider, ours.provider) == (TORCH_ROUTING, OURS) and torchs.seconds and ours.seconds


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [Shape(96, 64, 80), Mixture(96, 64, 80, E=4)], ids=lambda s: s.label)
def test_yardstick_of_16_bits_is_eagers_error(shape: Shape, dtype: str) -> None:
    case = Case(shape, dtype)
    native = Local(case.inputs, case.shape, "training").results()
    for name, result, exact, limit in zip(case.names, native, case.exact, case.limits, strict=True):
        again = _accuracy.limit(result, exact)
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

    ours = passes(
        lambda: _accuracy.worst(["y"], [actual], [exact], [_accuracy.limit(eager, exact)]), _accuracy.WrongResultError
    )
    assert ours == passes(lambda: theirs.check("y"), AssertionError) == (factor <= 1.5)


def test_budget() -> None:
    budget = Budget(seconds=1.0, least_rounds=3, most_rounds=5)
    seconds = (0.001, 0.24, 0.3, 0.9, 1.4, 2.9, 30.0)
    assert [budget.rounds(sample) for sample in seconds] == [5, 5, 4, 3, 2, 1, 1]


def test_slow_provider_gets_few_samples_and_is_predicted() -> None:
    def slow(y: Tensor) -> Tensor:
        time.sleep(0.03 * len(y) / SMALL.T)
        return y

    budget = Budget(seconds=0.01, least_rounds=3, most_rounds=6, least_sample=1e-5, longest_call=0.2)
    harness = Harness(budget, Cpu("baseline"), [PROVIDERS[0], changed(slow)])
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
    harness = Harness(budget, Cpu("baseline"), [changed(slow)])
    (timed,) = harness.measure(Row(SMALL, "float32", "inference")).timed
    assert len(timed.seconds) == len(calls) == 1 and "one call" in timed.note


def _record(row: Row, **seconds: list[float]) -> dict[str, Any]:
    names = {"eager": EAGER, "compiled": COMPILE, "ours": OURS}
    names |= {"loop": LOOP, "grouped": GROUPED, "torch": TORCH_ROUTING}
    timed = [Timed(names[key], value, error=0.5, first_call=1.0) for key, value in seconds.items()]
    return Measured(row, {"isa": "avx2"}, {"fma_gflops": [100.0], "read_gbs": [10.0]}, timed).record()


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
    one, growth, two = [t for t in targets.judged(rows) if t["measured"] is not None]
    assert one["measured"] == pytest.approx(0.9) and one["reached"]
    assert growth["measured"] == pytest.approx(at_90 / 1.125) and not growth["reached"]
    assert two["measured"] == pytest.approx(1.1) and two["reached"]  # of the same round: 1 and 1.2
    rows = [_record(row, ours=[2 * at_90]), _record(pair, eager=[2.0], ours=[1.0])]
    text = targets.targets_text(rows)
    assert "short by 43.8%" in text and "nan" not in text
    found = [t["what"] for t in targets.judged(rows) if t["measured"] is not None]
    assert found == [one["what"], growth["what"]]  # compile is missing


def test_least_speed_of_bfloat16_depends_on_the_instruction_set() -> None:
    row = Row(TALL, "bfloat16", "training")
    for isa, least in (("avx512_bf16", 1.6), ("avx2", 1 / 1.1)):
        record = {**_record(row, ours=[1.0]), "isa": isa}
        record["providers"][OURS_FLOAT32] = record["providers"][OURS] | {"seconds": [1.5], "median": 1.5}
        (judged,) = [t for t in targets.judged([record]) if t["least"] == least and t["measured"] is not None]
        assert judged["measured"] == pytest.approx(1.5) and judged["reached"] == (least < 1.5)


def test_targets_of_mixtures() -> None:
    def growing(experts: int, seconds: float) -> dict[str, Any]:
        return _record(Row(GROWTH[experts], "float32", "inference", 1, GROWING), ours=[seconds])

    routing = Row(workloads.ROUTING, "float32", "inference")
    few = Row(workloads.MOE_FEW, "float32", "training")
    rows = [
        growing(0, 1.0),
        growing(-1, 2.0),
        _record(routing, torch=[6.0], ours=[1.0]),
        _record(few, loop=[3.0, 4.0], grouped=[5.0, 3.0], ours=[1.0, 1.0]),
    ]
    judged = [t for t in targets.judged(rows) if t["measured"] is not None]
    # The best peer has the least median quotient: 3.5 and 4.
    assert [(t["measured"], t["reached"]) for t in judged] == [(3.5, True), (6.0, True), (0.5, False)]
    assert "nan" not in targets.targets_text(rows)


@pytest.mark.parametrize(("suite", "numbers"), [(dense.SUITE, range(1, 8)), (moe.SUITE, range(8, 13))])
def test_rows(suite: command.Suite, numbers: range) -> None:
    rows = in_order(suite.all_rows(1))
    assert len({row.name for row in rows}) == len(rows)
    kept = {(r.shape, r.dtype, r.mode, r.threads) for r in rows}
    assert kept >= {(r.shape, r.dtype, r.mode, r.threads) for r in suite.target_rows(1)}
    assert {row.configuration for row in rows} >= {str(number) for number in numbers}
    assert [row.shape.T for row in rows] == sorted(row.shape.T for row in rows)
    assert len(suite.quick_rows(1)) < len(suite.target_rows(1)) < len(rows)
    assert {p.name for p in suite.providers} >= {OURS}


def test_growing_mixtures_fit_a_cache() -> None:
    assert len({shape.T * shape.K for shape in GROWTH}) == 1
    assert all(3 * shape.E * shape.D * shape.F * 4 <= 24 << 20 for shape in GROWTH)


def test_command_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the process on huge pages, a refused provider, JSON and plot."""
    shape = dataclasses.replace(SMALL, D=512)
    rows = [
        Row(shape, "float32", "training"),
        Row(shape, "bfloat16", "inference"),
        Row(EXAMPLE, "bfloat16", "training"),
    ]
    others = (command.huge_pages(), OtherProcess(command.at("twin"), OURS))
    harness = Harness(SHORT, Cpu("baseline"), [*RUNNING, changed(lambda y: y * 0, "nothing")], others)
    file = tmp_path / "new" / "results.json"
    assert command.run(rows, harness, command.machine({1}), file) == 1
    captured = capsys.readouterr()
    assert captured.err.count("REFUSED") == 3
    results = json.loads(file.read_text(encoding="utf-8"))
    found = results["rows"][0]["providers"]
    assert [found[name]["n"] for name in (EAGER, OURS, RECOMPUTE, HUGE, command.at("twin"))] == [2] * 5
    assert "x ffn_ops at twin" in captured.out
    assert found["nothing"]["refused"] and found["nothing"]["seconds"] == []
    assert str(tmp_path) not in file.read_text(encoding="utf-8")
    assert targets.main([str(file)]) == 0
    pytest.importorskip("matplotlib")
    assert file.with_suffix(".png").stat().st_size > 10_000


def test_command_of_mixtures_end_to_end(tmp_path: Path) -> None:
    rows = [
        Row(dataclasses.replace(MIXED, D=512), "float32", "training"),
        Row(MIXED_BIAS, "bfloat16", "inference"),
        Row(ROUTED, "float32", "inference"),
        *(Row(Mixture(16, 16, 16, E=experts), "float32", "training", 1, GROWING) for experts in (4, 8)),
    ]
    file = tmp_path / "moe.json"
    assert command.run(rows, Harness(SHORT, Cpu("baseline"), MOE_RUNNING), command.machine({1}), file) == 0
    found = [set(row["providers"]) for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    assert {LOOP, OURS} <= found[0] and found[2:] == [{TORCH_ROUTING, OURS}, {OURS}, {OURS}]
    assert targets.main([str(file)]) == 0
    pytest.importorskip("matplotlib")
    assert file.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize("suite", [dense.SUITE, moe.SUITE], ids=lambda s: s.name)
def test_command_names_its_rows(suite: command.Suite) -> None:
    with pytest.raises(SystemExit, match="no row has all of these"):
        command.main(suite, ["--only", "T 5 "])


def test_limits_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "last_level_cache", lambda: 1 << 20)
    monkeypatch.setattr(peak, "LEAST_BUFFER", 32 << 20)
    peak.buffer.cache_clear()
    try:
        assert peak.isas()[0] == "baseline"
        for isa in peak.isas():
            assert 0.1 < peak.fma(isa, 1, 0.002) < 1e4
            assert 0.01 < peak.read(isa, 2) < 1e4
        if "avx2" in peak.isas():
            wide, narrow = (max(peak.fma(isa, 1, 0.005) for _ in range(5)) for isa in ("avx2", "baseline"))
            assert wide > 1.3 * narrow
    finally:
        peak.buffer.cache_clear()


@pytest.mark.parametrize("mode", ("inference", "training"))
def test_layers_on_quantised_weights_are_verified(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every provider agrees with float64 on its own weights; one that computes something else is refused."""
    row = quantized.Row("mixture", 3, 2, 256, 256, 5, mode, 1)
    providers = [*quantized.DENSE, *quantized.FORMATS, *quantized.BLOCKS]
    found, sizes, _ = quantized.measure(row, providers, 1, False)
    assert [t.note for t in found] == [""] * len(providers)
    assert all(t.error is not None and t.error <= 1 for t in found)
    assert sizes["mxfp4"] * 8 == 4.25 * 3 * row.E * row.D * row.F
    monkeypatch.setattr(quantized.Called, "weights", lambda self: torch.ones(self.row.T) * 1.01)
    (wrong,), _, _ = quantized.measure(row, ["mxfp4"], 1, False)
    assert wrong.refused and "y: " in wrong.note
