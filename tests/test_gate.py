# SPDX-License-Identifier: BSD-3-Clause
"""Gate as a value: printed, compared, pickled, traced; what every function and layer makes of it."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from typing import Any

import pytest
import torch
from device import generator, gradcheck, gradgradcheck
from problems import ACTIVATIONS, gate_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import ffn_ops
from ffn_ops import Gate, reference, routing

OAI = Gate("swiglu_oai")
GATES = (
    Gate("silu"), Gate("gelu", limit=0.4), OAI, Gate("swish", beta=-0.5, up_shift=-1, interleaved=True), Gate("situ"),
    *(gate_of(name) for name in ACTIVATIONS),
)  # fmt: skip


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_a_value(gate: Gate) -> None:
    """It leaves the process and comes back, prints as the call that makes it, and is a key."""
    again = [eval(repr(gate)), pickle.loads(pickle.dumps(gate)), copy.deepcopy(gate), copy.copy(gate), gate.replace()]
    file = io.BytesIO()
    torch.save({"gate": gate}, file)
    file.seek(0)
    again.append(torch.load(file, weights_only=True)["gate"])
    for other in again:
        assert other == gate and hash(other) == hash(gate) and other.own == gate.own and other.params == gate.params
    others = [each for each in GATES if repr(each) != repr(gate)]
    assert gate not in others and len({gate, *others, *again}) == len({repr(each) for each in GATES})
    with pytest.raises(AttributeError, match="limit: a Gate does not change"):
        gate.limit = 2.0
    with pytest.raises(AttributeError, match="limit: a Gate does not change"):
        del gate.limit


def test_names_of_models_gates() -> None:
    """What they stand for, and their numbers as defaults."""
    assert repr(OAI) == "Gate('swish', beta=1.702, limit=7.0, up_shift=1.0)"
    assert Gate("clamped_silu") == Gate("silu", limit=10) and Gate("clamped_silu", limit=7) == Gate("silu", limit=7)
    assert Gate("swiglu_oai", beta=1.0, up_shift=0) == Gate("swish", limit=7)
    gate, up = 8 * normal(3, 40), 8 * normal(3, 40, seed=1)
    held = gate.clamp(max=7)
    expected = held * torch.sigmoid(1.702 * held) * (up.clamp(-7, 7) + 1)  # gpt-oss
    torch.testing.assert_close(ffn_ops.gated_act(gate, up, activation="swiglu_oai"), expected, rtol=1e-13, atol=1e-13)
    expected = nn.functional.silu(gate.clamp(max=10)) * up.clamp(-10, 10)  # DeepSeek-V4
    torch.testing.assert_close(ffn_ops.gated_act(gate, up, activation="clamped_silu"), expected, rtol=1e-13, atol=1e-13)
    expected = 4 * torch.tanh(gate / 4) * torch.sigmoid(gate) * 25 * torch.tanh(up / 25)  # Kimi K3, Inkling 2
    torch.testing.assert_close(ffn_ops.gated_act(gate, up, activation="situ"), expected, rtol=1e-13, atol=1e-13)
    expected = nn.functional.silu(gate).clamp(max=7) * up.clamp(-7, 7)  # Step-3.7
    torch.testing.assert_close(ffn_ops.gated_act(gate, up, activation="swiglu_step"), expected, rtol=1e-13, atol=1e-13)


def test_the_list_is_the_formulas() -> None:
    """Every activation of the library has its formula, with the same parameters, and nothing else has."""
    assert list(reference.ACTIVATIONS) == list(ACTIVATIONS) and set(reference.UPS) <= set(ACTIVATIONS)
    one = torch.ones(1)
    for name, formula in reference.ACTIVATIONS.items():
        formula(one, **Gate(name).own)
    for name, formula in reference.UPS.items():
        formula(one, **Gate(name).own)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Gate("sillu"), ValueError, "activation: expected one of relu, .*clamped_silu, got 'sillu'"),
        (lambda: Gate(3), TypeError, "activation: expected a name, one of relu, .*, got int"),  # type: ignore[arg-type]
        (lambda: Gate("silu", beta=1.0), TypeError, "beta: expected a parameter of silu, none, got beta=1.0"),
        (lambda: Gate("situ", cap=1.0), TypeError, "cap: expected a parameter of situ, one of gate_softcap, "),
        (lambda: Gate("swish", beta=float("nan")), ValueError, "beta: expected a finite number, got nan"),
        (lambda: Gate("swish", beta="1"), TypeError, "beta: expected a number, got str"),  # type: ignore[arg-type]
        (lambda: Gate("situ", up_softcap=0), ValueError, "up_softcap: expected a positive number, got 0"),
        (lambda: Gate("situ", limit=7.0), ValueError, "limit, up_shift: expected None and 0 of situ, .*got 7.0"),
        (lambda: Gate("silu", limit=0), ValueError, "limit: expected a positive number, got 0"),
        (lambda: Gate("silu", up_shift=None, interleaved=1), TypeError, "interleaved: expected True or False, got int"),  # type: ignore[arg-type]
        (lambda: ffn_ops.gated_act(torch.ones(2, 2), activation=OAI), ValueError, "limit, up_shift: expected None"),
        (lambda: ffn_ops.PlainFFN(4, 6, activation=OAI), ValueError, "limit, up_shift: expected None and 0"),
        (lambda: ffn_ops.MoEFFN(4, 6, 3, activation="swiglu_oai"), ValueError, "limit, up_shift: expected None and 0"),
        *(
            (functools.partial(make, activation=Gate("silu", interleaved=True)), ValueError, "interleaved: expected")
            for make in (
                functools.partial(ffn_ops.gated_act, torch.ones(2, 2), torch.ones(2, 2)),
                functools.partial(ffn_ops.gated_linear, torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2)),
                functools.partial(ffn_ops.ffn, *[torch.ones(2, 2)] * 3, w_up=torch.ones(2, 2)),
                functools.partial(ffn_ops.ffn, *[torch.ones(2, 2)] * 3),
                functools.partial(ffn_ops.FeedForward, 4, 6, 2, 0.0),
                functools.partial(ffn_ops.GLU, 4, 6),
                functools.partial(ffn_ops.GatedFFN, 4, 6),
                functools.partial(ffn_ops.PlainFFN, 4, 6),
                functools.partial(ffn_ops.MoEFFN, 4, 6, 3),
            )
        ),
    ],
)  # fmt: skip
def test_wrong_gates(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        make()


@pytest.mark.parametrize("wrong", ["sillu", 3, None])
def test_an_unknown_activation_is_refused_in_the_same_words(wrong: Any) -> None:
    """By a Gate, by a function that takes a name or a Gate, and by a module."""
    said = set()
    for call in (
        lambda: Gate(wrong),
        lambda: ffn_ops.gated_act(torch.ones(2, 2), activation=wrong),
        lambda: ffn_ops.FeedForward(4, d_ff=6, activation=wrong),
    ):
        with pytest.raises((TypeError, ValueError)) as refused:
            call()
        said.add(str(refused.value))
    assert len(said) == 1, said


def expected_of(layer: Any, x: Tensor) -> Tensor:
    """The layer's formula, from its parameters."""
    gate = layer.activation
    if isinstance(layer, ffn_ops.FeedForward):
        return layer.w2(reference.gated_act(layer.w1(x), layer.w3(x), activation=gate))  # type: ignore[no-any-return]
    if isinstance(layer, ffn_ops.GLU):
        return reference.gated_act(layer.linear_gate(x), layer.linear_value(x), activation=gate)
    if isinstance(layer, ffn_ops.GatedFFN):
        pairs: Any = zip(layer.gate_layers, layer.value_layers, strict=True)
        return sum(reference.gated_act(g(x), v(x), activation=gate) for g, v in pairs)  # type: ignore[return-value]
    ids, weights = reference.top_k(layer.logits(x), layer.top_k)
    tensors = {"b_in": layer.b_in, "b_down": layer.b_down}
    return reference.moe(x, ids, weights, layer.w_in, layer.w_down, gated=True, activation=gate, **tensors)


EVERY_KIND = (OAI, Gate("gelu", limit=0.3, up_shift=0.5), gate_of("situ"), gate_of("swiglu_step"))


@pytest.mark.parametrize("gate", EVERY_KIND, ids=str)
def test_every_layer_takes_every_gate(gate: Gate) -> None:
    torch.manual_seed(0)
    layers = [
        ffn_ops.FeedForward(8, 12, 4, 0.0, activation=gate),
        ffn_ops.GLU(8, 7, activation=gate),
        ffn_ops.GatedFFN(8, 7, 3, activation=gate),
        ffn_ops.MoEFFN(8, 6, 4, gated=True, activation=gate),
        ffn_ops.MoEFFN(8, 6, 4, gated=True, activation=gate.replace(interleaved=True)),
    ]
    x = 3 * normal(9, 8)
    for layer in layers:
        layer = layer.double()
        parameters = list(layer.parameters())
        y, plain = layer(x), expected_of(layer, x)
        torch.testing.assert_close(y, plain, rtol=1e-11, atol=1e-12)
        for ours, known in zip(
            torch.autograd.grad(y.sin().sum(), parameters),
            torch.autograd.grad(plain.sin().sum(), parameters),
            strict=True,
        ):
            torch.testing.assert_close(ours, known, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gate", [OAI, gate_of("situ")], ids=str)
def test_a_fused_weight_in_turns(gate: Gate, isa: str) -> None:
    """The bits of one whose gate rows stand first, but for d_x, which adds over rows as they stand; its derivatives."""
    x, halves, down = normal(5, 6), normal(14, 6, seed=1), normal(3, 7, seed=2)
    bias, turned = normal(14, seed=3), gate.replace(interleaved=True)

    def plain(*t: Tensor) -> Tensor:
        return reference.ffn(*t[:3], gated=True, b_in=t[3], activation=turned)

    def turns(rows: Tensor) -> Tensor:
        return torch.stack(rows.chunk(2), 1).flatten(0, 1)

    for recompute in (False, True):
        leaves = [t.detach().requires_grad_() for t in (x, halves, down, bias)]
        others = [t.detach().requires_grad_() for t in (x, turns(halves), down, turns(bias))]
        found = []
        for (x_, w, w_down, b), form in ((leaves, gate), (others, turned)):
            y = ffn_ops.ffn(x_, w, w_down, gated=True, b_in=b, activation=form, recompute=recompute)
            found.append([y, *torch.autograd.grad(y.sin().sum(), [x_, w, w_down, b])])
        (y, d_x, d_w, d_down, d_b), (z, e_x, e_w, e_down, e_b) = found
        assert torch.equal(y, z) and torch.equal(d_down, e_down)
        assert torch.equal(turns(d_w), e_w) and torch.equal(turns(d_b), e_b)
        torch.testing.assert_close(d_x, e_x, rtol=1e-12, atol=1e-13)

        def call(*t: Tensor, recompute: bool = recompute) -> Tensor:
            return ffn_ops.ffn(*t[:3], gated=True, b_in=t[3], activation=turned, recompute=recompute)

        assert gradcheck(call, others, nondet_tol=0) and gradgradcheck(call, others, nondet_tol=0)
        tangents = tuple(torch.ones_like(t) for t in others)
        actual, expected = (torch.func.jvp(f, tuple(others), tangents) for f in (call, plain))
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


class Takes(nn.Module):
    def forward(self, x: Tensor, gate: Any) -> Tensor:
        return ffn_ops.gated_act(x, x.flip(1), activation=gate)


@pytest.mark.usefixtures("dynamo")
def test_compiled() -> None:
    """As a constant: an argument, made inside, of a layer; another gate is another graph, an equal one is not."""
    x = torch.randn(5, 6)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(Takes(), backend=counter, fullgraph=True)
    for gate, graphs in ((OAI, 1), (Gate("swiglu_oai"), 1), (Gate("silu", limit=0.3), 2), ("gelu", 3), (OAI, 3)):
        assert torch.equal(compiled(x, gate), Takes()(x, gate)) and counter.frame_count == graphs, gate

    def made_inside(x: Tensor) -> Tensor:
        y = ffn_ops.gated_act(x, x, activation=Gate("situ", up_softcap=2.0))
        return y + ffn_ops.gated_act(x, x, activation="swiglu_oai")

    assert torch.equal(torch.compile(made_inside, backend="eager", fullgraph=True)(x), made_inside(x))
    layer = ffn_ops.MoEFFN(6, 4, 3, gated=True, activation=Gate("swiglu_oai", interleaved=True))
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)(x), layer(x))


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_exported(strict: bool) -> None:
    """As an argument of the program, and in a layer; saved and loaded."""
    x = torch.randn(5, 6)
    program = torch.export.export(Takes(), (x, OAI), strict=strict)
    assert torch.equal(program.module()(x, OAI), Takes()(x, OAI))
    layer = ffn_ops.FeedForward(6, 12, 4, 0.0, activation=gate_of("situ")).requires_grad_(False)
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, (x,), strict=strict), file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), layer(x))


@pytest.mark.filterwarnings("ignore")  # of sizes that become constants; torch.jit.trace is deprecated
def test_traced() -> None:
    """torch.fx writes the call that makes it, torch.jit.trace its numbers."""
    x = torch.randn(5, 6)
    for gate in (OAI, Gate("situ")):
        for layer in (
            ffn_ops.FeedForward(6, 12, 4, 0.0, activation=gate).eval(),
            ffn_ops.GLU(6, 4, activation=gate),
            ffn_ops.MoEFFN(6, 4, 3, gated=True, activation=gate.replace(interleaved=True)),
        ):
            layer.requires_grad_(False)
            graph = torch.fx.symbolic_trace(nn.Sequential(layer))
            assert torch.equal(graph(x), layer(x)) and torch.equal(pickle.loads(pickle.dumps(graph))(x), layer(x))
            assert torch.equal(torch.jit.trace(layer, (x,))(x), layer(x))


def test_whole_layers_load_with_weights_only() -> None:
    """Who allows a layer's classes need not know that it holds a Gate."""
    layer = ffn_ops.GLU(3, 4, activation=OAI)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    with torch.serialization.safe_globals([ffn_ops.GLU, nn.Linear]):
        again = torch.load(file, weights_only=True)
    assert again.activation == OAI and torch.equal(again(torch.ones(2, 3)), layer(torch.ones(2, 3)))


def test_shared_experts_have_the_gate() -> None:
    """Of a layer each of whose own halves is a weight of its own."""
    layer = ffn_ops.MoEFFN(8, 6, 4, gated=True, num_shared=1, activation=Gate("situ", interleaved=True)).double()
    x, shared = normal(5, 8), layer.shared
    y = ffn_ops.moe(x, routing.top_k(layer.logits(x), 2), layer.w_in, layer.w_down, gated=True, b_in=layer.b_in,
                    b_down=layer.b_down, activation=layer.activation)  # fmt: skip
    torch.testing.assert_close(layer(x), y + expected_of(shared, x), rtol=1e-12, atol=1e-13)
