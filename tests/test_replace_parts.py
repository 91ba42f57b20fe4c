# SPDX-License-Identifier: BSD-3-Clause
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
from replacing import FF, D, sequential
from same_function import assert_same_function, left_alone, on, operators, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import ffn_ops
from ffn_ops import reference


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


class Global(Block):
    def between(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Twice(Block):
    def between(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x))) + self.act(x)


class Reading(Block):
    def between(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)).to(self.fc2.weight.dtype))


class Gated(Block):
    """A gate in a block, limited, and an input that is computed where it is given."""

    def __init__(self, act: Any = None) -> None:
        super().__init__(act=act)
        self.up = nn.Linear(D, FF)

    def between(self, x: Tensor) -> Tensor:
        gate = self.act(self.fc1(x).clamp(max=2.0))
        hidden = gate * self.up(x).clamp(-2.0, 2.0)
        return self.drop(self.fc2(hidden))


class Halves(Block):
    """Gate and up in one layer; what is needed for attention is not known to whoever looks at the block."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(D, 2 * FF)

    def forward(self, x: Tensor, mask: Tensor | None) -> Any:
        boxes = self.boxes(mask)
        scores = self.attention(x) * boxes["scale"]
        for _ in range(boxes["times"]):
            gate, up = self.fc1(self.norm2(x)).chunk(2, -1)
            if self.p == 0.0:
                gate = self.act(gate)
            x = x + self.fc2(gate * up)
        return x, scores

    def boxes(self, mask: Tensor | None) -> dict[str, Any]:
        if mask is not None and mask.shape[-1] != 1:
            raise ValueError("one number for each token")
        return {"scale": 1.0 if mask is None else mask, "times": 2}


class Inherited(Halves):
    """super() without arguments, which is a name from outside."""

    def forward(self, x: Tensor, mask: Tensor | None) -> Any:
        gate, up = self.fc1(x).chunk(2, dim=-1)
        x = x + self.fc2(self.act(gate) * up)
        return x, super().boxes(mask)["scale"] * x


class Branches(Block):
    """As Bloom: another way through the last layer for some option, and what is added comes from outside."""

    def __init__(self, slow: bool = False) -> None:
        super().__init__()
        self.slow = slow

    def between(self, x: Tensor) -> Tensor:
        h: Tensor = self.act(self.fc1(x))
        if self.slow and self.p == 0.0:
            y = h @ self.fc2.weight.t()
            y = y * 1.0
        else:
            y = self.fc2(h)
        return y + x


HALVES = "fc2(gelu(gate) * up of fc1(x), gate first)"
TAKEN: dict[str, tuple[Callable[[], Any], str]] = {
    "in a method": (Block, "fc2(gelu(fc1(x)))"),
    "in forward": (Inline, "fc2(drop(gelu(fc1(x))))"),
    "relu": (lambda: Block(act=nn.ReLU(inplace=True)), "fc2(relu(fc1(x)))"),
    "a function": (lambda: Inline(act=F.silu), "fc2(drop(silu(fc1(x))))"),
    "a function of a module": (Global, "fc2(gelu(fc1(x)))"),
    "its activation for more": (Twice, "fc2(gelu(fc1(x)))"),
    "reads weights": (Reading, "fc2(gelu(fc1(x)))"),
    "a gate": (lambda: Gated(nn.SiLU()), "fc2(silu(min(fc1(x), 2)) * clamp(up(x), 2))"),
    "a limit above relu": (lambda: Gated(nn.ReLU()), "fc2(relu(min(fc1(x), 2)) * clamp(up(x), 2))"),
    "halves": (Halves, HALVES),
    "in a branch": (Branches, "fc2(gelu(fc1(x)))"),
    "super": (Inherited, HALVES),
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
        seen = operators(Alone(layer), x)
        assert set(seen) == {"ffn"} and len(seen) == (2 if name == "halves" else 1)
        torch.testing.assert_close(layer(x, None), plain(x, None))
        torch.testing.assert_close(layer(x, mask=x[..., :1]), plain(x, mask=x[..., :1]))
    assert_same_function(layer, plain, first(layer))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)) if name != "a function" else layer):
        assert set(operators(Alone(other), x)) == {"ffn"}
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


def conv_next() -> nn.Module:
    """As torchvision has it: what goes first and last moves channels."""
    moved = [_Moved(0, 2, 3, 1), nn.LayerNorm(D), nn.Linear(D, FF), nn.GELU(), nn.Linear(FF, D), _Moved(0, 3, 1, 2)]
    return nn.Sequential(nn.Conv2d(D, D, 3, padding=1, groups=D), *moved)


class _Moved(nn.Module):
    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


class Misplaced(reference.FeedForward):
    """The guide's parenthesis, with widths at which it runs."""

    def __init__(self) -> None:
        super().__init__(D, 18, 4, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x))) * self.w3(x))


ALONE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "misplaced parenthesis": (Misplaced, (2, 5, D), "w2(silu(w1(x)))"),
    "ConvNeXt": (conv_next, (2, D, 4, 5), "5(gelu(3(x)))"),
    "a third layer": (
        lambda: nn.Sequential(*sequential(), nn.Tanh(), nn.Linear(D, 2)),
        (3, D),
        "4(3(gelu_tanh(1(x))))",
    ),
}


@pytest.mark.parametrize("name", ALONE)
def test_one_tensor(name: str) -> None:
    """An FFN and what else is done with its result: the product with a third layer, other layers of a sequence."""
    make, shape, computes = ALONE[name]
    layer, plain = seeded(make), seeded(make)
    ffn_ops.replace(layer)
    (entry,) = ffn_ops.replace_report(layer).entries
    assert (entry.status, entry.computes) == ("replaced", computes)
    x = torch.randn(shape)
    assert operators(layer, x) == ["ffn"]
    assert_same_function(layer, plain, on(x))
    layer, plain = copy.deepcopy(layer), copy.deepcopy(plain)
    if isinstance(layer, nn.Sequential):
        for model in (layer, plain):
            model.insert(0, nn.Tanh()), model.append(nn.Sigmoid())
        torch.testing.assert_close(layer(x), plain(x))
        del layer[-3:], plain[-3:]
        torch.testing.assert_close(layer(x), plain(x))
    assert torch.equal(ffn_ops.restore(layer)(x), plain(x))


def test_ways_that_depend_on_arguments() -> None:
    """Where other arguments ask the activation never, or twice, nothing is replaced."""

    class Depending(Block):
        def forward(self, x: Tensor, times: int | None) -> Any:
            h = self.fc1(x)
            for _ in range(1 if times is None else times):
                h = self.act(h)
            return self.fc2(h), x

    layer, plain = seeded(Depending), seeded(Depending)
    with pytest.warns(UserWarning, match="it also reads times|does more than to compute"):
        ffn_ops.replace(layer)
    x = torch.randn(2, 5, D)
    for times in (None, 0, 1, 2, 3):
        torch.testing.assert_close(layer(x, times), plain(x, times))


class _Both(nn.Module):
    def __init__(self, block: nn.Module, residual: Tensor) -> None:
        super().__init__()
        self.block, self.residual = block, residual

    def forward(self, x: Tensor) -> Any:
        return self.block(x, self.residual)


class Alone(nn.Module):
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
        return x + self.fc2(self.compute(self, self.act(self.fc1(x)))), x


class Again(Block):
    def between(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(self.fc2(self.act(self.fc1(x))))))


class Writing(Block):
    def between(self, x: Tensor) -> Tensor:
        self.calls = self.fc1(x)
        return self.fc2(self.act(self.calls))


class Statistic(Block):
    def between(self, x: Tensor) -> Tensor:
        z = self.fc1(x)
        return self.fc2(self.act(z)) + z.mean(-1, keepdim=True)


def left(between: Callable[[Any, Tensor], Tensor], act: Any = None) -> Callable[[], Block]:
    return lambda: type("Made", (Block,), {"between": between})(act=act)


def _branch(self: Any, x: Tensor) -> Tensor:
    h = x.repeat(1, 1, 2)[..., :FF]
    if x.shape[1] > 3:
        h = self.act(self.fc1(x))
    return self.fc2(h)


def _extra(self: Any, x: Tensor) -> Tensor:
    scale = 0.5
    return self.fc2(self.act(self.fc1(x)) * scale)


def _kept(self: Any, x: Tensor) -> Tensor:
    h = self.act(self.fc1(x))
    for _ in range(2):
        x = self.fc2(h)
        h = h + 1
    return x


def _order(self: Any, x: Tensor) -> Tensor:
    h = self.act(self.fc1(x))
    return torch.sin(x) + self.fc2(h)


def _own(self: Any, x: Tensor) -> Tensor:
    return self.fc2(self.act(self.fc1(x)) * self.gamma)


def _with_gamma() -> Block:
    made = left(_own)()
    made.gamma = nn.Parameter(torch.ones(FF))
    return made


def _no_source() -> Block:
    space: dict[str, Any] = {}
    exec("def between(self, x):\n    return self.fc2(self.act(self.fc1(x)))\n", space)
    return left(space["between"])()


LEFT: dict[str, tuple[Callable[[], Any], str]] = {
    "a norm between": (
        lambda: Other(lambda m, h: m.inner(h)),
        "inner, a norm or an activation with parameters, is between",
    ),
    "a clamp between": (lambda: Other(lambda m, h: h.clamp(max=1.0)), "no activation"),
    "another activation": (lambda: Block(act=nn.Hardswish()), "no activation"),
    "twice": (Again, "fc1 is called in 2 places"),
    "writes": (Writing, "it keeps what it computes: self.calls"),
    "used beside": (Statistic, "it computes z, which it reads later"),
    "in a branch": (left(_branch), "are called in different branches"),
    "something else between": (left(_extra), "it also reads scale"),
    "kept for later": (left(_kept), "different branches"),
    "not called first": (left(_order), "fc2 is not called first in its statement"),
    "a tensor of its own": (_with_gamma, "gamma"),
    "without source": (_no_source, "source"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left(name: str) -> None:
    make, why = LEFT[name]
    layer, plain = seeded(make), seeded(make)
    entry = left_alone(layer)
    assert re.search(why, entry.why), entry.why
    x = torch.randn(2, 5, D)
    assert torch.equal(layer(x, None)[0], plain(x, None)[0])
