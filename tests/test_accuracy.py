# SPDX-License-Identifier: BSD-3-Clause
"""Promise 1: errors against float64, for every activation, dtype and instruction set, and for shapes with a reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from device import generator
from problems import ACTIVATIONS, DTYPES, FORMS, MOE_FORMS, Problem, assert_same_numbers, dtype_name, results
from tolerance import assert_accurate
from torch import Tensor

import ffn_ops
from ffn_ops import reference

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)

# Widths that are no multiple of any vector, more than one register tile in every direction.
RAGGED = {"T": 37, "D": 53, "F": 101, "O": 103}

SHAPES = {
    "T=0: outputs empty, weight gradients zero": {"T": 0, "D": 8, "F": 9, "O": 10},
    "T=1: one row, streamed weights": {"T": 1, "D": 40, "F": 110, "O": 101},
    "T=8: the last streamed size": {"T": 8, "D": 40, "F": 110, "O": 101},
    "everything 1": {"T": 1, "D": 1, "F": 1, "O": 1},
    "D=0: the first product has nothing to add": {"T": 5, "D": 0, "F": 9, "O": 10},
    "F=0: the second product has nothing to add": {"T": 5, "D": 8, "F": 0, "O": 10},
    "O=0: no output": {"T": 5, "D": 8, "F": 9, "O": 0},
    "primes": {"T": 13, "D": 31, "F": 103, "O": 101},
    "multiples of every tile": {"T": 84, "D": 64, "F": 128, "O": 128},
    "T one more than a tile": {"T": 85, "D": 32, "F": 129, "O": 161},
    "sums just over a chunk of k": {"T": 17, "D": 257, "F": 259, "O": 101},
    "gradients sum over more than a chunk of tokens, biases over two levels": {"T": 1031, "D": 9, "F": 101, "O": 103},
    "more columns than a task packs at a time": {"T": 19, "D": 24, "F": 523, "O": 290},
}


# float16 differs from bfloat16 only in load and store: the element-wise forms have both with every activation.
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("form", "dtype"),
    [(form, dtype) for form in FORMS for dtype in DTYPES if dtype is not torch.float16 or form in ("act", "gated_act")],
)
def test_every_activation(form: str, activation: str, dtype: torch.dtype, isa: str) -> None:
    assert_accurate(Problem(form, **RAGGED, activation=activation), dtype)


class SecondOrder(Problem):
    """The gradients of an element-wise problem as its output, so that their gradients are what is compared."""

    def _first(self, call: Callable[..., Tensor], t: dict[str, Tensor]) -> Tensor:
        d_y = torch.linspace(-2, 2, self.T * self.F).view(self.T, self.F).to(t["gate"].dtype)
        with torch.enable_grad():
            return sum(torch.autograd.grad(call(**t), list(t.values()), d_y, create_graph=True))

    def ours(self, **t: Tensor) -> Tensor:  # type: ignore[override]
        return self._first(super().ours, t)

    def plain(self, **t: Tensor) -> Tensor:
        return self._first(super().plain, t)


@every_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives(activation: str, dtype: torch.dtype, isa: str) -> None:
    assert_accurate(SecondOrder("gated_act", T=9, F=75, activation=activation), dtype)


# branches differ from gated only in their sum
FORMS_OF_SHAPES = [(form, dtype) for form in ("plain", "gated") for dtype in DTYPES if dtype is not torch.float16]
FORMS_OF_SHAPES += [("branches", torch.float32)]


@pytest.mark.parametrize("size", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("form", "dtype"), FORMS_OF_SHAPES)
def test_shapes(form: str, size: dict[str, int], dtype: torch.dtype, isa: str) -> None:
    assert_accurate(Problem(form, **size), dtype)


@every_dtype
@pytest.mark.parametrize("form", [f for f in FORMS if "act" not in f])
def test_without_biases(form: str, dtype: torch.dtype) -> None:
    assert_accurate(Problem(form, **RAGGED, bias=False), dtype)


@pytest.mark.parametrize("length", [1, 7, 63, 65, 40000], ids=lambda n: f"{n} columns")
def test_gated_act_long_rows(length: int, isa: str) -> None:
    """A row of 40000 is cut into several tasks."""
    assert_accurate(Problem("gated_act", T=3, F=length), torch.float32)


MAGNITUDES = (1e-4, 1e-3, 1e1, 1e3)


@dataclass(frozen=True)
class Scaled(Problem):
    """Pre-activations of order ``hidden``, a gradient of the output of order ``gradient``."""

    hidden: float = 1.0
    gradient: float = 1.0

    def draw(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], Tensor]:
        factors = dict.fromkeys(("x", "b_in", "b_gate", "b_up", "gate", "up"), self.hidden)
        tensors, d_y = super().draw(seed)
        scaled = {name: t * factors.get(name.rstrip("012"), 1.0) for name, t in tensors.items()}
        return {name: t.to(dtype) for name, t in scaled.items()}, (d_y * self.gradient).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("form", FORMS)
def test_every_magnitude(form: str, dtype: torch.dtype) -> None:
    """From the smallest to the largest 16-bit values for which eager's results are finite: intermediate results must
    not leave the dtype's range if eager's do not."""
    finite = 0
    sizes = [(m, 1.0, 1.0) for m in MAGNITUDES] + [(1.0, m, 1.0) for m in MAGNITUDES]
    sizes += [(m, 1.0, 1e-3) for m in (1e-3, 1.0)] if form in MOE_FORMS else []
    for hidden, gradient, weight in sizes:
        problem = Scaled(form, T=37, D=101, F=101, O=101, scale=weight, hidden=hidden, gradient=gradient)
        if all(t.isfinite().all() for t in results(problem.plain, *problem.draw(0, dtype)).values()):
            finite += 1
            assert_accurate(problem, dtype)
    assert finite >= 6


CUT = {
    "forward: blocks of 32 MiB, at least 256 tokens; dX: sums of 32000": (
        "gated",
        {"T": 300, "D": 24, "F": 16000, "O": 8},
    ),
    "weight gradients sum over more tokens than fit a packed operand": (
        "plain",
        {"T": 90_000, "D": 101, "F": 103, "O": 101},
    ),
}


@pytest.mark.parametrize(("form", "size"), CUT.values(), ids=CUT)
def test_products_cut_into_blocks(form: str, size: dict[str, Any]) -> None:
    assert_accurate(Problem(form, **size), torch.float32)


LEADING = {"vector": (), "three dimensions": (2, 3), "a dimension of 0": (2, 0), "five": (2, 1, 3, 1)}


@pytest.mark.parametrize("shape", LEADING.values(), ids=LEADING)
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    """Any leading dimensions: the same bits as the rows of a matrix, and gradients of the shape of the input."""
    g = generator(0)
    w_in, w_up, w_down = (torch.randn(s, generator=g) for s in ((6, 5), (6, 5), (4, 6)))
    x = torch.randn(*shape, 5, generator=g, requires_grad=True)
    rows = x.detach().reshape(-1, 5).requires_grad_()
    calls = {
        "gated_act": lambda x: ffn_ops.gated_act(x, x * 2),
        "gated_linear": lambda x: ffn_ops.gated_linear(x, w_in, w_up),
        "ffn": lambda x: ffn_ops.ffn(x, w_in, w_down, w_up=w_up),
    }
    for name, call in calls.items():
        y, y_rows = call(x), call(rows)
        assert y.shape == (*shape, y_rows.shape[-1]), name
        assert torch.equal(y.reshape(y_rows.shape), y_rows), name
        (d_x,), (d_rows,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(y_rows.sum(), rows)
        assert d_x.shape == x.shape and torch.equal(d_x.reshape(-1, 5), d_rows), name


def test_leading_dimensions_of_width_zero() -> None:
    """D = 0 behind leading dimensions: nothing to infer the number of rows from. (A regression.)"""
    x, w, down = torch.zeros(2, 3, 0), torch.zeros(4, 0), torch.ones(5, 4)
    assert torch.equal(ffn_ops.ffn(x, w, down, b_in=torch.ones(4), activation="identity"), torch.full((2, 3, 5), 4.0))
    assert ffn_ops.gated_linear(x, w, w).tolist() == torch.zeros(2, 3, 4).tolist()
    assert ffn_ops.gated_act(x).shape == x.shape
    assert ffn_ops.gated_act(torch.tensor(2.0), activation="relu_squared").item() == 4.0


@every_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values(activation: str, dtype: torch.dtype, isa: str) -> None:
    """Infinities, NaN, zeros, denormals and overflow: forward as torch, and gradients wherever torch's are finite."""
    tiny, huge = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    inf = float("inf")
    values = [
        0.0,
        -0.0,
        inf,
        -inf,
        float("nan"),
        tiny,
        -tiny,
        tiny / 4,
        huge,
        -huge,
        12.0,
        -12.0,
        90.0,
        -90.0,
        800.0,
        -800.0,
    ]
    z = torch.tensor([values], dtype=dtype, requires_grad=True)
    ours = ffn_ops.gated_act(z, activation=activation)
    torchs = reference.gated_act(z, activation=activation)
    wide = z.detach().double().requires_grad_()
    exact = reference.gated_act(wide, activation=activation)  # torch's own overflow and cancellation are no models
    rounding = torch.finfo(dtype).eps
    # Torch cancels far from zero, to 0 where we give 1e-32; near zero a denormal must come out as one.
    atol = torch.where(z.detach().abs() < 1, 2 * tiny, rounding)

    def agree(a: Tensor, b: Tensor, atol: Tensor) -> Tensor:
        b = b.to(dtype)
        same = (a == b) | (a.isnan() & b.isnan())
        return same | ((a - b).abs() <= 8 * rounding * b.abs() + atol)

    wrong = ~agree(ours, torchs, atol) & ~agree(ours, exact, atol)
    assert not wrong.any(), (
        f"{activation} at {z[wrong].tolist()}: {ours[wrong].tolist()}, torch {torchs[wrong].tolist()}"
    )
    d_ours, d_torchs = (torch.autograd.grad(y.sum(), z)[0] for y in (ours, torchs))
    (d_exact,) = torch.autograd.grad(exact.sum(), wide)
    atol = torch.full_like(atol, 4 * rounding)
    finite = torch.isfinite(z) & torch.isfinite(d_torchs)
    wrong = finite & ~agree(d_ours, d_torchs, atol) & ~agree(d_ours, d_exact, atol)
    assert not wrong.any(), f"slope at {z[wrong].tolist()}: {d_ours[wrong].tolist()}, torch {d_torchs[wrong].tolist()}"
    assert torch.isnan(ours[0, 4]) and (
        activation in ("identity",) or torch.isnan(d_ours[0, 4]) or "relu" in activation
    )


def unaligned(t: Tensor) -> Tensor:
    """One element after an aligned address."""
    return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)


def strided(t: Tensor) -> Tensor:
    """Every second element of rows and columns; what lies between must not be read into the result."""
    spread = t.new_full([2 * n for n in t.shape], float("nan"))
    part = spread[tuple(slice(None, None, 2) for _ in t.shape)]
    return part.copy_(t)


def transposed(t: Tensor) -> Tensor:
    return t if t.dim() < 2 else t.mT.contiguous().mT


def padded_rows(t: Tensor) -> Tensor:
    """Columns dense, rows further apart than they are long."""
    wide = t.new_full((*t.shape[:-1], t.shape[-1] + 3), float("nan"))
    return wide[..., : t.shape[-1]].copy_(t)


@pytest.mark.parametrize("arrange", [unaligned, strided, transposed, padded_rows], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("form", FORMS)
def test_layouts(form: str, dtype: torch.dtype, arrange, isa: str) -> None:
    """Every input and the gradient of the output in another layout: the same bits as with dense tensors."""
    problem = Problem(form, T=21, D=270, F=35, O=18)
    tensors, d_y = problem.draw(dtype=dtype)
    expected = results(problem.ours, tensors, d_y)
    actual = results(problem.ours, {n: arrange(t) for n, t in tensors.items()}, arrange(d_y))
    assert_same_numbers(form, actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [0, 1])
def test_expanded(form: str, dim: int, dtype: torch.dtype, isa: str) -> None:
    """Stride 0 in any input and in the gradient (as from sum().backward()): the same bits as with copies."""
    problem = Problem(form, T=21, D=19, F=35, O=18)
    tensors, d_y = problem.draw(dtype=dtype)
    views = {n: t.narrow(min(dim, t.dim() - 1), 0, 1).expand(t.shape) for n, t in {**tensors, "d": d_y}.items()}
    dense = {n: t.contiguous() for n, t in views.items()}
    d_view, d_dense = views.pop("d"), dense.pop("d")
    expected, actual = results(problem.ours, dense, d_dense), results(problem.ours, views, d_view)
    assert_same_numbers(form, actual, expected)


def test_negative_view() -> None:
    """A tensor with torch's lazy minus sign (the imaginary part of a conjugate)."""
    x = torch.imag(torch.conj(torch.randn(4, 6, dtype=torch.complex64)))
    assert x.is_neg()
    assert torch.equal(ffn_ops.gated_act(x), ffn_ops.gated_act(x.resolve_neg()))


@pytest.mark.parametrize("form", FORMS)
def test_the_rule_rejects(form: str) -> None:
    """Zeros fail, and so does one wrong number in the last column: the checks above can fail."""
    problem = Problem(form, **RAGGED)

    def zeros(**tensors: Tensor) -> Tensor:
        return problem.ours(**tensors) * 0

    def one_wrong(**tensors: Tensor) -> Tensor:
        y = problem.ours(**tensors).clone()
        y.data[-1, -1] += 0.5
        return y

    for dtype in DTYPES:
        for broken in (zeros, one_wrong):
            with pytest.raises(AssertionError, match="error"):
                assert_accurate(problem, dtype, ours=broken)


@every_dtype
def test_the_rule_rejects_a_wrong_gradient(dtype: torch.dtype) -> None:
    problem = Problem("gated", **RAGGED)

    def no_gradient_for_up(*, w_up: Tensor, **tensors: Tensor) -> Tensor:
        return problem.ours(w_up=w_up.detach(), **tensors) + 0 * w_up.sum()

    with pytest.raises(AssertionError, match="d_w_up: error"):
        assert_accurate(problem, dtype, ours=no_gradient_for_up)
