# SPDX-License-Identifier: BSD-3-Clause
"""register(model): the experts that transformers cannot exchange, on whole models, against the model's own code."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from device import generator
from seen import Seen
from test_transformers_report import OWN, made
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.models.step3p7 import modeling_step3p7

import ffn_ops
from ffn_ops.integrations import _exchange
from ffn_ops.integrations import transformers as ours
from ffn_ops.integrations.transformers import register, report

pytestmark = pytest.mark.cpu_only("transformers builds its models on the CPU")
register()


@pytest.fixture(autouse=True)
def not_warned_yet() -> Iterator[None]:
    before = set(ours._warned)
    yield
    ours._warned.clear()
    ours._warned.update(before)


def model_of(name: str) -> Any:
    """In float64, with weights large enough that each part of a layer shows."""
    model = made(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3, generator=generator())
    return model.double().eval()


def step(model: Any) -> dict[str, Tensor]:
    """Every output, and every gradient."""
    ids = torch.randint(3, 61, (2, 6), generator=generator())
    inputs: dict[str, Any] = {"input_ids": ids}
    if type(model).__name__ == "VitPoseBackbone":
        images = torch.randn(2, 3, 32, 32, generator=generator(), dtype=torch.float64)
        inputs = {"pixel_values": images, "dataset_index": torch.tensor([0, 3])}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    model.zero_grad()
    results: dict[str, Tensor] = {}
    for name, value in model(**inputs).items():
        tensors = value if isinstance(value, tuple) else (value,)
        results |= {f"{name} {i}": t for i, t in enumerate(tensors) if isinstance(t, Tensor) and t.is_floating_point()}
    torch.stack([t.square().mean() for t in results.values()]).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {n: t.detach() for n, t in results.items()} | grads


def exchanged(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register(model)
    return model


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for n, value in expected.items():
        torch.testing.assert_close(actual[n], value, rtol=1e-8, atol=1e-10 * float(value.abs().max() + 1), msg=n)


@pytest.mark.parametrize("name", OWN)
def test_a_whole_model(name: str) -> None:
    """Outputs and every gradient in float64, by the operators; copies too; restored: the same bits."""
    model = model_of(name)
    keys, expected = list(model.state_dict()), step(model)
    exchanged(model)
    found = report(model)
    assert found.entries and {e.status for e in found.entries} == {"ffn_ops"}, str(found)
    assert list(model.state_dict()) == keys
    for entry in found.entries:
        module = model.get_submodule(entry.path)
        assert type(pickle.loads(pickle.dumps(module))) is type(module)
    for each in (model, copy.deepcopy(model)):
        with Seen() as seen:
            actual = step(each)
        assert seen.names.count("moe") + seen.names.count("moe_linear") >= len(found.entries)
        assert_close(actual, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_experts_implementation("ffn_ops")  # says nothing of experts that are exchanged
    ffn_ops.restore(model)
    assert "ffn_ops" not in {e.status for e in report(model).entries}
    again = step(model)
    assert all(torch.equal(again[n], value) for n, value in expected.items())


@pytest.mark.parametrize("name", ["Switch Transformers", "ViTPose", "Doge"])
def test_replace_before_and_after(name: str) -> None:
    """The dense layers that stand inside experts, or beside them, can be replaced too."""
    plain = model_of(name)
    expected = step(plain)
    for first, second in ((ffn_ops.replace, register), (register, ffn_ops.replace)):
        model = copy.deepcopy(plain)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first(model), second(model)
        assert_close(step(model), expected)
        taken = set(report(model).paths("ffn_ops"))
        assert taken and taken.isdisjoint(ffn_ops.replace_report(model).paths("replaced", "partly"))
        ffn_ops.restore(model)
        again = step(model)
        assert all(torch.equal(again[n], value) for n, value in expected.items())


BYPASSED = {
    "Switch Transformers": "expert_2.wi", "NLLB-MoE": "expert_1.fc2", "ViTPose": "3", "Llama 4": "experts",
    "DBRX": "mlp", "Doge": "up_embed", "LongCat-Flash": "identity_expert",
}  # fmt: skip


@pytest.mark.parametrize("name", BYPASSED)
def test_hooks_on_children(name: str) -> None:
    """Children that would be bypassed are called: the results with the hook, and the report says why."""
    model = model_of(name)
    plain = copy.deepcopy(model)
    path = report(exchanged(model)).entries[0].path
    for each in (model, plain):
        child = each.get_submodule(path).get_submodule(BYPASSED[name])
        child.register_forward_hook(lambda module, args, y: 1.5 * y)
    (now,) = [e for e in report(model).entries if e.path == path]
    assert now.status == "left" and "its own forward runs" in now.why and "called" in now.why
    assert_close(step(model), step(plain))


@pytest.mark.parametrize(("name", "path"), [("Switch Transformers", "dropout"), ("NLLB-MoE", "token_dropout")])
def test_dropout_in_training(name: str, path: str) -> None:
    """Inside an expert, and on what an expert gives: the mean over draws is the result without dropout."""
    model = exchanged(model_of(name))
    experts: Any = model.get_submodule(report(model).entries[0].path)
    experts.requires_grad_(False)
    _, call = _exchange.tiny(f"{type(experts).__module__}.{type(experts).__qualname__}")
    torch.manual_seed(0)
    x, ids, weights = call()
    first = next(m for m in experts.modules() if isinstance(m, nn.Linear))
    x = torch.randn(x.shape[0], first.in_features, dtype=torch.float64)
    for module in experts.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    experts.moe_token_dropout = 0.0
    expected = experts.train()(x, ids, weights)
    for n, module in experts.named_modules():
        if n.endswith(path):
            module.p = 0.5
    if path == "token_dropout":
        experts.moe_token_dropout = 0.5
        assert_close({"eval": experts.eval()(x, ids, weights)}, {"eval": 0.5 * expected})
    draws = torch.stack([experts.train()(x, ids, weights) for _ in range(300)])
    noise = draws.std(0) / 300**0.5
    assert bool((noise > 0).any())
    assert bool(((draws.mean(0) - expected).abs() <= 6 * noise + 1e-9).all())


def test_a_class_with_another_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of another release: left alone, and the warning says why."""
    model = model_of("Step-3.5")

    def other(self: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) * up * 1.001

    monkeypatch.setattr(modeling_step3p7.Step3p7Experts, "_apply_gate", other)
    _exchange.agrees.cache_clear()
    before = step(model)
    with pytest.warns(UserWarning, match="its forward is another function than that of transformers 5.24"):
        register(model)
    assert report(model).paths("left")
    assert all(torch.equal(value, before[n]) for n, value in step(model).items())
    _exchange.agrees.cache_clear()


def test_models_without_such_experts() -> None:
    with pytest.warns(UserWarning, match="no experts of Linear were exchanged: it has no such class"):
        register(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got str"):
        register("Llama 4")  # type: ignore[arg-type]


def test_an_activation_that_no_operator_has() -> None:
    """The report says what a call raises."""
    model = exchanged(model_of("Llama 4"))
    experts = model.get_submodule(report(model).entries[0].path)
    experts.experts.act_fn = nn.Mish()
    entry = report(model).entries[0]
    assert entry.status == "refused"
    with pytest.raises(ValueError) as raised:
        step(model)
    assert str(raised.value) == entry.why


def test_weights_of_two_dtypes() -> None:
    """Switch Transformers keeps ``wo`` in float32 beside 16-bit weights."""
    model = model_of("Switch Transformers").float()
    experts = exchanged(model).get_submodule(report(model).entries[0].path)
    for layer in experts.values():
        layer.wi.bfloat16()
    _, call = _exchange.tiny(f"{type(experts).__module__}.{type(experts).__qualname__}")
    _, ids, weights = call()
    x = torch.randn(9, 16).bfloat16()
    actual = experts(x, ids, weights.bfloat16())
    expected = ffn_ops.restore(experts)(x, ids, weights.bfloat16())
    assert actual.dtype is torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["Switch Transformers", "JetMoE", "Llama 4", "DBRX", "Doge"])
def test_router_logits_are_recorded(name: str) -> None:
    """transformers records them by hooks on routers, which are still called."""
    model = model_of(name)
    ids = torch.randint(3, 61, (2, 6), generator=generator())
    inputs = {"input_ids": ids, "output_router_logits": True}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        expected = model(**inputs)
        actual = exchanged(model)(**inputs)
    key = next(k for k in expected if "router_logits" in k)
    for a, b in zip(actual[key], expected[key], strict=True):
        torch.testing.assert_close(a, b)


def test_saved_and_loaded(tmp_path: Any) -> None:
    """The checkpoint is the model's own."""
    model = exchanged(model_of("NLLB-MoE"))
    model.save_pretrained(tmp_path)
    again = transformers.NllbMoeForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert_close(step(again), step(model))


def test_a_forward_on_the_instance() -> None:
    """accelerate's hooks, which hold the forward that they found: an exchanged class would not be called."""
    hooks: Any = pytest.importorskip("accelerate.hooks")
    model = model_of("Step-3.5")
    experts = model.get_submodule(report(model).entries[0].path)
    expected = step(model)

    def assert_runs(ours: bool) -> None:
        with Seen() as seen, torch.no_grad():
            actual = model(input_ids=torch.randint(3, 61, (2, 6), generator=generator()))[0]
        assert ("moe" in seen.names) == ours
        torch.testing.assert_close(actual, expected["last_hidden_state 0"])

    hooks.add_hook_to_module(experts, hooks.ModelHook())
    with pytest.warns(UserWarning, match="forward was set on the instance"):
        register(model)
    (entry,) = report(model).entries
    assert entry.status == "left" and "forward was set on the instance" in entry.why
    assert_runs(ours=False)
    hooks.remove_hook_from_module(experts)  # which leaves the class's own on the instance
    assert report(exchanged(model)).paths("ffn_ops")
    assert_runs(ours=True)
    hooks.add_hook_to_module(experts, hooks.ModelHook())
    assert_runs(ours=True)
    ffn_ops.restore(model)
    assert_runs(ours=False)
    assert not report(model).paths("ffn_ops")


class Stored(Tensor):
    """Stands for weights that another library stores in its own way."""


@pytest.mark.parametrize("name", ["DBRX", "JetMoE", "Llama 4", "LongCat-Flash", "Step-3.5"])
def test_stacked_weights_of_a_tensor_subclass(name: str) -> None:
    """Operators cannot read them: the model's own code runs, and the report says why."""
    model = exchanged(model_of(name))
    expected = step(model)
    for entry in report(model).entries:
        experts = model.get_submodule(entry.path)
        for holder in experts.modules():
            for n, p in holder._parameters.items():
                if p is not None and (p.dim() > 2 or n == "w1"):
                    holder._parameters[n] = nn.Parameter(p.detach().as_subclass(Stored))
    assert {e.status for e in report(model).entries} == {"left"}
    assert all("(a Stored)" in e.why for e in report(model).entries)
    with Seen() as seen:
        assert_close(step(model), expected)
    assert not {"moe", "moe_linear"} & set(seen.names)


def test_parametrised_after_the_exchange() -> None:
    """As PEFT does it: torch makes a subclass. It is reported, exchanged once and restored."""
    model = exchanged(model_of("Step-3.5"))
    experts = model.get_submodule(report(model).entries[0].path)

    class Halved(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 0.5 * w

    parametrize.register_parametrization(experts, "down_proj", Halved())
    assert report(model).paths("ffn_ops")
    expected = step(ffn_ops.restore(copy.deepcopy(model)))
    for change, ours_run in ((exchanged, True), (ffn_ops.restore, False), (exchanged, True)):
        change(model)
        assert bool(report(model).paths("ffn_ops")) == ours_run
        with Seen() as seen:
            assert_close(step(model), expected)
        assert ("moe" in seen.names) == ours_run
    parametrize.remove_parametrizations(experts, "down_proj")
    ffn_ops.restore(model)
    assert type(experts) is modeling_step3p7.Step3p7Experts
