# SPDX-License-Identifier: BSD-3-Clause
"""Which experts of a transformers model this package computes: the report says what runs, and experts that run their
own code cause a warning."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from device import generator
from seen import Seen
from test_transformers import MODELS, Base, config_of, experts, tokens
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import use_experts_implementation
from transformers.models.step3p7 import modeling_step3p7

import ffn_ops
from ffn_ops.integrations import transformers as ours
from ffn_ops.integrations.transformers import register, report

pytestmark = pytest.mark.cpu_only("transformers builds its models on the CPU")
register()

TEXT = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
STEP = {
    **TEXT, "num_local_experts": 4, "num_experts_per_tok": 2, "n_routed_experts": 4, "moe_intermediate_size": 8,
    "share_expert_dim": 8, "mlp_layer_types": ["sparse"], "layer_types": ["full_attention"],
    "swiglu_limits": [0.9], "swiglu_limits_shared": [0.9], "sliding_window": 8,
}  # fmt: skip
# Every mixture whose experts transformers 5.24 cannot exchange: its model, configuration and the class that holds them.
OWN: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "Switch Transformers": (
        "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig",
        {"vocab_size": 61, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2,
         "num_heads": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4},
        "SwitchTransformersExperts",
    ),
    "JetMoE": (
        "JetMoeForCausalLM", "JetMoeConfig",
        {**TEXT, "num_key_value_heads": 1, "kv_channels": 8, "num_local_experts": 4}, "JetMoeParallelExperts",
    ),
    "Llama 4": ("Llama4ForCausalLM", "Llama4TextConfig", {**TEXT, "num_local_experts": 4}, "Llama4TextExperts"),
    "Step-3.5": ("Step3p7TextModel", "Step3p7TextConfig", STEP, "Step3p7Experts"),
    "Step-3.7": (
        "Step3p7ForConditionalGeneration", "Step3p7Config",
        {"text_config": STEP, "vision_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}},
        "Step3p7Experts",
    ),
    "LongCat-Flash": (
        "LongcatFlashForCausalLM", "LongcatFlashConfig",
        {**TEXT, "num_hidden_layers": 2, "num_layers": 1,
         "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "kv_lora_rank": 8,
         "expert_ffn_hidden_size": 8, "ffn_hidden_size": 24, "q_lora_rank": 8, "qk_nope_head_dim": 8,
         "qk_rope_head_dim": 8, "v_head_dim": 8},
        "LongcatFlashExperts",
    ),
    "DBRX": (
        "DbrxForCausalLM", "DbrxConfig",
        {"vocab_size": 61, "d_model": 16, "n_heads": 2, "n_layers": 1,
         "attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0},
         "ffn_config": {"hidden_size": 16, "ffn_hidden_size": 8, "moe_num_experts": 4, "moe_top_k": 2}},
        "DbrxExpertGLU",
    ),
    "Doge": (
        "DogeForCausalLM", "DogeConfig", {**TEXT, "is_moe": True, "num_experts": 16, "num_experts_per_tok": 2},
        "DogeCDMoE",
    ),
    "NLLB-MoE": (
        "NllbMoeForConditionalGeneration", "NllbMoeConfig",
        {"vocab_size": 61, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_sparse_step": 1,
         "decoder_sparse_step": 1, "num_experts": 4},
        "NllbMoeExperts",
    ),
    "ViTPose": (
        "VitPoseBackbone", "VitPoseBackboneConfig",
        {"image_size": [32, 32], "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_experts": 4, "part_features": 4},
        "VitPoseNaiveMoe",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def not_warned_yet() -> Iterator[None]:
    before = set(ours._warned)
    ours._warned.clear()
    yield
    ours._warned.update(before)


def made(name: str, **options: Any) -> Any:
    cls, config, values, _ = OWN[name]
    transformers.set_seed(0)
    module = modeling_step3p7 if "Step" in name else transformers
    return getattr(module, cls)._from_config(getattr(transformers, config)(**values), **options).eval()


def call(model: nn.Module) -> list[str]:
    """The operators of this package that ran."""
    ids = torch.randint(3, 61, (2, 6), generator=generator())
    inputs: dict[str, Any] = {"input_ids": ids}
    if type(model).__name__ == "VitPoseBackbone":
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "dataset_index": torch.tensor([0, 3])}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    with torch.no_grad(), Seen() as seen:
        model(**inputs)
    return seen.names


@pytest.mark.parametrize("name", OWN)
def test_experts_that_transformers_cannot_exchange(name: str) -> None:
    """Set to "ffn_ops", by set_experts_implementation or when it is made, such a model runs its own code: the report
    says so before and after, and a warning names the class, once."""
    holds = OWN[name][3]
    model = made(name)
    with pytest.warns(UserWarning, match=rf"does not compute {holds}: the model's own code runs") as told:
        model.set_experts_implementation("ffn_ops")
    assert len(told) == 1
    found = report(model)
    assert found.entries and {(e.layer, e.status) for e in found.entries} == {(holds, "left")}
    assert "left" in str(found) and "asks for no experts_implementation" in str(found)
    assert not any(operator.startswith("moe") for operator in call(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_experts_implementation("ffn_ops")
    ours._warned.clear()
    with pytest.warns(UserWarning, match=f"does not compute {holds}"):
        made(name, experts_implementation="ffn_ops")


@pytest.mark.parametrize("name", MODELS)
def test_experts_that_it_can_exchange(name: str) -> None:
    """Each is listed, with the gate that its calls compute; no warning. With another implementation: left."""
    model = transformers.AutoModelForCausalLM.from_config(config_of(name), experts_implementation="eager").eval()
    before = report(model)
    assert {(e.status, e.why) for e in before.entries} == {("left", "experts_implementation is 'eager'")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_experts_implementation("ffn_ops")
    found = report(model)
    expected = {
        "gpt_oss": "swish(beta=1.702, limit=1.5, up_shift=1.0, interleaved=True)",
        "deepseek_v4": "silu(limit=0.7)",
    }.get(name, "silu")
    assert {(e.status, e.computes) for e in found.entries} == {("ffn_ops", expected)}
    assert before.paths("left") == found.paths("ffn_ops") == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    with torch.no_grad(), Seen() as seen:
        model(input_ids=tokens())
    assert seen.names.count("moe") == 2


def test_a_configuration_that_the_setting_does_not_reach() -> None:
    """As in Dots3-Note, whose vision layers have configurations of their own: transformers' default goes on there."""
    model = transformers.AutoModelForCausalLM.from_config(config_of("mixtral"), experts_implementation="eager")
    experts = model.model.layers[1].mlp.experts
    experts.config = config_of("mixtral")
    experts.config._experts_implementation = "grouped_mm"
    with pytest.warns(UserWarning, match="does not compute MixtralExperts: experts_implementation is 'grouped_mm'"):
        model.set_experts_implementation("ffn_ops")
    assert report(model).paths("left") == ["model.layers.1.mlp.experts"]
    with torch.no_grad(), Seen() as seen:
        model(input_ids=tokens())
    assert seen.names.count("moe") == 1


def test_a_gate_that_the_operator_does_not_have() -> None:
    """A call raises, and the report says beforehand with which words."""
    model = nn.Sequential(experts(lambda self, gate_up: gate_up.chunk(2, -1)[0].sin()))
    (entry,) = report(model).entries
    assert entry.status == "refused"
    with pytest.raises(ValueError) as raised:
        model[0](torch.randn(3, 6), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1))
    assert str(raised.value) == entry.why


def test_experts_of_eight_bits() -> None:
    """They ask a table of their own, which does not have this implementation: their calls raise."""
    eight_bits = use_experts_implementation(experts_interface=FP8ExpertsInterface())(type("Experts", (Base,), {}))
    model = nn.Sequential(eight_bits(experts().config))
    (entry,) = report(model).entries
    assert entry.status == "refused"
    with pytest.raises(KeyError) as raised:
        model[0](torch.randn(3, 6), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1))
    assert raised.value.args[0] == entry.why


def test_a_forward_that_another_library_has_put_in_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report checks the class's forward, not its declaration."""
    model = nn.Sequential(experts())
    assert report(model).paths("ffn_ops") == ["0"]
    monkeypatch.setattr(type(model[0]), "forward", lambda self, x, ids, weights: x)
    assert report(model).paths("left") == ["0"]


def test_other_modules() -> None:
    """Dense models and routers hold none; a list of experts and this package's own mixture are listed; what is
    no module is an error."""
    assert str(report(nn.TransformerEncoderLayer(16, 2))) == "no mixture of experts found"
    block = nn.ModuleDict(
        {"router": nn.Linear(8, 4), "experts": nn.ModuleList(ffn_ops.GELUFFN(8, 4) for _ in range(4))}
    )
    assert [(e.path, e.status) for e in report(block).entries] == [("experts", "left")]
    (entry,) = report(nn.Sequential(ffn_ops.MoEFFN(8, 4, 4))).entries
    assert (entry.path, entry.layer, entry.status, entry.computes) == ("0", "MoEFFN", "ffn_ops", "gelu")
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got str"):
        report("Mixtral")  # type: ignore[arg-type]


def test_registered_twice() -> None:
    """transformers' methods are wrapped once."""
    method = transformers.PreTrainedModel.set_experts_implementation
    register()
    assert transformers.PreTrainedModel.set_experts_implementation is method
