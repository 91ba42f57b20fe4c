# SPDX-License-Identifier: BSD-3-Clause
"""Routers of models against the models' own code in transformers: experts equal, weights and gradients within 1e-6."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device import generator
from torch import Tensor

from ffn_ops import Routing, routing

pytest.importorskip("transformers")

T, D, E, K = 33, 24, 16, 4
TABLE = torch.stack([torch.randperm(E, generator=generator(i))[:K] for i in range(50)])
TOKENS = torch.arange(T) * 7 % 50


def config_of(model: str, **settings: Any) -> Any:
    """A tiny one; ``model`` names the class's file and, behind the dot, its config where that has another name."""
    module = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    kind = settings.pop("config")
    return getattr(module, kind)(hidden_size=D, **settings)


def router_of(model: str, kind: Any, config: Any, *more: Any) -> Any:
    torch.manual_seed(0)
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    router = (getattr(module, kind) if isinstance(kind, str) else kind)(config, *more)
    with torch.no_grad():
        for name, t in (*router.named_parameters(), *router.named_buffers()):
            if name.endswith("tid2eid"):
                t.copy_(TABLE)
            else:
                t.copy_(
                    torch.rand_like(t) + 0.5 if "scale" in name else torch.randn(t.shape) / (1 if t.dim() > 1 else 9)
                )
    return router.train()


class Case:
    """``ours`` makes a Routing of logits and the model's router; ``theirs`` are weights and ids out of its results."""

    def __init__(
        self, model: str, kind: str, ours: Callable[[Tensor, Any], Routing], logits: Any = None, theirs: Any = None,
        more: tuple[Any, ...] = (), **settings: Any,
    ) -> None:  # fmt: skip
        self.model, self.kind, self.ours, self.settings, self.more = model, kind, ours, settings, more
        self.logits = logits or (lambda router, x: x @ router.weight.t())
        self.theirs = theirs or (lambda out: (out[1], out[2]))


def biased(router: Any, **options: Any) -> Callable[..., Routing]:
    bias = router.e_score_correction_bias
    return functools.partial(routing.top_k, k=router.top_k, bias=bias, **{"renormalize": True, **options})


def gemma_logits(router: Any, x: Tensor) -> Tensor:
    x = x * (x.square().mean(-1, keepdim=True) + router.eps) ** -0.5
    return (x * router.scale * router.scalar_root_size) @ router.proj.weight.t()  # type: ignore[no-any-return]


def inkling_ours(z: Tensor, router: Any) -> Routing:
    r = biased(router, score="sigmoid", shared=2, scale=router.route_scale)(z)
    return r.scaled(router.global_scale.expand(E + 2))


def inkling_theirs(out: Any) -> tuple[Tensor, Tensor]:
    _, weights, ids, gammas = out
    return torch.cat((weights, gammas), 1), torch.cat((ids, torch.arange(E, E + 2).expand(T, 2)), 1)


CASES = {
    "Mixtral": Case(
        "mixtral", "MixtralTopKRouter", lambda z, r: routing.top_k(z, K, renormalize=True),
        config="MixtralConfig", num_local_experts=E, num_experts_per_tok=K,
    ),
    "Qwen3-MoE": Case(
        "qwen3_moe", "Qwen3MoeTopKRouter", lambda z, r: routing.top_k(z, K, renormalize=True),
        config="Qwen3MoeConfig", num_experts=E, num_experts_per_tok=K, norm_topk_prob=True,
    ),
    "gpt-oss": Case(
        "gpt_oss", "GptOssTopKRouter", lambda z, r: routing.top_k(z, K, by_logits=True),
        lambda r, x: x @ r.weight.t() + r.bias,
        config="GptOssConfig", num_local_experts=E, num_experts_per_tok=K,
    ),
    "DeepSeek-V3": Case(
        "deepseek_v3", "DeepseekV3TopkRouter",
        lambda z, r: biased(r, score="sigmoid", num_groups=4, top_groups=2, scale=2.5)(z),
        config="DeepseekV3Config", n_routed_experts=E, num_experts_per_tok=K, n_group=4, topk_group=2,
        num_attention_heads=2, num_key_value_heads=2,
    ),
    "DeepSeek-V2": Case(
        "deepseek_v2", "DeepseekV2TopkRouter",
        lambda z, r: routing.top_k(z, K, num_groups=4, top_groups=2, group_best=1, scale=16.0),
        config="DeepseekV2Config", n_routed_experts=E, num_experts_per_tok=K, n_group=4, topk_group=2,
        topk_method="group_limited_greedy", routed_scaling_factor=16.0, num_attention_heads=2,
    ),
    "DeepSeek-V4": Case(
        "deepseek_v4", "DeepseekV4TopKRouter", lambda z, r: biased(r, score="sqrt_softplus", scale=1.5)(z),
        config="DeepseekV4Config", num_local_experts=E, num_experts_per_tok=K, routed_scaling_factor=1.5,
    ),
    "DeepSeek-V4, hash": Case(
        "deepseek_v4", "DeepseekV4HashRouter",
        lambda z, r: routing.hash(
            TOKENS, r.tid2eid, E, logits=z, score="sqrt_softplus", renormalize=True, scale=1.5
        ),
        more=(TOKENS,), config="DeepseekV4Config", num_local_experts=E, num_experts_per_tok=K,
        routed_scaling_factor=1.5, vocab_size=50,
    ),
    "Kolibri": Case(
        "kolibri1", "Kolibri1TopKRouter", lambda z, r: biased(r, score="sigmoid", by_logits=True)(z),
        config="Kolibri1Config", num_experts=E, num_experts_per_tok=K, norm_topk_prob=True,
    ),
    "Laguna": Case(
        "laguna", "LagunaTopKRouter", lambda z, r: biased(r, score="sigmoid", softcap=3.0)(z),
        config="LagunaConfig", num_experts=E, num_experts_per_tok=K, moe_router_logit_softcapping=3.0,
    ),
    "Inkling": Case(
        "inkling", "InklingTopkRouter", inkling_ours, theirs=inkling_theirs,
        config="InklingTextConfig", n_routed_experts=E, n_shared_experts=2, num_experts_per_tok=K, route_scale=2.5,
    ),
    "Gemma 4": Case(
        "gemma4", "Gemma4TextRouter",
        lambda z, r: routing.top_k(z, K, renormalize=True).scaled(r.per_expert_scale), gemma_logits,
        config="Gemma4TextConfig", num_experts=E, top_k_experts=K,
    ),
    "Nemotron-H": Case(
        "nemotron_h", "NemotronHTopkRouter",
        lambda z, r: biased(r, score="sigmoid", num_groups=4, top_groups=2, scale=2.5)(z),
        config="NemotronHConfig", n_routed_experts=E, num_experts_per_tok=K, n_group=4, topk_group=2,
        routed_scaling_factor=2.5,
    ),
    "Muse Spark": Case(
        "muse_spark", "MuseSparkTopkRouter", lambda z, r: biased(r, score="sigmoid", scale=2.0)(z),
        lambda r, x: x @ r.weight.t() * r.output_multiplier,
        config="MuseSparkTextConfig", num_local_experts=E, num_experts_per_tok=K, routed_scaling_factor=2.0,
        num_attention_heads=2, num_key_value_heads=2,
    ),
    "LongCat-Flash": Case(
        "longcat_flash", "LongcatFlashTopkRouter", lambda z, r: biased(r, renormalize=False, scale=6.0)(z),
        lambda r, x: x @ r.classifier.weight.t(),
        config="LongcatFlashConfig", n_routed_experts=E - 4, zero_expert_num=4, moe_topk=K, routed_scaling_factor=6.0,
    ),
    "Qwen2-MoE": Case(
        "qwen2_moe", "Qwen2MoeTopKRouter", lambda z, r: routing.top_k(z, K),
        config="Qwen2MoeConfig", num_experts=E, num_experts_per_tok=K, norm_topk_prob=False,
    ),
    "Qwen3.5": Case(
        "qwen3_5_moe", "Qwen3_5MoeTopKRouter", lambda z, r: routing.top_k(z, K, renormalize=True),
        config="Qwen3_5MoeTextConfig", num_experts=E, num_experts_per_tok=K,
    ),
    "PhiMoE, eval": Case(
        "phimoe", "PhimoeTopKRouter", lambda z, r: routing.sparse_mixer(z, jitter=0.2, training=False),
        config="PhimoeConfig", num_local_experts=E, num_experts_per_tok=2, router_jitter_noise=0.2,
    ),
}  # fmt: skip


def by_token(r: Routing) -> tuple[Tensor, Tensor]:
    """Ids and weights, the experts of each token in order."""
    expert = torch.bucketize(torch.arange(len(r.token)), r.offsets[1:], right=True)[r.row].view(T, -1)
    return ordered(expert, r.weight[r.row].view(T, -1))


def ordered(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    ids, order = ids.sort(1)
    return ids, weights.gather(1, order)


def compare(router: Any, ours: Callable[[Tensor], Routing], logits: Any, theirs: Any, more: Any = ()) -> None:
    x = torch.randn(T, D, generator=generator(4)).requires_grad_()
    weights, ids = theirs(router(x, *more))
    ids, weights = ordered(ids.view(T, -1), weights.view(T, -1))
    found_ids, found = by_token(ours(logits(router, x)))
    assert torch.equal(found_ids, ids)
    torch.testing.assert_close(found, weights, rtol=0, atol=1e-6 * max(1.0, weights.max().item()))
    leaves = [x, *(p for p in router.parameters() if p.requires_grad)]
    d = torch.randn(weights.shape, generator=generator(5))
    ours_, theirs_ = (torch.autograd.grad(w, leaves, d) for w in (found, weights))
    for a, b in zip(ours_, theirs_, strict=True):
        assert b.abs().max() > 1e-3  # the test sees a gradient at all
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("name", CASES)
def test_router_of_a_model(name: str) -> None:
    case = CASES[name]
    router = router_of(case.model, case.kind, config_of(case.model, **case.settings))
    if "eval" in name:
        router.eval()
    compare(router, lambda z: case.ours(z, router), case.logits, case.theirs, case.more)


def test_sparse_mixer_draws_as_phimoe_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """From one seed the same experts, weights and gradients. PhiMoE throws away one draw, which ours does not make."""
    case = CASES["PhiMoE, eval"]
    router = router_of(case.model, case.kind, config_of(case.model, **case.settings))
    calls = iter((lambda t: torch.empty_like(t).uniform_(), torch.empty_like))
    monkeypatch.setattr(torch, "rand_like", lambda t: next(calls)(t))
    near = 0

    def ours(z: Tensor) -> Routing:
        torch.manual_seed(9)
        return routing.sparse_mixer(z, jitter=0.2)

    def theirs(out: Any) -> tuple[Tensor, Tensor]:
        nonlocal near
        best = routing.sparse_mixer(out[0], jitter=0.2, training=False)
        near = int((by_token(best)[0] != out[2].sort(1).values).sum())
        return out[1], out[2]

    torch.manual_seed(9)
    forward = router.forward
    router.forward = lambda x: torch.manual_seed(9) and forward(x)
    compare(router, ours, case.logits, theirs)
    assert near > 5  # experts that are not the best were drawn
