# SPDX-License-Identifier: BSD-3-Clause
"""Operators on quantised weights: the bits of the same operator on what ``dequantize`` gives, in every kernel. On a GPU
dense layers are torch's products, so those of quantised weights have the bits of a mixture of one expert."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from device import DEVICE, generator
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import ffn_ops
from ffn_ops import QuantizedWeight

# Whether the CUDA operators run: on a GPU, or in the place of the CPU's (make simt-operators).
CUDA_OPERATORS = DEVICE == "cuda" or torch.ops.ffn_ops._isas() == "simt"

# Bytes of a row of K elements, and elements in a byte or block, of each format that holds random bytes.
GGUF = {"q8_0": (34, 32), "q4_0": (18, 32), "q4_k": (144, 256), "q5_k": (176, 256), "q6_k": (210, 256),
        "gguf_mxfp4": (17, 32)}  # fmt: skip
GROUPED = ("mxfp4", "nvfp4", "fp8", "int8", "int4", "uint4")


def random_weight(format: str, shape: tuple[int, ...], g: torch.Generator) -> QuantizedWeight:
    """Codes of every value, with scales of moderate size."""
    *lead, cols = shape
    if format in GGUF:
        size, block = GGUF[format]
        codes = torch.randint(256, (*lead, cols // block, size), dtype=torch.uint8, generator=g)
        halves = {"q8_0": (0,), "q4_0": (0,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "gguf_mxfp4": ()}
        for at in halves[format]:  # float16, not infinite
            codes[..., at + 1] = 0x20 + codes[..., at + 1] % 8
        if format == "gguf_mxfp4":
            codes[..., 0] = 118 + codes[..., 0] % 8
        return QuantizedWeight(format, codes.flatten(-2))
    per_byte = 1 if format in ("fp8", "int8") else 2
    codes = torch.randint(256, (*lead, cols // per_byte), dtype=torch.uint8, generator=g)
    block = {"mxfp4": (1, 32), "nvfp4": (1, 16), "fp8": (128, 128), "int8": (1, cols), "int4": (1, 32)}.get(
        format, (1, 64)
    )
    grid = (*lead[:-1], -(-lead[-1] // block[0]), -(-cols // block[1]))
    options: dict[str, Any] = {}
    if format == "mxfp4":
        scales = torch.randint(118, 124, grid, dtype=torch.uint8, generator=g)
    elif format == "nvfp4":
        scales = torch.randint(1, 0x7F, grid, dtype=torch.uint8, generator=g)
        options["factor"] = torch.rand(lead[:-1], generator=g) * 0.01
    else:
        scales = torch.rand(grid, generator=g) * 0.01
        codes = torch.where(codes & 0x7F == 0x7F, 0, codes) if format == "fp8" else codes
    if format == "uint4":
        scales = scales.half()
        options["zeros"] = torch.randint(256, (*grid[:-1], -(-grid[-1] // 2)), dtype=torch.uint8, generator=g)
    return QuantizedWeight(format, codes, scales, block=block, **options)


def gradients(call: Any, inputs: Sequence[Tensor | None]) -> list[Tensor]:
    leaves = [None if t is None else t.clone().requires_grad_() for t in inputs]
    y = call(*leaves)
    y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape))
    return [y.detach(), *(t.grad for t in leaves if t is not None and t.grad is not None)]


def assert_same(ours: list[Tensor], expected: list[Tensor]) -> None:
    assert len(ours) == len(expected) > 1
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert torch.equal(a, b), f"result {i}: differs by {(a - b).abs().max()}"


@pytest.mark.parametrize("format", (*GROUPED, *GGUF))
def test_a_mixture_has_the_bits_of_the_dequantised_one(format: str, isa: str) -> None:
    """T takes every kernel (none, dot, broadcast, packed); an odd F and O are tails of tiles; both layouts of gate and
    up; with and without biases."""
    g = generator(1)
    E, D, O = 3, 256, 67
    F = {"fp8": 75, "int8": 75}.get(format, 256 if format in GGUF else 96)
    for T, gated, interleaved in (
        (0, False, False),
        (1, True, True),
        (3, False, False),
        (16, True, False),
        (70, True, True),
    ):
        rows = 2 * F if gated else F
        w_in, w_down = random_weight(format, (E, rows, D), g), random_weight(format, (E, O, F), g)
        inputs: list[Tensor | None] = [torch.randn(T, D, generator=g), None, None, None]
        routing = ffn_ops.routing.top_k(torch.randn(T, E, generator=g), k=2)
        inputs[1] = routing.weight
        if gated is not interleaved or T == 3:
            inputs[2:] = [torch.randn(E, rows, generator=g), torch.randn(E, O, generator=g)]
        gate = ffn_ops.Gate("swiglu_oai", interleaved=True) if interleaved else ffn_ops.Gate("silu")

        def call(x: Any, weight: Any, *b: Any, w: Any, routing: Any = routing, **form: Any) -> Any:
            return ffn_ops.moe(x, routing._replace(weight=weight), *w, b_in=b[0], b_down=b[1], **form)

        form = {"gated": gated, "activation": gate}
        plain = gradients(partial(call, w=(w_in.dequantize(), w_down.dequantize()), **form), inputs)
        assert_same(gradients(partial(call, w=(w_in, w_down), **form), inputs), plain)


@pytest.mark.cpu_only("layouts that the CPU's kernels tell apart")
@pytest.mark.parametrize("format", (*GROUPED, *GGUF))
def test_long_rows_have_the_bits_of_the_dequantised_ones(format: str, isa: str) -> None:
    """More groups than a vector of scales, more of k than a packed block, and rows that end within a vector of words; T
    takes one sum of each vector of rows, several, as many as registers hold, and packing; rows that no vector and no
    pair of panels divides."""
    g = generator(8)
    D, N = 1280 if format in ("q4_k", "q5_k", "q6_k") else 1312, 262
    w = random_weight(format, (N, D), g)
    parts, name = w.stacked()
    dense = w.dequantize()[None]
    offsets = torch.tensor([0, 0])
    for T in (1, 2, 5, 7, 16, 20):
        offsets[1] = T
        x = torch.randn(T, D, generator=g)
        ours = torch.ops.ffn_ops.quantized_linear(x, parts, name, offsets, False)
        assert torch.equal(ours, torch.ops.ffn_ops.moe_linear(x, dense, offsets)), f"T {T}"


def assert_linear_has_the_bits_of_the_dequantised_one(
    w: QuantizedWeight, x: Tensor, plain: Tensor | None = None
) -> Tensor:
    offsets = torch.tensor([0, x.shape[0]])
    parts, name = w.stacked()
    ours = torch.ops.ffn_ops.quantized_linear(x, parts, name, offsets, False)
    expected = torch.ops.ffn_ops.moe_linear(x, w.dequantize()[None], offsets) if plain is None else plain
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
    return expected


@pytest.mark.cpu_only("layouts that the CPU's kernels tell apart")
@pytest.mark.parametrize("T", (1, 4, 12, 20))
def test_a_code_that_is_no_number_stays_in_its_row(T: int, isa: str) -> None:
    """e4m3's NaN takes a slower kernel: neighbours keep their bits."""
    g = generator(9)
    w = random_weight("fp8", (150, 256), g)
    w.codes[70, 100], w.codes[149, 3] = 0x7F, 0xFF
    y = assert_linear_has_the_bits_of_the_dequantised_one(w, torch.randn(T, 256, generator=g))
    assert y.isnan().any(0).nonzero().flatten().tolist() == [70, 149]


# Beyond what readers reach, which keep scales times a power of two: largest and smallest, denormal among them.
EXTREME: dict[str, tuple[Any, ...]] = {
    "mxfp4": (0, 1, 2, 227, 228, 254),
    "gguf_mxfp4": (0, 1, 2, 227, 228, 254),
    "fp8": (1e-45, 1e-38, 100.0, 1e3, 1e30),
    "int8": (1e-45, 3e-39, 1.2345e-33, 1e30),
}


@pytest.mark.cpu_only("layouts that the CPU's kernels tell apart")
@pytest.mark.parametrize("format", EXTREME)
def test_every_scale_has_the_bits_of_the_dequantised_weight(format: str, isa: str) -> None:
    g = generator(12)
    x = torch.randn(20, 256, generator=g)
    for value in EXTREME[format]:
        w = random_weight(format, (150, 256), g)
        if format == "gguf_mxfp4":
            w.codes[70, 17], w.codes[149, 0] = value, value
        else:
            assert w.scales is not None
            w.scales.view(-1)[w.scales.numel() // 2] = value
        for T in (1, 12, 20):
            assert_linear_has_the_bits_of_the_dequantised_one(w, x[:T])


@pytest.mark.cpu_only("layouts that the CPU's kernels tell apart")
@pytest.mark.parametrize("format", ("mxfp4", "gguf_mxfp4"))
def test_sums_in_units_of_a_scale_have_the_bits_whatever_x_is(format: str, isa: str) -> None:
    """One token's sums are kept in units of the scale at hand, between scales 2^48 apart and where x is neither too
    large nor too small; another kernel takes the others, and scales beyond."""
    g = generator(14)
    w = random_weight(format, (150, 288), g)
    scales = w.codes[:, ::17] if format == "gguf_mxfp4" else w.scales
    assert scales is not None
    scales[:, 0::2], scales[:, 1::2] = 87, 135
    scales[100:] = 135 - torch.randint(48, (50, 9), generator=g).byte()
    one = torch.randn(1, 288, generator=g)
    one[0, 7:60:3] = 0
    for power in (0, 28, 31, 90, -60, -69, -75, -110):
        assert_linear_has_the_bits_of_the_dequantised_one(w, one * 2.0**power)
    one[0, 50] = torch.inf
    assert_linear_has_the_bits_of_the_dequantised_one(w, one)
    for beyond in (86, 136):
        scales[70, 4] = beyond
        assert_linear_has_the_bits_of_the_dequantised_one(w, one.nan_to_num(0) * 2.0**-69)


@pytest.mark.cpu_only("threads of a CPU have that mode")
@pytest.mark.parametrize("T", (1, 20))
def test_codes_are_what_they_are_where_denormals_are_taken_as_zero(T: int, isa: str) -> None:
    g = generator(13)
    w = random_weight("fp8", (40, 256), g)
    w.codes[:] = w.codes % 8  # denormal in e4m3
    x = torch.randn(T, 256, generator=g)
    plain = torch.ops.ffn_ops.moe_linear(x, w.dequantize()[None], torch.tensor([0, T]))
    assert plain.count_nonzero() == plain.numel()
    torch.set_flush_denormal(True)
    try:
        assert_linear_has_the_bits_of_the_dequantised_one(w, x, plain)
    finally:
        torch.set_flush_denormal(False)


def layer(x: Tensor, b: Tensor, c: Tensor, *, w: Any, form: str, recompute: bool) -> Tensor:
    """A dense layer; on plain weights a mixture of one expert where that has the bits."""
    options: dict[str, Any] = {"gated": form != "plain", "activation": "gelu", "recompute": recompute}
    two = form == "two weights"
    if isinstance(w[0], QuantizedWeight) or not CUDA_OPERATORS:
        return ffn_ops.ffn(x, w[0], w[1], w_up=w[2] if two else None, b_in=b, b_down=c, **options)
    w_in = torch.cat((w[0], w[2])) if two else w[0]
    b = torch.cat((b, torch.zeros_like(b))) if two else b
    offsets = torch.tensor([0, x.shape[0]])
    return ffn_ops.moe_experts(x, offsets, w_in[None], w[1][None], b_in=b[None], b_down=c[None], **options)


@pytest.mark.parametrize("format", ("mxfp4", "fp8", "q4_k"))
def test_a_dense_layer_has_the_bits_of_the_dequantised_one(format: str, isa: str) -> None:
    g = generator(2)
    D, F, O = 256, 75 if format == "fp8" else 256, 33
    for T in (1, 9, 40):
        for form in ("plain", "one weight", "two weights"):
            rows = 2 * F if form == "one weight" else F
            weights = [random_weight(format, shape, g) for shape in ((rows, D), (O, F), (F, D))]
            b_in, b_down = torch.randn(rows, generator=g), torch.randn(O, generator=g)
            inputs = [torch.randn(T, D, generator=g), b_in, b_down]
            call = partial(layer, form=form, recompute=T == 9)
            plain = gradients(partial(call, w=[w.dequantize() for w in weights]), inputs)
            assert_same(gradients(partial(call, w=weights), inputs), plain)


@pytest.mark.parametrize("format", (*GROUPED, "q8_0"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_sixteen_bit_activations_err_no_more_than_with_weights_of_their_dtype(format: str, dtype: torch.dtype) -> None:
    """A GPU rounds the values to that dtype for its tensor cores; a CPU does not, and is nearer."""
    g = generator(11)
    w_in, w_down = random_weight(format, (2, 192, 256), g), random_weight(format, (2, 40, 96), g)
    routing = ffn_ops.routing.top_k(torch.randn(50, 2, generator=g), k=2)
    x = torch.randn(50, 256, generator=g).to(dtype) * 0.05

    def call(x: Any, weight: Any, *, w: Any) -> Any:
        return ffn_ops.moe(x, routing._replace(weight=weight), *w, gated=True)

    inputs = [x, routing.weight]
    ours = gradients(partial(call, w=(w_in, w_down)), inputs)
    plain = gradients(partial(call, w=(w_in.dequantize(dtype), w_down.dequantize(dtype))), inputs)
    exact = gradients(partial(call, w=(w_in.dequantize(), w_down.dequantize())), [x.float(), routing.weight])
    for a, b, e in zip(ours, plain, exact, strict=True):
        assert (a.float() - e).norm() <= 1.25 * (b.float() - e).norm()


@pytest.mark.parametrize("format", (*GROUPED, *GGUF))
def test_every_number_of_tokens_and_form_has_the_bits_of_the_dequantised_layer(format: str) -> None:
    """Each kernel and the borders between them, with and without gate and biases; odd numbers of rows."""
    g = generator(9)
    D, O = 256, 33
    F = 256 if format in GGUF else 37 if format in ("fp8", "int8") else 64
    w_in, w_up, w_down = (random_weight(format, shape, g) for shape in ((F, D), (F, D), (O, F)))
    for T in (0, 1, 3, 16, 33, 512):
        x, bs = torch.randn(T, D, generator=g), [torch.randn(n, generator=g) for n in (F, F, O)]
        for gated, bias in itertools.product((False, True), (False, True)):
            b_in, b_up, b_down = bs if bias else (None, None, None)
            options: dict[str, Any] = {"b_in": b_in, "b_up": b_up if gated else None, "b_down": b_down}
            ours = ffn_ops.ffn(x, w_in, w_down, w_up=w_up if gated else None, **options)
            dense = w_up.dequantize() if gated else None
            plain = ffn_ops.ffn(x, w_in.dequantize(), w_down.dequantize(), w_up=dense, **options)
            assert ours.shape == (T, O), f"{T} tokens, gated {gated}, bias {bias}"
            if CUDA_OPERATORS:  # dense layers take torch's products there
                torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()) if T else 0)
            else:
                assert torch.equal(ours, plain), f"{T} tokens, gated {gated}, bias {bias}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gated_linear_in_16_bits_rounds_once(dtype: torch.dtype) -> None:
    g = generator(4)
    w, v = (ffn_ops.quantize(torch.randn(48, 64, generator=g), "int8") for _ in range(2))
    x, b = (torch.randn(*shape, generator=g).to(dtype) for shape in ((33, 64), (48,)))
    exact = torch.sigmoid(x.double() @ w.dequantize(torch.float64).T + b.double()) * (
        x.double() @ v.dequantize(torch.float64).T
    )
    error = (ffn_ops.gated_linear(x, w, v, b_gate=b).double() - exact).abs()
    eps = torch.finfo(dtype).eps
    assert (error <= 0.51 * eps * exact.abs() + 1e-5).all()


def test_gated_linear_has_the_bits_of_the_dequantised_one(isa: str) -> None:
    """Its gradients are added in another order."""
    g = generator(3)
    gates, ups = ([random_weight("mxfp4", (40, 64), g) for _ in range(2)] for _ in range(2))
    biases = [torch.randn(40, generator=g) for _ in range(2)]

    def call(ws: list[Any], us: list[Any]) -> Any:
        return lambda x, a, b: ffn_ops.gated_linear(x, ws, us, b_gate=[a, b], activation="gelu")

    inputs = [torch.randn(2, 5, 64, generator=g), *biases]
    plain = gradients(call(*([w.dequantize() for w in ws] for ws in (gates, ups))), inputs)
    ours = gradients(call(gates, ups), inputs)
    assert CUDA_OPERATORS or torch.equal(ours[0], plain[0])
    torch.testing.assert_close(ours, plain)


def test_experts_on_sorted_rows_have_the_bits_of_the_dequantised_ones() -> None:
    g = generator(4)
    w_in, w_down = random_weight("int8", (3, 96, 64), g), random_weight("int4", (3, 12, 96), g)
    offsets = torch.tensor([0, 4, 4, 9])  # an expert without rows, and rows behind the experts'
    rows = torch.randn(11, 64, generator=g)
    plain = [w.dequantize() for w in (w_in, w_down)]
    ours = gradients(lambda r: ffn_ops.moe_experts(r, offsets, w_in, w_down), [rows])
    assert_same(ours, gradients(lambda r: ffn_ops.moe_experts(r, offsets, *plain), [rows]))


def test_sixteen_bit_activations_are_as_close_as_dequantised_weights() -> None:
    """x is widened exactly, so a layer on bfloat16 differs from float32 by its own roundings alone."""
    g = generator(5)
    w_in, w_down = random_weight("mxfp4", (2, 64, 64), g), random_weight("mxfp4", (2, 64, 32), g)
    routing = ffn_ops.routing.top_k(torch.randn(20, 2, generator=g), k=1)
    x = torch.randn(20, 64, generator=g).bfloat16()
    y = ffn_ops.moe(x, routing, w_in, w_down, gated=True)
    exact = ffn_ops.moe(x.double(), routing._replace(weight=routing.weight.double()), w_in.dequantize().double(),
                        w_down.dequantize().double(), gated=True)  # fmt: skip
    assert y.dtype is torch.bfloat16
    assert (y - exact).norm() < 0.01 * exact.norm()


def test_second_derivatives_and_tangents_are_those_of_constants() -> None:
    g = generator(6)
    w_in, w_down = random_weight("int8", (2, 8, 16), g), random_weight("int8", (2, 5, 4), g)
    routing = ffn_ops.routing.top_k(torch.randn(6, 2, generator=g), k=2)
    b_in, x = torch.randn(2, 8, generator=g), torch.randn(6, 16, generator=g)

    def layer(w: Any, v: Any) -> Any:
        return lambda x, s, b: ffn_ops.moe(x, routing._replace(weight=s), w, v, gated=True, b_in=b, activation="silu")

    args = (x, routing.weight, b_in)
    along = tuple(torch.randn(t.shape, generator=g) for t in args)
    for run in (
        lambda f: torch.func.jvp(f, args, along)[1],
        lambda f: torch.func.jvp(lambda *a: torch.func.grad(lambda *b: f(*b).sin().sum(), (0, 1, 2))(*a), args, along)[
            1
        ],
        lambda f: torch.autograd.functional.vhp(lambda *a: f(*a).sin().sum(), args, along)[1],
    ):
        ours, plain = run(layer(w_in, w_down)), run(layer(w_in.dequantize(), w_down.dequantize()))
        torch.testing.assert_close(ours, plain)


def test_groups_that_kernels_of_a_gpu_cannot_read_are_refused_there() -> None:
    g = generator(12)
    w = QuantizedWeight.from_int8(torch.randint(-128, 128, (4, 60), generator=g).to(torch.int8), torch.rand(4, 3))
    for call in (w.dequantize, lambda: ffn_ops.ffn(torch.zeros(2, 60), w, random_weight("int8", (3, 4), g))):
        if not CUDA_OPERATORS:
            assert call().isfinite().all()
            continue
        with pytest.raises(
            (ValueError, RuntimeError), match=r"w.*: expected a scale for whole .* 8 columns .* got one for 20"
        ):
            call()


def test_flops_are_those_of_the_dense_operator() -> None:
    g = generator(8)
    w_in, w_down = random_weight("mxfp4", (2, 64, 32), g), random_weight("q8_0", (2, 12, 32), g)
    routing = ffn_ops.routing.top_k(torch.randn(6, 2, generator=g), k=2)
    counts = []
    for a, b in ((w_in, w_down), (w_in.dequantize(), w_down.dequantize())):
        for recompute in (False, True):
            x = torch.randn(6, 32, generator=g, requires_grad=True)
            with FlopCounterMode(display=False) as counter:
                ffn_ops.moe(x, routing, a, b, gated=True, recompute=recompute).sum().backward()
            counts.append(counter.get_total_flops())
    assert counts[:2] == counts[2:]
    assert counts[0] == 2 * 12 * 2 * (64 * 32 + 12 * 32)


@pytest.mark.cpu_only("it measures the workspace that the CPU keeps")
def test_nothing_of_the_size_of_a_weight_is_allocated() -> None:
    g = generator(7)
    w_in, w_down = random_weight("mxfp4", (2, 2048, 1024), g), random_weight("mxfp4", (2, 1024, 1024), g)
    for T in (1, 300):
        x = torch.randn(T, 1024, generator=g, requires_grad=True)
        routing = ffn_ops.routing.top_k(torch.randn(T, 2, generator=g), k=2)
        ffn_ops.set_cache_limit(1 << 30)
        ffn_ops.empty_cache()
        ffn_ops.moe(x, routing, w_in, w_down, gated=True).sum().backward()
        kept = torch.ops.ffn_ops._cached_bytes()  # the workspace of the largest call
        rows, width = 2 * T, 2048 + 1024 + 1024
        assert kept < 2 * rows * width * 4 + (8 << 20), f"{kept} bytes for {T} tokens"
