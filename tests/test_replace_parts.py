"""Feed-forward layers whose linears are children of a block that does more: what is taken, left, and what a block that
was taken still does by itself."""

from __future__ import annotations

import copy
import functools
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from replacing import FF, D, assert_same_function, operators, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import ffn_ops


def decorated(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


class Block(nn.Module):
    """Attention (a linear here) and a feed-forward, each with its norm and residual connection."""

    def __init__(self, p: float = 0.0, act: Any = None) -> None:
        super().__init__()
        self.attention, self.norm1, self.norm2 = nn.Linear(D, D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.fc1, self.fc2 = nn.Linear(D, FF), nn.Linear(FF, D)
        self.act = act or nn.GELU()
        self.drop, self.p = nn.Dropout(p), p

    def between(self, x: Tensor) -> Tensor:
        h = self.act(self.fc1(x))
        return self.fc2(F.dropout(h, self.p, self.training))

    def forward(self, x: Tensor, mask: Tensor | None) -> Any:
        scores = self.attention(self.norm1(x))
        if mask is not None:
            scores = scores * mask
        x = x + scores
        return x + self.between(self.norm2(x)), scores


class Inline(Block):
    """All in forward, below two decorators."""

    @decorated
    @decorated
    def forward(self, x: Tensor, mask: Tensor | None) -> Any:
        scores = self.attention(x)
        h = self.fc1(self.norm1(x + scores))
        h = self.drop(self.act(h))
        return self.norm2(x + self.fc2(h)), scores


class Residual(nn.Module):
    """As Bloom and MPT have it: what is added comes from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(D, FF), nn.GELU(), nn.Linear(FF, D)

    def forward(self, x: Tensor, residual: Tensor) -> Any:
        return F.dropout(self.fc2(self.act(self.fc1(x))), 0.0, self.training) + residual, x


def first(block: nn.Module) -> Callable[[nn.Module], Tensor]:
    x = torch.randn(2, 5, D)
    return lambda m: torch.cat(m(x.to(m.fc1.weight.dtype), None), -1)


TAKEN: dict[str, tuple[Callable[[], Any], str]] = {
    "in a method": (Block, "fc2(gelu(fc1(x)))"),
    "in forward": (Inline, "fc2(gelu(fc1(x)))"),
    "relu": (lambda: Block(act=nn.ReLU(inplace=True)), "fc2(relu(fc1(x)))"),
    "a function": (lambda: Inline(act=F.silu), "fc2(silu(fc1(x)))"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str) -> None:
    make, computes = TAKEN[name]
    layer, plain = seeded(make), seeded(make)
    ffn_ops.replace(layer)
    (entry,) = ffn_ops.replace_report(layer).entries
    assert (entry.status, entry.computes) == ("replaced", computes)
    for shape in ((2, 5, D), (1, 1, D), (0, 3, D), (7, D)):
        x = torch.randn(shape)
        seen = operators(_Alone(layer), x)
        assert seen == (["ffn"] if len(shape) == 3 else [])
        torch.testing.assert_close(layer(x, None), plain(x, None))
        torch.testing.assert_close(layer(x, mask=x[..., :1]), plain(x, mask=x[..., :1]))
    assert_same_function(layer, plain, first(layer))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)) if name != "a function" else layer):
        assert operators(_Alone(other), x[None]) == ["ffn"]
        torch.testing.assert_close(other(x, None), plain(x, None))
    assert isinstance(layer.fc1, nn.Linear) and list(layer.state_dict()) == list(plain.state_dict())
    ffn_ops.restore(layer)
    assert type(layer) is type(plain)
    assert torch.equal(layer(x, None)[0], plain(x, None)[0])


def test_residual_from_outside() -> None:
    layer, plain = seeded(Residual), seeded(Residual)
    ffn_ops.replace(layer)
    x, residual = torch.randn(2, 5, D), torch.randn(2, 5, D)
    assert operators(_Both(layer, residual), x) == ["ffn"]
    torch.testing.assert_close(layer(x, residual), plain(x, residual))
    assert_same_function(layer, plain, lambda m: m(*[t.to(m.fc1.weight.dtype) for t in (x, residual)])[0])


def test_ways_that_depend_on_arguments() -> None:
    """Where other arguments ask the activation never, or twice, that is computed."""

    class Depending(Block):
        def forward(self, x: Tensor, times: int | None) -> Any:
            h = self.fc1(x)
            for _ in range(1 if times is None else times):
                h = self.act(h)
            return self.fc2(h), x

    layer, plain = seeded(Depending), seeded(Depending)
    ffn_ops.replace(layer)
    x = torch.randn(2, 5, D)
    assert operators(_Alone(layer), x) == ["ffn"]
    for times in (None, 0, 1, 2, 3):
        torch.testing.assert_close(layer(x, times), plain(x, times))


class _Both(nn.Module):
    def __init__(self, block: nn.Module, residual: Tensor) -> None:
        super().__init__()
        self.block, self.residual = block, residual

    def forward(self, x: Tensor) -> Any:
        return self.block(x, self.residual)


class _Alone(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Any:
        return self.block(x, None)


class Other(Block):
    def __init__(self, between: Callable[[Any, Tensor], Tensor], act: Any = None) -> None:
        super().__init__(act=act)
        self.inner = nn.LayerNorm(FF)
        self.compute = between

    def forward(self, x: Tensor, mask: Tensor | None) -> Any:
        if mask is None:
            return x + self.fc2(self.compute(self, self.act(self.fc1(x)))), x
        return self.fc2(self.fc1(x)), x


class Global(Block):
    def between(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Twice(Block):
    def between(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x))) + self.act(x)


class Again(Block):
    def between(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(self.fc2(self.act(self.fc1(x))))))


class Reading(Block):
    def between(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)).to(self.fc2.weight.dtype))


class Writing(Block):
    def between(self, x: Tensor) -> Tensor:
        self.calls = self.fc1(x)
        return self.fc2(self.act(self.calls))


class Statistic(Block):
    def between(self, x: Tensor) -> Tensor:
        z = self.fc1(x)
        return self.fc2(self.act(z)) + z.mean(-1, keepdim=True)


LEFT: dict[str, tuple[Callable[[], Any], str]] = {
    "a norm between": (lambda: Other(lambda m, h: m.inner(h)), "inner stands between"),
    "a clamp between": (lambda: Other(lambda m, h: h.clamp(max=1.0)), "no activation"),
    "another activation": (lambda: Block(act=nn.Hardswish()), "no activation"),
    "a function of a module": (Global, "neither a child nor an attribute"),
    "its activation for more": (Twice, "more than an activation"),
    "twice": (Again, "once each"),
    "reads weights": (Reading, "weight"),
    "writes": (Writing, "sets attributes"),
    "used beside": (Statistic, "more than an activation"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left(name: str) -> None:
    make, why = LEFT[name]
    layer, plain = seeded(make), seeded(make)
    with pytest.warns(UserWarning, match="no layer was replaced"):
        ffn_ops.replace(layer)
    (entry,) = [e for e in ffn_ops.replace_report(layer).entries if "fc1" in e.why]
    assert entry.status == "left" and re.search(why, entry.why), entry.why
    x = torch.randn(2, 5, D)
    assert torch.equal(layer(x, None)[0], plain(x, None)[0])


@pytest.mark.parametrize("make", [lambda: Block(0.5), lambda: Inline(0.5)])
def test_dropout_between(make: Callable[[], nn.Module]) -> None:
    """In training with p > 0 the block's own forward, with the masks of the untouched one."""
    layer, plain = seeded(make), seeded(make)
    ffn_ops.replace(layer)
    x = torch.randn(2, 5, D)
    why = "its own forward runs: in training it calls dropout, with p > 0, between fc1 and fc2"
    assert operators(_Alone(layer), x) == [] and ffn_ops.replace_report(layer).entries[0].why == why
    outputs = []
    for model in (layer, plain):
        torch.manual_seed(1)
        outputs.append(model(x, None)[0])
    assert torch.equal(*outputs)
    layer.eval()
    assert operators(_Alone(layer), x) == ["ffn"]
    layer.train()
    layer.drop.p = layer.p = 0.0
    ffn_ops.replace(layer)
    assert operators(_Alone(layer), x) == ["ffn"]


@pytest.mark.parametrize("child", ["fc1", "act", "fc2"])
def test_what_changes_later(child: str) -> None:
    """Hooks of the three run; another module in a child's place is called."""
    layer, plain = seeded(Block), seeded(Block)
    ffn_ops.replace(layer)
    x = torch.randn(2, 5, D)
    for model in (layer, plain):
        handle = model.get_submodule(child).register_forward_hook(lambda m, args, y: 1.5 * y)
    assert operators(_Alone(layer), x) == [] and "hooks" in str(ffn_ops.replace_report(layer))
    torch.testing.assert_close(layer(x, None), plain(x, None))
    handle.remove()
    for model in (layer, plain):
        model.add_module(child, nn.Sequential(seeded(Block).get_submodule(child), nn.Tanh()))
    assert operators(_Alone(layer), x) == []
    torch.testing.assert_close(layer(x, None), plain(x, None))


def test_another_activation() -> None:
    layer, plain = seeded(Block), seeded(Block)
    ffn_ops.replace(layer)
    x = torch.randn(2, 5, D)
    for act, names in ((nn.SiLU(), ["ffn"]), (nn.Hardswish(), []), (nn.ReLU(), ["ffn"])):
        layer.act = plain.act = act
        assert operators(_Alone(layer), x) == names
        torch.testing.assert_close(layer(x, None), plain(x, None))


def test_counted_calls(dynamo: None) -> None:
    """Counts calls that reach the last of the three, fused or not; compiled code is not counted."""
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
    assert counted() == (2, 2) and "fused in 2 of 4 calls" in str(ffn_ops.replace_report(layer))
    torch.compile(layer, fullgraph=True, backend="eager")(x, None)
    assert counted() == (2, 2)
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
        assert operators(_Alone(layer), x) == ["ffn"]
        torch.testing.assert_close(layer(x, None)[0], plain(x, None)[0], rtol=0.03, atol=0.02)
    layer.fc2.double(), plain.fc2.double()  # of several dtypes: as the untouched block, which raises
    assert pytest.raises(RuntimeError, layer, x, None).match("dtype")
    layer.bfloat16()
    assert operators(_Alone(layer), x.bfloat16()) == ["ffn"]


def test_compile_and_trace(dynamo: None) -> None:
    layer, plain = seeded(Inline), seeded(Inline)
    ffn_ops.replace(layer)
    x = torch.randn(2, 5, D)
    compiled = torch.compile(_Alone(layer), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain(x, None))
    exported = torch.export.export(_Alone(layer), (x,))
    assert "ffn_ops.ffn" in exported.graph_module.code
    traced = torch.fx.symbolic_trace(_Alone(layer))
    torch.testing.assert_close(traced(x), plain(x, None))


def test_checkpointing() -> None:
    layer, plain = seeded(Block), seeded(Block)
    ffn_ops.replace(layer)
    inside = first(layer)
    checkpointed = functools.partial(torch.utils.checkpoint.checkpoint, inside, use_reentrant=False)
    assert_same_function(layer, plain, lambda m: checkpointed(m) if m is layer else inside(m))
