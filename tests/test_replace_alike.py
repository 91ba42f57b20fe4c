# SPDX-License-Identifier: BSD-3-Clause
"""Layers that are alike are looked at once, and what differs in anything that its forward depends on is seen."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from replacing import BertLike, D, LlamaLike, PhiLike, Plain, named, new_gelu
from same_function import operators
from test_replace_parts import Block
from torch import Tensor, nn
from torch.nn import functional as F

import ffn_ops
from ffn_ops._replace import recognise


def swapped(m: Any, x: Tensor) -> Tensor:
    return m.down_proj(m.gate_proj(x) * F.silu(m.up_proj(x)))


class Optional(LlamaLike):
    """What its forward does is said by its attributes."""

    def __init__(self) -> None:
        super().__init__(bias=True)
        self.act_fn = nn.Sequential(nn.Identity(), nn.GELU())
        self.config = types.SimpleNamespace(swap=False)
        self.layer_idx, self.swap, self.sizes, self.scale = 0, False, [1], None

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.swap or self.config.swap or "swap" in vars(self.act_fn[0]) or self.sizes[0] > 1:
            gate, up = up, gate
        return self.down_proj(self.act_fn(gate) * up)


def differs(change: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = Optional()
        change(layer)
        return layer

    return make


def put(name: str, value: Any) -> Callable[[Any], Any]:
    return lambda layer: setattr(layer, name, value)


class Options:
    def __init__(self, swap: bool = False) -> None:
        self.swap = swap


class Processed(LlamaLike):
    """Each layer has an object of its own, as attention processors are."""

    def __init__(self, swap: bool = False) -> None:
        super().__init__()
        self.processor = Options(swap)

    def forward(self, x: Tensor) -> Tensor:
        return swapped(self, x) if self.processor.swap else super().forward(x)


class Packed(nn.Module):
    """As quantised layers have their weights: the shape of the numbers does not say that of the layer."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.in_features, self.out_features = columns, rows
        self.packed = nn.Parameter(torch.randn(columns * rows))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.packed.view(self.out_features, self.in_features))


def test_packed_weights() -> None:
    """Layers whose parameters are of the same shapes, and whose widths are not."""
    sizes = ((4, 6), (6, 4), (3, 8))
    layers = [nn.Sequential(Packed(a, b), nn.GELU("tanh"), Packed(b, a)) for a, b in sizes]
    ffn_ops.replace(nn.ModuleList(layers))
    assert [operators(layer, torch.randn(2, a)) for layer, (a, _) in zip(layers, sizes, strict=True)] == (
        [["gated_act"]] * 3
    )


# One layer that stands among others, and how the others are made.
DIFFERENT: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "an attribute": (differs(put("swap", True)), Optional),
    "an object": (differs(put("config", types.SimpleNamespace(swap=True))), Optional),
    "a value of an object": (lambda: Processed(swap=True), Processed),
    "a list": (differs(put("sizes", [2])), Optional),
    "an attribute of a child": (differs(lambda m: setattr(m.act_fn[0], "swap", True)), Optional),
    "an option of the activation": (differs(lambda m: setattr(m.act_fn[1], "approximate", "tanh")), Optional),
    "the activation": (differs(lambda m: m.act_fn.__setitem__(1, nn.SiLU())), Optional),
    "a forward of its own": (differs(lambda m: setattr(m, "forward", types.MethodType(swapped, m))), Optional),
    "a child's forward": (differs(lambda m: setattr(m.act_fn[1], "forward", F.silu)), Optional),
    "a child more": (differs(lambda m: m.act_fn.append(nn.SiLU())), Optional),
    "a tensor": (differs(lambda m: setattr(m.act_fn[0], "scale", torch.ones(1))), Optional),
    "a buffer": (differs(lambda m: m.act_fn[1].register_buffer("scale", torch.ones(1))), Optional),
    "a width": (differs(put("gate_proj", nn.Linear(D, 1))), Optional),
    "a linear child": (differs(put("gate_proj", nn.Identity())), Optional),
    "a norm in a linear's place": (differs(put("gate_proj", nn.LayerNorm(D))), Optional),
    "a child twice": (differs(lambda m: setattr(m, "up_proj", m.gate_proj)), Optional),
    "a class": (PhiLike, LlamaLike),
    "a function": (lambda: Plain(F.silu), lambda: Plain(F.gelu)),
    "another function of the same line": (lambda: Plain(named("silu")), lambda: Plain(named("gelu"))),
    "a part of a function": (
        lambda: Plain(functools.partial(F.gelu, approximate="tanh")), lambda: Plain(functools.partial(F.gelu)),
    ),
    "a number in a function": (lambda: Plain(named("swish", 1.5)), lambda: Plain(named("swish", 1.7))),
    "a method": (lambda: Plain(Scaled(2.0).act), lambda: Plain(Scaled(1.0).act)),
}  # fmt: skip


class Scaled:
    def __init__(self, beta: float) -> None:
        self.beta = beta

    def act(self, z: Tensor) -> Tensor:
        return z * torch.sigmoid(self.beta * z)


@pytest.mark.parametrize("name", DIFFERENT)
def test_one_among_others(name: str) -> None:
    """It is found to be what it is alone, and so are the others."""
    different, other = DIFFERENT[name]
    model = nn.ModuleList([other(), different(), other()])
    found = ffn_ops.replace_report(model).entries
    for path, make in (("0", other), ("1", different), ("2", other)):
        alone = ffn_ops.replace_report(make()).entries
        here = [e for e in found if e.path == path]
        assert [(e.status, e.computes, e.why) for e in here] == [(e.status, e.computes, e.why) for e in alone]
    ours, others = ([(e.status, e.computes, e.why) for e in found if e.path == path] for path in ("1", "0"))
    assert ours != others


def test_dtypes_among_others() -> None:
    """The same layer in a dtype in which it computes something else."""

    class Differing(LlamaLike):
        def forward(self, x: Tensor) -> Tensor:
            gate = self.gate_proj(x)
            gate = F.relu(gate) if x.dtype is torch.bfloat16 else F.silu(gate)
            return self.down_proj(gate * self.up_proj(x))

    model = nn.ModuleList([Differing(), Differing().bfloat16(), Differing()])
    assert ffn_ops.replace_report(model).paths("replaceable") == ["0", "2"]


class Counted(nn.GELU):
    calls = 0

    def forward(self, z: Tensor) -> Tensor:
        Counted.calls += 1
        return super().forward(z)


class Hard(nn.Hardswish):
    def forward(self, z: Tensor) -> Tensor:
        Counted.calls += 1
        return super().forward(z)


@pytest.mark.parametrize("make", [lambda: Block(act=Counted()), lambda: LlamaLike(Hard()), lambda: Block(act=Hard())])
def test_blocks_and_refused_layers_once(make: Callable[[], nn.Module]) -> None:
    """Forty blocks that do more run as often as one, and so do layers that are left."""
    Counted.calls = 0
    (alone,) = ffn_ops.replace_report(make()).entries
    once, Counted.calls = Counted.calls, 0
    assert once > 0
    found = ffn_ops.replace_report(nn.ModuleList([make() for _ in range(40)])).entries
    assert [(e.status, e.why) for e in found] == [(alone.status, alone.why)] * 40 and Counted.calls == once


def test_refused_layers_are_gone_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """replace() looks at the tree of a layer that is left one time, though it warns with a report of it."""
    trees: list[nn.Module] = []
    own = recognise.structure
    monkeypatch.setattr(recognise, "structure", lambda layer, of: trees.append(layer) or own(layer, of))
    model = nn.ModuleList([LlamaLike(nn.Hardswish()) for _ in range(5)])
    with pytest.warns(UserWarning, match="5 x"):
        ffn_ops.replace(model)
    assert [sum(tree is layer for tree in trees) for layer in model] == [1] * 5


@pytest.mark.parametrize(
    "make", [LlamaLike, Processed, PhiLike, BertLike, lambda: Plain(named("gelu")), lambda: Plain(new_gelu)]
)
def test_alike_once(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty layers run as often as one; numbers, options that forward does not read, and hooks do not matter."""
    calls: list[int] = []
    for cls in {type(make())}:
        method = "feed_forward_chunk" if cls is BertLike else "forward"
        own = getattr(cls, method)
        monkeypatch.setattr(cls, method, lambda self, x, own=own: calls.append(1) or own(self, x))
    ffn_ops.replace_report(make())
    once = len(calls)
    assert once > 0
    model = nn.ModuleList([make() for _ in range(60)])
    for i, layer in enumerate(model):
        layer.layer_idx = i
        layer.train(i % 2 == 0)
        layer.register_forward_hook(lambda *_: None) if i == 7 else None
    calls.clear()
    assert len(ffn_ops.replace_report(model).paths("replaceable")) == 60 and len(calls) == once
    calls.clear()
    ffn_ops.replace(model)
    assert len(calls) == once
