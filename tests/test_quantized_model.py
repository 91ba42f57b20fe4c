# SPDX-License-Identifier: BSD-3-Clause
"""``quantize_``: experts of modules and of transformers' models, against the same models on dequantised weights."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device import generator
from test_quantized_dense import dense_again as dense_linears
from torch import nn

import ffn_ops
from ffn_ops import QuantizedWeight

pytestmark = pytest.mark.cpu_only("models are quantised on the CPU")


def dense_again(model: nn.Module) -> nn.Module:
    """A copy with plain parameters of the dequantised values."""
    model = dense_linears(model)
    for module in list(model.modules()):
        for name, w in list(module.named_children()):
            if isinstance(w, QuantizedWeight):
                values = w.dequantize()
                turned = getattr(module, "is_transposed", False)
                delattr(module, name)
                setattr(module, name, nn.Parameter(values.transpose(1, 2) if turned else values))
    return model


@pytest.mark.parametrize("format", ["mxfp4", "int8", "int4", "fp8"])
def test_a_mixture_computes_with_its_quantised_weights(format: str) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(ffn_ops.MoEFFN(64, 96, num_experts=4, top_k=2, gated=True, num_shared=1))
    x = torch.randn(2, 5, 64, requires_grad=True)
    before = layer(x).detach()
    report = ffn_ops.quantize_(layer, format)
    assert report.paths("quantised") == ["0", "0.shared"]
    dense = dense_again(layer)
    y, expected = layer(x), dense(x)
    assert torch.equal(y, expected)
    assert 0 < (y - before).norm() < 0.3 * before.norm()
    grads = [torch.autograd.grad(out.sum(), x)[0] for out in (y, expected)]
    assert torch.equal(*grads)
    other = nn.Sequential(ffn_ops.MoEFFN(64, 96, num_experts=4, top_k=2, gated=True, num_shared=1))
    ffn_ops.quantize_(other, format)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)
    assert ffn_ops.quantize_(layer, format).paths("left") == ["0", "0.shared"]
    with pytest.raises(TypeError, match="w_in: expected a parameter to draw again, got QuantizedWeight"):
        layer[0].reset_parameters()  # type: ignore[operator]


def test_a_layer_that_cannot_be_quantised_stays_as_it_was() -> None:
    layer = ffn_ops.MoEFFN(33, 32, num_experts=2, top_k=1)
    with pytest.raises(ValueError, match="group: expected a divisor of K = 33"):
        ffn_ops.quantize_(layer, "int4")
    assert type(layer.w_in) is nn.Parameter and type(layer.w_down) is nn.Parameter
    with pytest.raises(ValueError, match="format: expected one of mxfp4, fp8, int8, int4, got 'int3'"):
        ffn_ops.quantize_(nn.Linear(2, 2), "int3")
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module"):
        ffn_ops.quantize_(layer.w_in, "int4")  # type: ignore[arg-type]


def test_a_shared_weight_stays_shared() -> None:
    """Layers that shared a parameter share its quantised bytes; all else is as without the tie."""
    first, second = ffn_ops.FeedForward(64, d_ff=96), ffn_ops.FeedForward(64, d_ff=96)
    second.w1.weight, second.w2.weight, second.w3.weight = first.w1.weight, first.w2.weight, first.w1.weight
    mixtures = [ffn_ops.MoEFFN(64, 96, num_experts=2, top_k=1) for _ in range(2)]
    mixtures[1].w_in = mixtures[0].w_in
    model = nn.Sequential(first, second, *mixtures)
    apart = copy.deepcopy(model)
    for module in apart.modules():
        for name, p in list(module._parameters.items()):
            module._parameters[name] = None if p is None else nn.Parameter(p.detach().clone())
    for each in (model, apart):
        assert len(ffn_ops.quantize_(each, "int8").paths("quantised")) == 4
    assert first.w1.weight is second.w1.weight is second.w3.weight and first.w2.weight is second.w2.weight
    assert mixtures[0].w_in is mixtures[1].w_in and mixtures[0].w_down is not mixtures[1].w_down
    x = torch.randn(5, 64, generator=generator(3))
    assert torch.equal(model(x), apart(x))
    copied = copy.deepcopy(model)
    assert copied[0].w1.weight is copied[1].w1.weight  # type: ignore[union-attr]


def test_quantised_experts_refuse_another_implementation() -> None:
    """Before any work, and by name; what has no quantised experts changes as ever."""
    transformers = pytest.importorskip("transformers")
    from ffn_ops.integrations.transformers import register

    register()
    config = transformers.Qwen3MoeConfig(
        vocab_size=50, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model: Any = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="ffn_ops").eval()
    model.set_experts_implementation("eager")
    model.set_experts_implementation("ffn_ops")
    ffn_ops.quantize_(model, "int8")
    ids = torch.arange(5)[None]
    logits = model(input_ids=ids).logits
    for asked in ("eager", "grouped_mm", {"": "eager"}):
        message = (
            "experts_implementation: expected 'ffn_ops', which alone computes quantised experts such as model.layers.0"
        )
        with pytest.raises(ValueError, match=message):
            model.set_experts_implementation(asked)
        assert model.config._experts_implementation == "ffn_ops"
    model.set_experts_implementation("ffn_ops")
    assert torch.equal(model(input_ids=ids).logits, logits)


def test_gpt_oss_finds_its_checkpoint_again() -> None:
    """Weights of MXFP4 values, as transformers dequantises them: quantised again they are the same, and so are logits
    and generated tokens."""
    transformers = pytest.importorskip("transformers")
    from ffn_ops.integrations.transformers import register

    register()
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=50, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    model: Any = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="ffn_ops").eval()
    g = generator(1)
    for module in model.modules():
        if hasattr(module, "gate_up_proj"):
            for name in ("gate_up_proj", "down_proj"):
                w = getattr(module, name)
                E, K, N = w.shape
                blocks = torch.randint(256, (E, N, K // 32, 16), dtype=torch.uint8, generator=g)
                scales = torch.randint(118, 122, (E, N, K // 32), dtype=torch.uint8, generator=g)
                w.data.copy_(QuantizedWeight.from_mxfp4(blocks, scales).dequantize().transpose(1, 2))
    ids = torch.randint(1, 50, (1, 7), generator=g)
    with torch.no_grad():
        expected = model(ids).logits
        tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
        experts = sum(p.nbytes for n, p in model.named_parameters() if n.endswith(("gate_up_proj", "down_proj")))
        report = ffn_ops.quantize_(model, "mxfp4")
        assert len(report.paths("quantised")) == 2
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), tokens)
    held = sum(w.nbytes for w in model.modules() if isinstance(w, QuantizedWeight))
    assert held * 32 * 4 == experts * 17


def test_experts_of_another_implementation_are_left() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    (entry,) = ffn_ops.quantize_(model, "int8").entries
    assert (entry.status, entry.why) == ("left", "experts_implementation is 'eager'")


def holder(w: QuantizedWeight) -> nn.Module:
    module = nn.Module()
    module.w = w
    return module


def in_bytes(format: str, scale: torch.Tensor) -> QuantizedWeight:
    codes = torch.randint(256, (8, 64), dtype=torch.uint8, generator=generator(2))
    cols = 64 if format in ("int8", "fp8") else 128
    return QuantizedWeight(format, codes, scale, block=(1, cols // scale.shape[1]))


@pytest.mark.parametrize("assign", [False, True])
def test_bytes_that_mean_something_else_are_not_loaded(assign: bool) -> None:
    """Shapes are alike, and int8 and fp8 have the same dtypes."""
    e8m0, wide = torch.full((8, 4), 127, dtype=torch.uint8), torch.ones(8, 4)
    row = torch.ones(8, 1)
    for ours, theirs, message in (
        (in_bytes("int8", row), in_bytes("fp8", row), "w: expected a quantised weight in int8:1x64, got one in fp8"),
        (in_bytes("mxfp4", e8m0), in_bytes("int4", wide), "w.scales: expected dtype uint8 as .* mxfp4.*, got float32"),
        (in_bytes("int4", wide), in_bytes("mxfp4", e8m0), "w.scales: expected dtype float32 as .* int4.*, got uint8"),
    ):
        into, before = holder(ours), [t.clone() for t in ours.parts]
        states = [holder(theirs).state_dict()]
        if theirs.format != "fp8":
            states.append(dict(states[0]))  # as safetensors gives it, without metadata
        for state in states:
            with pytest.raises(RuntimeError, match=message):
                into.load_state_dict(state, assign=assign)
            assert all(torch.equal(t, was) for t, was in zip(ours.parts, before, strict=True))


@pytest.mark.parametrize("as_parameters", [False, True])
def test_a_mapped_file_is_not_written_to(as_parameters: bool, tmp_path: Any) -> None:
    np = pytest.importorskip("numpy")
    (tmp_path / "weights").write_bytes(bytes(range(68)))
    data = np.memmap(tmp_path / "weights", mode="r+", dtype="uint8", shape=(2, 34))
    w = QuantizedWeight.from_gguf(SimpleNamespace(data=data, tensor_type=SimpleNamespace(name="Q8_0")))
    if as_parameters:
        w.as_parameters()
    other = torch.full((2, 34), 1, dtype=torch.uint8)
    holder(w).load_state_dict({"w.codes": other})
    assert torch.equal(w.codes, other)
    assert (tmp_path / "weights").read_bytes() == bytes(range(68))
