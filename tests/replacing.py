# SPDX-License-Identifier: BSD-3-Clause
"""Layers as people write them, for the tests of ``ffn_ops.replace``. No tests here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from same_function import seeded
from torch import Tensor, nn
from torch.nn import functional as F

import ffn_ops
from ffn_ops import reference

D, FF = 12, 20


# ---- layers as people write them ------------------------------------------------------------------------------------


class LlamaLike(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor] | None = None, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(D, FF, bias=bias)
        self.up_proj = nn.Linear(D, FF, bias=bias)
        self.down_proj = nn.Linear(FF, D, bias=bias)
        self.act_fn = act or nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class PhiLike(nn.Module):
    def __init__(self, gate_first: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(D, 2 * FF, bias=bias)
        self.down_proj = nn.Linear(FF, D, bias=bias)
        self.gate_first = gate_first

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.gelu(a) * b if self.gate_first else a * F.gelu(b))


class Normed(PhiLike):
    """As x-transformers' with a norm behind the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(FF)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.norm(F.gelu(a) * b))


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Limited(LlamaLike):
    """Gates with a limit, as DeepSeek-V4 has them, and with a shift, as gpt-oss and MiniMax-M3."""

    def __init__(self, limit: float, shift: float, beta: float = 1.0) -> None:
        super().__init__()
        del self.act_fn
        self.limit, self.shift, self.beta = limit, shift, beta

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x).clamp(max=self.limit)
        up = self.up_proj(x).clamp(-self.limit, self.limit)
        return self.down_proj((up + self.shift) * (gate * torch.sigmoid(self.beta * gate)))


class SoftCapped(LlamaLike):
    """Kimi K3's gate, with numbers that differ from its own."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(7 * torch.tanh(gate / 7) * torch.sigmoid(gate) * 50 * torch.tanh(up / 50))


class Step(LlamaLike):
    """Step-3.7's gate, likewise."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)).clamp(max=3) * self.up_proj(x).clamp(-3, 3))


class UpFirst(LlamaLike):
    """The up projection is called first."""

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        return self.down_proj(up * self.act_fn(self.gate_proj(x)))


class W123(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(D, FF, bias=False), nn.Linear(FF, D), nn.Linear(D, FF)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Plain(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor], dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, FF), nn.Linear(FF, D)
        self.act = act
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.act(self.fc1(x))))


class Dropouts(Plain):
    """Before the activation, as SAM 3 has it, or one twice, as XLNet."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.act, nn.ReLU):
            return self.fc2(self.act(self.drop(self.fc1(x))))
        return self.drop(super().forward(x)) + x


class FunctionalDropout(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc2(self.act(self.fc1(x))), 0.5, self.training)


class Intermediate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(D, FF)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.dense(x))


class Output(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(FF, D)
        self.norm = nn.LayerNorm(D)
        self.dropout = nn.Dropout(0.0)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.norm(self.dropout(self.dense(h)) + x)


class BertLike(nn.Module):
    """The feed-forward in a method, beside another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(D, D)
        self.intermediate, self.output = Intermediate(), Output()

    def feed_forward_chunk(self, x: Tensor) -> Tensor:
        return self.output(self.intermediate(x), x)

    def forward(self, x: Tensor) -> Tensor:
        return self.feed_forward_chunk(torch.tanh(self.attention(x)))


class T5Like(nn.Module):
    """Normalisation, FFN, residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.ffn = Plain(nn.ReLU())
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.ffn(self.norm(x)))


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(D),
        nn.Linear(D, FF),
        nn.GELU(approximate="tanh"),
        nn.Dropout(0.0),
        nn.Linear(FF, D),
        nn.Dropout(0.0),
    )


def quick_gelu(z: Tensor) -> Tensor:
    return z * torch.sigmoid(1.702 * z)


class ApproximateGELU(nn.Module):
    """diffusers' first layer of "geglu-approximate", which has no gate."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(D, FF)

    def forward(self, x: Tensor) -> Tensor:
        return quick_gelu(self.proj(x))


def new_gelu(z: Tensor) -> Tensor:
    return 0.5 * z * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * torch.pow(z, 3.0))))


def named(act: str, beta: float = 1.0) -> Callable[[Tensor], Tensor]:
    return lambda z: reference.gated_act(z, activation=ffn_ops.Gate("swish", beta=beta) if act == "swish" else act)


LLAMA = "down_proj({}(gate_proj(x)) * up_proj(x))"
# How each is described, and the operator that computes it.
LAYERS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "llama": (LlamaLike, LLAMA.format("silu"), "ffn"),
    "llama with biases": (lambda: LlamaLike(bias=True), LLAMA.format("silu"), "ffn"),
    "gemma": (lambda: LlamaLike(nn.GELU("tanh")), LLAMA.format("gelu_tanh"), "ffn"),
    "up called first": (UpFirst, LLAMA.format("silu"), "ffn"),
    "limit": (
        lambda: Limited(0.5, 0.0), "down_proj(silu(min(gate_proj(x), 0.5)) * clamp(up_proj(x), 0.5))", "ffn"
    ),
    "limit and shift": (
        lambda: Limited(7.0, 1.0, 1.702),
        "down_proj(swish(beta=1.702)(min(gate_proj(x), 7)) * (clamp(up_proj(x), 7) + 1))", "ffn",
    ),
    "soft caps": (
        SoftCapped, "down_proj(situ(gate_softcap=7.0, up_softcap=50.0)(gate_proj(x), up_proj(x)))", "ffn"
    ),
    "a step": (Step, "down_proj(swiglu_step(cap=3.0)(gate_proj(x), up_proj(x)))", "ffn"),
    "phi": (PhiLike, "down_proj(gelu(gate) * up of gate_up_proj(x), gate first)", "ffn"),
    "up rows first": (lambda: PhiLike(False, True), "down_proj(gelu(gate) * up of gate_up_proj(x), up first)", "ffn"),
    "w1 w2 w3": (W123, "w2(silu(w1(x)) * w3(x))", "ffn"),
    "quick gelu": (lambda: Plain(quick_gelu), "fc2(drop(swish(beta=1.702)(fc1(x))))", "ffn"),
    "geglu-approximate": (
        lambda: nn.Sequential(ApproximateGELU(), nn.Dropout(0.0), nn.Linear(FF, D)),
        "2(1(swish(beta=1.702)(0.proj(x))))", "ffn",
    ),
    "gated relu squared": (
        lambda: LlamaLike(Function(lambda z: F.relu(z) ** 2)), LLAMA.format("relu_squared"), "ffn"
    ),
    "leaky relu": (lambda: Plain(nn.LeakyReLU(0.2)), "fc2(drop(leaky_relu(slope=0.2)(fc1(x))))", "ffn"),
    "new gelu": (lambda: Plain(new_gelu), "fc2(drop(gelu_tanh(fc1(x))))", "ffn"),
    "in place": (lambda: Plain(nn.ReLU(inplace=True)), "fc2(drop(relu(fc1(x))))", "ffn"),
    "sequential": (sequential, "5(4(3(gelu_tanh(1(0(x))))))", "ffn"),
    "in a method": (BertLike, "output.norm(output.dropout(output.dense(gelu(intermediate.dense(x)))) + x)", "ffn"),
    "with its residual": (T5Like, "dropout(ffn.fc2(ffn.drop(relu(ffn.fc1(norm(x)))))) + x", "ffn"),
    "dropout twice": (lambda: Dropouts(nn.SiLU()), "drop(fc2(drop(silu(fc1(x))))) + x", "ffn"),
    "dropout before": (lambda: Dropouts(nn.ReLU()), "fc2(relu(drop(fc1(x))))", "ffn"),
    "a norm behind a gate": (
        Normed, "down_proj(norm(gelu(gate) * up of gate_up_proj(x), gate first))", "gated_linear"
    ),
    "a norm behind relu squared": (
        lambda: nn.Sequential(
            nn.Linear(D, FF), Function(lambda z: F.relu(z) ** 2), nn.Dropout(0.0), nn.LayerNorm(FF), nn.Linear(FF, D)
        ),
        "4(3(2(relu_squared(0(x)))))", "gated_act",
    ),
    "guide FeedForward": (
        lambda: reference.FeedForward(D, 30, 4, 0.0), "dropout(w2(silu(w1(x)) * w3(x)))", "ffn",
    ),
    "guide ReLUFFN": (lambda: reference.PlainFFN(D, FF), "linear2(relu(linear1(x)))", "ffn"),
    "guide SwishFFN": (
        lambda: reference.PlainFFN(D, FF, ffn_ops.Gate("swish", beta=1.7)),
        "linear2(swish(beta=1.7)(linear1(x)))", "ffn",
    ),
    "guide GLU": (lambda: reference.GLU(D, FF), "sigmoid(linear_gate(x)) * linear_value(x)", "gated_linear"),
    "guide GatedFFN": (
        lambda: reference.GatedFFN(D, FF, 2),
        "sigmoid(gate_layers.0(x)) * value_layers.0(x) + sigmoid(gate_layers.1(x)) * value_layers.1(x)",
        "gated_linear",
    ),
    **{
        act: (lambda act=act: Plain(named(act)), f"fc2(drop({act}(fc1(x))))", "ffn")
        for act in ffn_ops.activations() if not ffn_ops.Gate(act).own
    },
}  # fmt: skip


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Replaced, and untouched."""
    return ffn_ops.replace(seeded(LAYERS[name][0])), seeded(LAYERS[name][0])


# ---- layers that compute something else -----------------------------------------------------------------------------


class Scaled(LlamaLike):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Learned(Plain):
    """A learned activation that is SiLU at the start."""

    def __init__(self) -> None:
        super().__init__(F.silu)
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        z = self.fc1(x)
        return self.fc2(z * torch.sigmoid(self.beta * z))


class LearnedSwish(nn.Module):
    """The same as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(1))

    def forward(self, z: Tensor) -> Tensor:
        return z * torch.sigmoid(self.beta * z)


class Forward(LlamaLike):
    """LLaMA's children in another forward."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.compute = forward

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


def _twice(m: Any, x: Tensor) -> Tensor:
    return m.down_proj(F.silu(m.gate_proj(x)) * m.gate_proj(x)) + 0 * m.up_proj(x).sum()


def _reads_weights(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, m.gate_proj.weight)) * F.linear(x, m.up_proj.weight), m.down_proj.weight)


def _writes(m: Any, x: Tensor) -> Tensor:
    return m.down_proj(F.silu(m.gate_proj(x)) * m.up_proj(x.mul_(1.5)))


def _noise(m: Any, x: Tensor) -> Tensor:
    return m.down_proj(F.silu(m.gate_proj(x)) * m.up_proj(x) * (1 + torch.rand(())))


NO_ACTIVATION = "no activation"
BETWEEN = "(act|1), a norm or an activation with parameters, is between its linear children"
OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "clipped at 7": (lambda: LlamaLike(lambda z: F.silu(z.clamp(max=7.0))), NO_ACTIVATION),
    "clipped at 10000": (lambda: LlamaLike(lambda z: F.silu(z).clamp(max=1e4)), NO_ACTIVATION),
    "relu6": (lambda: Plain(nn.ReLU6()), NO_ACTIVATION),
    "hardswish": (lambda: Plain(nn.Hardswish()), NO_ACTIVATION),
    "nearly gelu": (lambda: Plain(lambda z: F.gelu(z) * (1 + 2e-5)), NO_ACTIVATION),
    "learned swish": (lambda: Plain(LearnedSwish()), BETWEEN),
    "buffer": (Scaled, "scale|return"),
    "learned beta": (Learned, "tensor of its own, beta"),
    "a child twice": (lambda: Forward(_twice), "twice|no activation"),
    "reads its weights": (lambda: Forward(_reads_weights), "no linear child"),
    "writes its input": (lambda: Forward(_writes), "modifies its input|no activation|called with"),
    "noise": (lambda: Forward(_noise), NO_ACTIVATION),
    "two results": (lambda: Forward(lambda m, x: (LlamaLike.forward(m, x), x)), "not one tensor"),
    "norm between": (
        lambda: nn.Sequential(nn.Linear(D, FF), nn.LayerNorm(FF), nn.GELU(), nn.Linear(FF, D)), BETWEEN
    ),
    "pooled": (lambda: Forward(lambda m, x: LlamaLike.forward(m, x).mean(-2)), "does not return"),
    "output scaled": (lambda: Forward(lambda m, x: 0.5 * LlamaLike.forward(m, x)), "does not return"),
    "bf16 only": (lambda: Forward(_bf16_differs).bfloat16(), "in bfloat16"),
}  # fmt: skip


def _bf16_differs(m: Any, x: Tensor) -> Tensor:
    z = m.gate_proj(x)
    return m.down_proj((F.silu(z) if x.dtype is not torch.bfloat16 else F.relu(z)) * m.up_proj(x))
