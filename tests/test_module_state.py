# SPDX-License-Identifier: BSD-3-Clause
"""State of modules: values after ``to_empty``, float32 buffers in a model of another dtype, layers without biases; and
the dropout of a training step."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device import DEVICE, generator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ffn_ops
from ffn_ops import reference, routing

MODULES: dict[str, Any] = {
    "FeedForward": lambda: ffn_ops.FeedForward(6, 30, 4, 0.1),
    "ReLUFFN": lambda: ffn_ops.ReLUFFN(6, 10),
    "SwishFFN": lambda: ffn_ops.SwishFFN(6, 10, 1.5),
    "GLU": lambda: ffn_ops.GLU(6, 10),
    "GatedFFN": lambda: ffn_ops.GatedFFN(6, 10, 3, out_proj=True),
    "MoEFFN": lambda: ffn_ops.MoEFFN(6, 10, 4),
    "MoEFFN gated, shared": lambda: ffn_ops.MoEFFN(6, 10, 4, gated=True, num_shared=2),
    "MoEFFN without biases": lambda: ffn_ops.MoEFFN(6, 10, 4, bias=False, num_shared=1),
    "MoEFFN BiasedTopK": lambda: ffn_ops.MoEFFN(6, 10, 4, router=routing.BiasedTopK(4, 2)),
    "BiasedTopK": lambda: routing.BiasedTopK(4, 2),
}


@pytest.mark.parametrize("name", MODULES)
def test_reset_after_to_empty_gives_a_fresh_layer(name: str) -> None:
    """From the meta device by way of uninitialised memory: a seed gives the same values as in the constructor."""
    torch.manual_seed(5)
    fresh = MODULES[name]()
    layer = copy.deepcopy(fresh).to("meta").to_empty(device=torch.get_default_device())
    with torch.no_grad():
        for t in (*layer.parameters(), *layer.buffers()):
            t.fill_(math.nan)  # as such memory may well be
    torch.manual_seed(5)
    assert layer.reset_parameters() is None
    assert layer.state_dict().keys() == fresh.state_dict().keys()
    for key, value in fresh.state_dict().items():
        assert torch.equal(layer.state_dict()[key], value), key
    for t in layer.parameters():
        assert t.requires_grad and t.is_leaf


@pytest.mark.parametrize("name", MODULES)
def test_reset_of_every_module_in_turn(name: str) -> None:
    """As sharding does it: each module that has the method; every value then lies where a fresh one's would."""
    layer = MODULES[name]()
    bounds = {key: value.abs().max() for key, value in layer.state_dict().items()}
    with torch.no_grad():
        for t in (*layer.parameters(), *layer.buffers()):
            t.fill_(math.nan)
    for module in layer.modules():
        if callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()
    for key, value in layer.state_dict().items():
        assert value.abs().max() <= 2 * bounds[key], key
        if not key.endswith("choose.bias") and key != "bias":
            assert value.unique().numel() == value.numel(), key


def test_built_on_the_meta_device() -> None:
    with torch.device("meta"):
        layer = ffn_ops.MoEFFN(6, 10, 4, router=routing.BiasedTopK(4, 2))
    layer.to_empty(device=torch.get_default_device()).reset_parameters()
    assert layer.w_in.abs().max() <= 6**-0.5 and layer.w_down.abs().max() <= 10**-0.5
    assert layer.w_in.std() > 0.15 and layer(torch.randn(5, 6)).isfinite().all()


# ---- buffers of float32 ---------------------------------------------------------------------------------------------

BIAS = torch.linspace(6.817, 7.063, 256)  # which bfloat16 rounds to nine values

CASTS: dict[str, Any] = {
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "to dtype": lambda m: m.to(torch.bfloat16),
    "to dtype and device": lambda m: m.to(torch.get_default_device(), torch.float16),
    "type": lambda m: m.type(torch.bfloat16),
    "float64 and back": lambda m: m.double().float(),
    "within a model": lambda m: nn.Sequential(m).bfloat16()[0],
    "a layer's child": lambda m: ffn_ops.MoEFFN(6, 10, 256, router=m).half().choose,
    "twice": lambda m: m.half().bfloat16(),
}


@pytest.mark.parametrize("name", CASTS)
def test_casts_leave_the_bias_its_values(name: str) -> None:
    router = routing.BiasedTopK(256, 2)
    router.bias.copy_(BIAS)
    router = CASTS[name](router)
    assert router.bias.dtype is torch.float32 and torch.equal(router.bias, BIAS)
    assert "bias" in dict(router.named_buffers()) and router.bias.device == BIAS.device


def test_casts_change_nobodys_expert() -> None:
    router = routing.BiasedTopK(256, 2)
    router.bias.copy_(BIAS)
    logits = torch.randn(64, 256) * 1e-2
    before = router(logits)
    assert torch.equal(router.bfloat16()(logits).offsets, before.offsets)


def test_meta_moves_and_empties_the_bias() -> None:
    router = routing.BiasedTopK(4, 2).bfloat16().to("meta")
    assert router.bias.is_meta and router.bias.dtype is torch.float32
    router.to_empty(device=torch.get_default_device()).reset_parameters()
    assert router.bias.dtype is torch.float32 and not router.bias.any()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "child"])
def test_loading_keeps_the_bias_float32(inside: bool, assign: bool) -> None:
    """A checkpoint of 16 bits has lost what it has lost; the steps from there on must not be."""
    router = routing.BiasedTopK(256, 2)
    model = ffn_ops.MoEFFN(6, 10, 256, router=router) if inside else router
    state = {name: t.bfloat16() for name, t in model.state_dict().items()}
    state["choose.bias" if inside else "bias"] = BIAS.bfloat16()
    model.load_state_dict(state, assign=assign)
    assert router.bias.dtype is torch.float32 and torch.equal(router.bias, BIAS.bfloat16().float())
    state["choose.bias" if inside else "bias"] = BIAS
    model.load_state_dict(state, assign=assign)
    assert torch.equal(router.bias, BIAS)
    if assign:
        assert router.bias.data_ptr() == BIAS.data_ptr()  # float32 is taken as it is


def test_update_bias_refuses_16_bits() -> None:
    """Steps of 1e-3 would vanish in it."""
    routed = routing.top_k(torch.randn(9, 4), 2)
    with pytest.raises(TypeError, match="bias: expected dtype float32 or float64, got bfloat16"):
        routing.update_bias(torch.ones(4, dtype=torch.bfloat16), routed)


# ---- layers without biases ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("num_shared", [0, 2])
def test_bias_false_makes_none(gated: bool, num_shared: int) -> None:
    """No biases in the router, the experts or the shared experts; the layer computes the same as with zero biases."""
    layer = ffn_ops.MoEFFN(6, 10, 4, gated=gated, num_shared=num_shared, bias=False)
    assert not [key for key in layer.state_dict() if "bias" in key or key.startswith("b_")]
    other = ffn_ops.MoEFFN(6, 10, 4, gated=gated, num_shared=num_shared)
    for p in other.parameters():
        nn.init.zeros_(p)
    other.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(9, 6)
    torch.testing.assert_close(layer(x), other(x))
    assert all(p.grad is None for p in layer.parameters())
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("how", ["a linear layer", "set to None"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_router_without_a_bias(how: str, dtype: torch.dtype) -> None:
    layer = ffn_ops.MoEFFN(16, 10, 4).to(dtype)
    if how == "a linear layer":
        layer.router = nn.Linear(16, 4, bias=False, dtype=dtype)
    else:
        layer.router.bias = None
    x = torch.randn(50, 16, dtype=dtype)
    logits = layer.logits(x)
    eps = torch.finfo(logits.dtype).eps
    torch.testing.assert_close(logits.double(), x.double() @ layer.router.weight.double().t(), rtol=0, atol=50 * eps)
    y = layer(x)
    assert y.dtype is dtype
    y.sum().backward()
    assert layer.router.weight.grad.any()


def test_the_guides_module_takes_the_state_of_a_router_without_a_bias() -> None:
    layer = ffn_ops.MoEFFN(6, 10, 4)
    layer.router.bias = None
    plain = reference.MoEFFN(6, 10, 4)
    plain.load_state_dict(layer.document_state_dict(), strict=True)
    x = torch.randn(9, 6)
    torch.testing.assert_close(layer(x), plain(x))


def test_upcycle_of_a_layer_with_some_biases() -> None:
    dense = ffn_ops.FeedForward(6, 15, 2, 0.0).double()
    dense.w1.bias = None
    x = torch.randn(9, 6, dtype=torch.float64)
    torch.testing.assert_close(ffn_ops.upcycle(dense, 4)(x), dense(x))
    dense.w2.bias = None
    torch.testing.assert_close(ffn_ops.upcycle(dense, 4)(x), dense(x))


def test_plain_ffn_without_biases() -> None:
    layer = ffn_ops.PlainFFN(6, 10, activation="relu", bias=False)
    assert set(layer.state_dict()) == {"linear1.weight", "linear2.weight"}
    x = torch.randn(9, 6)
    torch.testing.assert_close(layer(x), (x @ layer.linear1.weight.t()).relu() @ layer.linear2.weight.t())
    with pytest.raises(TypeError, match="bias: expected True or False"):
        ffn_ops.PlainFFN(6, 10, bias=1)


@pytest.mark.parametrize("shape", [(6, 12), (3, 2, 12)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_output_may_be_changed_in_place(shape: tuple[int, ...], p: float) -> None:
    layer = ffn_ops.FeedForward(12, 30, 8, p)
    x = torch.randn(*shape, generator=generator(0)).requires_grad_()

    def gradient(changed: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        y = changed(layer(x))
        return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]

    for in_place, apart in zip(gradient(lambda y: y.add_(x).mul_(2)), gradient(lambda y: (y + x) * 2), strict=True):
        assert torch.equal(in_place, apart)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_in_the_node_of_the_layer(dtype: torch.dtype) -> None:
    """On a CPU the dropout of a training step is no node of its own, nor is the folding of leading dimensions. The
    random numbers, the output and all derivatives to second order are those of ``F.dropout`` of the layer, under
    checkpoint, autocast and torch.func too."""
    layer = ffn_ops.FeedForward(12, 30, 8, 0.3).to(dtype)
    plain = copy.deepcopy(layer)
    plain.dropout = nn.Identity()
    x = torch.randn(3, 2, 12, generator=generator(0)).to(dtype).requires_grad_()
    d_y = torch.randn(3, 2, 12, generator=generator(1)).to(dtype)

    def ways(call: Callable[[Tensor], Tensor], module: nn.Module) -> list[Tensor]:
        found = []
        leaves = [x, *module.parameters()]
        again = functools.partial(checkpoint, call, use_reentrant=False)
        for way in (call, again, torch.autocast(DEVICE, torch.bfloat16)(call)):
            torch.manual_seed(3)
            y = way(x)
            first = torch.autograd.grad(y, leaves, d_y.to(y.dtype), create_graph=way is call)
            second = (
                ()
                if way is not call
                else torch.autograd.grad([g.square().sum() for g in first], leaves, materialize_grads=True)
            )
            found += [y, *first, *second]
        torch.manual_seed(3)
        found += torch.func.vjp(call, x.detach())[1](d_y)
        torch.manual_seed(3)
        return [*found, *torch.func.jvp(call, (x.detach(),), (d_y,))]

    def by_torch(x: Tensor) -> Tensor:
        return F.dropout(plain(x), 0.3)

    ours, theirs = ways(layer, layer), ways(by_torch, plain)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(a, b), i
    node: Any = layer(x).grad_fn
    assert ("OneNode" in type(node).__name__) == (DEVICE == "cpu")
    seen: list[type] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    layer(x)
    handle.remove()
    assert nn.Dropout in seen
    layer.dropout.p = 1.0
    assert not layer(x).any()
    for layer.dropout.p in (-0.1, float("nan")):
        with pytest.raises((ValueError, RuntimeError), match="dropout probability has to be"):
            layer(x)
