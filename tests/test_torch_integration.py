# SPDX-License-Identifier: BSD-3-Clause
"""Promise 6, without the compiler: torch's operator checks, autocast, checkpointing, hooks, torch.func, FLOP counts.

Everything is compared bit for bit with a plain call, unless it says otherwise.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import torch
from device import DEVICE
from operator_calls import CALLS
from problems import FFN_FORMS, FORMS, Problem, assert_same_bits, results
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ffn_ops

OPS = torch.ops.ffn_ops
SMALL = {"T": 5, "D": 4, "F": 9, "O": 6}


def test_every_operator_is_listed() -> None:
    public = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("ffn_ops::")}
    assert {op._qualified_op_name.split("::")[1] for op, _ in CALLS.values()} == {
        name for name in public if not name.startswith("_") and (DEVICE == "cpu" or "lora" not in name)
    }


@pytest.mark.cpu_only("a process of its own")
def test_import_brings_torch_alone() -> None:
    """No library of the extras, and not torch's compiler, which takes a second to import."""
    code = "import sys, torch; before = set(sys.modules); import ffn_ops; print(*(set(sys.modules) - before))"
    environment = {**os.environ, "PYTHONPATH": str(Path(ffn_ops.__file__).parents[1])}
    brought = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    names = set(brought.stdout.split())
    assert "ffn_ops.modules" in names and "torch._dynamo" not in names
    optional = [each for each in requires("ffn_ops") or () if "extra ==" in each]
    extras = {re.split(r"[^\w-]", each)[0].replace("-", "_") for each in optional}
    assert {"transformers", "peft"} <= extras and not {name.partition(".")[0] for name in names} & (extras - {"numpy"})


# Turns of gate and up are one more number to schema, fake and dispatch: once with what is saved is enough.
AGAIN = [name for name in CALLS if "interleaved=True" in name and ("save=False" in name or "slice(0, 2" in name)]


@pytest.mark.parametrize("name", [name for name in CALLS if name not in AGAIN])
def test_opcheck(name: str) -> None:
    """Schema, autograd registration, fake kernel, and AOT dispatch with dynamic shapes (forward and backward)."""
    op, args = CALLS[name]
    torch.library.opcheck(op.default, args)


def test_opcheck_can_fail() -> None:
    """An operator with a wrong fake kernel does not pass."""
    with torch.library._scoped_library("ffn_ops_test", "DEF") as lib:
        lib.define("doubled(Tensor x) -> Tensor")
        lib.impl("doubled", lambda x: x * 2, DEVICE.upper())
        torch.library.register_fake("ffn_ops_test::doubled", lambda x: x.new_empty(x.shape[0] + 1), lib=lib)
        with pytest.raises(Exception, match="test_faketensor"):
            torch.library.opcheck(torch.ops.ffn_ops_test.doubled.default, (torch.ones(3),))


def test_meta_tensors() -> None:
    """Shapes without data, as for a model built on the meta device."""
    x, w, down = (torch.empty(s, device="meta") for s in ((2, 3, 5), (6, 5), (4, 6)))
    for y, width in ((ffn_ops.ffn(x, w, down), 4), (ffn_ops.gated_linear(x, w, w), 6), (ffn_ops.gated_act(x, x), 5)):
        assert y.shape == (2, 3, width) and y.device.type == "meta" and y.dtype is torch.float32


@pytest.mark.parametrize("name", CALLS)
def test_one_tensor_on_meta(name: str) -> None:
    """Each tensor in turn: an error instead of uninitialised memory from the fake kernel. (A regression.)"""
    op, args = CALLS[name]
    tensors = sum(isinstance(t, Tensor) for arg in args for t in (arg if isinstance(arg, list) else [arg]))
    for place, arg in enumerate(args):
        for at in range(len(arg)) if isinstance(arg, list) else (None,):
            t = arg if at is None else arg[at]
            if not isinstance(t, Tensor) or tensors < 2:
                continue
            meta = t.detach().to("meta")
            other = meta if at is None else [meta if i == at else each for i, each in enumerate(arg)]
            with pytest.raises(ValueError, match="expected device"):
                op(*args[:place], other, *args[place + 1 :])


def called_on_meta() -> dict[str, tuple[torch.nn.Module, str]]:
    """Layers with a child that is called, as it is no plain nn.Linear, and the name of a weight of it."""
    Child = type("Child", (torch.nn.Linear,), {})
    layers = {
        "FeedForward": (ffn_ops.FeedForward(4, 9, 2, 0.0), "w1"),
        "GELUFFN": (ffn_ops.GELUFFN(4, 6), "linear2"),
        "GLU": (ffn_ops.GLU(4, 6), "linear_value"),
    }
    for layer, name in layers.values():
        child = layer.get_submodule(name)
        setattr(layer, name, Child(child.in_features, child.out_features, device="meta"))
    gated = ffn_ops.GatedFFN(4, 6, 2, out_proj=True)
    gated.value_layers[1] = Child(4, 6, device="meta")
    plain = ffn_ops.GatedFFN(4, 6, 2, out_proj=True)
    plain.out_proj = torch.nn.Linear(6, 4, device="meta")
    return layers | {"GatedFFN": (gated, "value_layers.1"), "GatedFFN out_proj": (plain, "out_proj")}


@pytest.mark.parametrize("case", ["FeedForward", "GELUFFN", "GLU", "GatedFFN", "GatedFFN out_proj"])
def test_called_child_on_meta(case: str) -> None:
    """Refused like a plain child, unless a hook loads its weights, as offloading does. (A regression.)"""
    layer, name = called_on_meta()[case]
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=rf"{name}\.weight: expected device {x.device} as x has, got meta"):
        layer(x)
    child = layer.get_submodule(name)
    torch.manual_seed(0)
    weights = {n: torch.randn(p.shape) for n, p in child.named_parameters()}

    def bring(module: torch.nn.Module, args: Any) -> None:
        for n, t in weights.items():
            setattr(module, n, torch.nn.Parameter(t))

    handle = child.register_forward_pre_hook(bring)
    y = layer(x)
    handle.remove()
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize("form", FORMS)
def test_inference_mode(form: str) -> None:
    problem = Problem(form, **SMALL)
    tensors, _ = problem.draw(dtype=torch.float32)
    expected = problem.ours(**tensors)
    with torch.inference_mode():
        y = problem.ours(**tensors)
    assert y.is_inference() and torch.equal(y, expected)


@pytest.mark.parametrize("form", FORMS)
def test_saved_tensor_hooks(form: str) -> None:
    """What is saved may be moved away and come back as a copy."""
    problem = Problem(form, **SMALL)
    tensors, d_y = problem.draw(dtype=torch.float32)
    packed = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal packed
        packed += 1
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.clone()):
        actual = results(problem.ours, tensors, d_y)
    assert packed > 0
    assert_same_bits(actual, results(problem.ours, tensors, d_y))


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("form", FORMS)
def test_activation_checkpointing(form: str, reentrant: bool) -> None:
    problem = Problem(form, **SMALL)
    tensors, d_y = problem.draw(dtype=torch.float32)
    names = list(tensors)
    calls = 0

    def call(*values: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return problem.ours(**dict(zip(names, values, strict=True)))

    def checkpointed(**given: Tensor) -> Tensor:
        return checkpoint(call, *given.values(), use_reentrant=reentrant)

    if reentrant:  # supports backward() only
        given = {n: t.clone().requires_grad_() for n, t in tensors.items()}
        y = checkpointed(**given)
        y.backward(d_y)
        actual = {"y": y.detach(), **{f"d_{n}": t.grad for n, t in given.items()}}
    else:
        actual = results(checkpointed, tensors, d_y)
    assert calls == 2
    assert_same_bits(actual, results(problem.ours, tensors, d_y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [f for f in FORMS if "act" not in f])
def test_autocast(form: str, dtype: torch.dtype) -> None:
    """As for torch's products: float32 inputs are cast, gradients come back in float32."""
    problem = Problem(form, **SMALL)
    tensors, d_y = problem.draw(dtype=torch.float32)

    def under_autocast(**given: Tensor) -> Tensor:
        with torch.autocast(DEVICE, dtype):
            return problem.ours(**given)

    def by_hand(**given: Tensor) -> Tensor:
        # A router's logits stay what they are.
        return problem.ours(**{n: t if n == "logits" else t.to(dtype) for n, t in given.items()})

    d_y = d_y.to(dtype)
    actual = results(under_autocast, tensors, d_y)
    assert actual["y"].dtype is dtype and all(t.dtype is torch.float32 for n, t in actual.items() if n != "y")
    assert_same_bits(actual, results(by_hand, tensors, d_y))
    with torch.autocast(DEVICE, dtype, enabled=False):
        assert problem.ours(**tensors).dtype is torch.float32
    double, d_double = problem.draw()
    assert_same_bits(results(under_autocast, double, d_double), results(problem.ours, double, d_double))


def test_autocast_casts_nothing_else() -> None:
    """What torch's product would not cast is still refused, and gated_act follows its inputs. (A regression.)"""
    x, w, down = torch.randn(3, 4), torch.randn(6, 4), torch.randn(5, 6)
    with torch.autocast(DEVICE, torch.bfloat16):
        for wrong in (w.double(), w.int(), [w]):
            with pytest.raises(TypeError, match="w_in: expected"):
                ffn_ops.ffn(x, wrong, down)
        assert ffn_ops.gated_act(x).dtype is torch.float32


@pytest.mark.parametrize("form", FORMS)
def test_func_grad(form: str) -> None:
    problem = Problem(form, **SMALL)
    tensors, d_y = problem.draw(dtype=torch.float32)
    grads = torch.func.grad(lambda given: (problem.ours(**given) * d_y).sum())(tensors)
    expected = results(problem.ours, tensors, d_y)
    assert_same_bits({f"d_{n}": g for n, g in grads.items()}, {n: g for n, g in expected.items() if n != "y"})


@pytest.mark.parametrize("form", FORMS)
def test_func_vmap(form: str) -> None:
    """Over the tokens' tensors alone, over every tensor, and over no example: as a loop."""
    problem = Problem(form, **SMALL)
    drawn = [problem.draw(seed, torch.float32)[0] for seed in range(3)]
    stacked = {n: torch.stack([d[n] for d in drawn]) for n in drawn[0]}
    y = torch.vmap(lambda given: problem.ours(**given))(stacked)
    assert torch.equal(y, torch.stack([problem.ours(**d) for d in drawn]))
    tokens = [n for n in stacked if n in ("x", "gate", "up")]
    mixed = {n: stacked[n] if n in tokens else drawn[0][n] for n in stacked}
    dims = {n: 0 if n in tokens else None for n in stacked}
    y = torch.vmap(lambda given: problem.ours(**given), in_dims=(dims,))(mixed)
    assert torch.equal(y, torch.stack([problem.ours(**{**drawn[0], **{n: d[n] for n in tokens}}) for d in drawn]))
    none = torch.vmap(lambda given: problem.ours(**given))({n: t[:0] for n, t in stacked.items()})
    assert none.shape == (0, *problem.out_shape)


@pytest.mark.parametrize("form", FORMS)
def test_func_per_example_gradients(form: str) -> None:
    problem = Problem(form, **SMALL)
    drawn = [problem.draw(seed, torch.float32)[0] for seed in range(3)]
    d_y = problem.draw(9, torch.float32)[1]
    stacked = {n: torch.stack([d[n] for d in drawn]) for n in drawn[0]}
    per_example = torch.vmap(torch.func.grad(lambda given: (problem.ours(**given) * d_y).sum()))(stacked)
    for i, each in enumerate(drawn):
        expected = results(problem.ours, each, d_y)
        for name in each:
            assert torch.equal(per_example[name][i], expected[f"d_{name}"]), name


@pytest.mark.parametrize("form", FORMS)
def test_func_jacobian_and_hessian(form: str) -> None:
    """jacrev (a vmap over the backward) and jacrev of jacrev against the plain formula."""
    problem = Problem(form, T=2, D=3, F=3, O=2, activation="gelu_tanh")
    tensors, _ = problem.draw()
    for call in (torch.func.jacrev, lambda f: torch.func.jacrev(torch.func.jacrev(f))):
        actual = call(lambda given: problem.ours(**given).sum(0))(tensors)
        expected = call(lambda given: problem.plain(**given).sum(0))(tensors)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def flops(call: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("form", [f for f in FORMS if "act" not in f])
def test_flop_counter(form: str, bias: bool) -> None:
    """What torch counts for the plain formula, forward and backward, whichever tensor asks for its gradient."""
    problem = Problem(form, **SMALL, bias=bias)
    tensors, d_y = problem.draw(dtype=torch.float32)
    expected = flops(lambda: problem.plain(**tensors))
    assert expected > 0 and flops(lambda: problem.ours(**tensors)) == expected
    for chosen in [tuple(tensors), *((name,) for name in tensors)]:

        def step(call: Any, names: tuple[str, ...] = chosen) -> None:
            given = {n: t.detach().requires_grad_(n in names) for n, t in tensors.items()}
            torch.autograd.grad(call(**given), [given[n] for n in names], d_y)

        counts = [flops(lambda call=call, step=step: step(call)) for call in (problem.ours, problem.plain)]
        if form == "branches" and chosen[0].startswith("w"):  # the other two of the list come with it
            counts[1] += 2 * (2 * problem.T * problem.D * problem.F)
        if chosen == ("logits",):  # plain keeps what the experts gave, of which ours computes the product again
            counts[1] += 2 * problem.T * problem.K * problem.F * problem.O
        assert counts[0] == counts[1], chosen


@pytest.mark.parametrize("form", FFN_FORMS)
def test_flop_counter_recompute(form: str) -> None:
    """The input products once more."""
    problem = Problem(form, **SMALL)
    tensors, d_y = problem.draw(dtype=torch.float32)
    saved = flops(lambda: results(problem.ours, tensors, d_y))
    again = flops(lambda: results(lambda **t: problem.ours(recompute=True, **t), tensors, d_y))
    rows = sum(t.shape[0] for n, t in tensors.items() if n in ("w_in", "w_up"))
    assert again == saved + 2 * problem.T * problem.D * rows
