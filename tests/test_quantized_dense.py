# SPDX-License-Identifier: BSD-3-Clause
"""Dense layers on quantised weights: ``QuantizedLinear``, this package's layers and replaced ones with it as children,
and ``quantize_`` of them; against the same layers on dequantised weights."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from device import generator
from seen import Seen
from torch import Tensor, nn
from torch.nn import functional as F

import ffn_ops
from ffn_ops import QuantizedLinear

pytestmark = pytest.mark.cpu_only("quantised weights have no CUDA kernels")


class Mlp(nn.Module):
    """As people write it, for ``replace``."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(64, 96, bias=bias), nn.Linear(64, 96, bias=False)
        self.down_proj = nn.Linear(96, 64, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


LAYERS: dict[str, Any] = {
    "FeedForward": lambda: ffn_ops.FeedForward(64, d_ff=96),
    "FeedForward, no bias": lambda: ffn_ops.FeedForward(64, d_ff=96, bias=False, recompute=True),
    "GELUFFN": lambda: ffn_ops.GELUFFN(64, 96),
    "replaced": lambda: ffn_ops.replace(Mlp()),
    "replaced, plain": lambda: ffn_ops.replace(nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))),
}
GATES = {"GLU": lambda: ffn_ops.GLU(64, 96), "GatedFFN": lambda: ffn_ops.GatedFFN(64, 96, 2, out_proj=True)}


def made(name: str) -> Any:
    torch.manual_seed(0)
    return {**LAYERS, **GATES}[name]()


def dense_again(layer: nn.Module) -> nn.Module:
    """A copy whose quantised children are ``nn.Linear`` of the dequantised weights."""
    layer = copy.deepcopy(layer)
    for parent in list(layer.modules()):
        for name, child in parent.named_children():
            if isinstance(child, QuantizedLinear):
                linear = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                linear.weight, linear.bias = nn.Parameter(child.weight.dequantize(), False), child.bias  # type: ignore[assignment]
                setattr(parent, name, linear)
    return layer


def gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    y = layer(x)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return [y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum(), wanted)]


@pytest.mark.parametrize("format", ["mxfp4", "int8", "int4", "fp8"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_one_operator_with_the_bits_of_the_dequantised_one(name: str, format: str) -> None:
    layer = made(name)
    x = torch.randn(2, 5, 64, generator=generator(1), requires_grad=True)
    before = layer(x).detach()
    (entry,) = ffn_ops.quantize_(layer, format).entries
    assert entry.status == "quantised" and entry.computes.startswith(f"{format}, 0.0 of ")
    with Seen() as seen:
        y = layer(x)
    assert seen.names == ["moe_quantized"]
    assert 0 < (y - before).norm() < 0.3 * before.norm()
    for ours, expected in zip(gradients(layer, x), gradients(dense_again(layer), x), strict=True):
        assert torch.equal(ours, expected)
    if "replaced" in name:
        assert ffn_ops.replace_report(layer).paths("replaced") == [""]
    assert ffn_ops.quantize_(layer, format).entries[0].why.endswith("is called (ffn_ops's QuantizedLinear)")


@pytest.mark.parametrize("name", GATES)
def test_gates_compute_with_their_quantised_weights(name: str) -> None:
    """Their products and the gate are operators of their own, whose gradients are added in another order."""
    layer, x = made(name), torch.randn(3, 64, generator=generator(2), requires_grad=True)
    assert ffn_ops.quantize_(layer, "mxfp4").paths("quantised") == [""]
    assert not any(isinstance(module, nn.Linear) for module in layer.modules())
    torch.testing.assert_close(gradients(layer, x), gradients(dense_again(layer), x))


@pytest.mark.parametrize("name", LAYERS)
def test_copies_pickles_saves_moves_and_compiles(name: str, dynamo: None) -> None:
    layer, x = made(name), torch.randn(3, 64, generator=generator(3))
    ffn_ops.quantize_(layer, "mxfp4")
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), y)
    other = made(name)
    ffn_ops.quantize_(other, "mxfp4")
    for p in [*other.parameters(), *(b for b in other.buffers() if b.dtype is torch.uint8)]:
        p.data.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), y)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    exact = dense_again(half).double()(x.bfloat16().double())
    assert half(x.bfloat16()).dtype is torch.bfloat16
    assert (half(x.bfloat16()) - exact).norm() < 0.02 * exact.norm()


def test_a_restored_layer_calls_its_quantised_children() -> None:
    layer, x = made("replaced"), torch.randn(3, 64, generator=generator(4))
    ffn_ops.quantize_(layer, "int8")
    y = layer(x)
    with Seen() as seen:
        torch.testing.assert_close(ffn_ops.restore(layer)(x), y)
    assert type(layer) is Mlp and seen.names == ["quantized_linear"] * 3


@pytest.mark.parametrize("name", ["FeedForward", "replaced"])
def test_a_changed_child_is_called(name: str) -> None:
    """A hook on a quantised child, a dense child between quantised ones: as with dequantised weights."""
    for path in ("w2", "w3") if name == "FeedForward" else ("down_proj", "up_proj"):
        layer, x = made(name), torch.randn(3, 64, generator=generator(5), requires_grad=True)
        original = layer.get_submodule(path)
        ffn_ops.quantize_(layer, "int8")
        layer.get_submodule(path).register_forward_hook(lambda module, args, y: 2 * y)
        expected = dense_again(layer)
        expected.get_submodule(path).register_forward_hook(lambda module, args, y: 2 * y)
        torch.testing.assert_close(gradients(layer, x), gradients(expected, x))
        layer.set_submodule(path, original)
        torch.testing.assert_close(gradients(layer, x), gradients(dense_again(layer), x))
        if name == "replaced":
            assert ffn_ops.replace_report(layer).paths("partly") == [""]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_linear_layer_is_its_formula(dtype: torch.dtype) -> None:
    g = generator(6)
    w, bias = ffn_ops.quantize(torch.randn(7, 64, generator=g), "int4"), torch.randn(7, generator=g).to(dtype)
    layer = QuantizedLinear(w, bias)
    for shape in ((64,), (0, 64), (2, 3, 64)):
        x = torch.randn(shape, generator=g).to(dtype).requires_grad_()
        exact = F.linear(x.double(), w.dequantize().double(), bias.double())
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.05}
        torch.testing.assert_close(layer(x), exact.to(dtype), **tolerance)
        ours, theirs = (torch.autograd.grad(y.double().square().sum(), x)[0] for y in (layer(x), exact))
        torch.testing.assert_close(ours, theirs, **{**tolerance, "atol": 10 * tolerance["atol"]})
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 64)).dtype is torch.bfloat16


def test_what_cannot_be_quantised_is_left_and_said() -> None:
    model = nn.Sequential(Mlp(), ffn_ops.FeedForward(64, d_ff=96), nn.Linear(64, 64))
    model[1].w2.register_forward_hook(lambda module, args, y: y)
    report = ffn_ops.quantize_(model, "int8")
    assert [(e.path, e.status, e.why) for e in report.entries] == [
        ("0", "left", "it does not run on an operator: replace(model) first"),
        ("1", "left", "w2 is called (hooks, or a forward set on the instance)"),
    ]
    assert all(type(p) is nn.Parameter for p in model.parameters()) and not list(model.buffers())
    with pytest.raises(ValueError, match="group: expected a divisor of K = 33"):
        ffn_ops.quantize_(ffn_ops.GELUFFN(33, 64), "int4")


def test_bad_linear_layers_are_refused_by_name() -> None:
    w, x = ffn_ops.quantize(torch.randn(5, 64), "int8"), torch.randn(3, 64)
    stack = ffn_ops.quantize(torch.randn(2, 5, 64), "int8")
    layer = QuantizedLinear(w, torch.zeros(5))
    for error, message, call in (
        (TypeError, "weight: expected a QuantizedWeight, got Tensor", lambda: QuantizedLinear(torch.randn(5, 64))),
        (ValueError, r"weight: expected a quantised weight of shape \[N, K\], got \[2, 5, 64\]",
         lambda: QuantizedLinear(stack)),
        (ValueError, r"bias: expected shape \[5\], got \[4\]", lambda: QuantizedLinear(w, torch.zeros(4))),
        (TypeError, "bias: expected a torch.Tensor, got list", lambda: QuantizedLinear(w, [0.0])),
        (ValueError, r"x: expected shape \[..., 64\], got \[3, 63\]", lambda: layer(x[:, :63])),
        (TypeError, "x: expected dtype float32, float16 or bfloat16 .* got float64", lambda: layer(x.double())),
        (TypeError, "bias: expected dtype bfloat16 as x has, got float32", lambda: layer(x.bfloat16())),
        (TypeError, "x: expected a torch.Tensor, got list", lambda: layer([1.0])),
        (TypeError, "weight: expected a parameter to draw again, got QuantizedWeight", layer.reset_parameters),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("columns", (3, 5, 12, 20, 24, 40, 100, 192))
def test_groups_that_end_within_a_vector(columns: int, isa: str) -> None:
    """Forward and the gradient of x, which packs rows of codes into panels whose neighbours are full already."""
    g = generator(9)
    codes = torch.randint(256, (70, 192), dtype=torch.uint8, generator=g)
    w = ffn_ops.QuantizedWeight("int8", codes, torch.rand(70, -(-192 // columns), generator=g), block=(1, columns))
    dense, (parts, name) = w.dequantize(), w.stacked()
    for T in (3, 40):
        offsets, x, d_y = torch.tensor([0, T]), torch.randn(T, 192, generator=g), torch.randn(T, 70, generator=g)
        y = torch.ops.ffn_ops.quantized_linear(x, parts, name, offsets, False)
        assert torch.equal(y, torch.ops.ffn_ops.moe_linear(x, dense[None], offsets)), f"T {T}"
        d_x = torch.ops.ffn_ops.quantized_linear(d_y, parts, name, offsets, True)
        assert torch.equal(d_x, torch.ops.ffn_ops.moe_linear(d_y, dense.t()[None], offsets)), f"T {T}"
