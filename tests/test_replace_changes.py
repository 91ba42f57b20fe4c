"""Replaced layers that change later: hooks, dropout, activations, dtypes and arguments are looked at in every call."""

from __future__ import annotations

import pytest
import torch
from replacing import LAYERS, D, LlamaLike, Plain, on, operators, pair, results, seeded, sequential
from torch import nn

import ffn_ops


def test_an_attribute_that_is_set() -> None:
    """Another activation: recognised anew. One that is not known: the layer's own forward."""
    layer, plain = pair("llama")
    x = torch.randn(5, D)
    for act, names in ((nn.GELU(), ["ffn"]), (nn.Hardswish(), []), (nn.SiLU(), ["ffn"])):
        layer.act_fn = plain.act_fn = act
        assert operators(layer, x) == names
        torch.testing.assert_close(layer(x), plain(x))
        assert bool(names) == (ffn_ops.replace_report(layer).entries[0].status == "replaced")
    layer.forward = lambda x: x  # a forward of the instance goes first, as ever
    assert layer(x) is x


def test_children_that_change_behind_its_back() -> None:
    """Where Module.__setattr__ is not called: another class, more children, another number in the activation."""
    x = torch.randn(5, D)
    layer = ffn_ops.replace(sequential())
    layer._modules["2"] = nn.ReLU()
    assert operators(layer, x) == [] and torch.equal(layer(x), ffn_ops.restore(layer)(x))
    layer = ffn_ops.replace(sequential())
    layer.append(nn.Tanh())
    assert operators(layer, x) == [] and layer(x).abs().max() < 1
    layer = ffn_ops.replace(sequential())
    layer[2].approximate = "none"
    assert operators(layer, x) == [] and "approximate" in str(ffn_ops.replace_report(layer))
    assert torch.equal(layer(x), ffn_ops.restore(layer)(x))
    assert operators(ffn_ops.replace(layer), x) == ["ffn"]


def test_dropout_between() -> None:
    """p > 0 in training: called, the gate fused before it, with the untouched layer's masks; else stepped over."""
    layer, plain = (seeded(lambda: Plain(nn.GELU(), 0.5)) for _ in range(2))
    ffn_ops.replace(layer)
    x = torch.randn(5, D)
    assert operators(layer, x) == ["gated_act"] and ffn_ops.replace_report(layer).paths("partly") == [""]
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, plain(x))
    layer.drop.p = 0.0
    assert operators(layer, x) == ["ffn"]
    layer.drop.p = 0.5
    assert operators(layer.eval(), x) == ["ffn"] and ffn_ops.replace_report(layer).paths("replaced") == [""]


@pytest.mark.parametrize("name", ("llama", "phi", "limit and shift", "sequential", "in a method"))
def test_hooks_of_children(name: str) -> None:
    """They run, and what they give counts, wherever they are and whenever they come."""
    paths = [path for path, module in seeded(LAYERS[name][0]).named_modules() if path and not path.startswith("att")]
    for path in paths:
        layer, plain = pair(name)
        seen: list[int] = []
        for model in (layer, plain):
            child = model.get_submodule(path)
            child.register_forward_hook(lambda m, args, y, seen=seen: seen.append(1) or 1.5 * y)
            child.register_full_backward_hook(lambda m, d_in, d_out, seen=seen: seen.append(2) or None)
        x = torch.randn(5, D)
        torch.testing.assert_close(results(layer, on(x)), results(plain, on(x)))
        assert seen == [1, 2, 1, 2], path


def test_global_hooks() -> None:
    layer, plain = pair("llama")
    counts: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: counts.append(type(m).__name__))
    try:
        layer(torch.randn(2, D))
        ours, counts[:] = list(counts), []
        plain(torch.randn(2, D))
        assert ours == counts and "Linear" in ours
        assert "global" in str(ffn_ops.replace_report(layer))
    finally:
        handle.remove()


class Casting(nn.Linear):
    """As openai-whisper has it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)


class Doubling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (2 if self.training else 1)


@pytest.mark.parametrize(("cls", "names"), [(Casting, ["ffn"]), (Doubling, ["gated_act"])])
def test_subclasses_of_linear(cls: type[nn.Linear], names: list[str], dynamo: None) -> None:
    """Stepped over where they compute what nn.Linear does; called else, and where something was set on them."""

    def make() -> nn.Module:
        return nn.Sequential(cls(D, 20), nn.GELU(), cls(20, D, bias=False))

    layer, plain = (seeded(make) for _ in range(2))
    ffn_ops.replace(layer)
    x = torch.randn(2, 5, D)
    assert operators(layer, x) == names
    torch.testing.assert_close(results(layer, on(x)), results(plain, on(x)))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain(x))
    for model in (layer, plain):
        model[2].half()
    torch.testing.assert_close(layer(x), plain(x)) if cls is Casting else None
    for model in (layer, plain):
        model[2].float()
        model[0].scale = 2.0
    assert operators(layer, x) == ["gated_act"]


def test_mixed_dtypes() -> None:
    """A forward that casts between its children does so still."""

    class Casting(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(self.act(self.fc1(x)).to(self.fc2.weight.dtype))

    layer = ffn_ops.replace(Casting(nn.ReLU()))
    x = torch.randn(5, D)
    assert operators(layer, x) == ["ffn"]
    layer.fc1.bfloat16()
    assert operators(layer, x.bfloat16()) == [] and layer(x.bfloat16()).dtype is torch.float32
    assert "several dtypes" in str(ffn_ops.replace_report(layer))


def test_arguments_of_forward() -> None:
    """By name as before; with more than one tensor its own forward."""

    class Optional(LlamaLike):
        def forward(self, hidden: torch.Tensor, scale: float = 1.0) -> torch.Tensor:  # type: ignore[override]
            return super().forward(hidden) if scale == 1.0 else scale * super().forward(hidden)

    layer = ffn_ops.replace(Optional())
    x = torch.randn(5, D)
    assert operators(layer, x) == ["ffn"]
    assert torch.equal(layer(hidden=x), layer(x))
    torch.testing.assert_close(layer(x, 2.0), 2 * layer(x))
    torch.testing.assert_close(layer(x, scale=2.0), 2 * layer(x))
    with pytest.raises(TypeError, match="unexpected keyword"):
        layer(x=x)


def test_a_dtype_in_which_it_differs() -> None:
    """Fused in the dtypes in which the form holds, also where autocast gives another."""

    class Differing(LlamaLike):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z = self.gate_proj(x)
            z = nn.functional.relu(z) if z.dtype is torch.bfloat16 else nn.functional.silu(z)
            return self.down_proj(z * self.up_proj(x))

    layer, plain = (seeded(Differing) for _ in range(2))
    ffn_ops.replace(layer)
    x = torch.randn(5, D)
    assert operators(layer, x) == ["ffn"]
    with torch.autocast(x.device.type, torch.bfloat16):
        assert operators(layer, x) == [] and torch.equal(layer(x), plain(x))
    layer.bfloat16(), plain.bfloat16()
    assert operators(layer, x.bfloat16()) == [] and torch.equal(layer(x.bfloat16()), plain(x.bfloat16()))


def test_dropout_in_place_behind() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(D, 20), nn.ReLU(inplace=True), nn.Linear(20, D), nn.Dropout(0.5, inplace=True))

    layer, plain = (seeded(make) for _ in range(2))
    ffn_ops.replace(layer)
    x = torch.randn(2, 5, D)
    assert operators(layer, x) == ["ffn"]
    both = []
    for model in (layer, plain):
        torch.manual_seed(1)
        both.append(results(model, on(x)))
    torch.testing.assert_close(*both)


def test_modules_of_this_package() -> None:
    """They fuse themselves: nothing to do, and no warning."""
    model = nn.Sequential(ffn_ops.FeedForward(D, 20, 4, 0.0))
    assert type(ffn_ops.replace(model)[0]) is ffn_ops.FeedForward
    assert "fuses itself" in str(ffn_ops.replace_report(model))
