# SPDX-License-Identifier: BSD-3-Clause
"""What changes later in a block of which a part is replaced: dropout, hooks, children; and what tools do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from replacing import D
from same_function import assert_same_function, operators, seeded
from test_replace_parts import Alone, Block, Inline, first
from torch import Tensor, nn

import ffn_ops

FUNCTIONAL = "its own forward runs: in training it calls dropout, with p > 0, which is no child"
CHILD = "its own forward runs, with torch's gelu: drop is called (p > 0 in training)"


@pytest.mark.parametrize(("make", "why"), [(lambda: Block(0.5), FUNCTIONAL), (lambda: Inline(0.5), CHILD)])
def test_dropout_between(make: Callable[[], nn.Module], why: str) -> None:
    """In training with p > 0 the block's own forward, with the masks of the untouched one."""
    layer, plain = seeded(make), seeded(make)
    ffn_ops.replace(layer)
    x = torch.randn(2, 5, D)
    assert operators(Alone(layer), x) == [] and ffn_ops.replace_report(layer).entries[0].why == why
    outputs = []
    for model in (layer, plain):
        torch.manual_seed(1)
        outputs.append(model(x, None)[0])
    assert torch.equal(*outputs)
    layer.eval()
    assert operators(Alone(layer), x) == ["ffn"]
    layer.train()
    layer.drop.p = layer.p = 0.0
    ffn_ops.replace(layer)
    assert operators(Alone(layer), x) == ["ffn"]


@pytest.mark.parametrize("child", ["fc1", "act", "fc2"])
def test_what_changes_later(child: str) -> None:
    """Hooks of the three run; another module in a child's place is called."""
    layer, plain = seeded(Block), seeded(Block)
    ffn_ops.replace(layer)
    x = torch.randn(2, 5, D)
    for model in (layer, plain):
        handle = model.get_submodule(child).register_forward_hook(lambda m, args, y: 1.5 * y)
    assert operators(Alone(layer), x) == [] and "hooks" in str(ffn_ops.replace_report(layer))
    torch.testing.assert_close(layer(x, None), plain(x, None))
    handle.remove()
    for model in (layer, plain):
        model.add_module(child, nn.Sequential(seeded(Block).get_submodule(child), nn.Tanh()))
    assert operators(Alone(layer), x) == []
    torch.testing.assert_close(layer(x, None), plain(x, None))


def test_another_activation() -> None:
    layer, plain = seeded(Block), seeded(Block)
    ffn_ops.replace(layer)
    x = torch.randn(2, 5, D)
    for act, names in ((nn.SiLU(), ["ffn"]), (nn.Hardswish(), []), (nn.ReLU(), ["ffn"])):
        layer.act = plain.act = act
        assert operators(Alone(layer), x) == names
        torch.testing.assert_close(layer(x, None), plain(x, None))


def test_counted_calls(dynamo: None) -> None:
    """Where the last of the three is reached, fused or not; compiled code does not come by the counter."""
    layer = ffn_ops.replace(seeded(Block))
    x = torch.randn(2, 5, D)

    def counted() -> tuple[int, int]:
        (entry,) = ffn_ops.replace_report(layer).entries
        return entry.fused_calls, entry.own_calls

    assert counted() == (0, 0)
    layer(x, None), layer(x, mask=x[..., :1])
    handle = layer.fc1.register_forward_hook(lambda *_: None)
    layer(x, None)
    handle.remove()
    layer(x[0], None)
    assert counted() == (3, 1) and "fused in 3 of 4 calls" in str(ffn_ops.replace_report(layer))
    torch.compile(layer, fullgraph=True, backend="eager")(x, None)
    assert counted() == (3, 1)
    ffn_ops.replace(ffn_ops.restore(layer))
    assert counted() == (0, 0)


def test_replaced_again_as_something_else() -> None:
    """What was a block of which a part is fused is now a feed-forward layer in all, and the other way round."""

    class Either(Block):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
            return self.between(x) if self.attention is None else x + self.between(self.attention(x).sin())

    layer, plain = seeded(Either), seeded(Either)
    x = torch.randn(2, 5, D)
    for attention in (None, layer.attention, None):
        layer.attention = plain.attention = attention
        ffn_ops.replace(layer)
        assert [e.status for e in ffn_ops.replace_report(layer).entries] == ["replaced"]
        assert operators(layer, x) == ["ffn"]
        torch.testing.assert_close(layer(x), plain(x))


def test_autocast_and_dtypes() -> None:
    layer, plain = seeded(Block), seeded(Block)
    ffn_ops.replace(layer)
    x = torch.randn(2, 5, D)
    with torch.autocast(x.device.type, torch.bfloat16):
        assert operators(Alone(layer), x) == ["ffn"]
        torch.testing.assert_close(layer(x, None)[0], plain(x, None)[0], rtol=0.03, atol=0.02)
    layer.fc2.double(), plain.fc2.double()  # of several dtypes: as the untouched block, which raises
    assert pytest.raises(RuntimeError, layer, x, None).match("dtype")
    layer.bfloat16()
    assert operators(Alone(layer), x.bfloat16()) == ["ffn"]


def test_compile_and_trace(dynamo: None) -> None:
    layer, plain = seeded(Inline), seeded(Inline)
    ffn_ops.replace(layer)
    x = torch.randn(2, 5, D)
    compiled = torch.compile(Alone(layer), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain(x, None))
    exported = torch.export.export(Alone(layer), (x,))
    assert "ffn_ops.ffn" in exported.graph_module.code
    traced = torch.fx.symbolic_trace(Alone(layer))
    torch.testing.assert_close(traced(x), plain(x, None))


def test_checkpointing() -> None:
    layer, plain = seeded(Block), seeded(Block)
    ffn_ops.replace(layer)
    inside = first(layer)
    checkpointed = functools.partial(torch.utils.checkpoint.checkpoint, inside, use_reentrant=False)
    assert_same_function(layer, plain, lambda m: checkpointed(m) if m is layer else inside(m))
