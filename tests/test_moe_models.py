# SPDX-License-Identifier: BSD-3-Clause
"""Mixtures of models against the models' own blocks in transformers: what MoEFFN computes with their parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device import generator
from test_router_models import CASES, D, E, K, config_of, router_of
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
    """Parameters by their place, which then are the model's own: gradients meet there."""
    for place, value in values.items():
        *path, name = place.split("__")
        owner = layer
        for each in path:
            owner = getattr(owner, each)
        owner._parameters[name] = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
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


def qwen2(block: Any, config: Any) -> Any:
    layer = mixture(config, num_shared=1, shared_gate=True, router=functools.partial(routing.top_k, k=K))
    layer = shared_of(experts_of(layer, block.experts, block.gate.weight), block.shared_expert)
    return put(layer, shared_gate__weight=block.shared_expert_gate.weight)


def with_bias(router: Any, source: Any) -> Any:
    router.bias = source.e_score_correction_bias.clone()
    return router


def longcat(block: Any, config: Any) -> Any:
    options = {"score": "softmax", "renormalize": False, "scale": 6.0}
    layer = mixture(
        config, experts=E - 4, num_identity=4, router=with_bias(routing.BiasedTopK(E, K, **options), block.router)
    )
    layer = experts_of(layer, block.experts, block.router.classifier.weight)
    return put(layer, w_in=block.experts.gate_up_proj[: E - 4].detach())


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
    scale = block.gate.global_scale.expand(E + 2)
    return put(
        layer, w_in=torch.cat((block.experts.gate_up_proj, gate_up)).detach(), expert_scale=scale.detach().clone(),
        w_down=torch.cat((block.experts.down_proj, shared.down_proj)).detach(),
    )  # fmt: skip


BLOCKS: dict[str, tuple[str, str, dict[str, Any], Callable[[Any, Any], Any]]] = {
    "Qwen2-MoE": (
        "qwen2_moe", "Qwen2MoeSparseMoeBlock", {
            **CASES["Qwen2-MoE"].settings, "moe_intermediate_size": F, "shared_expert_intermediate_size": F,
        }, qwen2,
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
def test_block_of_a_model(name: str) -> None:
    model, kind, settings, build = BLOCKS[name]
    layer_of = [settings["layer"]] if "layer" in settings else []
    config = config_of(model, **{k: v for k, v in settings.items() if k != "layer"})
    block = router_of(model, kind, config, *layer_of).double()
    layer = build(block, config).double()
    x = torch.randn(2, 9, D, generator=generator(6), dtype=torch.float64).requires_grad_()
    y, expected = layer(x), block(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
    d = torch.randn(y.shape, generator=generator(7), dtype=torch.float64)
    theirs = {id(p) for p in block.parameters()}
    leaves = [x, *(p for p in layer.parameters() if id(p) in theirs and p.requires_grad)]
    assert len(leaves) >= 2
    for a, b in zip(*(torch.autograd.grad(out, leaves, d) for out in (y, expected)), strict=True):
        atol = 4e-6 * b.abs().max().item()  # some of their routers compute in float32, also in a model of float64
        torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)
