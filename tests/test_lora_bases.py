# SPDX-License-Identifier: BSD-3-Clause
"""Adapters over quantised weights, which are constants, and in dense layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device import generator, gradcheck, gradgradcheck
from problems import assert_same_bits
from test_lora import FORMS, NAMES, SCALE, WIDE, Mixture, assert_close, every_form
from tolerance import assert_error_like_eagers
from torch import Tensor

import ffn_ops
from ffn_ops import Gate, Lora, QuantizedWeight, reference, routing
from ffn_ops.ops import _ffn

SIZES = {"T": 20, "D": 64, "F": 32, "O": 48, "rank": (4, 8)}


def over(m: Mixture, format: str) -> tuple[dict[str, Tensor], dict[str, QuantizedWeight]]:
    """Float32 tensors with the values of quantised weights, and those weights."""
    held = {n: ffn_ops.quantize(m.tensors[n].float(), format) for n in ("w_in", "w_down")}
    t = {n: v.float() for n, v in m.tensors.items()}
    return {**t, **{n: w.dequantize() for n, w in held.items()}}, held


def on_codes(m: Mixture, held: dict[str, QuantizedWeight]) -> Any:
    def call(recompute: bool = False, **t: Tensor) -> Tensor:
        lora = Lora(**{n: t.get(f"lora_{n}") for n in NAMES}, scale=SCALE)
        options = {"b_in": t["b_in"], "b_down": t["b_down"], **m.options, "lora": lora, "recompute": recompute}
        return ffn_ops.moe(t["x"], routing.top_k(t["logits"], 2), held["w_in"], held["w_down"], **options)

    return call


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("format", ["mxfp4", "int8", "int4", "fp8"])
def test_quantised_bases_give_the_bits_of_dequantised_ones(format: str, tokens: int) -> None:
    """And so do the gradients of x, the routing's weights, biases and adapters; all of them, recomputed, or one."""
    for form in FORMS:
        m = Mixture(form, **{**SIZES, "T": tokens})
        t, held = over(m, format)
        plain = {n: v for n, v in t.items() if n not in held}
        expected = m.results(m.ours, t, plain)
        assert_same_bits(m.results(on_codes(m, held), plain), expected)
        assert_same_bits(m.results(on_codes(m, held), plain, recompute=True), expected)
        for needed in ("lora_a_in", "lora_b_down"):
            assert_same_bits(m.results(on_codes(m, held), plain, [needed]), {n: expected[n] for n in ("y", needed)})


@pytest.mark.parametrize("pair", ["in", "down"])
def test_one_pair_over_a_quantised_base(pair: str) -> None:
    m = Mixture(**SIZES, pairs=(pair,))
    t, held = over(m, "mxfp4")
    plain = {n: v for n, v in t.items() if n not in held}
    assert_same_bits(m.results(on_codes(m, held), plain), m.results(m.ours, t, plain))


def test_bfloat16_rows_over_a_quantised_base() -> None:
    """As accurate as eager: float32 adapters, as PEFT keeps them."""
    m = Mixture(**{**SIZES, "T": 60})
    t, held = over(m, "mxfp4")
    t = {n: v if "lora" in n or n in ("logits", *held) else v.bfloat16() for n, v in t.items()}
    given = {n: v for n, v in t.items() if n not in held}
    exact = m.results(m.plain, {n: v.double() for n, v in t.items()}, given)
    eager = m.results(m.plain, {**t, **{n: t[n].bfloat16() for n in held}}, given)
    actual = m.results(on_codes(m, held), given)
    for n, value in exact.items():
        assert actual[n].dtype is eager[n].dtype
        assert_error_like_eagers(actual[n], eager[n], value)


@every_form
def test_second_derivatives_over_a_quantised_base(form: str) -> None:
    m = Mixture(form, **{**SIZES, "T": 3})
    t, held = over(m, "int8")
    given = {n: v for n, v in t.items() if n not in held}
    g = generator(5)
    directions = {n: torch.randn(v.shape, generator=g) for n, v in given.items()}

    def second(call: Any) -> list[Tensor]:
        leaves = {n: v.clone().requires_grad_() for n, v in given.items()}
        y = call(**leaves)
        grads = torch.autograd.grad((y * m.d_y.float()).sum(), list(leaves.values()), create_graph=True)
        total = sum((grad * directions[n]).sum() for n, grad in zip(leaves, grads, strict=True))
        again = torch.autograd.grad(total, list(leaves.values()))  # type: ignore[arg-type]
        tangent = torch.func.jvp(lambda d: call(**d), (given,), (directions,))[1]
        return [*again, tangent]

    expected = second(lambda **d: m.ours(**d, **{n: t[n] for n in held}))
    for actual, value in zip(second(on_codes(m, held)), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))


def test_compiled_over_a_quantised_base() -> None:
    m = Mixture(**SIZES)
    t, held = over(m, "mxfp4")
    call = on_codes(m, held)
    compiled = torch.compile(lambda t: call(**t), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(t), call(**t))


# ---- dense layers ---------------------------------------------------------------------------------------------------


class Layer:
    """A dense layer of one weight before the activation, or of ``two``."""

    def __init__(self, form: str, two: bool, pairs: tuple[str, ...], T: int = 7, D: int = 5, F: int = 6, O: int = 4):
        gated, interleaved = FORMS[form]
        self.options: dict[str, Any] = {"gated": gated, "activation": Gate("silu", interleaved=interleaved)}
        rows = 2 * F if gated and not two else F
        shapes: dict[str, tuple[int, ...]] = {"x": (T, D), "w_in": (rows, D), "w_down": (O, F), "b_in": (rows,)}
        shapes |= {"b_down": (O,)}
        if two:
            shapes |= {"w_up": (F, D)}
        for rank, place in enumerate(pairs, 1):
            out, width = shapes[f"w_{place}"]
            shapes |= {f"lora_a_{place}": (rank, width), f"lora_b_{place}": (out, rank)}
        g = generator(3)
        self.tensors = {n: torch.randn(s, generator=g, dtype=WIDE) * s[-1] ** -0.5 for n, s in shapes.items()}
        self.d_y = torch.randn(T, O, generator=g, dtype=WIDE)

    results = Mixture.results

    def ours(self, recompute: bool = False, **t: Tensor) -> Tensor:
        lora = Lora(**{n.removeprefix("lora_"): v for n, v in t.items() if "lora" in n}, scale=SCALE)
        base = {n: v for n, v in t.items() if "lora" not in n}
        return ffn_ops.ffn(**base, **self.options, lora=lora, recompute=recompute)

    def plain(self, **t: Tensor) -> Tensor:
        """The formula, in the tensors' own dtype."""

        def linear(rows: Tensor, place: str) -> Tensor:
            z, a, b = rows @ t[f"w_{place}"].T, t.get(f"lora_a_{place}"), t.get(f"lora_b_{place}")
            z = z + t[f"b_{place}"] if f"b_{place}" in t else z
            return z if a is None or b is None else z + (SCALE * (rows.to(a.dtype) @ a.T @ b.T)).to(z)

        gate = self.options["activation"]
        z, up = linear(t["x"], "in"), linear(t["x"], "up") if "w_up" in t else None
        if self.options["gated"] and up is None:
            z, up = (z[:, ::2], z[:, 1::2]) if gate.interleaved else z.chunk(2, 1)
        return linear(reference.gated_act(z, up, activation=gate.replace(interleaved=False)), "down")


LAYERS = {
    "plain": ("plain", False, ("in", "down")),
    "one weight": ("gated", False, ("in", "down")),
    "alternating": ("alternating", False, ("in", "down")),
    "two weights": ("gated", True, ("in", "up", "down")),
    "gate's pair": ("gated", True, ("in",)),
    "up's pair": ("gated", True, ("up", "down")),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_dense_layers_and_every_gradient(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the operator, recomputed, and by torch's products where those are faster."""
    for T in (1, 7, 70):
        m = Layer(*LAYERS[layer], T=T)
        expected = m.results(m.plain, m.tensors)
        assert_close(m.results(m.ours, m.tensors), expected)
        assert_close(m.results(m.ours, m.tensors, recompute=True), expected)
    monkeypatch.setattr(_ffn, "prefers_torch", lambda x: True)
    assert_close(m.results(m.ours, m.tensors), expected)


def test_a_dense_layer_of_tiles_and_of_any_leading_dimensions() -> None:
    m = Layer(*LAYERS["two weights"], T=90, D=70, F=45, O=66)
    expected = m.results(m.plain, m.tensors)
    assert_close(m.results(m.ours, m.tensors), expected)
    x = m.tensors["x"].unflatten(0, (9, 10))
    torch.testing.assert_close(m.ours(**{**m.tensors, "x": x}), expected["y"].unflatten(0, (9, 10)))


@pytest.mark.parametrize("layer", ["plain", "one weight", "two weights"])
def test_second_derivatives_of_a_dense_layer(layer: str) -> None:
    m = Layer(*LAYERS[layer], T=2, D=2, F=1, O=1)
    names = list(m.tensors)
    leaves = [m.tensors[n].requires_grad_() for n in names]

    def call(*values: Tensor) -> Tensor:
        return m.ours(**dict(zip(names, values, strict=True)))

    assert gradcheck(call, leaves, check_forward_ad=True) and gradgradcheck(call, leaves, check_fwd_over_rev=True)


@pytest.mark.parametrize("torchs", [False, True], ids=["operator", "torch's products"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dense_layers_with_float32_adapters_are_as_accurate_as_eager(
    dtype: torch.dtype, torchs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ffn, "prefers_torch", lambda x: torchs)
    m = Layer(*LAYERS["two weights"], T=60, D=40, F=48, O=40)
    t = {n: v.float() if "lora" in n else v.to(dtype) for n, v in m.tensors.items()}
    exact = m.results(m.plain, {n: v.double() for n, v in t.items()})
    eager, actual = m.results(m.plain, t), m.results(m.ours, t)
    for n, value in exact.items():
        assert actual[n].dtype is eager[n].dtype
        assert_error_like_eagers(actual[n], eager[n], value)
    if dtype is torch.float32:
        return
    with torch.autocast(t["x"].device.type, dtype):
        assert torch.equal(m.ours(**{n: v.float() for n, v in t.items()}), actual["y"])


@pytest.mark.cpu_only("a GPU sums the halves of two plain weights apart")
def test_a_quantised_dense_layer_gives_the_bits_of_its_dequantised_one() -> None:
    m = Layer(*LAYERS["two weights"], T=9, D=64, F=32, O=48)
    t = {n: v.float() for n, v in m.tensors.items()}
    held = {n: ffn_ops.quantize(v, "int8") for n, v in t.items() if n.startswith("w_")}
    t |= {n: w.dequantize() for n, w in held.items()}
    given = {n: v for n, v in t.items() if n not in held}
    assert_same_bits(m.results(lambda **d: m.ours(**d, **held), given), m.results(m.ours, t, given))  # type: ignore[arg-type]


WRONG: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "up without w_up": (
        ValueError, "lora: expected a_up and b_up None without a w_up", {"a_up": (2, 5), "b_up": (6, 2)},
    ),
    "width": (ValueError, r"lora.a_in: expected shape \[r, 5\], got \[2, 4\]", {"a_in": (2, 4), "b_in": (12, 2)}),
    "rows": (ValueError, r"lora.b_in: expected shape \[12, 2\], got \[6, 2\]", {"a_in": (2, 5), "b_in": (6, 2)}),
    "stacked": (ValueError, r"lora.a_down: expected shape \[r, 6\]", {"a_down": (1, 2, 6), "b_down": (1, 4, 2)}),
    "one of a pair": (ValueError, "a_up, b_up: expected both or neither, got one", {"a_up": (2, 5)}),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_adapters_of_a_dense_layer(case: str) -> None:
    error, message, shapes = WRONG[case]
    m = Layer("gated", False, ())
    with pytest.raises(error, match=message):
        ffn_ops.ffn(**m.tensors, **m.options, lora=Lora(**{n: torch.zeros(s, dtype=WIDE) for n, s in shapes.items()}))


def test_rows_of_gate_and_up_do_not_make_up_for_each_other() -> None:
    m = Layer("gated", True, ())
    shapes = {"a_in": (2, 5), "b_in": (7, 2), "a_up": (1, 5), "b_up": (5, 1)}  # 12 rows in all, as there are
    lora = Lora(**{n: torch.zeros(s, dtype=WIDE) for n, s in shapes.items()})
    with pytest.raises(ValueError, match=r"lora.b_in: expected shape \[6, 2\], got \[7, 2\]"):
        ffn_ops.ffn(**m.tensors, **m.options, lora=lora)
