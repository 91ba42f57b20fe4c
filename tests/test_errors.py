# SPDX-License-Identifier: BSD-3-Clause
"""Promise 7: a wrong argument raises TypeError or ValueError before any work, with its name, expected and actual."""

from __future__ import annotations

import functools
import gc
import math
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from problems import Problem
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ffn_ops

HERE = torch.empty(0).device


def good(form: str) -> dict[str, Any]:
    """Arguments that the function takes, by name."""
    tensors, _ = Problem(form, T=3, D=4, F=6, O=5).draw(dtype=torch.float32)
    if form == "gated_linear":
        return {name.rstrip("0"): t for name, t in tensors.items()}
    tensors.pop("logits", None)
    return tensors


def routing(tokens: int = 3) -> ffn_ops.Routing:
    return ffn_ops.routing.top_k(torch.randn(tokens, 5), 2)


ROUTING = routing()


def moe(x: Any, w_in: Any, w_down: Any, **options: Any) -> Tensor:
    return ffn_ops.moe(x, ROUTING, w_in, w_down, **options)


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "gated_act": (ffn_ops.gated_act, "gated_act"),
    "gated_linear": (ffn_ops.gated_linear, "gated_linear"),
    "ffn": (ffn_ops.ffn, "gated"),
    "moe": (moe, "moe"),
}
TENSORS = [(function, name) for function, (_, form) in FUNCTIONS.items() for name in good(form)]

# How to make a wrong tensor from a right one; the error; what the message must contain besides the argument's name.
WRONG: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "list": (lambda t: t.tolist(), TypeError, "expected a torch.Tensor"),
    "array": (lambda t: t.cpu().numpy(), TypeError, "expected a torch.Tensor.*got ndarray"),
    "number": (lambda t: 3.0, TypeError, "expected a torch.Tensor.*got float"),
    "text": (lambda t: "w", TypeError, "expected a torch.Tensor.*got str"),
    "integer dtype": (lambda t: t.int(), TypeError, "expected dtype .*got int32"),
    "complex dtype": (lambda t: t.to(torch.complex64), TypeError, "expected dtype .*got complex64"),
    "8-bit float dtype": (lambda t: t.to(torch.float8_e4m3fn), TypeError, "expected dtype .*got float8_e4m3fn"),
    "sparse": (lambda t: t.to_sparse(), ValueError, "expected a strided tensor, got layout torch.sparse_coo"),
    "mkldnn": (lambda t: t.cpu().to_mkldnn(), ValueError, "expected a strided tensor, got layout torch._mkldnn"),
    "nested": (lambda t: torch.nested.as_nested_tensor([t, t]), ValueError, "expected a strided.*got layout nested"),
}  # fmt: skip

# Wrong only beside the other arguments; the first one, which sets the standard, is judged by these too, under the name
# of the first that then differs from it.
CONFLICTS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "other dtype": (
        lambda t: t.double(),
        TypeError,
        "expected dtype (float32|float64) as x has, got (float64|float32)",
    ),
    "other device": (lambda t: t.to("meta"), ValueError, f"expected device ({HERE}|meta) as x has, got (meta|{HERE})"),
    "wider": (lambda t: torch.cat([t, t], -1), ValueError, r"expected shape \[.*\], got \["),
    "one dimension more": (lambda t: t[None], ValueError, r"expected shape \[.*\], got \["),
    "one dimension less": (lambda t: t[0], ValueError, r"expected shape \[.*\], got \["),
}


class NoWork(TorchDispatchMode):
    """Fails when an operator of ours runs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not func._schema.name.startswith("ffn_ops::"), f"{func} ran before the check"
        return func(*args, **(kwargs or {}))


def refused(call: Callable[..., Any], arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """In eager mode, and with fake tensors, as compilers use them."""
    with NoWork(), pytest.raises(error, match=f"^{message}") as caught:
        call(**arguments)
    assert type(caught.value) is error
    dense = [v for v in arguments.values() if isinstance(v, Tensor)]
    if all(t.layout is torch.strided and not t.is_nested for t in dense):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = {n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in arguments.items()}
            with pytest.raises(error, match=f"^{message}"):
                call(**fakes)


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize(("function", "name"), TENSORS)
def test_not_such_a_tensor(function: str, name: str, kind: str) -> None:
    call, form = FUNCTIONS[function]
    arguments = good(form)
    make, error, message = WRONG[kind]
    if kind == "list" and function == "gated_linear" and name != "x":
        message = "expected a torch.Tensor or a list of them, got"  # a list is right there, but of tensors
    arguments[name] = make(arguments[name])
    refused(call, arguments, error, f"{name}: {message}")


@pytest.mark.parametrize("kind", CONFLICTS)
@pytest.mark.parametrize(("function", "name"), TENSORS)
def test_does_not_fit_the_others(function: str, name: str, kind: str) -> None:
    call, form = FUNCTIONS[function]
    arguments = good(form)
    make, error, message = CONFLICTS[kind]
    first = name == next(iter(arguments))
    if first and kind in ("one dimension more", "one dimension less") and function != "gated_act":
        return  # x may have any leading dimensions
    arguments[name] = make(arguments[name])
    named = next(n for n in list(arguments)[1:]) if first else name
    if first and function == "moe" and kind == "other device":
        named = "routing.token"
    refused(call, arguments, error, f"{named}: {message}")


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("option", "value", "error", "message"),
    [
        ("activation", "sillu", ValueError, "expected one of relu, .*clamped_silu, got 'sillu'"),
        ("activation", "SiLU", ValueError, "expected one of relu, .*clamped_silu, got 'SiLU'"),
        ("activation", None, TypeError, "expected a name, one of relu, .*got NoneType"),
        ("activation", torch.nn.SiLU(), TypeError, "expected a name, one of relu, .*got SiLU"),
    ],
)
def test_options(function: str, option: str, value: Any, error: type[Exception], message: str) -> None:
    call, form = FUNCTIONS[function]
    refused(call, {**good(form), option: value}, error, f"{option}: {message}")


FFN_WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "gated=False beside w_up": ({"gated": False}, ValueError, "gated: expected None or True where w_up is given"),
    "gated is no flag": ({"gated": 1}, TypeError, "gated: expected True or False, got int"),
    "recompute is no flag": ({"recompute": "yes"}, TypeError, "recompute: expected True or False, got str"),
    "odd fused weight": (
        {"w_up": None, "b_up": None, "gated": True, "w_in": torch.ones(7, 4), "b_in": None},
        ValueError, r"w_in: expected an even number of rows, of gate and up, got \[7, 4\]",
    ),
    "b_up without w_up": ({"w_up": None}, ValueError, "b_up: expected None where w_up is None"),
    "no weight": ({"w_in": None}, TypeError, "w_in: expected a torch.Tensor, got NoneType"),
    "fused weight, w_down of its rows": (
        {"w_up": None, "b_up": None, "gated": True}, ValueError, r"w_down: expected shape \[D_out, 3\], got \[5, 6\]",
    ),
    "scalar x": ({"x": torch.tensor(1.0)}, ValueError, r"x: expected shape \[..., D\], got \[\]"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FFN_WRONG)
def test_ffn_combinations(kind: str) -> None:
    change, error, message = FFN_WRONG[kind]
    refused(ffn_ops.ffn, {**good("gated"), **change}, error, message)


W = torch.ones(6, 4)
LINEAR_WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "fewer ups": ({"w_gate": [W, W]}, ValueError, r"w_up: expected as many weights as w_gate has \(2\), got 1"),
    "no weights": ({"w_gate": [], "w_up": []}, ValueError, "w_gate: expected at least one weight, got none"),
    "fewer biases": (
        {"w_gate": [W, W], "w_up": [W, W], "b_up": None},
        ValueError, r"b_gate: expected none or one for each weight \(2\), got 1",
    ),
    "branches of other widths": (
        {"w_gate": [W, W[:5]], "w_up": [W, W], "b_gate": None, "b_up": None},
        ValueError, r"w_gate: expected shape \[6, 4\], got \[5, 4\]",
    ),
    "None in a list": ({"w_gate": [None]}, TypeError, "w_gate: expected a torch.Tensor or a list.*got NoneType"),
    "scalar x": ({"x": torch.tensor(1.0)}, ValueError, r"x: expected shape \[..., D\], got \[\]"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LINEAR_WRONG)
def test_gated_linear_combinations(kind: str) -> None:
    change, error, message = LINEAR_WRONG[kind]
    refused(ffn_ops.gated_linear, {**good("gated_linear"), **change}, error, message)


def test_the_right_arguments_pass() -> None:
    """Valid calls; the other tests change one thing in them."""
    for call, form in FUNCTIONS.values():
        assert torch.isfinite(call(**good(form))).all()


def test_a_right_call_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its operator; Python's checks word the error of a call that the operator refused."""

    def unexpected(name: str, *_: Any, **__: Any) -> None:
        raise AssertionError(f"{name} was checked in Python")

    x, w, down = torch.ones(10, 4), torch.ones(5, 6, 4), torch.ones(5, 4, 6)
    rows = routing(10)
    calls: list[Callable[[], Tensor]] = [
        *(functools.partial(call, **good(form)) for call, form in FUNCTIONS.values()),
        lambda: ffn_ops.route_linear(x, w[0]),
        lambda: ffn_ops.moe_experts(x, torch.arange(0, 12, 2), w, down),
        lambda: ffn_ops.moe_combine(ffn_ops.moe_dispatch(x, rows), rows),
    ]
    for check in ("tensor", "indices", "routing"):
        monkeypatch.setattr(f"ffn_ops._checks.{check}", unexpected)
    for call in calls:
        assert torch.isfinite(call()).all()


MODULE_SIZES: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (ffn_ops.FeedForward, {"dim": 4, "hidden_dim": 6, "multiple_of": 2}),
    (ffn_ops.ReLUFFN, {"d_model": 4, "d_ff": 6}),
    (ffn_ops.GELUFFN, {"d_model": 4, "d_ff": 6}),
    (ffn_ops.SwishFFN, {"d_model": 4, "d_ff": 6}),
    (ffn_ops.GLU, {"d_in": 4, "d_out": 6}),
    (ffn_ops.GatedFFN, {"d_model": 4, "d_ff": 6, "num_gates": 2}),
]


@pytest.mark.parametrize(("module", "sizes"), MODULE_SIZES, ids=lambda m: getattr(m, "__name__", ""))
def test_module_sizes_and_inputs(module: Callable[..., Any], sizes: dict[str, Any]) -> None:
    more = {"dropout": 0.0} if module is ffn_ops.FeedForward else {}
    for name in sizes:
        for value, error, message in (
            (0, ValueError, "expected at least 1, got 0"),
            (-3, ValueError, "expected at least 1, got -3"),
            (4.0, TypeError, "expected an integer, got float"),
            ("4", TypeError, "expected an integer, got str"),
            (True, TypeError, "expected an integer, got bool"),
            (None, TypeError, "expected an integer, got NoneType"),
        ):
            with pytest.raises(error, match=f"^{name}: {message}"):
                module(**{**sizes, **more, name: value})
    layer = module(**sizes, **more)
    for x, error in (
        (torch.ones(3, 5), ValueError), (torch.ones(()), ValueError), (torch.ones(3, 4).double(), TypeError),
        (torch.ones(3, 4).int(), TypeError), (torch.ones(3, 4).to_sparse(), ValueError), ([[1.0] * 4], TypeError),
        (np.ones((3, 4), np.float32), TypeError), (torch.ones(3, 4, device="meta"), ValueError), (None, TypeError),
    ):  # fmt: skip
        with pytest.raises(error, match=r"^\w+: expected .*, got "):
            layer(x)
    assert layer(torch.ones(3, 4)).shape[0] == 3


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: ffn_ops.FeedForward(4, 6, 2, 1.5),
            ValueError,
            "dropout: expected a probability between 0 and 1, got 1.5",
        ),
        (lambda: ffn_ops.FeedForward(4, 6, 2, "0"), TypeError, "dropout: expected a number, got str"),
        (lambda: ffn_ops.FeedForward(4, 6, 2, math.nan), ValueError, "dropout: expected a finite number, got nan"),
        (lambda: ffn_ops.FeedForward(4, d_ff=0), ValueError, "d_ff: expected at least 1, got 0"),
        (lambda: ffn_ops.FeedForward(4), TypeError, "hidden_dim: expected an integer, got NoneType"),
        (lambda: ffn_ops.FeedForward(4, 6, d_ff=4), ValueError, "d_ff: expected it alone .* got 4 with hidden_dim 6"),
        (lambda: ffn_ops.FeedForward(4, multiple_of=2, d_ff=4), ValueError, "d_ff: expected it alone"),
        (lambda: ffn_ops.FeedForward(4, 1, 2, 0.0), ValueError, "hidden_dim: expected at least 2"),
        (lambda: ffn_ops.FeedForward(4, 6, 2, 0.0, activation="x"), ValueError, "activation: expected one of"),
        (
            lambda: ffn_ops.FeedForward(4, 6, 2, 0.0, recompute=1),
            TypeError,
            "recompute: expected True or False, got int",
        ),
        (lambda: ffn_ops.SwishFFN(4, 6, beta=math.inf), ValueError, "beta: expected a finite number, got inf"),
        (lambda: ffn_ops.PlainFFN(4, 6, activation=3), TypeError, "activation: expected a name"),
        (lambda: ffn_ops.GLU(4, 6, activation="x"), ValueError, "activation: expected one of"),
        (lambda: ffn_ops.GatedFFN(4, 6, out_proj=1), TypeError, "out_proj: expected True or False, got int"),
    ],
)
def test_module_options(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        make()


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.cpu_only("instruction sets are the CPU's")
def test_unknown_instruction_set_in_the_environment() -> None:
    """A wrong FFN_OPS_ISA fails at import, and the error lists the available ones."""
    done = python("import ffn_ops", FFN_OPS_ISA="avx1024")
    assert done.returncode == 1 and "FFN_OPS_ISA" in done.stderr and "baseline" in done.stderr, done.stderr


@pytest.mark.cpu_only("instruction sets are the CPU's")
def test_instruction_set_from_the_environment() -> None:
    done = python("import ffn_ops; print(ffn_ops.info()['isa'])", FFN_OPS_ISA="baseline")
    assert done.stdout.strip() == "baseline", done.stderr


def test_a_refused_call_keeps_nothing() -> None:
    """The error, its traceback and the frame form no cycle: tensors are freed at once, which matters after running out
    of memory."""
    gc.disable()
    try:
        x = torch.randn(3, 4)
        kept = weakref.ref(x)
        with pytest.raises(ValueError, match="w_down"):
            ffn_ops.ffn(x, torch.randn(5, 4), torch.randn(4, 6), activation="gelu")
        del x
        assert kept() is None
    finally:
        gc.enable()
