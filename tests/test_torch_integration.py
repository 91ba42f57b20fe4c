# SPDX-License-Identifier: BSD-3-Clause
"""Promise 6, without the compiler: torch's operator checks, autocast, checkpointing, hooks, torch.func, FLOP counts.

Everything is compared bit for bit with a plain call, unless it says otherwise.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device import DEVICE, generator
from problems import FFN_FORMS, FORMS, Problem, assert_same_bits, results
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ffn_ops

OPS = torch.ops.ffn_ops
SMALL = {"T": 5, "D": 4, "F": 9, "O": 6}


def operator_calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every operator with arguments that require grad, in every form that changes what it returns."""
    g = generator(0)

    def t(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    T, D, F, O, G = 3, 4, 5, 6, 2
    act = ("swish", [0.0, 0.0, 1.5])
    limited = ("swish", [1.1, 0.6, 1.5])
    gates, ups = [t(F, D) for _ in range(G)], [t(F, D) for _ in range(G)]
    biases = [t(F) for _ in range(G)]
    backward = str(OPS.gated_linear_backward.default._schema)
    passed_on = (biases, biases) if "b_gate" in backward.split("->")[0] else ()
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "gated_act": (OPS.gated_act, (t(T, F), t(T, F), *act)),
        "gated_act limited": (OPS.gated_act, (t(T, F), t(T, F), *limited)),
        "gated_act_backward limited": (OPS.gated_act_backward, (t(T, F), t(T, F), t(T, F), *limited, [True, True])),
        "gated_act plain": (OPS.gated_act, (t(T, F), None, *act)),
        "gated_act_backward": (OPS.gated_act_backward, (t(T, F), t(T, F), t(T, F), *act, [True, True])),
        "gated_act_backward of gate": (OPS.gated_act_backward, (t(T, F), t(T, F), None, *act, [True, False])),
        "gated_act_double_backward": (
            OPS.gated_act_double_backward,
            tuple(x.detach() for x in (t(T, F), t(T, F), t(T, F), t(T, F), t(T, F))) + act,
        ),
        "learned_act": (OPS.learned_act, (t(T, F), t(4), "xielu")),
        "learned_act_backward": (OPS.learned_act_backward, (t(T, F), t(T, F), t(4), "xielu", [True, True])),
        "learned_act_backward of x": (OPS.learned_act_backward, (t(T, F), t(T, F), t(2), "star_relu", [True, False])),
        "learned_act_backward slope": (OPS.learned_act_backward, (t(T, F), t(T, F), t(1), "leaky_relu", [False, True])),
        "learned_act_double_backward": (
            OPS.learned_act_double_backward, (*(x.detach() for x in (t(T, F), t(T, F), t(T, F), t(4))), "xielu"),
        ),
        "gated_linear": (OPS.gated_linear, (t(T, D), gates, ups, biases, biases, *limited, True)),
        "gated_linear_backward": (
            OPS.gated_linear_backward,
            (t(T, F), t(T, D), gates, ups, *passed_on, t(G, T, F).detach(), t(G, T, F).detach(), *limited,
             [True] * 5),
        ),
        "gated_linear_backward of x": (
            OPS.gated_linear_backward,
            (t(T, F), t(T, D), gates, ups, *(() if not passed_on else ([], [])), t(G, T, F).detach(),
             t(G, T, F).detach(), *limited, [True, False, False, False, False]),
        ),
    }  # fmt: skip
    saved = (t(T, F).detach(), t(T, F).detach())
    none = (torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.float64))
    for form in FFN_FORMS:
        rows = 2 * F if form == "fused" else F
        w_up, b_up = (t(F, D), t(F)) if form == "gated" else (None, None)
        gated, options = form != "plain", (form != "plain", form == "fused", *act)
        args = (t(T, D), t(rows, D), w_up, t(O, F), t(rows), b_up)
        up = saved[1] if gated else none[1]
        for save in (True, False):
            calls[f"ffn {form} {save=}"] = (OPS.ffn, (*args, t(O), *options, save))
            pre = (saved[0], up) if save else none
            all_of_them = (t(T, O), *args, *pre, *options, [True] * 7)
            calls[f"ffn_backward {form} {save=}"] = (OPS.ffn_backward, all_of_them)
    needs = [False, True, False, False, False, False, True]
    calls["ffn_backward of two"] = (OPS.ffn_backward, (*all_of_them[:-1], needs))
    E, K, R = 3, 2, 2 * T
    logits = t(T, E)
    weights, ids = OPS.route_top_k(logits.detach(), None, None, K, 0, "softmax", True, False, 1, 1, 2, 1.0)
    weight, token, offsets, row, slot_offsets = OPS.moe_sort(ids, None, weights, E, T, 3, False)[:5]
    index = (token, offsets, row, slot_offsets)
    weight = weight.requires_grad_()
    route = (token, weight, offsets, row, slot_offsets)
    for gated, interleaved, form in ((False, False, act), (True, False, act), (True, True, limited)):
        rows = 2 * F if gated else F
        experts = (t(E, rows, D), t(E, O, F), t(E, rows), t(E, O))
        if interleaved:  # and transposed, as gpt-oss has them
            turned = [t(E, *shape).detach().transpose(1, 2).requires_grad_() for shape in ((D, rows), (F, O))]
            experts = (*turned, *experts[2:])
        options = (gated, interleaved, *form)
        for save in (True, False):
            calls[f"moe {gated=} {interleaved=} {save=}"] = (OPS.moe, (t(T, D), *route, *experts, *options, save))
            given = (t(R, D), None, None, offsets, None, None)
            calls[f"moe of rows {gated=} {interleaved=} {save=}"] = (OPS.moe, (*given, *experts, *options, save))
            pre = (t(R, F).detach(), t(R, F).detach() if gated else none[1]) if save else none
            all_of_them = (t(T, O), t(T, D), *route, *experts, *pre, *options, [True] * 6)
            calls[f"moe_backward {gated=} {interleaved=} {save=}"] = (OPS.moe_backward, all_of_them)
            of_rows = (t(R, O), *given, *experts, *pre, *options, [True, False, True, False, True, True])
            calls[f"moe_backward of rows {gated=} {interleaved=} {save=}"] = (OPS.moe_backward, of_rows)
        pairs = (t(E, 2, D), t(E, rows, 2), t(E, 1, F), t(E, O, 1))
        # both, or those of w_in alone; no kernels on a GPU, where the public functions compose other operators
        for at in (slice(0, 4), slice(0, 2)) if DEVICE == "cpu" else ():
            given_pairs = (*pairs[at], *(None,) * (4 - len(pairs[at])))
            whole, scaled = (*route, *experts, *given_pairs), (*options, 1.5)
            calls[f"moe_lora {interleaved=} {gated=} {at}"] = (OPS.moe_lora, (t(T, D), *whole, *scaled, True))
            needs = [True] * 6 + [given is not None for given in given_pairs]
            all_of_them = (t(T, O), t(T, D), *whole, *none, *scaled, needs)
            calls[f"moe_lora_backward {interleaved=} {gated=} {at}"] = (OPS.moe_lora_backward, all_of_them)
    for w in (None, weight):
        places = (token, w, offsets, row, slot_offsets)
        calls[f"moe_dispatch {w is None}"] = (OPS.moe_dispatch, (t(T, D), *places))
        calls[f"moe_combine {w is None}"] = (OPS.moe_combine, (t(R, D), *places))
    calls["moe_row_dots"] = (OPS.moe_row_dots, (t(T, D), t(R, D), *index))
    calls["moe_linear"] = (OPS.moe_linear, (t(R, D), t(E, F, D), offsets))
    calls["moe_outer"] = (OPS.moe_outer, (t(R, D), t(R, F), offsets))
    for bias in (None, t(E)):
        calls[f"route_linear {bias is None}"] = (OPS.route_linear, (t(T, D), t(E, D), bias))
    for chosen in ([True] * 3, [False, True, False]):
        calls[f"route_linear_backward {chosen}"] = (OPS.route_linear_backward, (t(T, E), t(T, D), t(E, D), chosen))
    flags = ((False, False), (True, False), (False, True))
    for options in (*(("softmax", *f) for f in flags), ("sigmoid", True, False), ("sqrt_softplus", True, True)):
        bias = t(E).detach()
        calls[f"route_top_k {options}"] = (OPS.route_top_k, (logits, bias, None, K, 0, *options, 1, 1, 2, 2.5))
        calls[f"route_top_k of given {options}"] = (OPS.route_top_k, (logits, None, ids, K, 0, *options, 1, 1, 2, 2.5))
        calls[f"route_top_k shared {options}"] = (
            OPS.route_top_k,
            (logits, bias[1:], None, 1, 1, *options, 1, 1, 1, 1.0),
        )
        calls[f"route_top_k_backward {options}"] = (OPS.route_top_k_backward, (t(T, K), logits, ids, *options, 2.5))
    calls["moe_sort"] = (OPS.moe_sort, (ids, None, t(T, K), E, T, 2, True))
    calls["moe_sort of pairs"] = (OPS.moe_sort, (ids.flatten(), token, t(R), E, T, -1, False))
    calls.update(quantized_calls())
    calls["balanced_assignment"] = (OPS.balanced_assignment, (logits.detach(), None))
    calls["round_tokens"] = (OPS.round_tokens, (logits.detach(), ids, 4))
    return calls


def quantized_calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    g = generator(1)

    def t(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).requires_grad_()

    def w(*shape: int) -> list[Tensor]:
        return ffn_ops.quantize(torch.randn(*shape, generator=g), "int8").parts

    T, D, F, O, E = 3, 6, 4, 5, 2
    name, offsets = "int8:1x6", torch.tensor([0, 1, 3])
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "dequantize": (OPS.dequantize, (w(E, F, D), name, "bfloat16")),
        "quantized_linear": (OPS.quantized_linear, (t(T, D), w(E, F, D), name, offsets, False)),
        "quantized_linear transposed": (OPS.quantized_linear, (t(T, F), w(E, F, D), name, offsets, True)),
    }
    options = (True, False, "silu", [0.0, 0.0])
    rows = (None, None, offsets, None, None)
    for up in (False, True):
        parts = (w(E, F if up else 2 * F, D), w(E, F, D) if up else [], w(E, O, F))
        names = f"{name},{name},int8:1x4" if up else f"{name},int8:1x4"
        experts = (*parts, names, t(E, 2 * F), t(E, O))
        for save in (True, False):
            calls[f"moe_quantized {up=} {save=}"] = (OPS.moe_quantized, (t(T, D), *rows, *experts, *options, save))
            pre = [torch.randn(T, F, generator=g) if save else torch.empty(0) for _ in range(2)]
            args = (t(T, O), t(T, D), *rows, *experts, *pre, *options, [True, False, True, True])
            calls[f"moe_quantized_backward {up=} {save=}"] = (OPS.moe_quantized_backward, args)
    return calls


CALLS = operator_calls()


def test_every_operator_is_listed() -> None:
    public = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("ffn_ops::")}
    assert {op._qualified_op_name.split("::")[1] for op, _ in CALLS.values()} == {
        name for name in public if not name.startswith("_") and (DEVICE == "cpu" or "lora" not in name)
    }


@pytest.mark.parametrize("name", CALLS)
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
