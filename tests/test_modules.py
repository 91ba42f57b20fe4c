# SPDX-License-Identifier: BSD-3-Clause
"""The modules: the guides' example, checkpoints and seeds of plain PyTorch, and children other than plain Linear."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import FORMS, MOE_FORMS, Problem, dtype_name
from seen import Seen
from tolerance import assert_accurate, assert_error_like_eagers
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import ffn_ops
from ffn_ops import reference
from ffn_ops.ops import _shared

# Ours, and the guides' code for the same layer.
PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "FeedForward": (lambda: ffn_ops.FeedForward(12, 30, 8, 0.0), lambda: reference.FeedForward(12, 30, 8, 0.0)),
    "FeedForward by width": (lambda: ffn_ops.FeedForward(12, d_ff=7), lambda: reference.FeedForward(12, 11, 1)),
    "FeedForward GeGLU": (
        lambda: ffn_ops.FeedForward(12, 30, 8, 0.0, activation="gelu"),
        lambda: reference.FeedForward(12, 30, 8, 0.0, activation="gelu"),
    ),
    "ReLUFFN": (lambda: ffn_ops.ReLUFFN(12, 20), lambda: reference.PlainFFN(12, 20, "relu")),
    "GELUFFN": (lambda: ffn_ops.GELUFFN(12, 20), lambda: reference.PlainFFN(12, 20, "gelu")),
    "SwishFFN": (
        lambda: ffn_ops.SwishFFN(12, 20, 1.7),
        lambda: reference.PlainFFN(12, 20, ffn_ops.Gate("swish", beta=1.7)),
    ),
    "GLU": (lambda: ffn_ops.GLU(12, 20), lambda: reference.GLU(12, 20)),
    "GatedFFN": (lambda: ffn_ops.GatedFFN(12, 20), lambda: reference.GatedFFN(12, 20)),
    "GatedFFN with projection": (
        lambda: ffn_ops.GatedFFN(12, 20, 2, out_proj=True),
        lambda: reference.GatedFFN(12, 20, 2, out_proj=True),
    ),
}
every_pair = pytest.mark.parametrize("name", PAIRS)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    ours, plain = (seeded(make) for make in PAIRS[name])
    return ours, plain


def gradients(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    layer(x).square().sum().backward()
    return {"x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}


def test_example_of_the_guide() -> None:
    """dim 128, hidden 256, multiple_of 16, dropout 0.1, input (4, 128): width 176, output (4, 128)."""
    torch.manual_seed(0)
    layer = ffn_ops.FeedForward(128, 256, 16, 0.1)
    assert layer.w1.out_features == layer.w3.out_features == layer.w2.in_features == 176
    x = torch.randn(4, 128)
    layer.eval()
    wide = copy.deepcopy(layer).double()
    expected = wide.w2(nn.functional.silu(wide.w1(x.double())) * wide.w3(x.double()))
    assert layer(x).shape == (4, 128)
    torch.testing.assert_close(layer(x), expected.float())
    with pytest.raises(RuntimeError, match="must match"):  # the guides' parenthesis: width 128 times width 176
        _ = wide.w2(nn.functional.silu(wide.w1(x.double()))) * wide.w3(x.double())


@every_pair
def test_seed_and_state(name: str) -> None:
    """The same parameters from the same seed, the same keys, and strict loading both ways."""
    ours, plain = pair(name)
    state, expected = ours.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    torch.manual_seed(1)
    other = PAIRS[name][1]()
    ours.load_state_dict(other.state_dict(), strict=True)
    plain.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(5, 12)
    torch.testing.assert_close(ours(x), other(x))
    torch.testing.assert_close(plain(x), other(x))


@every_pair
def test_values_and_gradients(name: str) -> None:
    """In one fused call, on any leading dimensions."""
    ours, plain = pair(name)
    for shape in ((5, 12), (12,), (2, 3, 12), (0, 12)):
        x = torch.randn(shape)
        with Seen() as seen:
            y = ours(x)
        assert seen.names == [{"FeedForward": "ffn", "GLU": "gated_linear"}.get(name.split()[0], seen.names[0])]
        torch.testing.assert_close(y, plain(x))
    x = torch.randn(7, 12)
    torch.testing.assert_close(gradients(ours, x), gradients(plain, x))


@every_pair
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=dtype_name)
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    ours, plain = (layer.to(dtype) for layer in pair(name))
    x = torch.randn(20, 12, dtype=dtype)
    assert ours(x).dtype is dtype
    if dtype is torch.float64:
        torch.testing.assert_close(ours(x), plain(x))
    else:
        assert_error_like_eagers(ours(x), plain(x), copy.deepcopy(plain).double()(x.double()))


def test_training_follows_plain_pytorch() -> None:
    """Twenty steps of Adam on the same data: the same losses."""
    losses = []
    for make in (lambda: ffn_ops.FeedForward(12, 30, 8, 0.0), lambda: reference.FeedForward(12, 30, 8, 0.0)):
        layer = seeded(make)
        optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
        x, target = torch.randn(32, 12), torch.randn(32, 12)
        losses.append([])
        for _ in range(20):
            loss = (layer(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    assert losses[0][-1] < 0.9 * losses[0][0]


# ---- children ------------------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """An adapter around a frozen layer, as LoRA libraries have it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:  # adapters expose it, and it is not what they compute
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class DoubledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class HalvedWeight(Tensor):
    """A weight that acts on its own: what quantisation libraries do with tensor subclasses."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return func(args[0], args[1].as_subclass(Tensor) / 2, *args[2:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def replaced(child: nn.Linear, by: nn.Linear) -> nn.Linear:
    by.load_state_dict(child.state_dict())
    return by


def hooked(child: nn.Linear, register: str, hook: Callable[..., Any]) -> nn.Linear:
    getattr(child, register)(hook)
    return child


def own_forward(child: nn.Linear) -> nn.Linear:
    child.forward = lambda x: 3 * nn.Linear.forward(child, x)  # type: ignore[method-assign]
    return child


def own_weight(child: nn.Linear) -> nn.Linear:
    child.weight = nn.Parameter(child.weight.detach().as_subclass(HalvedWeight), requires_grad=False)
    return child


def pruned(child: nn.Linear) -> nn.Linear:
    prune.random_unstructured(child, "weight", 0.5)
    return child


CHILDREN: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "adapter": LowRank,
    "subclass": lambda child: replaced(child, DoubledLinear(child.in_features, child.out_features)),
    "own forward": own_forward,
    "weight that acts": own_weight,
    "forward hook": lambda child: hooked(child, "register_forward_hook", lambda m, args, out: out * 1.5),
    "forward pre-hook": lambda child: hooked(child, "register_forward_pre_hook", lambda m, args: (args[0] + 1,)),
    "weight_norm": lambda child: parametrizations.weight_norm(child),
    "spectral_norm": lambda child: parametrizations.spectral_norm(child),
    "pruned": pruned,
    "other module": lambda child: nn.Sequential(child, nn.Tanh()),
}


def by_children(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's formula with its children called one by one."""
    if isinstance(layer, ffn_ops.FeedForward):
        return layer.w2(nn.functional.silu(layer.w1(x)) * layer.w3(x))
    if isinstance(layer, ffn_ops.PlainFFN):
        return layer.linear2(nn.functional.gelu(layer.linear1(x)))
    if isinstance(layer, ffn_ops.GLU):
        return layer.linear_value(x) * torch.sigmoid(layer.linear_gate(x))
    branches = zip(layer.value_layers, layer.gate_layers, strict=True)
    y = sum(value(x) * torch.sigmoid(gate(x)) for value, gate in branches)
    return y if layer.out_proj is None else layer.out_proj(y)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "FeedForward": lambda: ffn_ops.FeedForward(6, 9, 2, 0.0),
    "GELUFFN": lambda: ffn_ops.GELUFFN(6, 8),
    "GLU": lambda: ffn_ops.GLU(6, 8),
    "GatedFFN": lambda: ffn_ops.GatedFFN(6, 8, 2, out_proj=True),
}


@pytest.mark.parametrize("change", CHILDREN)
@pytest.mark.parametrize("name", LAYERS)
def test_changed_children(name: str, change: str) -> None:
    """Each child in turn: the result is that of calling the children, and differs from that of their weights."""
    paths = [path for path, child in seeded(LAYERS[name]).named_modules() if isinstance(child, nn.Linear)]
    for path in paths:
        layer = seeded(LAYERS[name])
        parent_path, _, attribute = path.rpartition(".")
        x = torch.randn(5, 6)
        before = layer(x)
        parent = layer.get_submodule(parent_path)
        changed = CHILDREN[change](getattr(parent, attribute))
        setattr(parent, attribute, changed)
        layer.eval()
        torch.testing.assert_close(layer(x), by_children(layer, x))
        if change != "weight_norm":  # it starts where the weight was
            assert not torch.allclose(layer(x), before), path
        leaves = [p for p in layer.parameters() if p.requires_grad]
        grads = [torch.autograd.grad(call.square().sum(), leaves) for call in (layer(x), by_children(layer, x))]
        torch.testing.assert_close(*grads)


def test_backward_hooks_run() -> None:
    layer = ffn_ops.FeedForward(6, 9, 2, 0.0)
    seen: list[torch.Size] = []
    layer.w1.register_full_backward_hook(lambda module, d_in, d_out: seen.append(d_out[0].shape))
    layer(torch.randn(5, 6, requires_grad=True)).sum().backward()
    assert seen == [(5, layer.w1.out_features)]


def test_trained_adapter() -> None:
    """A step on the adapter moves the output: it is not ignored, in forward or backward."""
    layer = ffn_ops.FeedForward(6, 9, 2, 0.0)
    layer.w1 = LowRank(layer.w1)
    x = torch.randn(5, 6)
    before = layer(x)
    before.sum().backward()
    assert layer.w1.base.weight.grad is None and layer.w1.up.weight.grad.abs().sum() > 0
    with torch.no_grad():
        layer.w1.up.weight -= layer.w1.up.weight.grad
    assert not torch.allclose(layer(x), before)


def test_plain_children_exchanged() -> None:
    """A plain Linear of another output width or without bias still goes through one operator, or is called: right."""
    layer = ffn_ops.FeedForward(6, 9, 2, 0.0, bias=False)
    layer.w2 = nn.Linear(6, 11)
    x = torch.randn(5, 6)
    torch.testing.assert_close(layer(x), by_children(layer, x))
    gates = ffn_ops.GatedFFN(6, 8, 2)
    gates.gate_layers[0] = nn.Linear(6, 8, bias=False)  # one branch with, one without (a regression)
    torch.testing.assert_close(gates(x), by_children(gates, x))


# ---- dropout, copies, other paths -----------------------------------------------------------------------------------


def test_dropout() -> None:
    """On in training, off in eval; the mask of nn.Dropout for the same seed; and its own switch counts."""
    layer = ffn_ops.FeedForward(6, 9, 2, 0.5)
    x = torch.randn(50, 6)
    clean = layer.eval()(x)
    assert torch.equal(layer(x), clean)
    layer.train()
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    assert torch.equal(y, nn.functional.dropout(clean, 0.5)) and (y == 0).any()
    layer.eval()
    layer.dropout.train()  # Monte Carlo dropout (a regression: the layer's own switch decided)
    assert (layer(x) == 0).any()
    layer.dropout = nn.Identity()
    assert torch.equal(layer.train()(x), clean)


def test_idle_dropout_is_called_where_that_does_something() -> None:
    layer = ffn_ops.FeedForward(8, 12, 4, 0.5).eval()
    x = torch.randn(3, 8)
    plain = layer(x)
    layer.dropout.register_forward_hook(lambda module, args, out: out * 3)
    torch.testing.assert_close(layer(x), plain * 3, rtol=0, atol=0)
    layer.dropout = nn.Sequential(nn.ReLU())
    torch.testing.assert_close(layer(x), plain.relu(), rtol=0, atol=0)


@every_pair
def test_copies(name: str) -> None:
    """deepcopy, pickle and torch.save: the same bits, and no shared parameter."""
    layer = seeded(PAIRS[name][0])
    x = torch.randn(5, 12)
    expected = layer(x)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False)):
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            next(other.parameters()).add_(1)
        assert torch.equal(layer(x), expected)


@every_pair
def test_functional_call(name: str) -> None:
    """Parameters given from outside, as torch.func does: used, with gradients."""
    layer, other = (seeded(PAIRS[name][0]), PAIRS[name][0]())
    x = torch.randn(5, 12)
    given = {n: p.detach().requires_grad_() for n, p in other.named_parameters()}
    y = torch.func.functional_call(layer, given, (x,))
    assert torch.equal(y, other(x)) and not torch.equal(y, layer(x))
    grads = torch.autograd.grad(y.sum(), list(given.values()))
    assert all(
        torch.equal(a, b)
        for a, b in zip(grads, torch.autograd.grad(other(x).sum(), list(other.parameters())), strict=True)
    )


@pytest.mark.cpu_only("AMX is the CPU's")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("form", [form for form in FORMS if form not in MOE_FORMS])
def test_path_of_machines_with_amx(form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit layers go through torch's products there, with our gate between them. Forced here; as accurate."""
    monkeypatch.setattr(_shared, "_HAS_AMX", True)
    problem = Problem(form, T=37, D=53, F=45, O=35)
    assert_accurate(problem, dtype)
    tensors, _ = problem.draw(dtype=dtype)
    with Seen() as seen:
        problem.ours(**tensors)
    assert set(seen.names) == {"gated_act"}
    tensors, _ = problem.draw(dtype=torch.float32)
    with Seen() as seen:
        problem.ours(**tensors)
    assert set(seen.names) == {"ffn" if form in ("plain", "gated", "fused") else
                               "gated_act" if "act" in form else "gated_linear"}  # fmt: skip
