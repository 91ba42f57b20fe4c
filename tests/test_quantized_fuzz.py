# SPDX-License-Identifier: BSD-3-Clause
"""Readers and raw operators given tensors that do not fit: an error that names the argument, before any work, or a
weight of the shape that its bytes have. guarded_run.py gives the operators such bytes before a page that faults."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device import generator
from guarded_run import misfits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ffn_ops import QuantizedWeight

pytestmark = pytest.mark.cpu_only("quantised weights have no CUDA kernels")
fuzz = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)

NAMED = re.compile(r"^[\w ]+: expected .*, got .*", re.DOTALL)
I32, U8, F32, F16 = torch.int32, torch.uint8, torch.float32, torch.float16
FP8, INT8 = torch.float8_e4m3fn, torch.int8

# Of each reader: the shapes and dtypes that fit N = 16, K = 64, and the shape that it makes of them.
READERS: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {
    "from_mxfp4": {"blocks": ((16, 2, 16), U8), "scales": ((16, 2), U8)},
    "from_nvfp4": {"packed": ((16, 32), U8), "scales": ((16, 4), FP8), "factor": ((), F32)},
    "from_fp8": {"weight": ((16, 64), FP8), "scale_inv": ((1, 1), F32)},
    "from_int8": {"weight": ((16, 64), INT8), "scale": ((16, 2), F32)},
    "from_gptq": {"qweight": ((8, 16), I32), "qzeros": ((2, 2), I32), "scales": ((2, 16), F16), "g_idx": ((64,), I32)},
    "from_awq": {"qweight": ((64, 2), I32), "qzeros": ((2, 2), I32), "scales": ((2, 16), F16)},
    "from_compressed_tensors": {"weight_packed": ((16, 8), I32), "weight_scale": ((16, 2), F32),
                                "weight_zero_point": ((2, 2), I32)},
}  # fmt: skip
DTYPES = (I32, U8, F32, F16, FP8, INT8, torch.int64, torch.float64, torch.bool)
OTHERS = (None, 3, "tensor", [1.0], torch.zeros(2, 2).to_sparse())


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    count = int(torch.tensor(shape).prod()) * dtype.itemsize
    raw = torch.randint(128, (count,), dtype=U8, generator=generator(seed))  # positive; infinite and NaN among floats
    return raw.to(torch.bool).reshape(shape) if dtype is torch.bool else raw.view(dtype).reshape(shape)


@st.composite
def calls(draw: Any) -> tuple[str, dict[str, Any]]:
    name = draw(st.sampled_from(sorted(READERS)))
    given_ = {}
    for i, (each, (shape, dtype)) in enumerate(READERS[name].items()):
        dims = list(shape)
        how = draw(st.sampled_from(["fits", "fits", "fits", "size", "dims", "dtype", "other"]))
        if how == "size" and dims:
            dims[draw(st.integers(0, len(dims) - 1))] = draw(st.integers(0, 40))
        elif how == "dims":
            dims = draw(st.lists(st.integers(0, 20), max_size=4))
        elif how == "dtype":
            dtype = draw(st.sampled_from(DTYPES))
        given_[each] = draw(st.sampled_from(OTHERS)) if how == "other" else drawn(tuple(dims), dtype, i)
        if dtype is I32 and each == "g_idx" and how == "fits":
            given_[each] = torch.arange(64, dtype=I32) // 32
    return name, given_


@fuzz
@given(call=calls())
def test_a_reader_makes_a_weight_or_names_what_does_not_fit(call: tuple[str, dict[str, Any]]) -> None:
    name, tensors = call
    try:
        w = getattr(QuantizedWeight, name)(**tensors)
    except (ValueError, TypeError) as error:
        assert NAMED.match(str(error)), f"{name}: {error}"
        return
    assert w.dequantize().shape == w.shape
    first = next(iter(tensors.values()))
    values = {"from_mxfp4": 2, "from_nvfp4": 2, "from_fp8": 1, "from_int8": 1}.get(name, 8)
    assert w.shape.numel() == values * first.numel()


@fuzz
@given(
    name=st.sampled_from(["Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4", "IQ1_S", "F32", "q8_0", ""]),
    shape=st.lists(st.integers(0, 300), max_size=4),
    dtype=st.sampled_from([U8, INT8, F32]),
)
def test_a_truncated_gguf_is_refused(name: str, shape: list[int], dtype: torch.dtype) -> None:
    shape = [min(size, 3) for size in shape[:-1]] + shape[-1:]
    data = drawn(tuple(shape), dtype, 0)
    tensor = SimpleNamespace(data=data.numpy(), tensor_type=SimpleNamespace(name=name))
    size = {"Q8_0": 34, "Q4_0": 18, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "MXFP4": 17}.get(name)
    if size and dtype is U8 and len(shape) in (2, 3) and shape[-1] % size == 0:
        w = QuantizedWeight.from_gguf(tensor)
        assert w.dequantize().shape == w.shape
    else:
        with pytest.raises((ValueError, TypeError), match=NAMED):
            QuantizedWeight.from_gguf(tensor)


@pytest.mark.parametrize("K", [64, 96, 80])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_gptq_knows_its_groups(K: int, group: int) -> None:
    """K = 96 in two groups is 64 and 32, or 48 twice: the number of groups does not say it."""
    groups, g = -(-K // group), generator(1)
    words = torch.randint(-(2**31), 2**31, (K // 8, 16), generator=g).to(I32)
    zeros = torch.randint(-(2**31), 2**31, (groups, 2), generator=g).to(I32)
    scales = torch.rand(groups, 16, generator=g)
    order = torch.arange(K) // group
    shifts = torch.arange(0, 32, 4)
    q = (words.unsqueeze(1) >> shifts[:, None] & 15).reshape(K, 16)
    z = (zeros.unsqueeze(-1) >> shifts & 15).reshape(groups, 16)
    expected = ((q - z[order]).float() * scales[order]).T
    for options in ({"group": group}, {"g_idx": order}, {"g_idx": order, "group": group}):
        w = QuantizedWeight.from_gptq(words, zeros, scales, version=2, **options)  # type: ignore[arg-type]
        assert torch.equal(w.dequantize(), expected)
    if groups > 1 and K % groups:
        with pytest.raises(ValueError, match="group: expected the columns of a group"):
            QuantizedWeight.from_gptq(words, zeros, scales, version=2)
    with pytest.raises(ValueError, match="scales: expected shape"):
        QuantizedWeight.from_gptq(words, zeros, scales, group=8)
    if groups > 1:
        with pytest.raises(ValueError, match=r"g_idx: expected k // .*, got another order"):
            QuantizedWeight.from_gptq(words, zeros, scales, order.flip(0))


def test_gptq_of_two_groups_asks_how_they_are_cut() -> None:
    with pytest.raises(ValueError, match="group: expected the columns of a group where K = 96"):
        QuantizedWeight.from_gptq(torch.zeros(12, 16, dtype=I32), torch.zeros(2, 2, dtype=I32), torch.ones(2, 16))


def test_raw_operators_refuse_what_does_not_fit() -> None:
    refused, ran = misfits(10)
    assert refused > 250 and ran > 40, (refused, ran)
