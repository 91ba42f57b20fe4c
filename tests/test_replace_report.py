# SPDX-License-Identifier: BSD-3-Clause
"""What replace_report lists: feed-forward layers and nothing else, each with the reason that holds."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from replacing import D, LlamaLike, Plain
from test_replace_models import GROUPED, SIZES, causal
from torch import Tensor, nn
from torch.nn import functional as F

import ffn_ops

transformers = pytest.importorskip("transformers")
NO_ACTIVATION = "no activation of the operators matches what it computes between its linear children"


class Attention(nn.Module):
    """Heads wider than the model: q_proj and o_proj have the shapes of an FFN's two layers."""

    def __init__(self, width: int = 2 * D, context: bool = False) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(D, width), nn.Linear(width, D)
        self.k_proj, self.v_proj = nn.Linear(D, width), nn.Linear(D, width)
        self.context = context

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        other = context[0] if self.context else x
        return self.o_proj(F.scaled_dot_product_attention(self.q_proj(x), self.k_proj(other), self.v_proj(other)))


class MultiQuery(nn.Module):
    """Three linear layers of a gated FFN's shapes, and an activation's name among what its forward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(D, 20), nn.Linear(D, 20), nn.Linear(20, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x) @ self.k(x).mT) @ self.k(x))


class Transformer(nn.Module):
    """An embedding and its way back, with blocks between, as Flux has them."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder, self.context_embedder = nn.Linear(4, D), nn.Linear(6, D)
        self.blocks = nn.ModuleList([LlamaLike()])
        self.proj_out = nn.Linear(D, 4)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.x_embedder(x) + F.silu(self.context_embedder(context))
        return self.proj_out(self.blocks[0](x))


class GatedOutput(nn.Module):
    """What attention gives goes through a gate and the last layer: as in Inkling 2."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.linear = nn.Linear(D, 20), nn.Linear(20, D)

    def forward(self, attended: Tensor, x: Tensor) -> Tensor:
        attended = attended * torch.sigmoid(self.gate_proj(x))
        return self.linear(attended)


class ForgetGate(nn.Module):
    """Two layers with nothing between, and an activation behind: as in GLM-5-next."""

    def __init__(self) -> None:
        super().__init__()
        self.f_a, self.f_b = nn.Linear(D, 6), nn.Linear(6, D)
        self.bias = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.f_b(self.f_a(x)) + self.bias)


class Positions(nn.Module):
    """Attention with a table for one length alone, and an activation before its last layer: as in LeViT."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.act, self.projection = nn.Linear(D, 3 * D), nn.Hardswish(), nn.Linear(D, D)
        self.biases = nn.Parameter(torch.zeros(30))
        self.register_buffer("indices", torch.arange(49).reshape(7, 7) % 30)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.projection(self.act((q @ k.mT + self.biases[self.indices]).softmax(-1) @ v))


def levit() -> nn.Module:
    with torch.device("meta"):
        return transformers.models.levit.modeling_levit.LevitAttention(16, 4, 2, 2, 3)


class Pool(nn.Module):
    """Attention with a query of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.k_proj, self.v_proj, self.o_proj = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.query = nn.Parameter(torch.zeros(1, 1, D))

    def forward(self, x: Tensor) -> Tensor:
        query = self.query.expand(x.shape[0], -1, -1)
        return self.o_proj(F.scaled_dot_product_attention(query, self.k_proj(x), self.v_proj(x)))


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(20, D), nn.Linear(D, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class Recurrent(nn.Module):
    """Stacked square weights that are no experts."""

    def __init__(self) -> None:
        super().__init__()
        self.input_gate = nn.Parameter(torch.zeros(4, 3, 3))
        self.recurrent_gate = nn.Parameter(torch.zeros(4, 3, 3))
        self.scale, self.shift = (nn.Parameter(torch.zeros(D, 1, 1)) for _ in range(2))


@pytest.mark.parametrize(
    "make",
    [
        Attention,
        lambda: Attention(context=True),
        lambda: Attention(D),
        lambda: Attention(6),
        MultiQuery,
        lambda: Transformer().requires_grad_(False),
        Recurrent,
        GatedOutput,
        ForgetGate,
        Positions,
        levit,
        Pool,
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)),
        lambda: causal("Qwen3", **{**GROUPED, "num_hidden_layers": 1}, head_dim=32)(),
    ],
    ids=["q and o", "cross", "square", "narrow", "two queries", "flux", "stacked", "gated output", "forget gate",
         "positions", "LeViT", "pool", "weight norm", "wide heads"],
)  # fmt: skip
def test_what_is_no_feed_forward_layer(make: Any) -> None:
    """Not listed, whatever its linear layers look like."""
    entries = ffn_ops.replace_report(make()).entries
    assert all(entry.status == "replaceable" for entry in entries), entries


class GateUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(D, 40), nn.Linear(20, D)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.hardswish(gate) * up)


class TwoTensors(Plain):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + residual


class Three(nn.Module):
    """As SAM's."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(D, D), nn.Linear(D, D)
        self.layers = nn.ModuleList([nn.Linear(D, D)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.proj_in(x))
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.proj_out(x)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(D, 20), nn.Hardswish())
        self.second = nn.Sequential(nn.Linear(20, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Block(nn.Module):
    """An FFN's two layers beside attention, in a forward with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.fc1, self.fc2 = nn.Linear(D, 20), nn.Linear(20, D)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(x) * mask
        scale = mask.mean()
        return x + self.fc2(F.gelu(self.fc1(x)) * scale)


class Narrow(LlamaLike):
    """Narrower between than outside, as small experts are: down comes first to whoever looks for the wider."""

    def __init__(self) -> None:
        super().__init__(nn.Hardswish())
        self.gate_proj, self.down_proj, self.up_proj = nn.Linear(D, 6), nn.Linear(6, D), nn.Linear(D, 6)


class Owning(Plain):
    """A feed-forward layer with numbers of its own before and between."""

    def __init__(self) -> None:
        super().__init__(nn.GELU())
        self.most = nn.Parameter(torch.ones(20))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)) * self.most)


REFUSED = {
    "numbers of its own": (Owning, "it holds a tensor of its own, most"),
    "narrow": (Narrow, NO_ACTIVATION),
    "gate_up": (GateUp, NO_ACTIVATION),
    "nested": (Nested, NO_ACTIVATION),
    "nested sequences": (lambda: nn.Sequential(*Nested().children()), NO_ACTIVATION),
    "a norm between": (
        lambda: nn.Sequential(nn.Linear(D, 20), nn.GELU(), nn.Dropout(), nn.LayerNorm(20), nn.Linear(20, D)),
        "3, a norm or an activation with parameters, is between its linear children, and torch has gelu as one"
        " operator",
    ),
    "an activation that learns": (
        lambda: nn.Sequential(nn.Linear(D, 20), nn.PReLU(20), nn.Linear(20, D)),
        "1, a norm or an activation with parameters, is between its linear children",
    ),
    "three layers": (
        Three,
        "proj_out is an additional linear layer",
    ),
    "two tensors": (
        lambda: TwoTensors(nn.GELU()),
        "forward does not run with one tensor [..., D] alone: TypeError: TwoTensors.forward() missing 1 required"
        " positional argument: 'residual'",
    ),
    "no forward": (
        lambda: nn.ModuleDict({"fc": nn.Linear(D, 20), "act": nn.GELU(), "proj": nn.Linear(20, D)}),
        "it has no forward: the layer around it calls its children",
    ),
    "in a block": (
        Block,
        "fc1 and fc2 are children of a layer that does more than an FFN: between fc1 and fc2 it also reads scale",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    """It is listed once, with a reason that its author would agree with."""
    make, why = REFUSED[name]
    (entry,) = ffn_ops.replace_report(make()).entries
    assert (entry.status, entry.path, entry.why) == ("left", "", why)


@pytest.mark.parametrize("name", ("Blip2", "InstructBlip"))
def test_qformer(name: str) -> None:
    """The method that an instance has children for is replaced; the other is no reason to leave it."""
    sizes = {k: v for k, v in SIZES.items() if k != "max_position_embeddings"} | {"encoder_hidden_size": 32}
    config = getattr(transformers, f"{name}QFormerConfig")(**sizes, hidden_dropout_prob=0.0)

    def make() -> Any:
        torch.manual_seed(0)
        return getattr(transformers, f"{name}QFormerModel")(config).eval().encoder.layer[0]

    layer, plain = ffn_ops.replace(make()), make()
    (entry,) = ffn_ops.replace_report(layer).entries
    assert entry.status == "replaced" and entry.computes.startswith("output")
    method = "feed_forward_chunk_query" if name == "Blip2" else "feed_forward_chunk"
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(getattr(layer, method)(x), getattr(plain, method)(x))


def test_experts_that_are_computed_already() -> None:
    """transformers' experts with ffn_ops: the report says who computes them, and replace has nothing to warn of."""
    from ffn_ops.integrations.transformers import register

    register()
    model = causal("Mixtral", **GROUPED, num_local_experts=4)()
    with pytest.warns(UserWarning, match="no layer was replaced"):
        ffn_ops.replace(model)
    why = 'stacked experts: replace() takes no mixtures, experts_implementation="ffn_ops" does'
    assert [(e.status, e.why) for e in ffn_ops.replace_report(model).entries] == [("left", why)] * 2
    model.set_experts_implementation("ffn_ops")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ffn_ops.replace(model)
    why = 'experts computed by experts_implementation="ffn_ops"'
    assert [(e.status, e.why) for e in ffn_ops.replace_report(model).entries] == [("fused", why)] * 2
