# SPDX-License-Identifier: BSD-3-Clause
"""Graphs of torch's older tracers keep our calls: torch.fx.symbolic_trace and torch.jit.trace; torch.jit.script
refuses."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import assert_same_bits
from torch import Tensor, nn

import ffn_ops
from ffn_ops import routing

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "FeedForward": lambda: ffn_ops.FeedForward(8, 12, 4, 0.5),
    "FeedForward, recompute": lambda: ffn_ops.FeedForward(8, 12, 4, 0.0, bias=False, recompute=True),
    "ReLUFFN": lambda: ffn_ops.ReLUFFN(8, 12),
    "GELUFFN": lambda: ffn_ops.GELUFFN(8, 12),
    "SwishFFN": lambda: ffn_ops.SwishFFN(8, 12),
    "GLU": lambda: ffn_ops.GLU(8, 8),
    "GatedFFN": lambda: ffn_ops.GatedFFN(8, 12, 2, out_proj=True),
    "MoEFFN": lambda: ffn_ops.MoEFFN(8, 6, 4, gated=True, num_shared=1),
    "MoEFFN, bias": lambda: ffn_ops.MoEFFN(8, 6, 4, router=routing.BiasedTopK(4, 2)),
    "MoEFFN, capacity": lambda: ffn_ops.MoEFFN(8, 6, 4, router=functools.partial(routing.switch, capacity_factor=0.7)),
}
MIXTURES = [name for name in LAYERS if name.startswith("MoE")]
every_layer = pytest.mark.parametrize("name", LAYERS)


class Block(nn.Module):
    """A layer as a part of a model."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.layer = nn.LayerNorm(8), LAYERS[name]()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.layer(y)


def step(model: Any, x: Tensor) -> dict[str, Tensor]:
    y = model(x)
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(y.square().sum(), list(parameters.values()))
    return {"y": y.detach(), **dict(zip(parameters, grads, strict=True))}


@every_layer
def test_symbolic_trace(name: str) -> None:
    """Forward and gradients of the layer for every T; one node for each call of ours."""
    model = Block(name).eval()
    graph = torch.fx.symbolic_trace(model)
    for T in (5, 9):
        x = torch.randn(T, 8)
        assert_same_bits(step(graph, x), step(model, x))
    assert not any("functional" in str(node.target) for node in graph.graph.nodes)


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in MIXTURES])
def test_symbolic_trace_of_a_layer_alone(name: str) -> None:
    layer = LAYERS[name]().eval()
    x = torch.randn(5, 8)
    assert torch.equal(torch.fx.symbolic_trace(layer)(x), layer(x))


def test_symbolic_trace_keeps_dropout() -> None:
    """A model that was traced for inference and is then trained drops."""
    layer = ffn_ops.FeedForward(8, 12, 4, 0.5).eval()
    graph = torch.fx.symbolic_trace(layer).train()
    x = torch.randn(20, 8)
    torch.manual_seed(0)
    dropped = graph(x)
    torch.manual_seed(0)
    assert torch.equal(dropped, layer.train()(x)) and (dropped == 0).any()


def test_symbolic_trace_of_functions() -> None:
    """Routers and operators called in a model's own forward; changed children are called."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.ffn = nn.Linear(8, 4), ffn_ops.GELUFFN(8, 12)
            self.ffn.linear1 = nn.Sequential(nn.Linear(8, 12), nn.Dropout(0.0))  # type: ignore[assignment]
            self.w_in, self.w_down = nn.Parameter(torch.randn(4, 6, 8)), nn.Parameter(torch.randn(4, 8, 6))

        def forward(self, x: Tensor) -> Tensor:
            logits = self.router(x)
            route = routing.top_k(logits, 2)
            y = ffn_ops.moe(self.ffn(x), route, self.w_in, self.w_down)
            return ffn_ops.gated_act(y, x) * routing.load_balancing_loss(logits, route)

    model, x = Own(), torch.randn(5, 8)
    graph = torch.fx.symbolic_trace(model)
    assert_same_bits(step(graph, x), step(model, x))
    assert any(node.target == "ffn.linear1.0" for node in graph.graph.nodes)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@every_layer
@pytest.mark.filterwarnings("ignore")  # of sizes that become constants; torch.jit.trace is deprecated
def test_jit_trace(name: str, grad: bool) -> None:
    """Traced, checked by torch, saved and loaded: forward and gradients of the layer. A mixture's trace has one T."""
    model = Block(name).eval()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, torch.randn(5, 8))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for T in (5,) if name in MIXTURES else (5, 9):
        x = torch.randn(T, 8)
        assert_same_bits(step(loaded, x), step(model, x))
    if name in MIXTURES:
        with pytest.raises(RuntimeError, match=r"expected 9 .*got 5"):
            loaded(torch.randn(9, 8))


@every_layer
@pytest.mark.filterwarnings("ignore")  # torch.jit.script is deprecated
def test_jit_script_is_refused(name: str) -> None:
    with pytest.raises(NotImplementedError, match=r"torch.jit.script cannot compile it. Use torch.export"):
        torch.jit.script(Block(name))
    replaced = ffn_ops.replace(nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)))
    with pytest.raises(NotImplementedError, match=r"restore\(model\) first"):
        torch.jit.script(replaced)
    x = torch.randn(3, 8)
    assert torch.equal(torch.jit.script(ffn_ops.restore(replaced))(x), replaced(x))


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_are_parts_of_a_traced_model(name: str) -> None:
    with pytest.raises(
        TypeError,
        match=r"MoEFFN: torch.fx.symbolic_trace cannot trace this module alone; trace a model that contains it",
    ):
        torch.fx.symbolic_trace(LAYERS[name]())


@pytest.mark.filterwarnings("ignore")  # torch.jit.script is deprecated
def test_a_script_has_no_layers_and_one_row() -> None:
    model, x = nn.Sequential(nn.Linear(8, 12), nn.SiLU(), nn.Linear(12, 8)), torch.randn(3, 8)
    expected = model(x)
    replaced = ffn_ops.replace(torch.jit.script(model))
    assert not ffn_ops.replace_report(replaced).entries
    with ffn_ops.profile(replaced) as prof:
        torch.testing.assert_close(replaced(x), expected)
    assert prof.as_dict()["rows"][1]["calls"] == 1
