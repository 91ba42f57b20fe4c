# SPDX-License-Identifier: BSD-3-Clause
"""PEFT's adapters on the stacked experts of transformers' models: taken up by the operator, and everything that PEFT
does with them, against the same on transformers' own loop."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from seen import Seen
from test_quantized_model import dense_again
from test_transformers import MODELS, config_of, tokens
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

import ffn_ops
from ffn_ops.integrations import _gates, _peft
from ffn_ops.integrations.transformers import from_pretrained, register

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.cpu_only("transformers builds its models on the CPU")
register()

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def base(implementation: str, name: str = "qwen3_moe", dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    config = config_of(name)
    return transformers.AutoModelForCausalLM.from_config(config, experts_implementation=implementation).to(dtype)


def config(r: int = 2, **options: Any) -> Any:
    return peft.LoraConfig(r=r, target_modules=[], target_parameters=TARGETS, **options)


def adapted(implementation: str, name: str = "qwen3_moe", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    model = peft.get_peft_model(base(implementation, name, dtype), config(**options), adapter_name="first")
    draw(model)
    return model


def draw(model: nn.Module) -> None:
    torch.manual_seed(1)
    for n, p in model.named_parameters():
        if "lora_" in n:
            nn.init.normal_(p, std=0.3)


def step(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(input_ids=tokens(), labels=tokens())
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **grads}


def assert_alike(ours: Any, theirs: Any, rtol: float = 1e-9) -> None:
    actual, expected = step(ours), step(theirs)
    assert actual.keys() == expected.keys() and len(expected) > 4
    for n, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(
            actual[n], value, rtol=rtol, atol=rtol * scale, msg=lambda m, n=n: f"{n}: {m}", check_stride=True
        )


def operators(model: Any) -> list[str]:
    with Seen() as seen:
        model(input_ids=tokens())
    return [n for n in seen.names if n != "moe_sort"]


def wrappers(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.layer.ParamWrapper)]


@contextlib.contextmanager
def forbidden(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No weight with an adapter in it may be formed."""

    def formed(*_: Any, **__: Any) -> None:
        raise AssertionError("a parametrisation")

    with monkeypatch.context() as m:
        m.setattr(nn.utils.parametrize, "register_parametrization", formed)
        yield


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v4"])
def test_every_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt-oss: transposed weights, rows that alternate, biases. The scales of the two weights differ."""
    ours, theirs = (adapted(i, name) for i in ("ffn_ops", "eager"))
    for wrapper in (*wrappers(ours), *wrappers(theirs)):
        wrapper.scaling["first"] = 0.7 if wrapper.parameter_name == "down_proj" else 1.2
    with forbidden(monkeypatch):
        assert operators(ours) == ["moe_lora"] * 2
        actual = step(ours)
    expected = step(theirs)
    assert actual.keys() == expected.keys()
    assert sum("experts" in n and "lora_" in n for n in expected) == 8
    for n, value in expected.items():
        torch.testing.assert_close(actual[n], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=n: f"{n}: {m}")


def test_float32_and_bfloat16() -> None:
    """float32: within its rounding. bfloat16 with PEFT's float32 adapters: nearer to float64 than PEFT's own way."""
    ours, theirs = (adapted(i, "mixtral", torch.float32) for i in ("ffn_ops", "eager"))
    assert_alike(ours, theirs, rtol=2e-5)
    x = torch.randn(40, 32)
    experts = [
        adapted(i, "mixtral", torch.bfloat16).base_model.model.model.layers[0].mlp.experts for i in ("ffn_ops", "eager")
    ]
    assert experts[0].lora_A["first"].weight.dtype is torch.float32
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(40)])
    weights = torch.rand(40, 2)
    exact = adapted("eager", "mixtral").base_model.model.model.layers[0].mlp.experts
    exact.load_state_dict({n: t.double() for n, t in experts[0].state_dict().items()})
    with torch.no_grad():
        expected = exact(x.bfloat16().double(), ids, weights.double())
        errors = [(e(x.bfloat16(), ids, weights).double() - expected).square().mean() for e in experts]
    assert errors[0] < errors[1] < 1e-2 * expected.square().mean()


def test_what_peft_does_with_adapters(tmp_path: Path) -> None:
    """Another adapter of another rank, both at once, disabled, merged, unmerged, saved and loaded."""
    ours, theirs = (adapted(i) for i in ("ffn_ops", "eager"))
    for model in (ours, theirs):
        model.add_adapter("second", config(r=3, use_rslora=True))
        draw(model)
    for active in ("second", ["first", "second"], "first"):
        for model in (ours, theirs):
            model.base_model.set_adapter(active)
        assert_alike(ours, theirs)
    alone = ours(input_ids=tokens()).logits
    with ours.disable_adapter():
        assert operators(ours) == ["moe"] * 2
        torch.testing.assert_close(ours(input_ids=tokens()).logits, base("eager")(input_ids=tokens()).logits)
    ours.merge_adapter()
    assert operators(ours) == ["moe"] * 2
    torch.testing.assert_close(ours(input_ids=tokens()).logits, alone)
    ours.unmerge_adapter()
    assert operators(ours) == ["moe_lora"] * 2
    torch.testing.assert_close(ours(input_ids=tokens()).logits, alone)
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base("ffn_ops"), tmp_path / "first")
    assert operators(loaded) == ["moe_lora"] * 2
    torch.testing.assert_close(loaded(input_ids=tokens()).logits, alone)


def test_a_refused_merge_merges_nothing() -> None:
    """Attention's layers come before the experts, and had been merged when these refused. What concerns no quantised
    weight is merged."""
    options = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=TARGETS)
    ours = peft.get_peft_model(base("ffn_ops", dtype=torch.float32), options, adapter_name="first")
    ours.add_adapter("attention", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    draw(ours)
    ffn_ops.quantize_(ours, "int8")
    before = {name: t.clone() for name, t in ours.state_dict().items()}
    for merge in (ours.merge_adapter, ours.merge_and_unload, lambda: ours.merge_adapter(["attention", "first"])):
        with pytest.raises(TypeError, match="proj: expected a plain weight to merge adapters into, got a Quantized"):
            merge()
        assert all(torch.equal(t, before[name]) for name, t in ours.state_dict().items())
    ours.base_model.set_adapter("attention")
    logits = ours(input_ids=tokens()).logits
    ours.merge_adapter()
    assert any(not torch.equal(t, before[name]) for name, t in ours.state_dict().items())
    torch.testing.assert_close(ours(input_ids=tokens()).logits, logits)
    ours.unmerge_adapter()
    torch.testing.assert_close(ours(input_ids=tokens()).logits, logits)


def with_plain_weights(model: nn.Module) -> nn.Module:
    model = dense_again(model)
    for n, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and "lora_" in n)
    return model


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_quantised_experts(name: str, tmp_path: Path) -> None:
    """Quantised with adapters on them, or before: the bits of the same model on the dequantised values."""
    ours = adapted("ffn_ops", name, torch.float32)
    assert len(ffn_ops.quantize_(ours, "int8").paths("quantised")) == 2
    dense = with_plain_weights(ours)
    assert operators(ours) == ["moe_quantized"] * 2 and operators(dense) == ["moe_lora"] * 2
    assert_alike(ours, dense, rtol=1e-6)
    logits = ours(input_ids=tokens()).logits
    assert not torch.allclose(logits, base("eager", name, torch.float32)(input_ids=tokens()).logits, rtol=0.1)
    for call in (ours.merge_adapter, ours.merge_and_unload):
        with pytest.raises(TypeError, match="proj: expected a plain weight to merge adapters into, got a Quantized"):
            call()
    ours.save_pretrained(tmp_path)
    before = base("ffn_ops", name, torch.float32)
    ffn_ops.quantize_(before, "int8")
    loaded = peft.PeftModel.from_pretrained(before, tmp_path / "first")
    assert torch.equal(loaded(input_ids=tokens()).logits, logits)
    before = base("ffn_ops", name, torch.float32)
    ffn_ops.quantize_(before, "int8")
    before.save_pretrained(tmp_path / "base")
    kept = from_pretrained(transformers.AutoModelForCausalLM, tmp_path / "base")  # down_proj is loaded first
    kept = peft.PeftModel.from_pretrained(kept, tmp_path / "first")
    assert torch.equal(kept(input_ids=tokens()).logits, logits)
    loaded.add_adapter("second", config(r=3))
    draw(loaded)
    loaded.base_model.set_adapter(["default", "second"])
    assert_alike(loaded, with_plain_weights(loaded), rtol=1e-6)
    assert not any(isinstance(p, nn.Parameter) for n, p in loaded.named_parameters() if n.endswith("up_proj"))


def test_gradient_checkpointing_and_training() -> None:
    ours, theirs = (adapted(i) for i in ("ffn_ops", "eager"))
    ours.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    ours.train(), theirs.train()
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for _ in range(3):
            step(model)
            optimizer.step()
    assert_alike(ours, theirs)


@pytest.mark.skipif(torch.__version__ < "2.12", reason="dynamo of torch 2.11 takes no module for a constant")
def test_compiled_in_one_graph() -> None:
    experts = adapted("ffn_ops", "mixtral").base_model.model.model.layers[0].mlp.experts
    given = torch.randn(5, 32, dtype=torch.float64), torch.randint(0, 4, (5, 2)), torch.rand(5, 2, dtype=torch.float64)
    compiled = torch.compile(experts, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), experts(*given))


def test_other_implementations_and_other_adapters_stay_as_they_are() -> None:
    """PEFT's own way where another implementation is set, or where an adapter is not plain."""
    ours = adapted("ffn_ops")
    expected = ours(input_ids=tokens()).logits
    ours.base_model.model.set_experts_implementation("eager")
    assert operators(ours) == []
    torch.testing.assert_close(ours(input_ids=tokens()).logits, expected)
    ours.base_model.model.set_experts_implementation("ffn_ops")
    for wrapper in wrappers(ours):
        wrapper.lora_dropout["first"] = nn.Dropout(0.0)
    assert operators(ours) == ["moe"] * 2
    torch.testing.assert_close(ours(input_ids=tokens()).logits, expected)


def test_adapters_of_another_orientation(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT before 0.20 took the rows of a weight for its inputs. Of a square weight both orientations fit."""
    half = {**MODELS["qwen3_moe"][1], "moe_intermediate_size": config_of("qwen3_moe").hidden_size // 2}
    monkeypatch.setitem(MODELS, "qwen3_moe", (MODELS["qwen3_moe"][0], half))
    models = []
    for implementation in ("ffn_ops", "eager"):
        only_first = peft.LoraConfig(r=2, target_modules=[], target_parameters=TARGETS[:1])
        models.append(peft.get_peft_model(base(implementation), only_first))
        draw(models[-1])
        for wrapper in wrappers(models[-1]):
            assert wrapper._did_swap_in_out_features
            wrapper._did_swap_in_out_features = False
    assert_alike(*models)


def test_hooks_of_every_wrapper_run() -> None:
    """The outermost wrapper calls the experts, unless one inside has something to do."""
    ours = adapted("ffn_ops", "mixtral", torch.float32)
    expected, seen = ours(input_ids=tokens()).logits, []
    for wrapper in wrappers(ours):
        wrapper.register_forward_hook(lambda module, _given, _out: seen.append(module))
    assert operators(ours) == ["moe_lora"] * 2 and len(seen) == len(wrappers(ours)) == 4
    assert torch.equal(ours(input_ids=tokens()).logits, expected)
    other, seen_by_all = adapted("ffn_ops", "mixtral", torch.float32), []
    with register_module_forward_hook(lambda module, _given, _out: seen_by_all.append(module)):
        other(input_ids=tokens())
    assert sum(each in wrappers(other) for each in seen_by_all) == 4


def test_adapters_of_a_call_are_those_of_its_thread() -> None:
    ours = adapted("ffn_ops")
    entered, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with wrappers(ours)[0]._activate_lora(["first"]):
            entered.set()
            leave.wait(60)

    other = threading.Thread(target=stay)
    other.start()
    assert entered.wait(60)
    try:
        with ours.disable_adapter():
            assert operators(ours) == ["moe"] * 2
    finally:
        leave.set()
        other.join()


@pytest.mark.parametrize("under", [None, torch.float16], ids=["plain", "float16 autocast"])
def test_factors_of_other_dtypes(under: torch.dtype | None) -> None:
    """A pair of two dtypes; and bfloat16 under autocast to float16, which casts the weights: as PEFT's own way."""
    results = []
    for implementation in ("ffn_ops", "eager"):
        model = adapted(implementation, "mixtral", torch.bfloat16)
        for wrapper in wrappers(model):
            wrapper.lora_B["first"].bfloat16()
            if under:
                wrapper.lora_A["first"].bfloat16()
        with torch.no_grad(), torch.autocast("cpu", under, enabled=under is not None):
            results.append(model(input_ids=tokens()).logits)
    torch.testing.assert_close(*results, rtol=0, atol=0.05 * float(results[1].abs().max()))


def test_peft_that_is_imported_after_register(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call runs PEFT's way, the next one ours."""
    wrapper = peft.tuners.lora.layer.ParamWrapper
    monkeypatch.setattr(wrapper, "_activate_lora", wrapper._activate_lora._ffn_ops)
    ours = adapted("ffn_ops")
    first = ours(input_ids=tokens()).logits
    assert operators(ours) == ["moe_lora"] * 2
    torch.testing.assert_close(ours(input_ids=tokens()).logits, first)


def test_lines_of_the_page(tmp_path: Path) -> None:
    """docs/fine-tuning.md: what it shows trains, saves, loads and generates."""
    base("ffn_ops", dtype=torch.float32).save_pretrained(tmp_path / "model")
    names: dict[str, Any] = {
        "name": str(tmp_path / "model"), "folder": tmp_path / "adapter", "ids": tokens()[:, :12], "steps": 8,
    }  # fmt: skip
    page = (Path(__file__).parents[1] / "docs" / "fine-tuning.md").read_text(encoding="utf-8")
    setup, training, generation, quantised = re.findall(r"^```py\n(.*?)^```", page, re.S | re.M)
    exec(setup, names)
    before = float(names["model"](input_ids=names["ids"], labels=names["ids"]).loss)
    exec(training, names)
    assert float(names["loss"]) < 0.9 * before and operators(names["model"]) == ["moe_lora"] * 2
    trained = names["model"].eval().generate(names["ids"], max_new_tokens=4, do_sample=False)
    exec(generation, names)
    assert torch.equal(names["text"], trained)

    names["model"] = names["AutoModelForCausalLM"].from_pretrained(names["name"], experts_implementation="ffn_ops")
    exec(quantised.replace("mxfp4", "int8"), names)  # the small model's experts are narrower than a group of MXFP4
    exec(training, names)
    assert float(names["loss"]) < 0.9 * before and operators(names["model"]) == ["moe_quantized"] * 2


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def test_a_thousand_forwards_recognise_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each parametrisation makes a new class. The gate is found once, and nothing grows."""
    experts = base("ffn_ops", "mixtral", torch.float32).model.layers[0].mlp.experts
    x, ids, weights = torch.randn(2, 32), torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2)
    looks = []
    recognise = _gates._recognise
    monkeypatch.setattr(_gates, "_known", {})
    monkeypatch.setattr(_gates, "_recognise", lambda *a: looks.append(a) or recognise(*a))
    classes = set()
    with torch.no_grad():
        for _ in range(1000):
            parametrize.register_parametrization(experts, "down_proj", Doubled(), unsafe=True)
            y = experts(x, ids, weights)
            classes.add(type(experts))
            parametrize.remove_parametrizations(experts, "down_proj", leave_parametrized=False)
        plain = experts(x, ids, weights)
    assert len(classes) == 1000 and len(looks) == 1 and len(_gates._known) == 1
    torch.testing.assert_close(y, 2 * plain)
    assert _peft.adapters_of(experts, "gate_up_proj") is None and ffn_ops.Lora().a_in is None
