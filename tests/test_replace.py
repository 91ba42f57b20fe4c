# SPDX-License-Identifier: BSD-3-Clause
"""replace and restore on layers as people write them: what is recognised, what is left, what stays as it is."""

from __future__ import annotations

import copy
import io
import pickle
import random
import re
from typing import Any

import pytest
import torch
from device import generator
from replacing import FF, LAYERS, OTHERS, BertLike, D, FunctionalDropout, LlamaLike, PhiLike, T5Like, pair
from same_function import assert_same_function, left_alone, on, operators, results, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import ffn_ops
from ffn_ops import reference

every_layer = pytest.mark.parametrize("name", LAYERS)
KEPT = ("llama", "phi", "sequential", "in a method", "guide GatedFFN")  # one of each kind
kept_layers = pytest.mark.parametrize("name", KEPT)


# ---- what is recognised ---------------------------------------------------------------------------------------------


@every_layer
def test_recognised(name: str) -> None:
    """One operator in the layer's place, output and gradients of the untouched layer, for any number of dimensions."""
    layer, plain = pair(name)
    _, computes, operator = LAYERS[name]
    (entry,) = ffn_ops.replace_report(layer).entries
    assert (entry.status, entry.computes, entry.path) == ("replaced", computes, "")
    for shape in ((9, D), (D,), (2, 3, D), (2, 1, 2, D), (0, D)):
        x = torch.randn(shape)
        assert operators(layer, x) == [operator]
        torch.testing.assert_close(layer(x), plain(x))
    assert_same_function(layer, plain, on(torch.randn(3, 11, D)))


@pytest.mark.parametrize("name", OTHERS)
def test_left_alone(name: str) -> None:
    """Not one bit changes, and the report says why."""
    make, why = OTHERS[name]
    layer, plain = seeded(make), seeded(make)
    entry = left_alone(layer)
    assert type(layer) is type(plain) and vars(layer).keys() == vars(plain).keys()
    assert len(ffn_ops.replace_report(layer).entries) == 1 and re.search(why, entry.why)
    if name not in ("noise", "writes its input"):
        x = torch.randn(2, 5, D, dtype=next(layer.parameters()).dtype)
        assert str(layer(x)) == str(plain(x))


def test_ranks_that_differ() -> None:
    """A forward that does something else for three dimensions is fused for two."""

    class Ranked(LlamaLike):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.dim() == 2 else -super().forward(x)

    layer = ffn_ops.replace(Ranked())
    x = torch.randn(5, D)
    assert operators(layer, x) == ["ffn"] and operators(layer, x[None]) == []
    torch.testing.assert_close(layer(x[None]), -layer(x)[None])


def test_dropout_that_is_no_child() -> None:
    """Fused in eval; in training the layer's own forward runs, with the masks of the untouched layer."""
    layer, plain = (seeded(lambda: FunctionalDropout(nn.GELU())) for _ in range(2))
    numbers = torch.get_rng_state()
    ffn_ops.replace(layer)
    assert torch.equal(torch.get_rng_state(), numbers)  # though it drew, in the look at training
    x = torch.randn(5, D)
    assert "in training it calls dropout, with p > 0" in str(ffn_ops.replace_report(layer))
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    assert torch.equal(y, plain(x))
    assert operators(layer.eval(), x) == ["ffn"]


def test_outermost_layers_of_a_model() -> None:
    """A whole model: each layer once, shared ones too, with paths; the rest is listed with its reason."""
    shared = LlamaLike()
    model = nn.ModuleDict(
        {"a": shared, "blocks": nn.ModuleList([T5Like(), T5Like(), shared]), "other": OTHERS["relu6"][0]()}
    )
    report = ffn_ops.replace_report(model)
    assert report.paths("replaceable") == ["a", "blocks.0", "blocks.1"] and report.paths("left") == ["other"]
    ffn_ops.replace(model)
    report = ffn_ops.replace_report(model)
    assert report.paths("replaced") == ["a", "blocks.0", "blocks.1"] and report.paths("left") == ["other"]
    assert str(report).splitlines() == [
        "replaced    a (LlamaLike): down_proj(silu(gate_proj(x)) * up_proj(x))",
        "replaced    2 x blocks.* (T5Like): dropout(ffn.fc2(ffn.drop(relu(ffn.fc1(norm(x)))))) + x",
        "left        other (Plain)",
        f"              {report.entries[-1].why}",
    ]
    assert "ffn_ops: down_proj" in repr(model["a"])


def test_other_objects() -> None:
    for function in (ffn_ops.replace, ffn_ops.restore, ffn_ops.replace_report):
        with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
            function(3)  # type: ignore[type-var]
    with pytest.warns(UserWarning, match="no feed-forward layer found"):
        ffn_ops.replace(nn.Linear(3, 4))


# ---- what stays as it is --------------------------------------------------------------------------------------------


@kept_layers
def test_everything_else_stays(name: str) -> None:
    """Parameters themselves, the state dict, random state, flags, hooks, lists: looking at a layer leaves no trace."""
    layer = seeded(LAYERS[name][0])
    linear = next(m for m in layer.modules() if isinstance(m, nn.Linear))
    linear.weight.requires_grad_(False)
    layer.calls = []
    calls: list[Any] = layer.calls
    for module in layer.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(2))
    for training in (True, False):
        layer.train(training)
        parameters = list(layer.named_parameters())
        state = {key: (id(value), value.clone()) for key, value in layer.state_dict(keep_vars=True).items()}
        flags = [(m.training, p.requires_grad) for m in layer.modules() for p in m.parameters()]
        numbers = (torch.get_rng_state(), random.getstate())
        ffn_ops.replace(layer)
        ffn_ops.replace_report(layer)
        assert torch.equal(torch.get_rng_state(), numbers[0]) and random.getstate() == numbers[1]
        assert [(m.training, p.requires_grad) for m in layer.modules() for p in m.parameters()] == flags
        assert [(n, id(p)) for n, p in layer.named_parameters()] == [(n, id(p)) for n, p in parameters]
        after = layer.state_dict(keep_vars=True)
        assert list(after) == list(state)
        assert all(id(after[key]) == i and torch.equal(after[key], value) for key, (i, value) in state.items())
        assert isinstance(layer, type(seeded(LAYERS[name][0])))
        assert type(layer).__name__ == type(seeded(LAYERS[name][0])).__name__
        ffn_ops.restore(layer)
    assert calls == []
    everywhere.remove()


@every_layer
def test_restored(name: str) -> None:
    """The class, the attributes and every bit of the untouched layer."""
    layer, plain = pair(name)
    ffn_ops.restore(layer)
    assert type(layer) is type(plain) and vars(layer).keys() == vars(plain).keys()
    x = torch.randn(2, 3, D)
    for key, value in results(layer, on(x)).items():
        assert torch.equal(value, results(plain, on(x))[key])
    assert ffn_ops.replace_report(layer).paths("replaceable") == [""]
    ffn_ops.replace(ffn_ops.replace(layer))  # twice is once
    assert ffn_ops.restore(layer) is layer and type(layer) is type(plain)


@kept_layers
def test_training(name: str) -> None:
    """An optimiser made before goes on: the losses of the untouched layer."""
    losses = []
    for replaced in (True, False):
        layer = seeded(LAYERS[name][0])
        optimizer = torch.optim.AdamW(layer.parameters(), 1e-2)
        x, target = torch.randn(32, D), torch.randn(32, 1)
        losses.append([])
        for step in range(12):
            if replaced and step == 3:
                ffn_ops.replace(layer)
            loss = (layer(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    assert losses[0][-1] < 0.9 * losses[0][0]


@kept_layers
def test_copies(name: str) -> None:
    """deepcopy, pickle and torch.save: replaced as well, of the same bits, with parameters and a plan of their own."""
    layer, _ = pair(name)
    x = torch.randn(5, D)
    expected = layer(x)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False)):
        assert operators(other, x) == [LAYERS[name][2]] and torch.equal(other(x), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1)
        assert not torch.equal(other(x), expected) and torch.equal(layer(x), expected)
        assert torch.equal(ffn_ops.restore(copy.deepcopy(layer))(x), pair(name)[1](x))


@kept_layers
def test_functional_call_and_vmap(name: str) -> None:
    layer, _ = pair(name)
    other = LAYERS[name][0]()
    x = torch.randn(5, D)
    given = {n: p.detach() for n, p in other.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(layer, given, (x,)), other(x))
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@kept_layers
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    layer, plain = (seeded(LAYERS[name][0]).to(dtype) for _ in range(2))
    ffn_ops.replace(layer)
    x = torch.randn(2, 20, D)
    assert operators(layer, x.to(dtype))
    if dtype is torch.float64:
        torch.testing.assert_close(results(layer, on(x)), results(plain, on(x)))
    else:
        assert_same_function(layer, plain, on(x))


@pytest.mark.parametrize("name", ("llama", "in a method"))
def test_meta_and_default_device(name: str) -> None:
    """Layers without memory are recognised, and the layer works once it has some."""
    with torch.device("meta"):
        layer = ffn_ops.replace(LAYERS[name][0]())
    assert layer(torch.empty(2, D, device="meta")).shape == (2, D)
    layer.to_empty(device=torch.get_default_device())
    plain = seeded(LAYERS[name][0])
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, D)
    torch.testing.assert_close(layer(x), plain(x))


def test_autocast() -> None:
    """One operator in the dtype that a native layer would take."""
    layer, plain = pair("llama with biases")
    x = torch.randn(40, D)
    device = torch.get_default_device().type
    with torch.autocast(device, torch.bfloat16):
        assert operators(layer, x) and layer(x).dtype is torch.bfloat16
        torch.testing.assert_close(layer(x).float(), plain(x).float(), rtol=0.03, atol=0.01)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    layer, plain = pair("with its residual")
    x = torch.randn(6, D)

    def call(model: nn.Module) -> torch.Tensor:
        inside = on(x)
        given = x.to(next(model.parameters()).dtype).requires_grad_()
        if model is not layer:
            return inside(model)
        return torch.utils.checkpoint.checkpoint(model, given, use_reentrant=reentrant)

    assert_same_function(layer, plain, call)


@kept_layers
def test_compile(name: str, dynamo: None) -> None:
    """One graph, with the operator in it; compiled before, it notices the replacement."""
    layer = seeded(LAYERS[name][0])
    x = torch.randn(5, D)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), layer(x))
    assert f"ffn_ops.{LAYERS[name][2]}" not in graphs[-1].code
    ffn_ops.replace(layer)
    torch.testing.assert_close(compiled(x), layer(x))
    assert f"ffn_ops.{LAYERS[name][2]}" in graphs[-1].code
    other = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(other, on(x))["output"], layer(x).detach())


def test_export() -> None:
    layer, plain = pair("in a method")
    x = torch.randn(5, D)
    program = torch.export.export(layer.eval(), (x,))
    assert "ffn_ops.ffn" in program.graph_module.code
    torch.testing.assert_close(program.module()(x), plain(x))


# ---- whole models ---------------------------------------------------------------------------------------------------


def test_mixture_of_the_guide() -> None:
    """Its experts are layers of their own; the mixture itself is MoEFFN's."""
    model, plain = (seeded(lambda: reference.MoEFFN(D, FF, 3, 2)) for _ in range(2))
    ffn_ops.replace(model)
    assert ffn_ops.replace_report(model).paths("replaced") == ["experts.0", "experts.1", "experts.2"]
    assert_same_function(model, plain, on(torch.randn(30, D)))


def test_large_report_is_short() -> None:
    model = nn.Sequential(*[BertLike() for _ in range(12)], PhiLike())
    ffn_ops.replace(model)
    assert str(ffn_ops.replace_report(model)).startswith("replaced    12 x * (BertLike): ")
    assert len(str(ffn_ops.replace_report(model)).splitlines()) == 2


def test_the_rule_rejects_a_careless_gate() -> None:
    """A gate that is wrong by three roundings fails the rule: the comparisons above can fail."""
    g = generator()

    def careless(z: Tensor) -> Tensor:
        return F.silu(z) * (1 + 3 * torch.finfo(z.dtype).eps * torch.randn(z.shape, generator=g, dtype=z.dtype))

    layer, plain = seeded(lambda: LlamaLike(careless)), seeded(LlamaLike)
    with pytest.raises(AssertionError, match="error"):
        assert_same_function(layer, plain, on(torch.randn(30, D)))
