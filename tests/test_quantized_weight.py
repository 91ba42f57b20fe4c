# SPDX-License-Identifier: BSD-3-Clause
"""QuantizedWeight: values against the libraries that define each format or their written formula, errors, and what it
is as a buffer."""

from __future__ import annotations

import copy
import io
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device import generator
from test_quantized import GGUF, GROUPED, random_weight
from torch import Tensor, nn

import ffn_ops
from ffn_ops import QuantizedWeight

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def codes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator(seed))


def nibbles(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def words(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=generator(seed)).to(torch.int32)


def test_mxfp4_is_what_transformers_makes_of_gpt_oss(isa: str) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = codes(2, 6, 3, 16), torch.randint(110, 140, (2, 6, 3), dtype=torch.uint8)
    w = QuantizedWeight.from_mxfp4(blocks, scales)
    expected = mxfp4.convert_moe_packed_tensors(blocks, scales).transpose(1, 2)
    assert torch.equal(w.dequantize(torch.bfloat16), expected)
    assert w.codes.data_ptr() == blocks.data_ptr()  # the bytes as they lie
    assert torch.equal(
        QuantizedWeight.from_mxfp4(blocks.flatten(-2).view(torch.int8), scales).dequantize(), w.dequantize()
    )


def test_mxfp4_over_the_whole_range_of_scales(isa: str) -> None:
    scales = torch.arange(255, dtype=torch.uint8).reshape(255, 1)
    w = QuantizedWeight.from_mxfp4(codes(255, 16), scales)
    fp4 = torch.tensor(FP4, dtype=torch.float64)[nibbles(w.codes).long()]
    exact = fp4 * torch.exp2(scales.double() - 127)
    assert torch.equal(w.dequantize(), exact.float())
    assert torch.equal(w.dequantize(torch.float64), exact.float().double())


def test_nvfp4_is_its_formula(isa: str) -> None:
    w = random_weight("nvfp4", (3, 5, 48), generator(1))
    scales = w.scales.view(torch.float8_e4m3fn).float() * w.factor[:, None, None]
    fp4 = torch.tensor(FP4)[nibbles(w.codes).long()]
    assert torch.equal(w.dequantize(), fp4 * scales.repeat_interleave(16, -1))


@pytest.mark.parametrize("shape", [(448, 300), (576, 128), (300, 448)])
def test_fp8_blocks_are_their_formula_with_partial_ones_too(shape: tuple[int, int], isa: str) -> None:
    bytes_ = codes(*shape)  # NaN among them
    scale = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128), generator=generator(1))
    weight = bytes_.view(torch.float8_e4m3fn)
    expected = weight.float()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            expected[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= scale[i, j]
    ours = QuantizedWeight.from_fp8(weight, scale).dequantize()
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
    assert expected.isnan().any()


def test_fp8_by_row_by_tensor_and_with_powers_of_two(isa: str) -> None:
    weight = codes(2, 6, 40).where(codes(2, 6, 40) & 0x7F != 0x7F, 0).view(torch.float8_e4m3fn)
    rows, one = torch.rand(2, 6), torch.rand(2)
    assert torch.equal(QuantizedWeight.from_fp8(weight, rows, "row").dequantize(), weight.float() * rows[..., None])
    by_tensor = QuantizedWeight.from_fp8(weight, one, "tensor").dequantize()
    assert torch.equal(by_tensor, weight.float() * one[:, None, None])
    powers = torch.randint(120, 130, (2, 1, 1), dtype=torch.uint8)
    ours = QuantizedWeight.from_fp8(weight, powers.view(torch.float8_e8m0fnu)).dequantize()
    assert torch.equal(ours, weight.float() * torch.exp2(powers.float() - 127))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_is_its_formula(dtype: torch.dtype, isa: str) -> None:
    weight = codes(7, 72).view(torch.int8)
    for scale in (torch.rand(7).to(dtype), torch.rand(7, 3).to(dtype)):
        wide = scale.float().reshape(7, -1).repeat_interleave(72 // (scale.numel() // 7), -1)
        assert torch.equal(QuantizedWeight.from_int8(weight, scale).dequantize(), weight.float() * wide)


def test_gptq_is_its_formula(isa: str) -> None:
    """Zeros of version 1 are stored less one, in a subtraction from the whole word, whose borrow runs."""
    K, N, group = 64, 16, 32
    q = torch.randint(16, (K, N), generator=generator(1))
    zeros = torch.randint(16, (K // group, N), generator=generator(2))
    zeros[0, :8] = torch.tensor([0, 0, 1, 15, 0, 3, 0, 7])
    scales = torch.rand(K // group, N).half()
    shifts = torch.arange(8) * 4
    pack = lambda t: ((t << shifts).sum(-1) & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)  # noqa: E731
    qweight = pack(q.reshape(K // 8, 8, N).transpose(1, 2))
    qzeros = pack(zeros.reshape(K // group, N // 8, 8))
    expected = ((q - zeros.repeat_interleave(group, 0)).float() * scales.float().repeat_interleave(group, 0)).T
    order = torch.arange(K) // group
    v1 = QuantizedWeight.from_gptq(qweight, qzeros - 0x11111111, scales, order)
    assert torch.equal(v1.dequantize(), expected)
    assert torch.equal(QuantizedWeight.from_gptq(qweight, qzeros, scales, version=2).dequantize(), expected)
    stack = QuantizedWeight.from_gptq(*(torch.stack((t, t)) for t in (qweight, qzeros, scales)), version=2)
    assert torch.equal(stack.dequantize(), torch.stack((expected, expected)))
    with pytest.raises(ValueError, match="g_idx: expected k // 32, got another order"):
        QuantizedWeight.from_gptq(qweight, qzeros, scales, order.flip(0))


def test_awq_is_its_formula(isa: str) -> None:
    K, N, group = 64, 16, 32
    q = torch.randint(16, (K, N), generator=generator(1))
    zeros = torch.randint(16, (K // group, N), generator=generator(2))
    scales = torch.rand(K // group, N).half()

    def pack(t: Tensor) -> Tensor:
        out = torch.zeros(t.shape[0], t.shape[1] // 8, dtype=torch.int64)
        for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            out |= t[:, column::8] << (4 * i)
        return out.to(torch.uint32).view(torch.int32)

    expected = ((q - zeros.repeat_interleave(group, 0)).float() * scales.float().repeat_interleave(group, 0)).T
    assert torch.equal(QuantizedWeight.from_awq(pack(q), pack(zeros), scales).dequantize(), expected)


def test_compressed_tensors_is_its_formula(isa: str) -> None:
    q = torch.randint(-8, 8, (16, 64), generator=generator(1))
    scale = torch.rand(16, 2).bfloat16()
    zero = torch.randint(-8, 8, (16, 2), generator=generator(2))
    shifts = torch.arange(8) * 4
    packed = ((q + 8).reshape(16, 8, 8) << shifts).sum(-1).to(torch.uint32).view(torch.int32)
    packed_zero = ((zero + 8).T.reshape(2, 2, 8) << shifts).sum(-1).T.to(torch.uint32).view(torch.int32)
    wide = scale.float().repeat_interleave(32, 1)
    symmetric = QuantizedWeight.from_compressed_tensors(packed, scale)
    assert torch.equal(symmetric.dequantize(), q.float() * wide)
    assert symmetric.codes.data_ptr() == packed.data_ptr()
    ours = QuantizedWeight.from_compressed_tensors(packed, scale, packed_zero.contiguous())
    assert torch.equal(ours.dequantize(), (q - zero.repeat_interleave(32, 1)).float() * wide)


def ggml(format: str, b: Any) -> list[float]:
    """One block of ggml-quants.c, in its own loops; float32 at each step."""
    half = lambda at: torch.tensor(list(b[at : at + 2]), dtype=torch.uint8).view(torch.float16).float()  # noqa: E731
    signed = lambda byte: byte - 256 if byte > 127 else byte  # noqa: E731
    out = []
    if format == "q8_0":
        out = [half(0) * signed(q) for q in b[2:]]
    elif format == "q4_0":
        out = [half(0) * ((q & 15) - 8) for q in b[2:]] + [half(0) * ((q >> 4) - 8) for q in b[2:]]
    elif format == "gguf_mxfp4":
        d = torch.tensor(2.0) ** (b[0] - 128)  # the table is doubled
        values = [int(2 * v) for v in FP4]
        out = [d * values[q & 15] for q in b[1:]] + [d * values[q >> 4] for q in b[1:]]
    elif format in ("q4_k", "q5_k"):
        for j in range(8):
            s = b[4:16]
            scale = s[j] & 63 if j < 4 else (s[j + 4] & 15) | (s[j - 4] >> 6 << 4)
            low = s[j + 4] & 63 if j < 4 else (s[j + 4] >> 4) | (s[j] >> 6 << 4)
            for i in range(32):
                q = b[(16 if format == "q4_k" else 48) + 32 * (j // 2) + i] >> 4 * (j % 2) & 15
                if format == "q5_k":
                    q += 16 * (b[16 + i] >> j & 1)
                out.append(half(0) * scale * q - half(2) * low)
    else:
        for k in range(256):
            n, l, j = k // 128, k % 32, k % 128 // 32
            q = b[64 * n + l + 32 * (j % 2)] >> 4 * (j // 2) & 15 | (b[128 + 32 * n + l] >> 2 * j & 3) << 4
            out.append(half(208) * signed(b[192 + k // 16]) * (q - 32))
    return [float(v) for v in out]


@pytest.mark.parametrize("format", GGUF)
def test_gguf_blocks_are_those_of_ggml(format: str, isa: str) -> None:
    size, block = GGUF[format]
    w = random_weight(format, (2, 2 * block), generator(3))
    expected = [[v for at in (0, size) for v in ggml(format, row[at : at + size])] for row in w.codes.tolist()]
    assert torch.equal(w.dequantize(), torch.tensor(expected))


@pytest.mark.cpu_only("files of GGUF are read on the CPU")
@pytest.mark.parametrize("format", GGUF)
def test_gguf_blocks_are_those_of_the_gguf_library(format: str) -> None:
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[format.removeprefix("gguf_").upper()]
    w = random_weight(format, (3, 4, 512), generator(3))
    tensor = SimpleNamespace(data=w.codes.numpy(), tensor_type=kind)
    read = QuantizedWeight.from_gguf(tensor)
    assert read.format == format and read.codes.data_ptr() == w.codes.data_ptr()
    assert torch.equal(read.dequantize(), torch.from_numpy(gguf.quants.dequantize(tensor.data, kind)))


def test_pieces_of_compressed_tensors_library() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    q = torch.randint(-8, 8, (16, 64), dtype=torch.int8)
    packed = pack_to_int32(q, 4)
    assert torch.equal(QuantizedWeight.from_compressed_tensors(packed, torch.ones(16, 1)).dequantize(), q.float())


# ---- quantize -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "group", "most"),
    [("mxfp4", None, 0.13), ("int8", None, 0.01), ("int8", 16, 0.006), ("int4", None, 0.1), ("fp8", None, 0.03)],
)
def test_quantize_takes_the_nearest_code(format: str, group: Any, most: float) -> None:
    """No other code of the same scale is nearer."""
    w = torch.randn(3, 10, 64, generator=generator(4))
    made, error = ffn_ops.quantize(w, format, group=group, return_error=True)
    value = made.dequantize()
    assert 0.001 < error.relative < most
    assert error.largest == float((value - w).abs().max())
    every = torch.arange(256 if format in ("fp8", "int8") else 16, dtype=torch.uint8)
    nearest = torch.full_like(w, torch.inf)
    for code in every:
        filled = torch.full_like(made.codes, int(code) * (1 if len(every) == 256 else 17))
        other = QuantizedWeight(format, filled, made.scales, block=made.block).dequantize()
        nearest = torch.minimum(nearest, (other - w).abs().nan_to_num(torch.inf))
    assert torch.equal((value - w).abs(), nearest)


def test_quantize_counts_what_saturates_and_takes_zeros() -> None:
    w = torch.zeros(2, 32)
    w[0, 0], w[0, 1] = 7.9, 4.0  # the exponent is that of 4; 6 is the largest code
    made, error = ffn_ops.quantize(w, "mxfp4", return_error=True)
    assert error.saturated == 1
    assert made.dequantize()[0, :2].tolist() == [6.0, 4.0]
    for format in ("mxfp4", "fp8", "int8", "int4"):
        assert not ffn_ops.quantize(torch.zeros(4, 32), format).dequantize().any()


# ---- as a value, a module, a pytree ---------------------------------------------------------------------------------


@pytest.mark.parametrize("format", (*GROUPED, *GGUF))
def test_copies_pickles_and_saves(format: str) -> None:
    w = random_weight(format, (2, 4, 256), generator(5))
    holder = nn.Module()
    holder.w = w
    for other in (copy.deepcopy(w), pickle.loads(pickle.dumps(w))):
        assert (other.format, other.block, other.shape) == (w.format, w.block, w.shape)
        assert torch.equal(other.dequantize(), w.dequantize())
    file = io.BytesIO()
    torch.save(holder.state_dict(), file)
    file.seek(0)
    empty = nn.Module()
    empty.w = copy.deepcopy(w)
    for t in empty.w.parts:
        t.zero_()
    for assign in (False, True):
        empty.load_state_dict(torch.load(io.BytesIO(file.getvalue())), assign=assign)
        assert torch.equal(empty.w.dequantize(), w.dequantize())


def test_to_moves_bytes_and_leaves_dtypes() -> None:
    w = random_weight("nvfp4", (2, 4, 64), generator(6))
    before = w.dequantize()
    holder = nn.Sequential(nn.Linear(2, 2))
    holder.w = w
    for change in (holder.half, holder.double, holder.bfloat16, holder.float):
        assert torch.equal(change().w.dequantize(), before)
    assert holder.to("meta").w.codes.is_meta
    assert holder.w.shape == (2, 4, 64)


def test_prints_and_does_not_change() -> None:
    w = QuantizedWeight.from_mxfp4(codes(320, 1440), torch.full((320, 90), 127, dtype=torch.uint8))
    assert repr(w) == "QuantizedWeight(mxfp4, [320, 2880], 0.5 of 1.8 MB in bfloat16)"
    assert w.nbytes == 320 * (1440 + 90)
    for name, value in (("format", "int4"), ("codes", codes(2, 2)), ("block", (1, 1)), ("other", 1)):
        with pytest.raises(AttributeError, match="does not change"):
            setattr(w, name, value)
    with pytest.raises(TypeError, match="LoRA"):
        w.requires_grad_()
    assert w.requires_grad_(False) is w


def test_is_a_pytree_of_its_tensors() -> None:
    w = random_weight("uint4", (4, 128), generator(7))
    doubled = torch.utils._pytree.tree_map(lambda t: t.clone(), {"w": w})["w"]
    assert isinstance(doubled, QuantizedWeight)
    assert torch.equal(doubled.dequantize(), w.dequantize())
    assert doubled.codes.data_ptr() != w.codes.data_ptr()


def test_compiles_and_exports_with_the_same_bits() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w_in = random_weight("mxfp4", (64, 32), generator(8))
            self.w_down = random_weight("int8", (24, 64), generator(9))

        def forward(self, x: Tensor) -> Tensor:
            return ffn_ops.ffn(x, self.w_in, self.w_down)

    layer, x = Layer(), torch.randn(5, 32, generator=generator(10), requires_grad=True)
    y = layer(x)
    (d_x,) = torch.autograd.grad(y.sum(), x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    again = compiled(x)
    assert torch.equal(again, y)
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], d_x)
    program = torch.export.export(layer, (x.detach(),))
    assert torch.equal(program.module()(x.detach()), y)
    assert {"w_in.codes", "w_in.scales", "w_down.codes"} <= program.state_dict.keys()


# ---- bad input ------------------------------------------------------------------------------------------------------

BYTES = torch.zeros(4, 16, dtype=torch.uint8)
GPTQ = (torch.zeros(8, 16, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, 16))
BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda: QuantizedWeight("q2_k", BYTES), ValueError, "format: expected one of mxfp4, .*, got 'q2_k'"),
    (lambda: QuantizedWeight.from_mxfp4(BYTES, BYTES), ValueError, r"scales: expected shape \[4, 1\]"),
    (lambda: QuantizedWeight.from_mxfp4(BYTES[:, :8], BYTES[:, :1]), ValueError, "multiple of 32 elements"),
    (lambda: QuantizedWeight.from_mxfp4(BYTES, BYTES[:, :1] + 255), ValueError, "expected finite scales, got 4"),
    (lambda: QuantizedWeight.from_mxfp4(BYTES.float(), BYTES[:, :1]), TypeError, "blocks: expected dtype uint8"),
    (lambda: QuantizedWeight.from_fp8(BYTES, torch.ones(1, 1)), TypeError, "weight: expected dtype float8_e4m3fn"),
    (lambda: QuantizedWeight.from_fp8(BYTES.view(torch.float8_e4m3fn), torch.ones(2, 2)), ValueError, "scales:"),
    (lambda: QuantizedWeight.from_fp8(BYTES.view(torch.float8_e4m3fn), torch.full((1, 1), torch.inf)), ValueError,
     "scales: expected finite"),
    (lambda: QuantizedWeight.from_int8(BYTES.view(torch.int8), torch.ones(4, 3)), ValueError, "scale: expected a last"),
    (lambda: QuantizedWeight.from_gguf(BYTES), TypeError, "tensor: expected a gguf.ReaderTensor"),
    (lambda: QuantizedWeight.from_gguf(SimpleNamespace(data=BYTES, tensor_type=SimpleNamespace(name="IQ1_S"))),
     ValueError, "tensor_type: expected one of Q8_0, Q4_0, Q4_K, Q5_K, Q6_K, MXFP4, got 'IQ1_S'"),
    (lambda: QuantizedWeight("q8_0", BYTES), ValueError, "codes: expected rows of whole blocks of 34 bytes"),
    (lambda: QuantizedWeight("q8_0", torch.zeros(2, 34, dtype=torch.uint8), BYTES), TypeError, "scales: .* None"),
    (lambda: ffn_ops.quantize(torch.randn(4, 33), "int4"), ValueError,
     "group: expected a divisor of K = 33, got 32, the default of int4"),
    (lambda: ffn_ops.quantize(torch.randn(4, 33), "int4", group=11), ValueError,
     r"w: expected an even number of columns for int4, got \[4, 33\]"),
    (lambda: ffn_ops.quantize(torch.randn(4, 32), "int8", return_error=1), TypeError, "return_error: expected True or"),
    (lambda: QuantizedWeight("q8_0", torch.zeros(4, 34, dtype=torch.uint8).to_sparse()), ValueError,
     "codes: expected a strided tensor, got layout torch.sparse_coo"),
    (lambda: ffn_ops.quantize(torch.full((4, 32), torch.nan), "int8"), ValueError, "w: expected finite .* 128"),
    (lambda: ffn_ops.quantize(torch.randn(4, 32), "q4_k"), ValueError, "one of mxfp4, fp8, int8, int4, got"),
    (lambda: ffn_ops.quantize(torch.full((4, 32), 1e300, dtype=torch.float64), "mxfp4"), ValueError, "w: .* finite"),
    (lambda: ffn_ops.quantize(torch.empty(4, 32, device="meta"), "int8"), ValueError, "w: .* on the meta device"),
    (lambda: QuantizedWeight.from_mxfp4(BYTES[0], BYTES[0, 0]), ValueError, r"scales: expected shape \[..., N, K / 32"),
    (lambda: QuantizedWeight.from_fp8(BYTES.view(torch.float8_e4m3fn), torch.ones(1), 128), ValueError, "block: .*8"),
    (lambda: QuantizedWeight("int8", BYTES, torch.ones(4, 1), block=(1, 16, 2)), ValueError, "block: expected a pair"),
    (lambda: QuantizedWeight.from_nvfp4(BYTES.expand(3, 4, 16), BYTES[:, :2].expand(3, 4, 2), torch.ones(2)),
     ValueError, r"factor: expected one value or one for each expert, \[3\], got \[2\]"),
    (lambda: QuantizedWeight.from_gptq(*GPTQ, torch.tensor(0)), ValueError, r"g_idx: .* \[..., K\], got \[\]"),
    (lambda: QuantizedWeight.from_gptq(*GPTQ, [0] * 64), TypeError, "g_idx: expected a torch.Tensor, got list"),
]  # fmt: skip


@pytest.mark.cpu_only("scales are looked at on the CPU alone")
@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_weights_are_refused_by_name(case: int) -> None:
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()


def test_bad_calls_are_refused_by_name() -> None:
    w_in, w_down = (ffn_ops.quantize(torch.randn(*shape), "int8") for shape in ((8, 6), (5, 8)))
    x = torch.randn(3, 6)
    lora = ffn_ops.Lora(torch.randn(1, 2, 5), torch.randn(1, 8, 2))
    assert ffn_ops.ffn(x, w_in, w_down).shape == (3, 5)
    for error, message, call in (
        (TypeError, "x: expected dtype .* got float64", lambda: ffn_ops.ffn(x.double(), w_in, w_down)),
        (TypeError, "w_down: expected a QuantizedWeight", lambda: ffn_ops.ffn(x, w_in, torch.randn(5, 8))),
        (ValueError, "w_in: expected a quantised weight", lambda: ffn_ops.ffn(x[:, :5], w_in, w_down)),
        (ValueError, r"w_down: expected a quantised weight of shape \[1, D_out, 8\]",
         lambda: ffn_ops.ffn(x, w_in, ffn_ops.quantize(torch.randn(5, 7), "int8"))),
        (ValueError, r"w_in: expected a quantised weight of shape \[E, N, K\]",
         lambda: ffn_ops.moe_experts(x, torch.tensor([0, 3]), w_in, w_down)),
        (TypeError, "b_in: expected a torch.Tensor, got list", lambda: ffn_ops.ffn(x, w_in, w_down, b_in=[1.0])),
        (TypeError, "routing: expected an ffn_ops.Routing", lambda: ffn_ops.moe(x, None, w_in, w_down)),
        (TypeError, "mesh: expected a torch.distributed.device_mesh.DeviceMesh",
         lambda: ffn_ops.expert_parallel.shard(w_in, 8, None)),
        (TypeError, "b_in: expected dtype float32", lambda: ffn_ops.ffn(x, w_in, w_down, b_in=torch.randn(8).double())),
        (ValueError, r"lora.a_in: expected shape \[r, 6\], got \[1, 2, 5\]",
         lambda: ffn_ops.ffn(x, w_in, w_down, lora=lora)),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
