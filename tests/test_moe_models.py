# SPDX-License-Identifier: BSD-3-Clause
"""Mixtures of models against the models' own blocks in transformers: what MoEFFN computes with their parameters."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device import generator
from test_router_models import CASES, TABLE, TOKENS, D, E, K, config_of, gemma_logits, router_of
from torch import Tensor, nn

import ffn_ops
from ffn_ops import routing

pytest.importorskip("transformers")

F = 20
Build = Callable[[Any, Any], ffn_ops.MoEFFN]


def mixture(config: Any, **options: Any) -> ffn_ops.MoEFFN:
    options = {"gated": True, "activation": "silu", "bias": False, **options}
    return ffn_ops.MoEFFN(D, F, options.pop("experts", E), K, **options)


def put(layer: Any, **values: Tensor) -> Any:
    """The model's own parameters, or what is made of them, in the places of ours: gradients meet there."""
    for place, value in values.items():
        *path, name = place.split("__")
        owner = layer
        for each in path:
            owner = getattr(owner, each)
        owner._parameters[name] = value
    return layer


def experts_of(layer: Any, experts: Any, router: Tensor) -> Any:
    up = experts.gate_up_proj if hasattr(experts, "gate_up_proj") else experts.up_proj
    return put(layer, w_in=up, w_down=experts.down_proj, router__weight=router)


def shared_of(layer: Any, shared: Any) -> Any:
    """``shared`` in the model's order: gate, up, down."""
    return put(
        layer, shared__w1__weight=shared.gate_proj.weight, shared__w3__weight=shared.up_proj.weight,
        shared__w2__weight=shared.down_proj.weight,
    )  # fmt: skip


def plain(**options: Any) -> Callable[[Any, Any], Any]:
    """A block of a router, experts and shared experts, without more."""

    def build(block: Any, config: Any) -> Any:
        gate = block.gate if hasattr(block, "gate") else block.router
        router = options["router"]
        if isinstance(router, dict):
            router = with_bias(routing.BiasedTopK(E, K, **router), gate)
        shared = getattr(block, "shared_experts", None)
        layer = mixture(config, num_shared=0 if shared is None else 1, **{**options, "router": router})
        layer = experts_of(layer, block.experts, gate.weight)
        return layer if shared is None else shared_of(layer, shared)

    return build


def gated_shared(**options: Any) -> Callable[[Any, Any], Any]:
    def build(block: Any, config: Any) -> Any:
        layer = mixture(config, num_shared=1, shared_gate=True, router=functools.partial(routing.top_k, k=K, **options))
        layer = shared_of(experts_of(layer, block.experts, block.gate.weight), block.shared_expert)
        return put(layer, shared_gate__weight=block.shared_expert_gate.weight)

    return build


def with_bias(router: Any, source: Any) -> Any:
    router.bias = source.e_score_correction_bias.detach().clone()
    return router


def longcat(block: Any, config: Any) -> Any:
    options = {"score": "softmax", "renormalize": False, "scale": 6.0}
    layer = mixture(
        config, experts=E - 4, num_identity=4, router=with_bias(routing.BiasedTopK(E, K, **options), block.router)
    )
    layer = experts_of(layer, block.experts, block.router.classifier.weight)
    return put(layer, w_in=block.experts.gate_up_proj[: E - 4])  # it has rows, unused, of the others too


def nemotron(block: Any, config: Any) -> Any:
    router = routing.BiasedTopK(E, K, num_groups=4, top_groups=2, scale=2.5)
    layer = mixture(
        config, gated=False, activation="relu_squared", num_shared=1, d_latent=8, router=with_bias(router, block.gate)
    )
    layer = experts_of(layer, block.experts, block.gate.weight)
    shared = block.shared_experts
    return put(
        layer, latent_down__weight=block.fc1_latent_proj.weight, latent_up__weight=block.fc2_latent_proj.weight,
        shared__linear1__weight=shared.up_proj.weight, shared__linear2__weight=shared.down_proj.weight,
    )  # fmt: skip


def muse(block: Any, config: Any) -> Any:
    router = with_bias(routing.BiasedTopK(E, K, scale=2.0), block.gate)
    layer = mixture(config, d_latent=8, expert_norm=block.experts.post_expert_norm, router=router)
    layer = experts_of(layer, block.experts, block.gate.weight)
    layer.router.register_forward_hook(lambda m, x, z: z * block.gate.output_multiplier)
    layer.latent_down = nn.Sequential(block.pre_expert_proj, block.pre_expert_norm)
    layer.latent_up = block.post_expert_proj
    return layer


def zaya(block: Any, config: Any) -> Any:
    router = routing.BiasedTopK(E + 1, 1, score="softmax", renormalize=False)
    router.bias = block.gate.balancing_biases.clone()
    layer = mixture(config, num_null=1, router=router)
    layer = put(layer, w_in=block.experts.gate_up_proj, w_down=block.experts.down_proj)
    layer.router = nn.Sequential(block.gate.down_proj, block.gate.router_mlp)
    return layer


def inkling(block: Any, config: Any) -> Any:
    """Its shared experts are experts of the mixture, which every token has."""
    router = with_bias(routing.BiasedTopK(E + 2, K, shared=2, scale=2.5), block.gate)
    layer = mixture(config, experts=E + 2, router=router, expert_scale=True)
    layer = experts_of(layer, block.experts, block.gate.weight)
    shared = block.shared_experts
    gate_up = torch.cat((shared.gate_proj, shared.up_proj), 1)
    return put(
        layer, w_in=torch.cat((block.experts.gate_up_proj, gate_up)),
        w_down=torch.cat((block.experts.down_proj, shared.down_proj)),
        expert_scale=block.gate.global_scale.expand(E + 2),
    )  # fmt: skip


def gemma(block: Any, config: Any) -> Any:
    router = functools.partial(routing.top_k, k=K, renormalize=True)
    layer = mixture(config, router=router, expert_scale=True, activation="gelu_tanh")
    layer.router = GemmaLogits(block.router)
    return put(
        layer, w_in=block.experts.gate_up_proj, w_down=block.experts.down_proj,
        expert_scale=block.router.per_expert_scale,
    )  # fmt: skip


class GemmaLogits(nn.Module):
    def __init__(self, router: Any) -> None:
        super().__init__()
        self.own = [router]

    def forward(self, x: Tensor) -> Tensor:
        return gemma_logits(self.own[0], x)


class GemmaBlock(nn.Module):
    """Gemma 4's layer calls both itself, on x after different norms."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        module = importlib.import_module("transformers.models.gemma4.modeling_gemma4")
        self.router, self.experts = module.Gemma4TextRouter(config), module.Gemma4TextExperts(config)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, D)
        _, weights, ids = self.router(rows)
        return self.experts(rows, ids, weights).view(x.shape)  # type: ignore[no-any-return]


SHARED = {"moe_intermediate_size": F, "shared_expert_intermediate_size": F}
BLOCKS: dict[str, tuple[str, Any, dict[str, Any], Callable[[Any, Any], Any]]] = {
    "Qwen2-MoE": ("qwen2_moe", "Qwen2MoeSparseMoeBlock", {**CASES["Qwen2-MoE"].settings, **SHARED}, gated_shared()),
    "Qwen3.5": (
        "qwen3_5_moe", "Qwen3_5MoeSparseMoeBlock", {**CASES["Qwen3.5"].settings, **SHARED},
        gated_shared(renormalize=True),
    ),
    "DeepSeek-V2": (
        "deepseek_v2", "DeepseekV2Moe", {
            **CASES["DeepSeek-V2"].settings, "moe_intermediate_size": F, "n_shared_experts": 1,
        },
        plain(
            router=functools.partial(routing.top_k, k=K, num_groups=4, top_groups=2, group_best=1, scale=16.0)
        ),
    ),
    "DeepSeek-V3": (
        "deepseek_v3", "DeepseekV3MoE", {
            **CASES["DeepSeek-V3"].settings, "moe_intermediate_size": F, "n_shared_experts": 1,
        }, plain(router={"num_groups": 4, "top_groups": 2, "scale": 2.5}),
    ),
    "DeepSeek-V4": (
        "deepseek_v4", "DeepseekV4SparseMoeBlock", {
            **CASES["DeepSeek-V4"].settings, "moe_intermediate_size": F, "layer": 0, "mlp_layer_types": ["moe"],
            "num_hidden_layers": 1, "swiglu_limit": 1.5, "layer_types": ["sliding_attention"],
        }, plain(router={"score": "sqrt_softplus", "scale": 1.5}, activation=ffn_ops.Gate("clamped_silu", limit=1.5)),
    ),
    "DeepSeek-V4, hash": (
        "deepseek_v4", "DeepseekV4SparseMoeBlock", {
            **CASES["DeepSeek-V4, hash"].settings, "moe_intermediate_size": F, "layer": 0,
            "mlp_layer_types": ["hash_moe"], "num_hidden_layers": 1, "swiglu_limit": 1.5,
            "layer_types": ["sliding_attention"],
        },
        plain(
            router=lambda z, token_ids: routing.hash(
                token_ids, TABLE, E, logits=z, score="sqrt_softplus", renormalize=True, scale=1.5
            ),
            activation=ffn_ops.Gate("clamped_silu", limit=1.5),
        ),
    ),
    "Kolibri": (
        "kolibri1", "Kolibri1SparseMoeBlock", {**CASES["Kolibri"].settings, **SHARED}, plain(router={"by_logits": True})
    ),
    "Laguna": (
        "laguna", "LagunaSparseMoeBlock", {**CASES["Laguna"].settings, **SHARED, "moe_routed_scaling_factor": 2.5},
        plain(router={"softcap": 3.0, "scale": 2.5}),
    ),
    "Gemma 4": ("gemma4", GemmaBlock, {**CASES["Gemma 4"].settings, "moe_intermediate_size": F}, gemma),
    "PhiMoE, eval": (
        "phimoe", "PhimoeSparseMoeBlock", {**CASES["PhiMoE, eval"].settings, "intermediate_size": F},
        plain(router=functools.partial(routing.sparse_mixer, jitter=0.2)),
    ),
    "LongCat-Flash": (
        "longcat_flash", "LongcatFlashMoE", {**CASES["LongCat-Flash"].settings, "expert_ffn_hidden_size": F}, longcat,
    ),
    "Nemotron-H": (
        "nemotron_h", "NemotronHMoE", {
            **CASES["Nemotron-H"].settings, "moe_intermediate_size": F, "moe_shared_expert_intermediate_size": F,
            "moe_latent_size": 8, "mlp_hidden_act": "relu2", "mlp_bias": False,
        }, nemotron,
    ),
    "Zaya": (
        "zaya", "ZayaSparseMoeBlock", {
            "config": "ZayaConfig", "num_experts": E, "num_experts_per_tok": 1, "moe_intermediate_size": F,
            "router_hidden_size": 12, "layer": 0,
        }, zaya,
    ),
    "Inkling": (
        "inkling", "InklingMoE", {**CASES["Inkling"].settings, "moe_intermediate_size": F, "hidden_act": "silu"},
        inkling,
    ),
    "Muse Spark": (
        "muse_spark", "MuseSparkMoE", {
            **CASES["Muse Spark"].settings, "moe_intermediate_size": F, "moe_hidden_size": 8, "hidden_act": "silu",
        }, muse,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_block_of_a_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its output and the gradients of x and of every parameter of the model's block."""
    model, kind, settings, build = BLOCKS[name]
    layer_of = [settings["layer"]] if "layer" in settings else []
    config = config_of(model, **{k: v for k, v in settings.items() if k != "layer"})
    block = router_of(model, kind, config, *layer_of).double().train("eval" not in name)
    layer = build(block, config).train("eval" not in name)
    x = torch.randn(2, 9, D, generator=generator(6), dtype=torch.float64).requires_grad_()
    with monkeypatch.context() as patch:  # their routers and norms compute in float32, also in a model of float64
        patch.setattr(torch.Tensor, "float", lambda t: t)
        patch.setattr(torch.Tensor, "type", lambda t, dtype: t)
        for place in (torch.Tensor, nn.functional):
            patch.setattr(place, "softmax", lambda t, dim, dtype=None: torch.softmax(t, dim))
        tokens = TOKENS[:18].view(2, 9)
        y, expected = (layer(x, token_ids=tokens), block(x, tokens)) if "hash" in name else (layer(x), block(x))
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12 * expected.abs().max().item())
    d = torch.randn(y.shape, generator=generator(7), dtype=torch.float64)
    names, leaves = zip(*(item for item in block.named_parameters() if item[1].requires_grad), strict=True)
    for place, a, b in zip(
        ("x", *names), *(torch.autograd.grad(out, [x, *leaves], d) for out in (y, expected)), strict=True
    ):
        atol = 1e-12 * b.abs().max().item()
        assert atol > 0, place
        torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda text, place=place: f"{place}: {text}")
