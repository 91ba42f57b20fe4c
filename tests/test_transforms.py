# SPDX-License-Identifier: BSD-3-Clause
"""Promise 6, transformations beyond plain backward: forward mode, batched gradients, torch.func inside a graph.

Values come from the plain formula under the same transformation, in float64 to a few roundings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from device import generator, gradcheck
from problems import FORMS, Problem
from routes import ROUTERS
from torch import Tensor, nn
from torch.autograd import forward_ad, functional

import ffn_ops
from ffn_ops import reference

SMALL = {"T": 2, "D": 3, "F": 3, "O": 2, "activation": "gelu_tanh"}
Call = Callable[[Callable[..., Tensor]], Any]


def same(form: str, call: Call, **sizes: Any) -> None:
    """``call`` of a function of a dictionary of tensors, ours against the plain one."""
    problem = Problem(form, **{**SMALL, **sizes})
    actual = call(lambda given: problem.ours(**given))
    expected = call(lambda given: problem.plain(**given))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def drawn(form: str, seed: int = 0) -> dict[str, Tensor]:
    return Problem(form, **SMALL).draw(seed)[0]


@pytest.mark.parametrize("form", FORMS)
def test_jvp(form: str) -> None:
    """Of all tensors together and of each alone, by torch.func and by dual numbers; the output is the plain call's."""
    tensors, tangents = drawn(form), drawn(form, 1)
    same(form, lambda f: torch.func.jvp(f, (tensors,), (tangents,)))
    for name, tensor in tensors.items():
        same(form, lambda f, n=name, t=tensor: torch.func.jvp(lambda z: f({**tensors, n: z}), (t,), (tangents[n],)))
    with forward_ad.dual_level():
        same(
            form,
            lambda f: tuple(
                forward_ad.unpack_dual(f({n: forward_ad.make_dual(t, tangents[n]) for n, t in tensors.items()}))
            ),
        )


@pytest.mark.parametrize("form", FORMS)
def test_linearize_and_jacfwd(form: str) -> None:
    tensors, tangents = drawn(form), drawn(form, 1)
    same(form, lambda f: torch.func.linearize(f, tensors)[1](tangents))
    same(form, lambda f: torch.func.jacfwd(lambda given: f(given).sum(0))(tensors))


@pytest.mark.parametrize("form", FORMS)
def test_second_order_by_forward_mode(form: str) -> None:
    """Forward over backward (torch.func.hessian), backward over forward and forward over forward. (The last one is
    a zero for an autograd.Function whose jvp leaves forward mode off.)"""
    tensors, tangents = drawn(form), drawn(form, 1)

    def along(function: Any) -> Any:
        return lambda given: torch.func.jvp(function, (given,), (tangents,))[1]

    def scalar(f: Any) -> Any:
        return lambda given: f(given).sin().sum()

    same(form, lambda f: along(torch.func.grad(scalar(f)))(tensors))
    same(form, lambda f: torch.func.grad(along(scalar(f)))(tensors))
    same(form, lambda f: along(along(scalar(f)))(tensors))
    if form in ("gated", "moe_limited"):
        same(form, lambda f: torch.func.hessian(scalar(f))(tensors))


@pytest.mark.parametrize("form", FORMS)
def test_forward_mode_by_differences(form: str) -> None:
    problem = Problem(form, **SMALL)
    tensors, _ = problem.draw()
    names, inputs = list(tensors), [t.requires_grad_() for t in tensors.values()]

    def call(*values: Tensor) -> Tensor:
        return problem.ours(**dict(zip(names, values, strict=True)))

    assert gradcheck(call, inputs, check_forward_ad=True, check_backward_ad=False, check_batched_forward_grad=True)


@pytest.mark.parametrize("form", FORMS)
def test_vmap_of_jvp_and_jvp_of_vmap(form: str) -> None:
    tensors, tangents = drawn(form), drawn(form, 1)
    pairs = {n: torch.stack((t, tangents[n])) for n, t in tensors.items()}
    turned = {n: t.flip(0) for n, t in pairs.items()}
    problem = Problem(form, **SMALL)

    def ours(given: dict[str, Tensor]) -> Tensor:
        return problem.ours(**given)

    def plain(given: dict[str, Tensor], tangent: dict[str, Tensor]) -> Tensor:
        return torch.func.jvp(lambda z: problem.plain(**z), (given,), (tangent,))[1]

    expected = torch.stack((plain(tensors, tangents), plain(tangents, tensors)))
    mapped = torch.vmap(lambda a, b: torch.func.jvp(ours, (a,), (b,))[1])(pairs, turned)
    torch.testing.assert_close(mapped, expected, rtol=1e-9, atol=1e-11)
    outside = torch.func.jvp(torch.vmap(ours), (pairs,), (turned,))[1]
    torch.testing.assert_close(outside, expected, rtol=1e-9, atol=1e-11)


def test_raw_operators_keep_tangents() -> None:
    """A call by torch.ops has the tangent of the public function. (A regression: it dropped it in silence.)"""
    gate, t = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    form = ("silu", [0.0, 0.0])
    actual = torch.func.jvp(lambda z: torch.ops.ffn_ops.gated_act(z, None, *form), (gate,), (t,))
    torch.testing.assert_close(actual, torch.func.jvp(nn.functional.silu, (gate,), (t,)), rtol=1e-12, atol=1e-12)
    with pytest.raises(NotImplementedError, match="ffn_ops: third derivatives"):
        torch.func.jvp(
            lambda z: torch.ops.ffn_ops.gated_act_double_backward(gate, None, gate, z, None, *form), (gate,), (t,)
        )


@pytest.mark.parametrize("form", FORMS)
def test_batched_gradients(form: str) -> None:
    """``is_grads_batched=True`` and the vectorised jacobian and hessian, through lists of weights as well."""
    tensors = drawn(form)
    names, values = list(tensors), tuple(tensors.values())

    def by_position(f: Any) -> Any:
        return lambda *given: f(dict(zip(names, given, strict=True)))

    same(form, lambda f: functional.jacobian(by_position(f), values, vectorize=True))
    if form in ("gated_act", "branches", "fused", "moe_limited"):
        same(form, lambda f: functional.hessian(lambda *v: by_position(f)(*v).sin().sum(), values, vectorize=True))


def layers() -> dict[str, tuple[nn.Module, nn.Module]]:
    """Each layer and its plain form with the same parameters."""
    pairs = {
        "GLU": (ffn_ops.GLU(4, 5), reference.GLU(4, 5)),
        "GatedFFN": (ffn_ops.GatedFFN(4, 6, 2), reference.GatedFFN(4, 6, 2)),
        "GELUFFN": (ffn_ops.GELUFFN(4, 8), reference.PlainFFN(4, 8, "gelu")),
        "FeedForward": (ffn_ops.FeedForward(4, 9, 2, 0.0), reference.FeedForward(4, 9, 2, 0.0)),
        "MoEFFN": (ffn_ops.MoEFFN(4, 6, 3), reference.MoEFFN(4, 6, 3)),
    }
    for ours, plain in pairs.values():
        ours.double().load_state_dict(plain.double().state_dict())
    return pairs


@pytest.mark.parametrize("name", ["GLU", "GatedFFN", "GELUFFN", "FeedForward", "MoEFFN"])
def test_func_grad_in_one_graph(name: str, dynamo: None) -> None:
    """torch.func.grad of parameters and of the input, inside fullgraph=True. (A regression: an error for all.)"""
    ours, plain = layers()[name]
    x = torch.randn(3, 4, dtype=torch.float64)

    def loss(layer: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).sin().sum()

    compiled = torch.compile(
        torch.func.grad(lambda p, x: loss(ours, p, x), argnums=(0, 1)), backend="aot_eager", fullgraph=True
    )
    of_parameters, of_x = compiled(dict(ours.named_parameters()), x)
    leaves, z = dict(plain.named_parameters()), x.clone().requires_grad_()
    expected = torch.autograd.grad(loss(plain, leaves, z), [*leaves.values(), z], allow_unused=True)
    torch.testing.assert_close(of_x, expected[-1], rtol=1e-9, atol=1e-11)
    shared = [i for i, n in enumerate(leaves) if n in of_parameters]  # MoEFFN's experts are stacked
    assert len(shared) >= 2
    for i in shared:
        torch.testing.assert_close(of_parameters[list(leaves)[i]], expected[i], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("name", ["GLU", "GatedFFN", "GELUFFN", "FeedForward"])
def test_grads_batched_of_layers(name: str, shape: tuple[int, ...]) -> None:
    """Through lists of weights and with leading dimensions, for which torch has no rule of its own."""
    ours, plain = layers()[name]
    x = torch.randn(*shape, dtype=torch.float64)
    d = torch.randn(2, *plain(x).shape, dtype=torch.float64)
    names = list(dict(plain.named_parameters()))
    actual, expected = (
        torch.autograd.grad(layer(x), [layer.get_parameter(n) for n in names], d, is_grads_batched=True)
        for layer in (ours, plain)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_backward_of_a_call_that_saved_nothing() -> None:
    """gated_linear computes its pre-activations again, to the same bits. (A regression: an error.)"""
    x, w, up = (torch.randn(s).requires_grad_() for s in ((3, 4), (5, 4), (5, 4)))
    grads = [
        torch.autograd.grad(
            torch.ops.ffn_ops.gated_linear(x, [w], [up], [], [], "silu", [0.0, 0.0], save)[0].sin().sum(),
            (x, w, up),
        )
        for save in (True, False)
    ]
    assert all(torch.equal(saved, again) for saved, again in zip(*grads, strict=True))


@pytest.mark.parametrize("name", ROUTERS)
def test_jvp_of_routing_weights(name: str) -> None:
    """Of every router, against backward: <d, J t> is <J^T d, t>."""
    g = generator(3)
    logits, t = (torch.randn(8, 4, generator=g, dtype=torch.float64) for _ in range(2))
    weights, tangent = torch.func.jvp(lambda z: ROUTERS[name](z).weight, (logits,), (t,))
    d = torch.randn(weights.shape, generator=g, dtype=torch.float64)
    (by,) = torch.func.vjp(lambda z: ROUTERS[name](z).weight, logits)[1](d)
    assert float(tangent.abs().max()) > 0
    torch.testing.assert_close((d * tangent).sum(), (by * t).sum(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("bias", [True, False])
def test_forward_mode_of_logits(bias: bool) -> None:
    """route_linear: first and second order by forward mode, against the plain product."""
    g = generator(4)
    shapes = [(5, 4), (3, 4), *([(3,)] if bias else [])]
    tensors, tangents = ([torch.randn(s, generator=g, dtype=torch.float64) for s in shapes] for _ in range(2))

    def second(f: Any) -> Any:
        return torch.func.jvp(torch.func.grad(lambda *t: f(*t).square().sum(), (0, 1)), tuple(tensors), tuple(tangents))

    for call in (lambda f: torch.func.jvp(f, tuple(tensors), tuple(tangents)), second):
        torch.testing.assert_close(call(ffn_ops.route_linear), call(nn.functional.linear))
    assert gradcheck(ffn_ops.route_linear, [t.requires_grad_() for t in tensors], check_forward_ad=True, nondet_tol=0)
