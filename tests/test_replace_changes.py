# SPDX-License-Identifier: BSD-3-Clause
"""Replaced layers that change later: hooks, dropout, activations, dtypes and arguments are looked at in every call."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from replacing import LAYERS, D, LlamaLike, Plain, pair, sequential
from same_function import on, operators, results, seeded
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
    layer.forward = lambda x: x  # a forward on the instance takes precedence, as always
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


@pytest.mark.parametrize(("act", "alone"), ((nn.GELU("tanh"), ["gated_act"]), (nn.GELU(), []), (nn.ReLU(), [])))
def test_dropout_between(act: nn.Module, alone: list[str]) -> None:
    """p > 0 in training: called, with the untouched layer's masks, and the activation before it by whichever operator
    is faster; else stepped over."""
    layer, plain = (seeded(lambda: Plain(act, 0.5)) for _ in range(2))
    ffn_ops.replace(layer)
    x = torch.randn(5, D)
    assert operators(layer, x) == alone and ffn_ops.replace_report(layer).paths("partly") == [""]
    assert ("its own forward runs, with torch's" in str(ffn_ops.replace_report(layer))) == (not alone)
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


@pytest.mark.parametrize(("cls", "names"), [(Casting, ["ffn"]), (Doubling, [])])
def test_subclasses_of_linear(cls: type[nn.Linear], names: list[str], dynamo: None) -> None:
    """Stepped over where they compute what nn.Linear does; called else, and where something was set on them, with
    nothing slower than torch's gelu between."""

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
    assert operators(layer, x) == [] and torch.equal(layer(x), plain(x))
    why = "its own forward runs, with torch's gelu: 0 is called ("
    assert ffn_ops.replace_report(layer).entries[0].why.startswith(why)


def test_mixed_dtypes() -> None:
    """A forward that casts between its children still does."""

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
    """One tensor by name or place, others where they are what they are without being given; else its own forward."""

    class Optional(LlamaLike):
        def forward(self, hidden: torch.Tensor, deep: Any = None, *, scale: float = 1.0) -> torch.Tensor:  # type: ignore[override]
            y = super().forward(hidden) if deep is None else super().forward(hidden) * deep
            return y if scale == 1.0 else scale * y

    layer = ffn_ops.replace(Optional())
    x, deep = torch.randn(5, D), torch.randn(5, D)
    y = layer(x)
    assert operators(layer, x) == ["ffn"]
    for args, kwargs in (((x, None), {}), ((x,), {"deep": None}), ((), {"hidden": x, "deep": None, "scale": 1.0})):
        assert operators(lambda _, a=args, k=kwargs: layer(*a, **k), x) == ["ffn"]
        assert torch.equal(layer(*args, **kwargs), y)
    assert "is given" not in str(ffn_ops.replace_report(layer))
    torch.testing.assert_close(layer(x, scale=2.0), 2 * y)
    torch.testing.assert_close(layer(x, deep), y * deep)
    assert "its own forward runs where it is given deep\n" in str(ffn_ops.replace_report(layer))
    for args, kwargs in (((), {"x": x}), ((x, None, 1.0), {}), ((x,), {"hidden": x}), ((), {"deep": None})):
        with pytest.raises(TypeError, match=r"unexpected keyword|positional argument|multiple values"):
            layer(*args, **kwargs)


def test_a_forward_that_asks_what_it_is_given() -> None:
    """The default that is given is not the same as none: not fused with it."""

    def negated(function: Any) -> Any:
        @functools.wraps(function)
        def forward(self: Any, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return -function(self, x) if "flag" in kwargs else function(self, x)

        return forward

    class Asking(LlamaLike):
        @negated
        def forward(self, x: torch.Tensor, flag: Any = None) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x)

    layer = ffn_ops.replace(Asking())
    x = torch.randn(5, D)
    assert operators(layer, x) == ["ffn"]
    torch.testing.assert_close(layer(x, flag=None), -layer(x))


def test_dropout_that_is_no_child() -> None:
    """In training with p = 0 fused; with p > 0, whenever it is set, its own forward runs and the report says so."""

    class Functional(Plain):
        p = 0.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(super().forward(x), self.p, self.training)

    layer = ffn_ops.replace(Functional(nn.GELU()))
    x = torch.randn(5, D)
    assert operators(layer, x) == ["ffn"] and ffn_ops.replace_report(layer).paths("replaced") == [""]
    layer.p = 0.5
    assert operators(layer, x) == []
    why = "its own forward runs: in training it calls dropout, with p > 0, which is no child"
    assert [(e.status, e.why) for e in ffn_ops.replace_report(layer).entries] == [("partly", why)]
    assert operators(layer.eval(), x) == ["ffn"]
    (entry,) = ffn_ops.replace_report(layer).entries
    assert entry.why == "in training its own forward runs: it calls dropout, with p > 0, which is no child"
    layer.p = 0.0
    assert operators(layer.train(), x) == ["ffn"]


def test_counted_calls(dynamo: None) -> None:
    """Since the replacement, also in copies; what compiled code calls is not counted, and makes no graph of its own."""
    layer = ffn_ops.replace(LlamaLike())
    x = torch.randn(5, D)

    def counted(model: nn.Module) -> tuple[int, int]:
        (entry,) = ffn_ops.replace_report(model).entries
        return entry.fused_calls, entry.own_calls

    assert counted(layer) == (0, 0) and "calls" not in str(ffn_ops.replace_report(layer))
    for _ in range(3):
        layer(x)
    handle = layer.act_fn.register_forward_hook(lambda *_: None)
    layer(x)
    handle.remove()
    assert counted(layer) == (3, 1) and "fused in 3 of 4 calls" in str(ffn_ops.replace_report(layer))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other(x)
        assert counted(other) == (4, 1)
    graphs: list[Any] = []
    compiled = torch.compile(layer, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    for _ in range(3):
        compiled(x)
        layer(x)
    assert len(graphs) == 1 and counted(layer) == (6, 1)
    ffn_ops.replace(ffn_ops.restore(layer))
    assert counted(layer) == (0, 0)


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
