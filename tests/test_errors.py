# SPDX-License-Identifier: BSD-3-Clause
"""Promise 7: a wrong argument raises TypeError or ValueError before any work, with its name, expected and actual."""

from __future__ import annotations

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

OPS = torch.ops.ffn_ops
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


def raw_calls() -> dict[str, Callable[[], Any]]:
    """Arguments that reach C++ only through torch.ops."""
    x, w, down, h = torch.ones(3, 4), torch.ones(6, 4), torch.ones(5, 6), torch.ones(3, 6)
    none, act = torch.empty(0), ("silu", [0.0, 0.0])
    seven = [True] * 7

    def ffn(*args: Any, gated: bool = False) -> Callable[[], Any]:
        return lambda: OPS.ffn(*args, gated, False, *act, True)

    def backward(d_y: Tensor, gate: Tensor, up: Tensor, needs: list[bool], gated: bool = True) -> Callable[[], Any]:
        return lambda: OPS.ffn_backward(d_y, x, w, w, down, None, None, gate, up, gated, False, *act, needs)

    d_y = torch.ones(3, 5)
    return {
        "rank of x": ffn(x[0], w, None, down, None, None, None),
        "rank of w_in": ffn(x, w[0], None, down, None, None, None),
        "width of w_in": ffn(x, w[:, :3], None, down, None, None, None),
        "width of w_up": ffn(x, w, w[:5], down, None, None, None),
        "width of w_down": ffn(x, w, None, down[:, :5], None, None, None),
        "odd fused": ffn(x, w[:5], None, down, None, None, None, gated=True),
        "length of b_in": ffn(x, w, None, down, torch.ones(5), None, None),
        "b_up alone": ffn(x, w, None, down, None, torch.ones(6), None),
        "length of b_down": ffn(x, w, None, down, None, None, torch.ones(6)),
        "dtype": ffn(x, w.double(), None, down, None, None, None),
        "integers": ffn(x.int(), w.int(), None, down.int(), None, None, None),
        "sparse": ffn(x, w.to_sparse(), None, down, None, None, None),
        "d_y": backward(d_y[:, :4], h, h, seven),
        "saved gate": backward(d_y, h[:2], h, seven),
        "saved up": backward(d_y, h, h[:, :5], seven),
        "saved up missing": backward(d_y, h, none, seven),
        "saved gate with strides": backward(d_y, torch.ones(6, 3).t(), h, seven),
        "activation": lambda: OPS.ffn(x, w, None, down, None, None, None, False, False, "sillu", [0.0, 0.0], True),
        "gated_act rank": lambda: OPS.gated_act(x[None], None, *act),
        "gated_act up": lambda: OPS.gated_act(x, x[:2], *act),
        "gated_act d_out": lambda: OPS.gated_act_backward(x[:2], x, None, *act, [True, True]),
        "gated_act dd_up without up": lambda: OPS.gated_act_double_backward(None, x, x, x, None, *act),
        "no branches": lambda: OPS.gated_linear(x, [], [], [], [], *act, True),
        "branches differ": lambda: OPS.gated_linear(x, [w, w[:5]], [w, w], [], [], *act, True),
        "fewer ups": lambda: OPS.gated_linear(x, [w, w], [w], [], [], *act, True),
        "fewer biases": lambda: OPS.gated_linear(x, [w, w], [w, w], [torch.ones(6)], [], *act, True),
        "bias length": lambda: OPS.gated_linear(x, [w], [w], [torch.ones(5)], [], *act, True),
        "limit": lambda: OPS.gated_act(x, x, "silu", [-1.0, 0.0]),
        "limit without up": lambda: OPS.gated_act(x, None, "silu", [1.0, 0.0]),
        "shift without up": lambda: OPS.ffn(x, w, None, down, None, None, None, False, False, "silu", [0.0, 1.0], True),
        "too few parameters": lambda: OPS.gated_act(x, x, "swish", [0.0, 0.0]),
        "too many parameters": lambda: OPS.gated_act(x, x, "silu", [0.0, 0.0, 1.0]),
        "a parameter that is not positive": lambda: OPS.gated_act(x, x, "situ", [0.0, 0.0, 4.0, -1.0]),
        "a limit beside a side of up": lambda: OPS.gated_act(x, x, "situ", [1.0, 0.0, 4.0, 25.0]),
        "interleaved beside w_up": lambda: OPS.ffn(x, w, w, down, None, None, None, True, True, *act, True),
        "instruction set": lambda: OPS._use_isa("avx1024"),
        "needs too short": backward(d_y, h, h, [True]),
        "needs too long": lambda: OPS.gated_act_backward(x, x, None, *act, [True] * 3),
    }


@pytest.mark.parametrize("kind", raw_calls())
def test_raw_operators(kind: str) -> None:
    """torch.ops checks for itself: RuntimeError (NotImplementedError is one), never a crash or a wrong read."""
    with pytest.raises(RuntimeError):
        raw_calls()[kind]()


@pytest.mark.cpu_only("the text names the CPU")
def test_raw_operators_name_dtypes() -> None:
    """As Python does, not by torch's numbers."""
    for dtype in (torch.int32, torch.bool, torch.complex64, torch.uint16):
        name = str(dtype).removeprefix("torch.")
        with pytest.raises(RuntimeError, match=f"expected dtype float64, float32, float16 or bfloat16, got {name}"):
            OPS.gated_act(torch.ones(2, 3).to(dtype), None, "silu", [0.0, 0.0])
        ids, scores = torch.zeros(2, 1).to(dtype), torch.ones(2, 3)
        with pytest.raises(RuntimeError, match=rf"expected int64 of shape \[.*, got {name} of shape \[2, 1\]"):
            OPS.round_tokens(scores, ids, 4)
    with pytest.raises(RuntimeError, match=r"mask: expected bool of shape \[2\].*, got int32 of shape \[2\]"):
        OPS.balanced_assignment(scores, torch.ones(2, dtype=torch.int32))


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
