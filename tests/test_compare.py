# SPDX-License-Identifier: BSD-3-Clause
"""``python -m ffn_ops compare``: counts, budgets, pairing, statistics, and the command end to end at a tiny size."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import STEPS, TINY, UNIFORM, parsed

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from ffn_ops import MoEFFN, Routing, compare
from ffn_ops.compare import advice, architectures, counts, layers, mixtures, paired, text, train
from ffn_ops.compare.architectures import ARCHITECTURES, BASELINE, BY_KEY, EXPERTS, LAYERS, MOE, Architecture, Layer
from ffn_ops.compare.mixtures import MIXTURES, Mixture
from ffn_ops.compare.model import LanguageModel
from ffn_ops.compare.results import Results, TextFacts
from ffn_ops.compare.settings import LayerSize, ModelSize, Settings

pytestmark = pytest.mark.cpu_only("the comparison runs on the CPU")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """One whole run of the command, its sizes made tiny; one thread, for a busy machine stretches every barrier."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("compare") / "made" / "by the command"
    arguments = ["--steps", str(STEPS), "--seeds", "2", "--repeats", "7", "--compile", "none", "--out", str(out)]
    args = parsed(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "Settings", TINY)
        assert compare.run(args) == 0
    torch.set_num_threads(threads)
    yield out, json.loads((out / "results.json").read_text(encoding="utf-8"))


def test_every_file_is_written(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    report = (out / "report.md").read_text(encoding="utf-8")
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert len(pictures) == 9
    assert all(f"({name})" in report for name in pictures)
    assert all(a.name in report for a in (*LAYERS, *MIXTURES))
    assert str(out) not in report + (out / "results.json").read_text(encoding="utf-8")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)):
        yield value


def test_results_are_finite_and_losses_fall(finished: tuple[Path, dict[str, Any]]) -> None:
    _, results = finished
    assert all(math.isfinite(number) for number in _numbers(results))
    assert len(results["runs"]) == 2 * len(ARCHITECTURES)
    for run in results["runs"]:
        assert run["validation"][0] > UNIFORM - 0.5, run["architecture"]
        assert run["final_validation"] < UNIFORM - 1.5, run["architecture"]
        assert run["steps"][0] == 0 and run["steps"][-1] == STEPS
        assert all(norm > 0 for norms in run["gradient_norms"] for norm in norms)
        assert all(0 <= share <= 1 for shares in run["dead_share"] for share in shares)
        last = sum(run["dead_share"][-1]) / len(run["dead_share"][-1])
        assert run["dead_at_end"] / run["units"] == pytest.approx(last, abs=1e-6)


def test_mixtures_learn_and_their_loads_are_recorded(finished: tuple[Path, dict[str, Any]]) -> None:
    """The batch of 128 bytes divides among the experts, so that two of the mixtures balance it exactly."""
    _, results = finished
    assert len(results["mixtures"]) == 2 * len(MIXTURES)
    for run in results["mixtures"]:
        assert run["final_validation"] < UNIFORM - 1, run["architecture"]
        assert len(run["training_loads"]) == len(run["gradient_steps"])
        assert len(run["validation_loads"]) == len(run["steps"])
        for load in (load for loads in run["training_loads"] + run["validation_loads"] for load in loads):
            assert sum(load["shares"]) == pytest.approx(1, abs=1e-3)
            assert 0 <= load["entropy"] <= 1 + 1e-5 and 1 - 1e-5 <= load["max_over_mean"] <= EXPERTS
            assert 0 <= load["dropped"] <= load["unreached"] or run["architecture"] != "switch"
        balanced = [load["max_over_mean"] == 1 for loads in run["training_loads"] for load in loads]
        assert all(balanced) if run["architecture"] in ("expert_choice", "base") else not all(balanced)
    rows = {row["architecture"]: row for row in results["trained_mixtures"]}
    assert rows.keys() == {BASELINE, *(m.key for m in MIXTURES)}
    assert rows["switch"]["training_load"]["dropped"] > 0 == rows["top2"]["training_load"]["dropped"]
    for key in ("biased", "quantile"):
        runs = [run["training_loads"] for run in results["mixtures"] if run["architecture"] == key]
        found = [load["max_over_mean"] for points in runs for loads in points for load in loads]
        assert rows[key]["training_max_over_mean"] == pytest.approx(sum(found) / len(found))
    assert rows[BASELINE]["training_load"] is None and len(rows["base"]["paired"]["differences"]) == 2


def test_budgets_match_and_seeds_are_paired(finished: tuple[Path, dict[str, Any]]) -> None:
    _, results = finished
    budget = next(r["ffn_parameters"] for r in results["runs"] if r["architecture"] == BASELINE)
    for row in results["trained"]:
        assert abs(row["ffn_parameters"] / budget - 1) < 0.06  # tiny widths round coarsely; the default's are below
        baseline = next(r for r in results["trained"] if r["architecture"] == BASELINE)
        for seed, difference in row["paired"]["differences"].items():
            assert difference == pytest.approx(row["losses"][seed] - baseline["losses"][seed])


def test_fused_layers_were_timed_and_agree(finished: tuple[Path, dict[str, Any]]) -> None:
    _, results = finished
    assert [layer["architecture"] for layer in results["layers"]] == [a.key for a in LAYERS]
    for layer in results["layers"]:
        assert not layer["refused"], layer["notes"]
        assert layer["providers"].keys() == {"eager", "fused"}
        for provider in layer["providers"].values():
            assert provider["error"] < 1e-5
            assert provider["saved_bytes"] > 16 * 32 * 4
            assert 0 < provider["forward"]["low"] <= provider["forward"]["median"] <= provider["forward"]["high"]


def test_counts_equal_the_formulas_and_the_guides() -> None:
    D, F, G = 512, 2048, 4
    plain, gated = 2 * D * F + F + D, 3 * D * F + 2 * F + D
    branches = 2 * G * (D * F + F)
    expected = {
        "ReLU FFN": (plain, 4 * D * F),
        "GELU FFN": (plain, 4 * D * F),
        "Swish FFN": (plain, 4 * D * F),
        "GLU FFN": (gated, 6 * D * F),
        "GeGLU": (gated, 6 * D * F),
        "SwiGLU": (gated, 6 * D * F),
        "Gated-FFN": (branches + D * F + D, (4 * G + 2) * D * F),
        "GLU layer alone": (2 * (D * F + F), 4 * D * F),
        "Gated-FFN, no projection": (branches, 4 * G * D * F),
        "MoE FFN": (8 * plain + 8 * D + 8, 2 * 4 * D * F + 16 * D),
    }
    rows = {row.name: row for row in counts.count(LayerSize())}
    for name, (parameters, flops) in expected.items():
        assert (rows[name].parameters, rows[name].flops_per_token) == (parameters, flops), name
    assert rows["MoE FFN"].active_parameters == 2 * plain + 8 * D + 8
    assert rows["GLU FFN"].verdict == "3.2M agrees, 2.0x differs, 1.5x agrees"
    assert rows["Gated-FFN"].verdict == "9.5M agrees, 4.0x differs, 4.5x agrees"
    assert rows["SwiGLU, 2/3 width"].parameters == pytest.approx(plain, rel=1e-3)


def test_mixtures_have_the_dense_layers_active_flops() -> None:
    """Up to the router, D * E products of the dense layer's 2 * D * F. The plain loop's FLOPs are those of its rows."""
    dense, *rows = counts.count_mixtures(ModelSize())
    assert [row.name for row in rows] == [m.name for m in MIXTURES]
    for row in rows:
        assert row.flops_per_token - dense.flops_per_token == 2 * 96 * EXPERTS
        assert 1 < row.active_parameters / dense.parameters < 1.02 and row.multiple > 4
    assert architectures.flops_per_token(MOE.fused(32, 48), 32) == architectures.flops_per_token(MOE.eager(32, 48), 32)


@pytest.mark.parametrize("mixture", MIXTURES, ids=lambda m: m.key)
def test_only_the_mixture_marked_so_leaks_the_future(mixture: Mixture) -> None:
    """Another last token changes what the earlier ones get, in evaluation."""
    torch.manual_seed(0)
    layer = mixture.fused(32, mixture.width(48)).eval()
    x = torch.randn(1, 64, 32)
    other = torch.cat([x[:, :-1], 10 * torch.randn(1, 1, 32)], 1)
    same = torch.allclose(layer(x)[:, :-1], layer(other)[:, :-1], rtol=1e-4, atol=1e-6)
    assert same is not mixture.leaks


def test_load_of_a_known_routing() -> None:
    """Six tokens choose experts 0 0 0 1 2 and none; expert 0 has room for two."""
    ids = torch.tensor([[0], [0], [0], [1], [2], [4]])
    load = mixtures.layer_load(Routing.from_topk(ids, torch.ones(6, 1), 4, capacity=2))
    assert load.shares == [0.6, 0.2, 0.2, 0.0]
    assert (load.dropped, load.max_over_mean) == (0.2, 2.0)
    assert load.unreached == pytest.approx(2 / 6, abs=1e-5)
    assert load.entropy == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(4)) / math.log(4), abs=1e-5)


def test_balancing_loss_is_one_per_balanced_layer() -> None:
    logits = torch.zeros(8, 4)
    routing = Routing.from_topk(torch.arange(8)[:, None] % 4, torch.ones(8, 1), 4)
    assert mixtures.balancing_loss([(routing, logits)] * 3).item() == pytest.approx(3)


def test_units_of_an_expert_that_no_token_reaches_are_dead() -> None:
    torch.manual_seed(0)
    layer = MoEFFN(16, 24, EXPERTS, 1)
    with torch.no_grad():
        layer.router.bias[3] = 100.0
    x = torch.randn(5, 16)
    units = architectures.expert_units(layer, x).unflatten(1, (EXPERTS, 24))
    assert layer.b_in is not None
    expected = torch.nn.functional.gelu(x @ layer.w_in[3].t() + layer.b_in[3])
    torch.testing.assert_close(units[:, 3], expected)
    units[:, 3] = 0
    assert not units.any()


def test_training_with_noise_is_repeatable_and_draws_nothing_from_the_caller(tmp_path: Path) -> None:
    data, settings = text.load(None, 32), TINY(out=tmp_path)
    before = torch.random.get_rng_state()

    def trained(steps: int = 3) -> list[float]:
        layers: list[Layer] = [BY_KEY["gelu"], MIXTURES[0]]
        runs = train.train_together(
            layers, data, settings, seed=0, steps=steps, learning_rate=1e-2, advance=lambda: None
        )
        return [run.validation[-1] for run in runs]

    first = trained()
    torch.rand(1)
    assert trained() == first
    torch.random.set_rng_state(before)
    trained(1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_nothing_that_depends_on_data_is_compiled() -> None:
    assert layers.compiled_keys("all") == [a.key for a in ARCHITECTURES]
    assert MOE.key not in layers.compiled_keys("some")


def test_advice_on_sparsity_is_counted(tmp_path: Path) -> None:
    """The guide's parameters and active share hold for its code; its growth of compute does not."""
    results = Results({}, Settings(tmp_path), TextFacts("text", 1, 1, False), counts=counts.count(LayerSize()))
    found = advice._sparse(results)
    assert found.verdict == advice.MIXED
    assert "8.00x ReLU FFN's parameters, 25.0 % of them active for a token, +100 % FLOPs" in found.measured


@pytest.mark.parametrize("architecture", LAYERS, ids=lambda a: a.key)
def test_fused_layer_has_the_counted_parameters(architecture: Architecture) -> None:
    for d_ff in (48, 85):  # even, odd: the guide's 2/3 rule rounds
        fused, eager = architecture.fused(32, d_ff), architecture.eager(32, d_ff)
        assert architectures.disagreement(fused, eager) == []
        units = architecture.units(fused, torch.randn(5, 32))
        assert units.shape[0] <= 5 and units.shape[1] in (d_ff, 4 * d_ff, EXPERTS * d_ff)


def test_default_budgets_are_within_one_percent() -> None:
    settings = Settings(Path())
    size = settings.model
    budget = architectures.count_parameters(BY_KEY[BASELINE].eager(size.d_model, size.d_ff))
    for key, d_ff in train.budget_widths(settings).items():
        parameters = architectures.count_parameters(BY_KEY[key].eager(size.d_model, d_ff))
        assert abs(parameters / budget - 1) < 0.01, key


def test_equal_seeds_give_equal_weights_outside_the_ffn() -> None:
    size = ModelSize(d_model=16, d_ff=24, layers=2, heads=2, context=8)
    models = [LanguageModel(size, functools.partial(a.fused, 16, 24), seed=3) for a in (*ARCHITECTURES, *MIXTURES)]
    states = [{k: v for k, v in m.state_dict().items() if ".ffn." not in k} for m in models]
    assert len(states[0]) > 10
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[k], states[0][k]) for k in state)
    other = LanguageModel(size, functools.partial(ARCHITECTURES[0].fused, 16, 24), seed=4)
    assert not torch.equal(other.token.weight, models[0].token.weight)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.key)
def test_dead_units_are_found(architecture: Architecture) -> None:
    """A gate bias of -100 kills exactly the units that it is given to."""
    torch.manual_seed(0)
    size = ModelSize(d_model=16, d_ff=24, layers=1, heads=2, context=8)
    model = LanguageModel(size, functools.partial(architecture.fused, 16, 24), seed=0)
    layer = model.ffn_layers()[0]
    name = {"gated_ffn": "gate_layers.0"}.get(architecture.key, "linear1" if hasattr(layer, "linear1") else "w1")
    x = torch.randint(256, (4, 8))
    before = train.probe(model, architecture, x, x)[1][0]
    with torch.no_grad():
        layer.get_submodule(name).get_parameter("bias")[:5] = -100.0
    after = train.probe(model, architecture, x, x)[1][0]
    assert after[:5].all() and torch.equal(after[5:], before[5:]) and not before.all()


def test_saved_bytes_of_a_known_layer() -> None:
    """Eager SwiGLU keeps x, both pre-activations, silu(gate) and the product; ReLU x and the activation alone."""
    x = torch.randn(16, 32, requires_grad=True)
    unit = 16 * 4
    assert layers.saved_for_backward(BY_KEY["relu"].eager(32, 48), x) == unit * (32 + 48)
    assert layers.saved_for_backward(BY_KEY["swiglu"].eager(32, 48), x) == unit * (32 + 4 * 48)
    assert layers.saved_for_backward(BY_KEY["swiglu"].fused(32, 48), x) <= unit * (32 + 2 * 48)


def test_a_wrong_layer_is_refused(tmp_path: Path) -> None:
    """Negative control: silu in the place of gelu differs by far more than rounding."""
    wrong = Architecture(**{**BY_KEY["gelu"].__dict__, "fused": BY_KEY["silu"].fused})
    settings = TINY(out=tmp_path, compile="none")
    prepared = layers.prepare(wrong, settings)
    assert prepared.result.refused and "fused" not in prepared.layers
    assert prepared.result.notes[0].startswith("fused refused: y: ")


def test_a_layer_that_fails_is_refused(tmp_path: Path) -> None:
    def broken(d_model: int, d_ff: int) -> torch.nn.Module:
        layer = BY_KEY["gelu"].fused(d_model, d_ff)
        layer.register_forward_pre_hook(lambda *_: exec("raise RuntimeError('out of order')"))
        return layer

    settings = TINY(out=tmp_path, compile="none")
    prepared = layers.prepare(Architecture(**{**BY_KEY["gelu"].__dict__, "fused": broken}), settings)
    assert prepared.result.refused and list(prepared.layers) == ["eager"]
    assert prepared.result.notes == ["fused failed: RuntimeError: out of order"]


def test_paired_statistics() -> None:
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t(2 degrees) 4.303."""
    found = paired.paired({0: 2.0, 1: 4.0, 2: 6.0, 9: 1.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert found is not None and found.half_width is not None
    assert found.differences == {0: 1.0, 1: 2.0, 2: 3.0}
    assert found.mean == 2.0 and found.half_width == pytest.approx(4.303 / math.sqrt(3))
    assert found.verdict == paired.NOT_SHOWN
    clear = paired.paired({0: 1.0, 1: 2.0, 2: 3.1}, {0: 2.0, 1: 3.0, 2: 4.0})
    assert clear is not None and clear.verdict == paired.LOWER
    single = paired.paired({0: 1.0}, {0: 2.0})
    assert single is not None and (single.half_width, single.verdict) == (None, paired.UNTESTABLE)
    assert paired.paired({0: 1.0}, {1: 2.0}) is None


def test_speed_ratio() -> None:
    """Nine rounds: the 2nd smallest to the 2nd largest ratio (coverage 96 %); five rounds carry no 95 % interval."""
    rounds = [float(i) for i in range(1, 10)]
    assert paired.speed_ratio([1.0] * 9, rounds) == paired.Ratio(5.0, (2.0, 8.0))
    assert paired.speed_ratio([1.0] * 9, rounds).verdict == paired.FASTER
    assert paired.speed_ratio(rounds, [1.0] * 9).verdict == paired.SLOWER
    assert paired.speed_ratio([1.0] * 9, [0.9, 1.1] * 4 + [1.0]).verdict == paired.NOT_SHOWN
    assert paired.speed_ratio([1.0] * 5, [2.0] * 5).interval is None
    many = [float(i) for i in range(1, 2001)]
    assert paired.speed_ratio([1.0] * 2000, many).interval == (956.0, 1045.0)


def test_advice_verdicts() -> None:
    """Supported needs every comparison; one against it and none for it contradicts."""
    assert advice._combine([paired.LOWER, paired.LOWER]) == advice.SUPPORTED
    assert advice._combine([paired.LOWER, paired.NOT_SHOWN]) == advice.MIXED
    assert advice._combine([paired.HIGHER, paired.NOT_SHOWN]) == advice.CONTRADICTED
    assert advice._combine([paired.NOT_SHOWN, paired.NOT_SHOWN]) == advice.OPEN
    assert advice._combine([paired.UNTESTABLE]) == advice.NOT_TESTED


def test_choice_names_the_best_and_only_layers_not_shown_to_be_worse(tmp_path: Path) -> None:
    """SwiGLU lowest; GeGLU within the spread of it; every other layer 0.5 worse for every seed."""
    results = Results({}, Settings(tmp_path), TextFacts("text", 1, 1, False))
    for seed in range(3):
        for a in ARCHITECTURES:
            run = train.Run(a.key, seed, 1.0, 1, 100, 100, step_ms=[2.0 if a.key == "relu" else 4.0] * 6)
            worse = {"swiglu": 0.0, "geglu": 0.01 * (-1) ** seed + 0.005}.get(a.key, 0.5 + 0.01 * seed)
            run.final_validation = 2.0 + 0.1 * seed + worse
            results.runs.append(run)
    first, second = advice.choice(results)[:2]
    assert "SwiGLU has the lowest mean loss, 2.100" in first
    assert first.endswith("over: GeGLU.")
    assert "ReLU FFN 0.50 (0.50-0.50)" in second and "GELU FFN 1.00" in second
    table = {a.guide: a.verdict for a in advice.guide_advice(results)}
    assert table["Standard transformer: GELU"] == advice.BEATEN
    assert table["GELU or Swish as the gate beats the sigmoid gate"] == advice.SUPPORTED


def test_diverging_run_is_recorded_without_nan(tmp_path: Path) -> None:
    data = text.load(None, 32)
    settings = TINY(out=tmp_path)
    calls: list[int] = []
    (run,) = train.train_together(
        [BY_KEY["relu"]],
        data,
        settings,
        seed=0,
        steps=6,
        learning_rate=float("inf"),
        advance=lambda: calls.append(1),
    )
    assert run.diverged and run.final_validation is None and len(calls) == 6
    assert all(map(math.isfinite, run.validation))


def test_windows_are_next_bytes_and_stay_in_the_text() -> None:
    data = torch.arange(100, dtype=torch.uint8)
    x, y = text.windows(data, torch.tensor([0, 67]), 32)
    assert torch.equal(y, x + 1) and y[1, -1] == 99
    starts = text.training_starts(data, 0, 500, 4, 32)
    assert (int(starts.min()), int(starts.max())) == (0, 67)
    assert torch.equal(starts, text.training_starts(data, 0, 500, 4, 32))
    assert int(text.validation_starts(data, 50, 32).max()) == 67
