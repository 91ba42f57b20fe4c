# SPDX-License-Identifier: BSD-3-Clause
"""Gates with a limit and a shift, and experts whose weights are transposed or have alternating gate and up rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device import generator, gradcheck, gradgradcheck
from problems import ACTIVATIONS, BETA, LIMITS, gate_of
from tolerance import assert_error_like_eagers
from torch import Tensor

import ffn_ops
from ffn_ops import Gate, Routing, reference

FORMS = ({"limit": 1.1}, {"up_shift": 0.6}, LIMITS)
E, T, D, F, O, K = 3, 6, 4, 5, 7, 2


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, isa: str) -> None:
    """Long enough for whole vectors, with a tail; the values and both gradients."""
    for form in FORMS:
        act: dict[str, Any] = {"activation": gate_of(activation, **form)}
        for dtype in (torch.float32, torch.float64):
            inputs = [normal(3, 37, seed=seed).to(dtype) for seed in (1, 2, 3)]
            actual, expected = (run(call, *inputs, act) for call in (ffn_ops.gated_act, reference.gated_act))
            exact = run(reference.gated_act, *(t.double() for t in inputs), act)
            for ours, eager, known in zip(actual, expected, exact, strict=True):
                if dtype is torch.float64:
                    torch.testing.assert_close(ours, known, rtol=1e-13, atol=1e-14)
                else:
                    assert_error_like_eagers(ours, eager, known)


def run(call: Any, gate: Tensor, up: Tensor, d: Tensor, act: dict[str, Any]) -> tuple[Tensor, ...]:
    gate, up = gate.requires_grad_(), up.requires_grad_()
    y = call(gate, up, **act)
    return y.detach(), *torch.autograd.grad(y, (gate, up), d)


def test_at_the_limit_and_beyond(isa: str) -> None:
    """Nothing reaches what lies at the bounds or beyond (as torch.clamp's gradient from 2.15 on, before they passed at
    the bounds), infinities are held, NaN stays visible in the value."""
    inf, nan = torch.inf, torch.nan
    act: dict[str, Any] = {"activation": Gate("identity", limit=2.0, up_shift=1.0)}
    gate = torch.tensor([-inf, -3.0, 2.0, 1.9999999, inf, -2.0, nan])
    up = torch.tensor([1.0, -inf, -2.0, 2.0, inf, -1.9999999, 0.5])
    y, d_gate, d_up = run(ffn_ops.gated_act, gate.clone(), up.clone(), torch.ones(7), act)
    expected = run(reference.gated_act, gate.clone(), up.clone(), torch.ones(7), act)
    assert torch.equal(y[:6], expected[0][:6]) and y[6].isnan()
    assert torch.equal(d_gate, torch.tensor([2.0, -1.0, 0.0, 3.0, 0.0, float(up[5]) + 1, 0.0]))
    assert torch.equal(d_up[:6], torch.tensor([-inf, 0.0, 0.0, 0.0, 0.0, -2.0])) and d_up[6].isnan()
    act["activation"] = Gate("identity", up_shift=1.0)  # then an infinity is a number like others
    y, d_gate, d_up = run(ffn_ops.gated_act, gate.clone(), up.clone(), torch.ones(7), act)
    assert torch.equal(d_gate[:6], up[:6] + 1) and torch.equal(d_up[:6], gate[:6])


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name not in reference.UPS])
def test_nan_at_a_limit(isa: str, activation: str) -> None:
    """NaN and infinities in gate and up, in every pair: value and gradients where the plain formula has them, and 0
    where it lets nothing pass. (Ours are NaN in one more place: where relu multiplies a NaN by its slope of 0.)"""
    some = torch.tensor([torch.nan, torch.inf, -1e4, 0.0, 1.5, -1.5, 2.5, -2.5, 9.0])
    gate, up = (t.flatten() for t in torch.meshgrid(some, some, indexing="ij"))
    dead = (gate <= 0) & up.isnan() if "relu" in activation else torch.zeros_like(gate, dtype=torch.bool)
    for shift in (0.0, 1.0):
        act = {"activation": gate_of(activation, limit=2.5, up_shift=shift)}
        d = torch.full_like(gate, 2.0)
        actual = run(ffn_ops.gated_act, gate.clone(), up.clone(), d, act)
        expected = run(stopped, gate.clone(), up.clone(), d, act)
        assert torch.equal(actual[0].isnan(), expected[0].isnan())
        for mine, theirs, t in zip(actual[1:], expected[1:], (gate, up), strict=True):
            assert torch.equal(mine[~dead].isnan(), theirs[~dead].isnan())
            assert (mine[t.isnan() | (t.abs() >= 2.5) & ((t is up) | (t > 0))] == 0).all()


def stopped(gate: Tensor, up: Tensor, activation: Gate) -> Tensor:
    """Whether torch.clamp stops a gradient at the limit and at NaN depends on torch's version: here it always does."""
    limit: Any = activation.limit
    gate = torch.where(gate < limit, gate, gate.detach().clamp(max=limit))
    up = torch.where(up.abs() < limit, up, up.detach().clamp(-limit, limit))
    return reference.ACTIVATIONS[activation.activation](gate, **activation.own) * (up + activation.up_shift)


def test_derivatives_of_gated_act_and_ffn() -> None:
    gate, up = normal(4, 6).requires_grad_(), normal(4, 6, seed=1).requires_grad_()
    x, w, w_up, down = (normal(*shape, seed=9).requires_grad_() for shape in ((T, D), (F, D), (F, D), (O, F)))
    fused = torch.cat((w, w_up)).detach().requires_grad_()
    for activation in ("swish", "silu", "gelu"):
        act: dict[str, Any] = {"activation": gate_of(activation, **LIMITS)}

        def gated(gate: Tensor, up: Tensor, act: dict[str, Any] = act) -> Tensor:
            return ffn_ops.gated_act(gate, up, **act)

        def ffn(x: Tensor, w: Tensor, w_up: Tensor, down: Tensor, act: dict[str, Any] = act) -> Tensor:
            return ffn_ops.ffn(x, w, down, w_up=w_up, **act)

        assert gradcheck(gated, (gate, up), nondet_tol=0) and gradgradcheck(gated, (gate, up), nondet_tol=0)
        assert gradcheck(ffn, (x, w, w_up, down), nondet_tol=0) and gradgradcheck(ffn, (x, w, w_up, down), nondet_tol=0)
        y = reference.ffn(x, w, down, w_up=w_up, **act)
        torch.testing.assert_close(ffn(x, w, w_up, down), y, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(ffn_ops.ffn(x, fused, down, gated=True, **act), y, rtol=1e-12, atol=1e-13)
        again = ffn_ops.ffn(x, w, down, w_up=w_up, recompute=True, **act)
        for ours, known in zip(
            torch.autograd.grad(again.sin().sum(), (x, w, w_up, down)),
            torch.autograd.grad(y.sin().sum(), (x, w, w_up, down)),
            strict=True,
        ):
            torch.testing.assert_close(ours, known, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("limit", [0, -1.0, float("inf"), "7", True])
def test_wrong_limits(limit: Any) -> None:
    x = torch.ones(2, 3)
    error = TypeError if isinstance(limit, (str, bool)) else ValueError
    for call in (
        lambda: ffn_ops.gated_act(x, x, activation=Gate("silu", limit=limit)),
        lambda: ffn_ops.ffn(x, torch.ones(4, 3), torch.ones(3, 2), gated=True, activation=Gate("silu", limit=limit)),
        lambda: torch.compile(lambda x: ffn_ops.gated_act(x, x, activation=Gate("silu", limit=limit)), backend="eager")(
            x
        ),
    ):
        with pytest.raises((error, torch._dynamo.exc.TorchDynamoException), match="limit"):
            call()


# ---- layouts of experts ---------------------------------------------------------------------------------------------


def mixture(dtype: torch.dtype = torch.float64, F: int = F) -> tuple[Tensor, Routing, dict[str, Tensor]]:
    ids = torch.stack([torch.randperm(E + 1, generator=generator(t))[:K] for t in range(T)])  # some are another rank's
    route = Routing.from_topk(ids, normal(T, K).abs().to(dtype), E)
    shapes = {"w_in": (E, 2 * F, D), "w_down": (E, O, F), "b_in": (E, 2 * F), "b_down": (E, O)}
    return normal(T, D).to(dtype), route, {name: normal(*s, seed=len(name)).to(dtype) for name, s in shapes.items()}


def turns(halves: Tensor) -> Tensor:
    """Alternating rows of gate and up."""
    return halves.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().requires_grad_() for name, t in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("width", [F, 37, 80])
def test_turns_have_the_bits_of_halves(transposed: bool, dtype: torch.dtype, width: int, isa: str) -> None:
    """The same sums in the same order, whatever the layout, but for d_x, which adds over rows as they stand."""
    x, route, halves = mixture(dtype, width)
    inputs = leaves({"x": x, **halves})
    w = leaves({"x": x, **{n: turns(t) if n.endswith("in") else t for n, t in halves.items()}})
    if transposed:
        for name in ("w_in", "w_down"):
            w[name] = w[name].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    gate = Gate("swish", beta=BETA, **LIMITS)
    y = ffn_ops.moe(inputs["x"], route, **{n: inputs[n] for n in halves}, gated=True, activation=gate)
    gate = gate.replace(interleaved=True)
    z = ffn_ops.moe(w["x"], route, **{n: w[n] for n in halves}, gated=True, activation=gate)
    assert torch.equal(y, z)
    grads = torch.autograd.grad(y.sin().sum(), list(inputs.values()))
    others = torch.autograd.grad(z.sin().sum(), list(w.values()))
    for name, grad, other in zip(inputs, grads, others, strict=True):
        if name == "x":
            accuracy = torch.finfo(dtype).eps
            torch.testing.assert_close(grad, other, rtol=4 * accuracy, atol=100 * accuracy)
        else:
            assert torch.equal(turns(grad) if name.endswith("_in") else grad, other), name
        assert other.stride() == w[name].stride(), name


def test_a_transposed_parameter_keeps_its_gradient() -> None:
    """No copy between the operator and ``.grad``: the strides are already the parameter's."""
    x, route, experts = mixture()
    w = torch.nn.Parameter(experts["w_in"].transpose(1, 2).contiguous())
    seen: list[Tensor] = []
    view = w.transpose(1, 2)
    view.register_hook(seen.append)
    ffn_ops.moe(x, route, view, experts["w_down"], gated=True).sum().backward()
    assert w.grad is not None and w.grad.is_contiguous()
    assert seen[0].data_ptr() == w.grad.data_ptr()


def test_derivatives_of_experts_in_turns() -> None:
    x, route, experts = mixture()
    w = leaves({n: turns(t) if n.endswith("in") else t for n, t in experts.items()})
    w["w_in"] = w["w_in"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    weights = route.weight.detach().requires_grad_()
    options: dict[str, Any] = {"gated": True, "activation": Gate("swish", beta=BETA, interleaved=True, **LIMITS)}
    for recompute in (False, True):

        def call(x: Tensor, weights: Tensor, *w: Tensor, recompute: bool = recompute) -> Tensor:
            names = dict(zip(experts, w, strict=True))
            return ffn_ops.moe(x, route._replace(weight=weights), **names, recompute=recompute, **options)

        inputs = (x.requires_grad_(), weights, *w.values())
        assert gradcheck(call, inputs, nondet_tol=0)
        assert gradgradcheck(call, inputs, nondet_tol=0)
    rows = normal(8, D).requires_grad_()
    offsets = torch.tensor([0, 3, 3, 7])
    assert gradcheck(lambda r, *w: ffn_ops.moe_experts(r, offsets, *w[:2], b_in=w[2], b_down=w[3], **options),
                     (rows, *w.values()), nondet_tol=0)  # fmt: skip
