# SPDX-License-Identifier: BSD-3-Clause
"""replace beside peft, torchao and torch's parametrisations, before it and after: every result is that of the untouched
model with the same change, and the report says what is fused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from replacing import FF, LAYERS, D, LlamaLike
from same_function import assert_same_function, on, results, seeded
from seen import Seen
from test_replace_models import TOKENS, logits, made
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import ffn_ops

peft = pytest.importorskip("peft")
torchao = pytest.importorskip("torchao")


def adapted(model: nn.Module, *targets: str, config: Any = None, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    config = config or peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


def operators(model: nn.Module) -> list[str]:
    with Seen() as seen:
        logits(model)
    return seen.names


def assert_same_in_float64(model: nn.Module, plain: nn.Module) -> None:
    """Output and every gradient."""
    actual, expected = (results(each, logits) for each in (model, plain))
    assert list(actual) == list(expected)
    for n, value in expected.items():
        torch.testing.assert_close(actual[n], value, rtol=1e-9, atol=1e-9 * float(value.abs().max()))


# Two layers of each model: what runs in the place of a layer's whole forward.
TARGETS: dict[str, tuple[tuple[str, ...], str]] = {
    "down": (("down_proj",), "moe_lora"),
    "gate and up": (("gate_proj", "up_proj"), "moe_lora"),
    "all": (("gate_proj", "up_proj", "down_proj"), "moe_lora"),
    "attention": (("q_proj", "v_proj"), "ffn"),
}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", TARGETS)
def test_lora(name: str, before: bool) -> None:
    """Adapters on some children, added after or before: output and gradients, and only the adapters have gradients."""
    targets, operator = TARGETS[name]
    plain = adapted(made("Llama"), *targets)
    model = (
        adapted(ffn_ops.replace(made("Llama")), *targets)
        if before
        else ffn_ops.replace(adapted(made("Llama"), *targets))
    )
    assert operators(model) == [operator] * 2
    assert list(model.state_dict()) == list(plain.state_dict())
    assert_same_in_float64(model.double(), plain.double())
    assert all("lora_" in n for n, p in model.named_parameters() if p.grad is not None)
    report = ffn_ops.replace_report(model)
    assert len(report.paths("replaced")) == 2
    assert [e.why for e in report.entries] == [
        "" if name == "attention" else f"with peft's LoRA on {', '.join(targets)}"
    ] * 2


def test_lora_rounds_like_the_untouched_model() -> None:
    """Adapters that are not small make much of float32's rounding, by chance of the draw: 24 are pooled."""
    plain = adapted(made("Llama"), *TARGETS["all"][0])
    assert_same_function(ffn_ops.replace(copy.deepcopy(plain)), plain, logits, draws=24)


def test_lora_merged_disabled_removed() -> None:
    """Merged, disabled and removed adapters: what peft says they compute; then the whole layer is fused again."""
    model, plain = (adapted(made("Llama"), "down_proj", "gate_proj") for _ in range(2))
    ffn_ops.replace(model)
    torch.testing.assert_close(logits(model), logits(plain))
    with model.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(logits(model), logits(plain))
    model.merge_adapter(), plain.merge_adapter()
    torch.testing.assert_close(logits(model), logits(plain))
    model, plain = model.merge_and_unload(), plain.merge_and_unload()
    assert operators(model) == ["ffn"] * 2
    torch.testing.assert_close(logits(model), logits(plain))


@pytest.mark.parametrize("wrap", ["compile", "peft"])
def test_wrappers_that_hand_attributes_on_are_no_layers(wrap: str) -> None:
    """The model itself is a replaced layer: PEFT's modules around it, and torch.compile's, show its attributes."""
    layer = ffn_ops.replace(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)))
    model: Any = torch.compile(layer, backend="eager")
    if wrap == "peft":
        model = peft.get_peft_model(layer, peft.LoraConfig(target_modules=["0"]))
    (path,) = ffn_ops.replace_report(model).paths("replaced")
    assert model.get_submodule(path) is layer
    status = {"compile": "quantised", "peft": "left"}[wrap]
    assert ffn_ops.quantize_(model, "int8").paths(status) == [path]


def test_two_adapters_at_once_and_gradients_in_float64() -> None:
    """Ranks and scales of their own: PEFT's results and every gradient, within rounding."""
    models = [adapted(made("Llama"), "gate_proj", "up_proj", "down_proj").double() for _ in range(2)]
    ffn_ops.replace(models[0])
    for model in models:
        torch.manual_seed(3)
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
        model.add_adapter("second", config)  # type: ignore[operator]
        model.double()
    for active in ("second", ["default", "second"], "default"):
        for model in models:
            model.base_model.set_adapter(active)  # type: ignore[union-attr, operator]
        assert operators(models[0]) == ["moe_lora"] * 2
        assert_same_in_float64(*models)


OURS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "FeedForward": (lambda: ffn_ops.FeedForward(D, d_ff=FF), ("w1", "w3", "w2")),
    "up alone": (lambda: ffn_ops.FeedForward(D, d_ff=FF, bias=False), ("w3",)),
    "GELUFFN": (lambda: ffn_ops.GELUFFN(D, FF), ("linear1", "linear2")),
}


@pytest.mark.parametrize("name", OURS)
def test_lora_on_our_own_modules(name: str) -> None:
    """One operator; the values of the layer with merged weights. With dropout in training the children are called."""
    make, targets = OURS[name]
    torch.manual_seed(0)
    model = adapted(nn.Sequential(make()), *targets, lora_dropout=0.1).double().eval()
    x = torch.randn(2, 3, D, dtype=torch.float64)

    def names() -> list[str]:
        with Seen() as seen:
            model(x)
        return seen.names

    y = model(x)
    assert names() == ["moe_lora"]
    model.train()
    assert names() == ["gated_act"]
    model.eval()
    with model.disable_adapter():  # type: ignore[operator]
        assert names() == ["ffn"] and not torch.allclose(model(x), y)
    model.merge_adapter()  # type: ignore[operator]
    assert names() == ["ffn"]
    torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-12)
    model.unmerge_adapter()  # type: ignore[operator]
    assert names() == ["moe_lora"]
    restored = model.merge_and_unload()(x)  # type: ignore[operator]
    torch.testing.assert_close(restored, y, rtol=1e-10, atol=1e-12)


NOT_PLAIN: dict[str, dict[str, Any]] = {
    "dropout": {"lora_dropout": 0.2}, "DoRA": {"use_dora": True}, "bias": {"lora_bias": True},
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_is_not_plain_lora_is_called(name: str) -> None:
    model = adapted(ffn_ops.replace(made("Llama")), "up_proj", **NOT_PLAIN[name]).train()
    assert operators(model) == ["gated_act"] * 2
    (entry, _) = ffn_ops.replace_report(model).entries
    assert (entry.status, entry.why) == ("partly", "up_proj is called (peft's Linear, and not plain LoRA)")


def test_lora_dropout_and_training() -> None:
    """Adapters with dropout draw the masks of the untouched model: the same losses."""
    losses: list[list[float]] = []
    for replaced in (False, True):
        model = adapted(made("Llama"), "gate_proj", "up_proj", "down_proj", lora_dropout=0.2).train()
        if replaced:
            ffn_ops.replace(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        torch.manual_seed(2)
        losses.append([])
        for _ in range(5):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    assert losses[1][-1] < losses[1][0]


CONFIGS: dict[str, Callable[[], Any]] = {
    "DoRA": lambda: peft.LoraConfig(r=2, target_modules=["up_proj"], use_dora=True, init_lora_weights=False),
    "IA3": lambda: peft.IA3Config(
        target_modules=["down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["gate_proj"], init_weights=False),
    "VeRA": lambda: peft.VeraConfig(r=2, target_modules=["down_proj"], init_weights=False),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_other_methods(name: str) -> None:
    """Further methods of peft on children."""
    model = adapted(ffn_ops.replace(made("Llama")), config=CONFIGS[name]())
    plain = adapted(made("Llama"), config=CONFIGS[name]())
    plain.load_state_dict(model.state_dict())
    ours, untouched = results(model, logits), results(plain, logits)
    torch.testing.assert_close(ours, untouched, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ours["output"], logits(made("Llama")), atol=1e-4)


def test_lora_of_conv1d_and_fused() -> None:
    """GPT-2's Conv1D and Phi-3's gate_up_proj."""
    for name, target, operator in (("GPT-2", "c_fc", "moe_lora"), ("Phi-3", "gate_up_proj", "moe_lora")):
        model = adapted(ffn_ops.replace(made(name)), target, fan_in_fan_out=name == "GPT-2")
        plain = adapted(made(name), target, fan_in_fan_out=name == "GPT-2")
        assert operators(model) == [operator] * 2
        assert_same_function(model, plain, logits)


def test_lora_compiled(dynamo: None) -> None:
    model = adapted(ffn_ops.replace(made("Llama")), "down_proj").eval()
    compiled = torch.compile(
        lambda ids: model(input_ids=ids, use_cache=False).logits, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(TOKENS), logits(model))


# ---- weights that act on their own ----------------------------------------------------------------------------------


def quantised(model: nn.Module, which: Callable[[nn.Module, str], bool] | None = None) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), **({} if which is None else {"filter_fn": which}))
    return model


@pytest.mark.cpu_only("torchao's int8 products are those of the device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_weights(dtype: torch.dtype) -> None:
    """torchao's int8 weights, set before and after: one operator on their bytes; called beside dense weights."""
    plain = quantised(made("Llama", dtype).eval())
    for model in (
        quantised(ffn_ops.replace(made("Llama", dtype).eval())),
        ffn_ops.replace(quantised(made("Llama", dtype).eval())),
    ):
        assert operators(model) == ["moe_quantized"] * 2
        tolerance = {"rtol": 0.05, "atol": 0.02} if dtype is torch.bfloat16 else {}
        torch.testing.assert_close(logits(model), logits(plain), **tolerance)
        assert len(ffn_ops.replace_report(model).paths("replaced")) == 2
    only_down = quantised(ffn_ops.replace(made("Llama")), lambda m, name: name.endswith("down_proj"))
    assert operators(only_down) == ["gated_linear", "quantized_linear"] * 2
    assert "down_proj is called (its weight is a " in str(ffn_ops.replace_report(only_down))


class Half(Tensor):
    """A weight that acts on its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return func(args[0], args[1].as_subclass(Tensor) / 2, *args[2:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def halved(child: nn.Linear) -> nn.Module:
    child.weight = nn.Parameter(child.weight.detach().as_subclass(Half), requires_grad=False)
    return child


def doubled(child: nn.Linear) -> nn.Module:
    by = Doubled(child.in_features, child.out_features, bias=child.bias is not None)
    by.load_state_dict(child.state_dict())
    return by


def own_forward(child: nn.Linear) -> nn.Module:
    child.forward = lambda x: 3 * nn.Linear.forward(child, x)  # type: ignore[method-assign]
    return child


def pruned(child: nn.Linear) -> nn.Module:
    torch.manual_seed(3)
    return prune.random_unstructured(child, "weight", 0.5)


CHANGES: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "subclass of Linear": doubled,
    "subclass of Tensor": halved,
    "own forward": own_forward,
    "weight_norm": parametrizations.weight_norm,
    "pruned": pruned,
    "other module": lambda child: nn.Sequential(child, nn.Tanh()),
}


@pytest.mark.filterwarnings("ignore:ffn_ops.replace")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["llama", "phi", "sequential", "in a method", "guide GatedFFN"])
def test_changed_children(name: str, change: str) -> None:
    """Each linear child in turn, changed before and after."""
    paths = [
        path for path, m in seeded(LAYERS[name][0]).named_modules() if isinstance(m, nn.Linear) and path != "attention"
    ]
    x = torch.randn(5, D)
    for path in paths:
        for before in (True, False):
            layer, plain = (seeded(LAYERS[name][0]) for _ in range(2))
            if before:
                ffn_ops.replace(layer)
            for model in (layer, plain):
                model.set_submodule(path, CHANGES[change](model.get_submodule(path)))
            if not before:
                ffn_ops.replace(layer)
            torch.testing.assert_close(results(layer, on(x)), results(plain, on(x)))
            if change != "other module":  # of which only the layer's own forward knows what it computes
                assert ffn_ops.replace_report(layer).paths("partly") == [""]


def test_parametrisation_removed() -> None:
    layer = ffn_ops.replace(LlamaLike())
    x = torch.randn(5, D)
    parametrizations.weight_norm(layer.up_proj)
    with Seen() as seen:
        layer(x)
    nn.utils.parametrize.remove_parametrizations(layer.up_proj, "weight")
    with Seen() as later:
        layer(x)
    assert (seen.names, later.names) == (["gated_act"], ["ffn"])


def test_children_of_other_widths() -> None:
    """Plain layers of other widths, as pruning makes them: still one operator."""
    layer = ffn_ops.replace(LlamaLike())
    layer.gate_proj, layer.up_proj, layer.down_proj = nn.Linear(D, 7), nn.Linear(D, 7, bias=False), nn.Linear(7, 3)
    x = torch.randn(5, D)
    with Seen() as seen:
        y = layer(x)
    assert seen.names == ["ffn"] and FF not in y.shape
    torch.testing.assert_close(y, ffn_ops.restore(copy.deepcopy(layer))(x))


def test_lines_of_the_pages() -> None:
    """The lines of the pages on replacing and on LoRA run as they stand, on a model."""
    names: dict[str, Any] = {"ffn_ops": ffn_ops, "peft": peft, "model": made("Llama")}
    for page in ("replacing.md", "quantisation.md"):
        text = (Path(__file__).parents[1] / "docs" / page).read_text(encoding="utf-8")
        exec(text.partition("```py\n")[2].partition("```")[0], names)
    report = ffn_ops.replace_report(names["model"])
    assert {e.why for e in report.entries} == {"with peft's LoRA on down_proj"}
