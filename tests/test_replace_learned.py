# SPDX-License-Identifier: BSD-3-Clause
"""replace on layers whose activation has parameters of its own: Apertus's xIELU, MetaFormers' StarReLU, PReLU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from device import generator
from same_function import assert_same_function, results
from seen import Seen
from torch import Tensor, nn
from torch.nn import functional as F

import ffn_ops

D, FF = 12, 20


class XIELU(nn.Module):
    """As transformers writes it."""

    def __init__(self, alpha_p: float = 0.8, alpha_n: float = 0.8, beta: float = 0.5, eps: float = -1e-6) -> None:
        super().__init__()
        self.alpha_p = nn.Parameter(torch.log(torch.expm1(torch.tensor(alpha_p))).unsqueeze(0))
        self.alpha_n = nn.Parameter(torch.log(torch.expm1(torch.tensor(alpha_n - beta))).unsqueeze(0))
        self.register_buffer("beta", torch.tensor(beta))
        self.register_buffer("eps", torch.tensor(eps))

    def forward(self, x: Tensor) -> Tensor:
        beta, eps = self.beta, self.eps
        alpha_p, alpha_n = F.softplus(self.alpha_p), beta + F.softplus(self.alpha_n)
        below = (torch.expm1(torch.min(x, eps)) - x) * alpha_n + beta * x
        return torch.where(x > 0, alpha_p * x * x + beta * x, below)


class StarReLU(nn.Module):
    """As timm writes it."""

    def __init__(self, scale: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.scale, self.bias = nn.Parameter(scale * torch.ones(1)), nn.Parameter(bias * torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.relu(x) ** 2 + self.bias


class Layer(nn.Module):
    def __init__(self, act: nn.Module, p: float = 0.0) -> None:
        super().__init__()
        self.up_proj, self.down_proj, self.act_fn = nn.Linear(D, FF), nn.Linear(FF, D), act
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.drop(self.act_fn(self.up_proj(x))))


class Block(nn.Module):
    """The layer is a part of it, as in DAB-DETR."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2, self.act = nn.LayerNorm(D), nn.Linear(D, FF), nn.Linear(FF, D), act

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = F.dropout(self.act(self.fc1(x)), 0.0, self.training)
        y = self.norm(self.fc2(y) + x)
        return y if mask is None else y * mask


ACTS: dict[str, Any] = {
    "xielu": lambda i: XIELU(0.8 + 0.1 * i, 0.9 - 0.1 * i),
    "star_relu": lambda i: StarReLU(0.9 + 0.1 * i, -0.3),
    "leaky_relu": lambda i: nn.PReLU(init=0.25 + 0.1 * i),
}


def layers(name: str, kind: Any = Layer) -> nn.Module:
    """Two, with different numbers."""
    torch.manual_seed(0)
    return nn.Sequential(*(kind(ACTS[name](i)) for i in range(2)))


def given(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, D, generator=generator(), dtype=torch.float32).to(dtype)


def names(model: nn.Module, x: Tensor) -> list[str]:
    with Seen() as seen:
        model(x)
    return [name for name in seen.names if name == "learned_act"]


@pytest.mark.parametrize("kind", [Layer, Block])
@pytest.mark.parametrize("name", ACTS)
def test_outputs_and_every_gradient(name: str, kind: Any) -> None:
    """Those of the activation's own parameters too, in float64 and by the rule of accuracy in bfloat16."""
    plain = layers(name, kind)
    model = ffn_ops.replace(copy.deepcopy(plain))
    for entry in ffn_ops.replace_report(model).entries:
        assert entry.status == "replaced" and f"({name}(" in entry.computes, entry
    assert names(model, given()) == ["learned_act"] * 2
    ours, theirs = (results(m.double(), lambda m: m(given(torch.float64))) for m in (model, plain))
    assert ours.keys() == theirs.keys() and len(ours) == 1 + sum(1 for _ in plain.parameters())
    for each, value in theirs.items():
        torch.testing.assert_close(ours[each], value, rtol=1e-12, atol=1e-13)
    assert_same_function(model.bfloat16(), plain.bfloat16(), lambda m: m(given().to(next(m.parameters()).dtype)))


def test_what_others_change() -> None:
    """Hooks on the activation and exchanged ones are obeyed, adapters' layers are called, autocast and dropout work."""
    plain, x = layers("xielu"), given()
    model: Any = ffn_ops.replace(copy.deepcopy(plain))
    expected = plain(x)
    with torch.no_grad():  # new values, as from a checkpoint: nothing was frozen
        for m in (plain, model):
            m[0].act_fn.alpha_p.fill_(1.5), m[0].act_fn.beta.fill_(0.1), m[1].act_fn.eps.fill_(-0.3)
    assert not torch.allclose(plain(x), expected)
    torch.testing.assert_close(model(x), plain(x))
    with torch.autocast(x.device.type, torch.bfloat16):
        assert names(model, x) == ["learned_act"] * 2
        torch.testing.assert_close(model(x), plain(x), rtol=0.02, atol=0.02)
    calls = []
    handle = model[0].act_fn.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(x), plain(x))
    assert calls == [1] and names(model, x) == ["learned_act"]
    assert "act_fn has hooks" in str(ffn_ops.replace_report(model))
    handle.remove()
    model[0].act_fn = Other()
    assert names(model, x) == ["learned_act"]
    model[0].act_fn = XIELU(1.1)
    assert names(model, x) == ["learned_act"] * 2
    model[0].up_proj = nn.Sequential(model[0].up_proj)  # as an adapter stands in its place
    assert torch.equal(ffn_ops.restore(model)(x), model(x))


def test_dropout_between() -> None:
    torch.manual_seed(0)
    plain = Layer(XIELU(), 0.5)
    model, x = ffn_ops.replace(copy.deepcopy(plain)), given()
    found = []
    for each in (model, plain):
        torch.manual_seed(1)
        found.append(each(x))
    torch.testing.assert_close(*found)
    assert names(model, x) == ["learned_act"]


def test_hooks_within_the_activation() -> None:
    model, x = ffn_ops.replace(layers("star_relu")), given()
    calls: list[int] = []
    model.get_submodule("1.act_fn.relu").register_forward_hook(lambda *_: calls.append(1))
    model(x)
    assert calls == [1]


class Other(XIELU):
    """The same tensors, another function."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-3 * x


@pytest.mark.parametrize("act", [lambda: nn.PReLU(5), Other, lambda: nn.Sequential(XIELU(), nn.PReLU())])
def test_other_functions_are_left_alone(act: Any) -> None:
    layer = Layer(act())
    with pytest.warns(UserWarning, match="no layer was replaced"):
        assert names(ffn_ops.replace(layer), given()) == []
    assert not ffn_ops.replace_report(layer).paths("replaced", "partly", "replaceable")


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("name", ACTS)
def test_compiled(name: str) -> None:
    """One graph for all that a call does."""
    model, x = ffn_ops.replace(layers(name)), given()
    graphs: list[Any] = []
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    (graph,) = graphs
    assert [node.target for node in graph.graph.nodes].count(torch.ops.ffn_ops.learned_act.default) == 2


def test_apertus() -> None:
    """transformers' own model, its two learned numbers in every layer."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.ApertusConfig(**sizes, num_key_value_heads=2, vocab_size=61, max_position_embeddings=64)
    torch.manual_seed(0)
    plain = transformers.ApertusForCausalLM(config).float()
    model = ffn_ops.replace(copy.deepcopy(plain))
    assert str(ffn_ops.replace_report(model)).startswith(
        "replaced    2 x model.layers.*.mlp (ApertusMLP): down_proj(xielu(up_proj(x)))"
    )
    tokens = torch.arange(24).reshape(2, 12) * 5 % 61
    assert names(model, tokens) == ["learned_act"] * 2
    assert_same_function(model, plain, lambda m: m(tokens).logits)
    ours = results(model, lambda m: m(tokens).logits)
    assert {f"model.layers.{i}.mlp.act_fn.alpha_{which}" for i in range(2) for which in "pn"} <= ours.keys()
