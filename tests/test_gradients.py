# SPDX-License-Identifier: BSD-3-Clause
"""Derivatives on the real kernels: first and second order, every subset of inputs, no gradients that are not needed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from device import DEVICE, generator, gradcheck, gradgradcheck
from problems import ACTIVATIONS, DTYPES, FORMS, RECOMPUTING, Problem, assert_same_bits, dtype_name, results
from tolerance import assert_accurate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ffn_ops
from ffn_ops import _library

SMALL = {"T": 3, "D": 4, "F": 5, "O": 2}


def leaves(problem: Problem) -> tuple[list[str], list[Tensor]]:
    tensors, _ = problem.draw()
    return list(tensors), [t.requires_grad_() for t in tensors.values()]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64], ids=dtype_name)
def test_gradcheck(form: str, activation: str, dtype: torch.dtype, isa: str) -> None:
    """Against finite differences in float64, exactly reproducible. Random inputs lie off the kinks of relu."""
    problem = Problem(form, **SMALL, activation=activation)
    names, inputs = leaves(problem)

    def call(*values: Tensor) -> Tensor:
        return problem.ours(**dict(zip(names, values, strict=True)))

    assert gradcheck(call, inputs, nondet_tol=0, fast_mode=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_gradgradcheck(form: str, activation: str) -> None:
    problem = Problem(form, **SMALL, activation=activation)
    names, inputs = leaves(problem)

    def call(*values: Tensor) -> Tensor:
        return problem.ours(**dict(zip(names, values, strict=True)))

    assert gradgradcheck(call, inputs, nondet_tol=0, fast_mode=True)


@pytest.mark.parametrize(
    ("form", "keywords"), [*((f, {}) for f in FORMS), *((f, {"recompute": True}) for f in RECOMPUTING)], ids=str
)
def test_every_entry_of_the_jacobian(form: str, keywords: dict[str, bool]) -> None:
    """The two checks above compare random projections; here every entry, once per form."""
    problem = Problem(form, T=2, D=3, F=2, O=2)
    names, inputs = leaves(problem)

    def call(*values: Tensor) -> Tensor:
        return problem.ours(**dict(zip(names, values, strict=True)), **keywords)

    assert gradcheck(call, inputs, nondet_tol=0)
    assert gradgradcheck(call, inputs, nondet_tol=0)


class Asked(TorchDispatchMode):
    """Records of every backward operator what was asked for and how many numbers each gradient has."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[bool], list[int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name.startswith("ffn_ops") and func._schema.arguments[-1].name == "needs":
            self.calls.append((func._schema.name, list(args[-1]), [t.numel() for t in out]))
        return out


@pytest.mark.parametrize("form", FORMS)
def test_subsets(form: str) -> None:
    """Every subset of inputs that requires grad: the bits of the full backward, and only those gradients computed."""
    problem = Problem(form, T=5, D=4, F=9, O=6, bias=form != "branches")
    tensors, d_y = problem.draw(dtype=torch.float32)
    expected = results(problem.ours, tensors, d_y)
    names = list(tensors)
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, count):
            given = {n: t.detach().requires_grad_(n in chosen) for n, t in tensors.items()}
            y = problem.ours(**given)
            assert torch.equal(y, expected["y"])
            with Asked() as asked:
                grads = torch.autograd.grad(y, [given[n] for n in chosen], d_y)
            for name, grad in zip(chosen, grads, strict=True):
                assert torch.equal(grad, expected[f"d_{name}"]), f"d_{name} when {chosen} are asked for"
            ((_, needs, sizes),) = asked.calls
            kinds = {name.rstrip("0123456789") for name in chosen}  # branches of one list are asked for together
            assert sum(needs) == len(kinds)
            assert [size > 0 for size in sizes] == needs


@pytest.mark.parametrize("form", FORMS)
def test_only_what_this_backward_asks_for(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor requires grad, and each way of backward asks for one of them or for some: the operator is asked for
    no other, and the bits are those of the full backward. (A regression: it computed everything.) Of a small layer it
    may compute the gradients of all leaves."""
    problem = Problem(form, T=5, D=4, F=9, O=6, bias=form != "branches")
    tensors, d_y = problem.draw(dtype=torch.float32)
    expected = results(problem.ours, tensors, d_y)
    names = list(tensors)
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
    given = {n: t * 1 for n, t in leaves.items()}  # not leaves: autograd.grad asks the engine another way
    y = problem.ours(**given)
    small = problem.ours(**leaves)
    monkeypatch.setattr(_library, "_WORTH_ASKING", 0)
    direct = problem.ours(**leaves)
    for chosen in {*((n,) for n in names), tuple(names[1:]) or ("gate",), tuple(names)}:
        with Asked() as asked:
            of_inputs = torch.autograd.grad(y, [given[n] for n in chosen], d_y, retain_graph=True)
            before = torch.autograd.grad(y, [leaves[n] for n in chosen], d_y, retain_graph=True, create_graph=True)
            torch.autograd.backward(direct, d_y, retain_graph=True, inputs=[leaves[n] for n in chosen])
        kinds = {name.rstrip("0123456789") for name in chosen}
        assert [sum(needs) for _, needs, _ in asked.calls] == [len(kinds)] * 3, chosen
        for i, name in enumerate(chosen):
            wanted = expected[f"d_{name}"]
            assert torch.equal(of_inputs[i], wanted) and torch.equal(before[i], wanted), name
            assert torch.equal(leaves[name].grad, wanted), name
            leaves[name].grad = None
        assert all(t.grad is None for t in leaves.values())
        for name, grad in zip(chosen, torch.autograd.grad(small, [leaves[n] for n in chosen], d_y, True), strict=True):
            assert torch.equal(grad, expected[f"d_{name}"]), name


def test_large_leaves_are_asked_for_one_by_one() -> None:
    """``autograd.grad`` of one large leaf computes no other; second derivatives of it compute what they ask for."""
    shapes = {"x": (64, 256), "w_in": (384, 256), "w_up": (384, 256), "w_down": (256, 384)}
    leaves = {
        n: torch.randn(s, generator=generator(i)).mul_(0.05).requires_grad_() for i, (n, s) in enumerate(shapes.items())
    }
    y = ffn_ops.ffn(**leaves)
    everything = torch.autograd.grad(y.sum(), list(leaves.values()), retain_graph=True)
    for (name, leaf), wanted in zip(leaves.items(), everything, strict=True):
        with Asked() as asked:
            (grad,) = torch.autograd.grad(y.sum(), leaf, retain_graph=True, create_graph=True)
        assert [sum(needs) for _, needs, _ in asked.calls] == [1], name
        assert torch.equal(grad, wanted)


def test_everything_reaches_hooks() -> None:
    """backward() under hooks of tensors, of parameters after accumulation, and through a nested backward."""
    x, w, down = (torch.randn(s, generator=generator(1)).requires_grad_() for s in ((5, 4), (6, 4), (3, 6)))
    expected = torch.autograd.grad(ffn_ops.ffn(x, w, down).sum(), (x, w, down))
    seen: dict[str, Tensor] = {}
    inner = x * 1
    inner.register_hook(lambda g: seen.update(x=g.clone()))
    handle = w.register_post_accumulate_grad_hook(lambda p: seen.update(w=p.grad.clone()))
    inner.retain_grad()

    class Nested(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, d: Tensor) -> Tensor:
            with torch.enable_grad():  # as reentrant checkpointing does
                again = [t.detach().requires_grad_() for t in (x, w, down)]
                torch.autograd.backward(ffn_ops.ffn(*again).sum())
            assert all(torch.equal(t.grad, g) for t, g in zip(again, expected, strict=True))
            return d

    Nested.apply(ffn_ops.ffn(inner, w, down)).sum().backward()
    handle.remove()
    for name, grad in zip(("x", "w"), expected[:2], strict=True):
        assert torch.equal(seen[name], grad)
    assert torch.equal(inner.grad, expected[0]) and torch.equal(down.grad, expected[2])


@pytest.mark.parametrize("form", FORMS)
def test_no_gradient_no_backward(form: str) -> None:
    """If no tensor requires grad, nothing is saved and the output has no history; the bits are the same."""
    problem = Problem(form, T=5, D=4, F=9, O=6)
    tensors, d_y = problem.draw(dtype=torch.float32)
    expected = results(problem.ours, tensors, d_y)["y"]
    assert torch.equal(problem.ours(**tensors), expected)
    given = {n: t.requires_grad_() for n, t in tensors.items()}
    with torch.no_grad():
        y = problem.ours(**given)
    assert y.grad_fn is None and not y.requires_grad and torch.equal(y, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("form", RECOMPUTING)
def test_recompute(form: str, dtype: torch.dtype, isa: str) -> None:
    """The same bits as with saved pre-activations, in the output and in every gradient."""
    for T in (1, 9, 67):
        problem = Problem(form, T=T, D=37, F=45, O=35)
        tensors, d_y = problem.draw(dtype=dtype)
        expected = results(problem.ours, tensors, d_y)
        actual = results(lambda p=problem, **t: p.ours(recompute=True, **t), tensors, d_y)
        assert_same_bits(actual, expected, f"T={T}")


def test_recompute_of_one_gradient() -> None:
    """Each gradient alone, recomputed: no step that it needs is left out."""
    problem = Problem("gated", T=5, D=4, F=9, O=6)
    tensors, d_y = problem.draw(dtype=torch.float32)
    expected = results(problem.ours, tensors, d_y)
    for name in tensors:
        given = {n: t.detach().requires_grad_(n == name) for n, t in tensors.items()}
        (grad,) = torch.autograd.grad(problem.ours(recompute=True, **given), given[name], d_y)
        assert torch.equal(grad, expected[f"d_{name}"]), name


def test_inputs_are_not_written() -> None:
    """Forward, backward and double backward leave every input and every gradient as it was."""
    for form in FORMS:
        problem = Problem(form, T=5, D=4, F=9, O=6)
        tensors, d_y = problem.draw()
        given = {n: t.clone().requires_grad_() for n, t in tensors.items()}
        d = d_y.clone().requires_grad_()
        grads = torch.autograd.grad(problem.ours(**given), list(given.values()), d, create_graph=True)
        copies = [g.clone() for g in grads]
        torch.autograd.grad(sum(g.square().sum() for g in grads), [*given.values(), d], allow_unused=True)
        assert_same_bits({**given, "d": d}, {**tensors, "d": d_y}, form)
        assert all(torch.equal(a, b) for a, b in zip(grads, copies, strict=True))


def test_accumulation_and_reuse() -> None:
    """One weight in two places and a second backward: gradients add up, and a kept graph gives the same bits again."""
    x, w, down = torch.randn(5, 4), torch.randn(6, 4, requires_grad=True), torch.randn(3, 6)
    y = ffn_ops.ffn(x, w, down, w_up=w)
    (together,) = torch.autograd.grad(y.sum(), w, retain_graph=True)
    (again,) = torch.autograd.grad(y.sum(), w)
    assert torch.equal(together, again)
    gate, up = w.detach().requires_grad_(), w.detach().requires_grad_()
    parts = torch.autograd.grad(ffn_ops.ffn(x, gate, down, w_up=up).sum(), (gate, up))
    assert torch.equal(together, parts[0] + parts[1])


def test_overwritten_input_is_noticed() -> None:
    """An input changed between forward and backward: torch's own error, never a wrong gradient."""
    x, w, down = torch.randn(5, 4), torch.randn(6, 4, requires_grad=True), torch.randn(3, 6)
    y = ffn_ops.ffn(x, w, down)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_third_order_is_refused(form: str) -> None:
    """An error, not a zero with a warning."""
    names, inputs = leaves(problem := Problem(form, **SMALL, activation="tanh"))
    y = problem.ours(**dict(zip(names, inputs, strict=True)))
    (d,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
    (dd,) = torch.autograd.grad(d.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivatives"):
        torch.autograd.grad(dd.sum(), inputs[0])


@pytest.mark.parametrize("hooks", [False, True], ids=["", "hooks"])
@pytest.mark.parametrize("form", FORMS)
def test_second_order_where_one_input_is_a_function_of_another(form: str, hooks: bool) -> None:
    """As in a network that gives weights; of each gradient alone, by every leaf; under hooks on saved tensors."""
    problem = Problem(form, **SMALL)
    names, inputs = leaves(problem)

    def second(call: Callable[..., Tensor]) -> list[Tensor | None]:
        given = [inputs[0], *(t * inputs[0].sum().sin() for t in inputs[1:])]
        y = call(**dict(zip(names, given, strict=True)))
        firsts = torch.autograd.grad(y.square().sum(), given, create_graph=True)
        return [
            grad
            for first in firsts
            for grad in torch.autograd.grad(first.sin().sum(), inputs, retain_graph=True, allow_unused=True)
        ]

    with torch.autograd.graph.save_on_cpu() if hooks else nullcontext():
        actual = second(problem.ours)
    for ours, plain in zip(actual, second(problem.plain), strict=True):
        expected = torch.zeros(()) if plain is None else plain
        torch.testing.assert_close(
            torch.zeros_like(expected) if ours is None else ours, expected, rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize("form", FORMS)
def test_threads_share_a_graph(form: str) -> None:
    """Several backward passes through one graph at once give what one gives, and leave the graph as it was."""
    problem = Problem(form, **SMALL)
    _, inputs = leaves(problem)
    y = problem.ours(**dict(zip(problem.shapes, inputs, strict=True)))
    expected = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    some = inputs[::2]  # not all, so that what is needed differs from what requires a gradient

    def repeat(_: int) -> None:
        for _ in range(20):
            for actual, wanted in zip(
                torch.autograd.grad(y.sum(), some, retain_graph=True), expected[::2], strict=True
            ):
                assert torch.equal(actual, wanted)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(repeat, range(3)))
    again = torch.autograd.grad(y.sum(), inputs)
    assert all(torch.equal(actual, wanted) for actual, wanted in zip(again, expected, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives_under_autocast(form: str) -> None:
    """A penalty on gradients whose backward runs under autocast: in the dtypes of forward, as for a native layer."""
    problem = Problem(form, **SMALL)
    tensors, _ = problem.draw(dtype=torch.float32)
    names = list(tensors)

    def second(autocast: bool) -> list[Tensor]:
        inputs = [t.clone().requires_grad_() for t in tensors.values()]
        y = problem.ours(**dict(zip(names, inputs, strict=True)))
        grads = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            penalty.backward()
        return [t.grad for t in inputs if t.grad is not None]

    plain, under = second(False), second(True)
    assert len(plain) == len(under) > 0
    for expected, actual in zip(plain, under, strict=True):
        # The squares outside our operators are cast; our own formulas are not.
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


@pytest.mark.cpu_only("the ways in which the CPU's kernels store short sums")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("T", [1, 5])
def test_wide_weights_of_a_few_tokens(T: int, dtype: torch.dtype, isa: str) -> None:
    """Their gradients are sums of a few products: more rows than one may add up in place (32), stored from end to end,
    with a ragged end behind several pieces."""
    assert_accurate(Problem("plain", T=T, D=1291, F=41, O=9), dtype)
