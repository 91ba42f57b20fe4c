# SPDX-License-Identifier: BSD-3-Clause
"""learned_act: activations whose own parameters are a tensor with a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device import generator, gradcheck, gradgradcheck
from problems import DTYPES, dtype_name
from tolerance import assert_error_like_eagers
from torch import Tensor
from torch.nn import functional as F

import ffn_ops
from ffn_ops import Gate, reference

# Not the defaults, so that a parameter that is mixed up shows; eps far enough from 0 for the tests to see both sides,
# and no number of 16 bits, as its own slope is a matter of taste.
OWN = {"star_relu": [0.7, -0.3], "leaky_relu": [-0.4], "xielu": [1.3, 0.6, 0.45, -0.2503]}
every_kind = pytest.mark.parametrize("activation", OWN)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def drawn(activation: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, own and a gradient of the result."""
    x, d = (torch.randn(shape, generator=generator(seed + i), dtype=torch.float64).to(dtype) for i in range(2))
    return x, torch.tensor(OWN[activation], dtype=wide(dtype)), d


def plain(x: Tensor, own: Tensor, activation: str) -> Tensor:
    return reference.ACTIVATIONS[activation](x, *own.unbind())


def ours(x: Tensor, own: Tensor, activation: str) -> Tensor:
    return ffn_ops.learned_act(x, own, activation=activation)


def run(call: Any, x: Tensor, own: Tensor, d: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    x, own = x.detach().requires_grad_(), own.detach().requires_grad_()
    y = call(x, own, activation)
    return y.detach(), *torch.autograd.grad(y, (x, own), d)


def test_every_learned_activation_is_here() -> None:
    assert {name for name in ffn_ops.activations() if name in ("star_relu", "leaky_relu", "xielu")} == set(OWN)
    with pytest.raises(ValueError, match="activation: expected one of star_relu, leaky_relu, xielu, got 'silu'"):
        ffn_ops.learned_act(torch.ones(2), torch.ones(1), activation="silu")


@every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_values_and_gradients(activation: str, dtype: torch.dtype, isa: str) -> None:
    """As near to float64 as torch's own operators are; sums over the elements to float32's rounding."""
    for shape in ((3, 37), (257, 300), (1, 1)):
        given = drawn(activation, shape, dtype)
        y, d_x, d_own = run(ours, *given, activation)
        exact = run(plain, *(t.double() for t in given), activation)
        if dtype is torch.float64:
            torch.testing.assert_close(y, exact[0], rtol=1e-14, atol=1e-15)
            torch.testing.assert_close(d_x, exact[1], rtol=1e-14, atol=1e-15)
        elif shape[0] > 1:
            eager = run(plain, *given, activation)
            for got, torchs, target in zip((y, d_x), eager, exact, strict=False):
                assert_error_like_eagers(got, torchs, target)
        each = [plain(given[0].double(), one, activation) - plain(given[0].double(), 0 * one, activation)
                for one in torch.eye(len(given[1]), dtype=torch.float64)]  # fmt: skip
        size = torch.stack([(e * given[2].double()).abs().sum() for e in each])
        learned = Gate(activation).own.keys() - {"eps"}
        error = (d_own.double() - exact[2]).abs()[: len(learned)]
        assert (error <= 8 * torch.finfo(wide(dtype)).eps * size[: len(learned)]).all(), (error, size)
        assert d_own.dtype is wide(dtype) and (d_own[len(learned) :] == 0).all()


@every_kind
def test_derivatives(activation: str) -> None:
    """First and second order by differences, forward mode, every subset of inputs that needs a gradient."""
    x, own, _ = drawn(activation, (4, 9), torch.float64)
    x = x[(x.abs() > 0.02) & ((x + 0.25).abs() > 0.02)].requires_grad_()  # away from kinks
    free = own[:3].clone().requires_grad_()

    def call(x: Tensor, free: Tensor) -> Tensor:
        return ours(x, torch.cat([free, own[3:]]), activation)

    for inputs in ((x, free), (x, free.detach()), (x.detach(), free)):
        assert gradcheck(call, inputs, nondet_tol=0, check_forward_ad=True)
        assert gradgradcheck(call, inputs, nondet_tol=0, check_fwd_over_rev=True)


def test_where_xielu_has_its_kinks(isa: str) -> None:
    """At 0, between eps and 0 and at eps: value and slope are those of transformers. Nothing cancels near 0."""
    own = torch.tensor([0.8, 0.8, 0.5, -1e-6], dtype=torch.float64)
    x = torch.tensor([0.0, -0.0, -5e-7, -1.0000001e-6, 1e-300, -1e-3, -3e-4, 5e-7, -800.0, 700.0], dtype=torch.float64)
    y, d_x, _ = run(ours, x, own, torch.ones_like(x), "xielu")
    z = x.clone().requires_grad_()
    alpha_p, alpha_n, beta, eps = own
    formula = torch.where(z > 0, alpha_p * z * z + beta * z, (torch.expm1(torch.min(z, eps)) - z) * alpha_n + beta * z)
    torch.testing.assert_close(y, formula.detach(), rtol=1e-14, atol=1e-21)
    torch.testing.assert_close(d_x, torch.autograd.grad(formula.sum(), z)[0], rtol=1e-14, atol=0)
    small = torch.tensor([-2e-3, -1e-4, -1e-5], dtype=torch.float32)  # exp(x) - 1 - x, where the rest is nothing
    bend = ours(small, torch.tensor([0.0, 1.0, 0.0, -1e-7]), "xielu")
    torch.testing.assert_close(bend.double(), torch.expm1(small.double()) - small.double(), rtol=1e-4, atol=0)
    nan = ours(torch.tensor([torch.nan]), torch.tensor([0.8, 0.8, 0.5, -1e-6]), "xielu")
    assert nan.isnan().all()


@every_kind
def test_layouts_and_shapes(activation: str) -> None:
    x, own, d = drawn(activation, (6, 40), torch.float32)
    expected = run(ours, x, own, d, activation)
    strided = x.new_zeros(6, 80)[:, ::2].copy_(x)
    for other in (x.t().contiguous().t(), strided):
        y, d_x, d_own = run(ours, other, own.repeat_interleave(2)[::2], d, activation)
        assert torch.equal(y, expected[0]) and torch.equal(d_x, expected[1])
        torch.testing.assert_close(d_own, expected[2], rtol=1e-5, atol=1e-5)
    assert torch.equal(ours(x.view(2, 3, 40), own, activation), expected[0].view(2, 3, 40))
    assert torch.equal(ours(x[0, 0], own, activation), expected[0][0, 0])
    for empty in (x[:0], x[:, :0], x[0, :0]):
        y, d_x, d_own = run(ours, empty, own, torch.zeros_like(empty), activation)
        assert y.shape == d_x.shape == empty.shape and (d_own == 0).all()
    low = own.bfloat16().requires_grad_()  # parameters in x's dtype
    ours(x.bfloat16(), low, activation).backward(d.bfloat16())
    assert low.grad is not None and low.grad.dtype is torch.bfloat16


@pytest.mark.cpu_only("threads are the CPU's")
@every_kind
def test_threads(activation: str, threads: None) -> None:
    """No bit depends on them."""
    given = drawn(activation, (301, 700), torch.float32)
    torch.set_num_threads(1)
    expected = run(ours, *given, activation)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert all(torch.equal(a, b) for a, b in zip(run(ours, *given, activation), expected, strict=True))


@pytest.mark.usefixtures("dynamo")
def test_compiled_and_saves_x_alone() -> None:
    """One graph, nothing of which waits for a number."""
    alphas = torch.tensor([0.3, -0.2], requires_grad=True)
    x = torch.randn(5, 33, generator=generator()).requires_grad_()

    def call(x: Tensor) -> Tensor:
        own = torch.cat([F.softplus(alphas[:1]), 0.5 + F.softplus(alphas[1:]), x.new_tensor([0.5, -1e-6])])
        return ours(x, own, "xielu").sin()

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for a, b in zip(*(torch.autograd.grad(f(x).sum(), (x, alphas)) for f in (call, compiled)), strict=True):
        torch.testing.assert_close(a, b)
    own = torch.tensor(OWN["xielu"], requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(x, own, "xielu")
    assert [t.data_ptr() for t in saved] == [x.data_ptr(), own.data_ptr()]


def test_wrong_arguments() -> None:
    x, own = torch.ones(2, 3), torch.ones(4)
    for error, message, call in (
        (ValueError, r"own: expected shape \[4\], got \[3\]", lambda: ours(x, own[:3], "xielu")),
        (TypeError, "own: expected dtype float32, got float64", lambda: ours(x, own.double(), "xielu")),
        (TypeError, "own: expected dtype bfloat16 or float32, got", lambda: ours(x.bfloat16(), own.half(), "xielu")),
        (TypeError, "x: expected a torch.Tensor, got int", lambda: ours(3, own, "xielu")),  # type: ignore[arg-type]
        (RuntimeError, "activation: expected one of star_relu, leaky_relu, xielu, got 'silu'",
         lambda: torch.ops.ffn_ops.learned_act(x, own, "silu")),
        (RuntimeError, r"own: expected shape \[2\], got \[4\]",
         lambda: torch.ops.ffn_ops.learned_act(x, own, "star_relu")),
        (RuntimeError, "dd_x: expected shape",
         lambda: torch.ops.ffn_ops.learned_act_double_backward(x[:1], x, x, own, "xielu")),
        (RuntimeError, "d_out: expected shape",
         lambda: torch.ops.ffn_ops.learned_act_backward(x[:1], x, own, "xielu", [True, True])),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
