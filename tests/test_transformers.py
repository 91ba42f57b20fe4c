# SPDX-License-Identifier: BSD-3-Clause
"""transformers' mixtures with ``experts_implementation="ffn_ops"`` against their own "eager", on small models."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from device import generator
from tolerance import assert_error_like_eagers
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from ffn_ops.integrations.transformers import register

pytestmark = pytest.mark.cpu_only("transformers builds its models on the CPU")
register()

VOCABULARY, T = 61, 24
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,  # pre-activations of order 1
    "pad_token_id": 0,
    "eos_token_id": None,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"intermediate_size": 24, "num_local_experts": 4, "output_router_logits": True}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"moe_intermediate_size": 12, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True,
         "head_dim": 8},
    ),
    "olmoe": ("Olmoe", {"intermediate_size": 12, "num_experts": 8, "num_experts_per_tok": 3}),
    "deepseek_v3": (
        "DeepseekV3",
        {"moe_intermediate_size": 12, "intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2,
         "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0, "q_lora_rank": 16, "kv_lora_rank": 8,
         "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4},
    ),
    "gpt_oss": (
        "GptOss",
        {"intermediate_size": 20, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
         "sliding_window": 8, "swiglu_limit": 1.5},
    ),
    "deepseek_v4": (
        "DeepseekV4",
        {"moe_intermediate_size": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 16,
         "q_lora_rank": 16, "num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 8, "hc_mult": 2,
         "mlp_layer_types": ["moe"] * 2, "layer_types": ["sliding_attention"] * 2, "sliding_window": 8,
         "partial_rotary_factor": 0.5, "num_nextn_predict_layers": 0, "swiglu_limit": 0.7},
    ),
}  # fmt: skip
every_model = pytest.mark.parametrize("name", MODELS)


def config_of(name: str, layers: int = 2) -> Any:
    family, options = MODELS[name]
    options = {**SMALL, "num_hidden_layers": layers, **options}
    for key in ("mlp_layer_types", "layer_types"):
        if key in options:
            options[key] = options[key][:layers]
    return getattr(transformers, f"{family}Config")(**options)


@functools.cache
def built(name: str, layers: int) -> nn.Module:
    """transformers' own, in float64; copies are taken of it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(name, layers), experts_implementation="eager")
    return model.double()


def pair(name: str, dtype: torch.dtype = torch.float64, layers: int = 2) -> tuple[Any, Any]:
    """The same weights twice: with transformers' "eager", and with ours."""
    eager = copy.deepcopy(built(name, layers)).to(dtype)
    ours = copy.deepcopy(eager)
    ours.set_experts_implementation("ffn_ops")
    assert ours.config._experts_implementation == "ffn_ops" and eager.config._experts_implementation == "eager"
    return eager, ours


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, T), generator=generator(seed))


def step(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Logits, loss and every gradient of one training step."""
    model.train()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **grads}


def joined(results: dict[str, Tensor], scales: dict[str, Tensor]) -> Tensor:
    """All gradients in one vector, each relative to its size: errors of small ones count alike."""
    parts = [results[n].flatten() / scales[n].to(results[n].dtype) for n in scales]
    return torch.cat(parts)


@every_model
def test_float64(name: str) -> None:
    eager, ours = pair(name)
    expected, actual = step(eager, tokens()), step(ours, tokens())
    assert expected.keys() == actual.keys() and any("experts" in n for n in expected)
    for n, value in expected.items():
        torch.testing.assert_close(actual[n], value, rtol=1e-9, atol=1e-11 * float(value.abs().max() + 1), msg=n)


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_accurate_as_eager(name: str, dtype: torch.dtype) -> None:
    """One layer: its routers see the same numbers, so that no token goes elsewhere by rounding. Several draws: where a
    gate rounds onto its limit (DeepSeek-V4), whether its gradient passes is chance."""
    eager, ours = pair(name, dtype, layers=1)
    wide = copy.deepcopy(eager).double()
    logits, gradients = [], []
    for seed in range(8 if name == "deepseek_v4" else 3):
        exact, expected, actual = (step(model, tokens(seed)) for model in (wide, eager, ours))
        logits.append([r["logits"] for r in (actual, expected, exact)])
        scales = {
            n: g.square().mean().sqrt() for n, g in exact.items() if n not in ("logits", "loss") and bool(g.any())
        }
        gradients.append([joined(r, scales) for r in (actual, expected, exact)])
        assert all(actual[n].dtype is dtype and actual[n].stride() == expected[n].stride() for n in scales)
    for results in (logits, gradients):
        assert_error_like_eagers(*(torch.cat(draws) for draws in zip(*results, strict=True)))


@every_model
def test_greedy_generation(name: str) -> None:
    """With a cache, token by token: the same tokens, and the same scores."""
    eager, ours = (m.eval() for m in pair(name))
    options: dict[str, Any] = {
        "max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_scores": True,
    }  # fmt: skip
    expected, actual = (m.generate(tokens()[:, :9], **options) for m in (eager, ours))
    assert torch.equal(expected.sequences, actual.sequences)
    torch.testing.assert_close(torch.stack(actual.scores), torch.stack(expected.scores), rtol=1e-9, atol=1e-10)


@pytest.mark.skipif(torch.__version__ < "2.12", reason="dynamo of torch 2.11 takes no module for a constant")
# Softmax, transposed with limits, sigmoid with groups: the others' experts are traced as Mixtral's.
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_compiled_in_one_graph(name: str, dynamo: None) -> None:
    _eager, ours = pair(name, torch.float32, layers=1)
    expected = step(ours, tokens())
    actual = step(torch.compile(ours, backend="aot_eager", fullgraph=True), tokens())
    for n, value in expected.items():
        torch.testing.assert_close(actual[n.replace("_orig_mod.", "")] if n in actual else actual[f"_orig_mod.{n}"],
                                   value, rtol=1e-4, atol=1e-5 * float(value.abs().max() + 1), msg=n)  # fmt: skip


@every_model
def test_gradient_checkpointing(name: str) -> None:
    """What is computed again has the same bits."""
    _eager, ours = pair(name, torch.float32)
    expected = step(ours, tokens())
    getattr(ours, "activation_checkpointing_enable", ours.gradient_checkpointing_enable)()  # renamed in 5.24
    calls = []
    for module in ours.modules():
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    actual = step(ours, tokens())
    assert len(calls) == 4  # both layers, twice
    assert all(torch.equal(actual[n], value) for n, value in expected.items())


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """The checkpoint is transformers' own and does not contain the implementation, which the loader chooses."""
    eager, ours = pair(name, torch.float32)
    ours.save_pretrained(tmp_path)
    assert "ffn_ops" not in (tmp_path / "config.json").read_text()
    load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, tmp_path)
    again, plain = load(experts_implementation="ffn_ops"), load(experts_implementation="eager")
    with torch.no_grad():
        y = ours.eval()(tokens()).logits
        assert torch.equal(again.eval()(tokens()).logits, y)
        assert torch.equal(plain.eval()(tokens()).logits, eager.eval()(tokens()).logits)
        plain.set_experts_implementation("ffn_ops")
        assert torch.equal(plain(tokens()).logits, y)


def test_no_other_implementation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And ours calls the operator once for each mixture."""
    calls = []
    forward = ALL_EXPERTS_FUNCTIONS["ffn_ops"]
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "ffn_ops", lambda *a: calls.append(1) or forward(*a))
    _eager, ours = pair("mixtral")
    calls.clear()  # of whether it runs, which register() makes the setting ask
    ours(tokens())
    assert len(calls) == 2


# ---- experts of every form that transformers declares ---------------------------------------------------------------

E, D, F, K = 4, 6, 5, 2


class Base(nn.Module):
    """transformers' own loop, for every declared form."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts, self.limit, self.alpha = E, config.limit, config.alpha
        self.act_fn = config.act_fn
        rows = 2 * F if config.has_gate else F
        for name, shape in (("gate_up_proj" if config.has_gate else "up_proj", (rows, D)), ("down_proj", (D, F))):
            weight = torch.randn(E, *(reversed(shape) if config.is_transposed else shape), dtype=torch.float64)
            setattr(self, name, nn.Parameter(weight))
            if config.has_bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(E, shape[0], dtype=torch.float64)))
        if config.has_post_expert_norm:
            self.post_expert_norm = nn.RMSNorm(D, eps=1e-6, dtype=torch.float64)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        first = "gate_up_proj" if self.has_gate else "up_proj"
        y = torch.zeros_like(x)
        for e in range(E):
            tokens, slots = torch.where(ids == e)
            rows = x[tokens]
            for name in (first, "down_proj"):
                w = getattr(self, name)[e]
                rows = rows @ (w if self.is_transposed else w.t())
                rows = rows + getattr(self, f"{name}_bias")[e] if self.has_bias else rows
                if name == first:
                    rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
            rows = self.post_expert_norm(rows) if self.has_post_expert_norm else rows
            y = y.index_add(0, tokens, rows * weights[tokens, slots, None].to(x.dtype))
        return y


def experts(
    gate: Callable[..., Tensor] | None = None, act_fn: Any = None, limit: float = 0.9, alpha: float = 1.3, **form: bool
) -> Any:
    """A module as ``use_experts_implementation`` makes it of a class with this ``_apply_gate``."""
    declared = {
        "is_concatenated": True, "is_transposed": False, "has_bias": False, "has_gate": True,
        "has_post_expert_norm": False, **form,
    }  # fmt: skip
    methods = {} if gate is None else {"_apply_gate": gate}
    cls = use_experts_implementation(**declared)(type("SomeExperts", (Base,), methods))
    config = SimpleNamespace(
        **declared, limit=limit, alpha=alpha, act_fn=act_fn or nn.SiLU(), _experts_implementation="ffn_ops"
    )
    torch.manual_seed(0)
    return cls(config)


def in_turns(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up[..., ::2].clamp(max=self.limit), gate_up[..., 1::2].clamp(-self.limit, self.limit)
    return gate * torch.sigmoid(gate * self.alpha) * (up + 1)


def held(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return self.act_fn(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


class SoftcappedSwiGLU(nn.Module):
    """As Inkling 2 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_softcap, self.up_softcap = 3.0, 5.0

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        a, b = self.gate_softcap, self.up_softcap
        return torch.tanh(gate / a) * a * torch.sigmoid(gate) * (torch.tanh(up / b) * b)


def softcapped(self: Any, gate_up: Tensor) -> Tensor:
    return self.act_fn(*gate_up.chunk(2, -1))  # type: ignore[no-any-return]


def held_after(self: Any, gate_up: Tensor) -> Tensor:
    """As Step-3.7 has it."""
    gate, up = gate_up.chunk(2, -1)
    return self.act_fn(gate).clamp(max=self.limit) * up.clamp(-self.limit, self.limit)  # type: ignore[no-any-return]


FORMS: dict[str, dict[str, Any]] = {
    "softcapped": {"gate": softcapped, "act_fn": SoftcappedSwiGLU()},
    "held after": {"gate": held_after},
    "plain": {"has_gate": False, "act_fn": nn.GELU()},
    "plain, biases, transposed": {"has_gate": False, "has_bias": True, "is_transposed": True, "act_fn": nn.ReLU()},
    "gated": {},
    "biases": {"has_bias": True, "act_fn": nn.GELU("tanh")},
    "transposed": {"is_transposed": True},
    "gpt-oss": {"gate": in_turns, "is_concatenated": False, "is_transposed": True, "has_bias": True},
    "in turns": {"gate": in_turns, "is_concatenated": False},
    "held": {"gate": held},
    "norm": {"has_post_expert_norm": True, "has_bias": True},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("elsewhere", [False, True], ids=["all here", "expert parallel"])
def test_every_declared_form(form: str, elsewhere: bool) -> None:
    """Also with ids of experts that another rank has: skipped, no gradient for their weights."""
    module = experts(**FORMS[form])
    ids = torch.stack([torch.randperm(E + 2 if elsewhere else E)[:K] for _ in range(9)])
    x = torch.randn(9, D, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(9, K, dtype=torch.float64, requires_grad=True)
    d = torch.randn(9, D, dtype=torch.float64)
    leaves = [x, weights, *module.parameters()]
    results = []
    for implementation in ("ffn_ops", "eager"):
        module.config._experts_implementation = implementation
        y = module(x, ids, weights)
        results.append((y, *torch.autograd.grad(y, leaves, d)))
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-12, atol=1e-12)
    if elsewhere:
        assert not results[0][2][ids >= E].any()


def test_float32_weights_of_a_bfloat16_layer() -> None:
    """The routing weights are not rounded: the sum is as near to float64 as the last rounding lets it be."""
    module = experts()
    x, ids = torch.randn(64, D, dtype=torch.float64), torch.stack([torch.randperm(E)[:K] for _ in range(64)])
    weights = torch.rand(64, K, requires_grad=True)
    low = copy.deepcopy(module).bfloat16()
    exact_module = copy.deepcopy(low).double()
    y = low(x.bfloat16(), ids, weights)
    exact = exact_module(x.bfloat16().double(), ids, weights.double())
    low.config._experts_implementation = "batched_mm"
    assert y.dtype is torch.bfloat16
    assert_error_like_eagers(y, low(x.bfloat16(), ids, weights), exact)
    (grad,) = torch.autograd.grad(y.sum(), weights)
    assert grad.dtype is torch.float32 and bool(grad.any())


def other_gate(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return self.act_fn(gate).clamp(max=self.limit) * up


def hidden_number(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return self.act_fn(gate.clamp(max=77.0)) * up


@pytest.mark.parametrize(
    "case",
    [
        {"gate": other_gate},
        {"gate": hidden_number},
        {"act_fn": nn.Mish()},
        {"act_fn": nn.PReLU(dtype=torch.float64)},
        {"has_gate": False, "act_fn": nn.Softplus()},
        {"gate": held, "is_concatenated": False},
    ],
    ids=["other gate", "hidden number", "mish", "learned", "plain softplus", "declared in turns"],
)
def test_other_functions_are_refused(case: dict[str, Any]) -> None:
    x, ids, weights = torch.randn(3, D, dtype=torch.float64), torch.zeros(3, K, dtype=torch.long), torch.ones(3, K)
    with pytest.raises(ValueError, match=r"SomeExperts.*(_apply_gate|act_fn).*got another function"):
        experts(**case)(x, ids, weights)


def test_other_parameters_are_refused() -> None:
    module = experts()
    module.scale = nn.Parameter(torch.ones(E))
    with pytest.raises(ValueError, match="expected no parameters besides those of the experts, got scale"):
        module(torch.randn(3, D, dtype=torch.float64), torch.zeros(3, K, dtype=torch.long), torch.ones(3, K))


def test_numbers_are_read_again() -> None:
    """A changed limit makes a new gate; the cached one is not used."""
    module = experts(gate=held)
    args = (torch.randn(5, D, dtype=torch.float64), torch.zeros(5, K, dtype=torch.long), torch.ones(5, K))
    before = module(*args)
    module.limit = 0.3
    after = module(*args)
    assert not torch.equal(before, after)
    module.config._experts_implementation = "eager"
    torch.testing.assert_close(after, module(*args), rtol=1e-12, atol=1e-12)


def test_old_transformers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.22.1")
    with pytest.raises(ImportError, match=r"transformers: expected at least 5.23, got 5.22.1"):
        register()
