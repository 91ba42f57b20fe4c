# SPDX-License-Identifier: BSD-3-Clause
"""``replace`` on layers whose children other libraries have quantised: one operator on their own bytes, against float64
on what those libraries say that the bytes mean. Those of AWQ and GPTQ need other versions of torch: classes of their
names, with their documented buffers, stand for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device import generator
from seen import Seen
from test_quantized_dense import Mlp
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional as F

import ffn_ops

pytestmark = pytest.mark.cpu_only("quantised weights have no CUDA kernels")
Quantised = tuple[nn.Module, dict[str, Tensor]]  # a layer, and its weights in float64 by its library or its formula
TRACED = torch.__version__ >= "2.15"
NAMES = ("gate_proj", "up_proj", "down_proj")


def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp()


def by_torchao(config: Callable[[Any], Any]) -> Quantised:
    quantization = pytest.importorskip("torchao.quantization")
    layer = mlp()
    quantization.quantize_(layer, config(quantization))
    return layer, {name: layer.get_submodule(name).weight.dequantize().double() for name in NAMES}  # type: ignore[operator, union-attr]


def by_transformers(scale: torch.dtype, block: tuple[int, int] | None) -> Quantised:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    layer, g, dense = mlp(), generator(1), {}
    for name in NAMES:
        old: Any = layer.get_submodule(name)
        options = {"scale_fmt": "ue8m0"} if scale is not torch.float32 else {}
        new = fp8.FP8Linear(old.in_features, old.out_features, block, has_bias=old.bias is not None, **options)
        new.weight.data = (30 * torch.randn(new.weight.shape, generator=g)).to(torch.float8_e4m3fn)
        values = torch.randint(-9, -6, new.weight_scale_inv.shape, generator=g).float().exp2()
        if scale is torch.float32:
            values = values * (1 + torch.rand(values.shape, generator=g))
        new.weight_scale_inv.data = values.to(new.weight_scale_inv.dtype)
        if old.bias is not None:
            new.bias.data = old.bias.data
        rows, cols = block or new.weight.shape
        wide = values.reshape(-1, 1) if block is None else values
        wide = wide.double().repeat_interleave(rows, 0).repeat_interleave(cols, 1)
        dense[name] = new.weight.double() * wide[: old.out_features, : old.in_features]
        setattr(layer, name, new)
    return layer, dense


def by_compressed_tensors(format: str | None = None, **weights: Any) -> Quantised:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import compress_module, decompress_module
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, initialize_module_for_quantization

    layer, dense = mlp(), {}
    for name in NAMES:
        child: Any = layer.get_submodule(name)
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
        initialize_module_for_quantization(child, scheme)
        child.weight_scale.data.fill_(0.02)
        child.weight_scale.data += 0.01 * torch.rand(child.weight_scale.shape, generator=generator(2))
        if weights["type"] == "float" and weights["strategy"] == "group":  # mxfp4: its scales are powers of two
            child.weight_scale.data = (
                torch.randint(-8, -4, child.weight_scale.shape, generator=generator(2)).float().exp2()
            )
        if weights["strategy"] == "tensor_group":
            child.weight_scale.data = (100 * child.weight_scale.data.float()).to(child.weight_scale.dtype)
            child.weight_global_scale.data.fill_(128.0)  # of a power of two the library's bfloat16 values are exact
        if not weights["symmetric"]:
            child.weight_zero_point.data = torch.randint(-8, 8, child.weight_zero_point.shape).to(torch.int8)
        compress_module(child, format)
        other = copy.deepcopy(child)
        decompress_module(other)
        dense[name] = other.weight.detach().double()
    return layer, dense


class Packed(nn.Module):
    def __init__(self, old: nn.Linear, **held: Any) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group_size = old.in_features, old.out_features, 32
        for name, t in held.items():
            self.register_buffer(name, t)
        self.register_buffer("bias", None if old.bias is None else old.bias.detach().half())


AWQ: Any = type("WQLinear_GEMM", (Packed,), {"__module__": "awq.modules.linear.gemm", "w_bit": 4})
GPTQ: Any = type("TorchQuantLinear", (Packed,),
                 {"__module__": "gptqmodel.nn_modules.qlinear.torch", "bits": 4, "qzero_format": lambda self: 2,
                  "adapter": None})  # fmt: skip


def packed(t: Tensor, order: tuple[int, ...]) -> Tensor:
    """Eight values of the last dimension to a word, the value ``order[i]`` in its nibble i."""
    words = (t.unflatten(-1, (-1, 8))[..., list(order)] << torch.arange(0, 32, 4)).sum(-1)
    return (words & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)


def by_hand(kind: Any) -> Quantised:
    layer, g, dense = mlp(), generator(3), {}
    for name in NAMES:
        old: Any = layer.get_submodule(name)
        K, N = old.in_features, old.out_features
        q, zeros = (torch.randint(16, (rows, N), generator=g) for rows in (K, K // 32))
        scales = (0.02 * torch.rand(K // 32, N, generator=g)).half()
        if kind is AWQ:
            order = (0, 2, 4, 6, 1, 3, 5, 7)
            new = AWQ(old, qweight=packed(q, order), qzeros=packed(zeros, order), scales=scales)
        else:
            order = tuple(range(8))
            g_idx = torch.arange(K, dtype=torch.int32) // 32
            words = packed(q.T, order).T.contiguous()
            new = GPTQ(old, qweight=words, qzeros=packed(zeros, order), scales=scales, g_idx=g_idx)
        wide = (each.repeat_interleave(32, 0).double() for each in (zeros, scales))
        dense[name] = ((q - next(wide)) * next(wide)).T
        setattr(layer, name, new)
    return layer, dense


FP8, MX = torch.float32, torch.uint8
ZERO_COPY: dict[str, Callable[[], Quantised]] = {
    "torchao int8": lambda: by_torchao(lambda q: q.Int8WeightOnlyConfig()),
    "torchao int8, bytes of int4": lambda: by_torchao(
        lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32))
    ),
    "torchao fp8": lambda: by_torchao(lambda q: q.Float8WeightOnlyConfig()),
    "transformers fp8, blocks": lambda: by_transformers(FP8, (128, 128)),
    "transformers fp8, partial blocks": lambda: by_transformers(FP8, (40, 48)),
    "transformers fp8, tensor": lambda: by_transformers(FP8, None),
    "transformers fp8, e8m0": lambda: by_transformers(MX, (32, 32)),
    "compressed-tensors int4": lambda: by_compressed_tensors(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=32
    ),
    "compressed-tensors int8": lambda: by_compressed_tensors(
        "naive-quantized", num_bits=8, type="int", symmetric=True, strategy="channel"
    ),
    "compressed-tensors mxfp4": lambda: by_compressed_tensors(
        num_bits=4, type="float", symmetric=True, strategy="group", group_size=32, scale_dtype=torch.uint8
    ),
}
TURNED: dict[str, Callable[[], Quantised]] = {
    "compressed-tensors nvfp4": lambda: by_compressed_tensors(
        num_bits=4,
        type="float",
        symmetric=True,
        strategy="tensor_group",
        group_size=16,
        scale_dtype=torch.float8_e4m3fn,
    ),
    "compressed-tensors uint4": lambda: by_compressed_tensors(
        num_bits=4, type="int", symmetric=False, strategy="group", group_size=32
    ),
    "compressed-tensors int8 in words": lambda: by_compressed_tensors(
        num_bits=8, type="int", symmetric=True, strategy="channel"
    ),
    "awq": lambda: by_hand(AWQ),
    "gptq": lambda: by_hand(GPTQ),
}


def tensors(layer: nn.Module) -> dict[str, Tensor]:
    """All tensors of the children, those inside subclasses too."""
    found = {}
    for name, t in (*layer.named_parameters(), *layer.named_buffers()):
        for part in t.__tensor_flatten__()[0] if hasattr(t, "__tensor_flatten__") else ("",):
            found[f"{name}.{part}"] = getattr(t, part) if part else t.detach()
    return found


@pytest.mark.parametrize("name", (*ZERO_COPY, *TURNED))
def test_other_libraries_bytes_are_computed_in_one_operator(name: str) -> None:
    layer, w = {**ZERO_COPY, **TURNED}[name]()
    held = tensors(layer)
    before = {each: t.clone() for each, t in held.items()}
    ffn_ops.replace(layer)
    assert ffn_ops.replace_report(layer).paths("replaced") == [""]
    x = torch.randn(2, 5, 64, generator=generator(4), requires_grad=True)
    with Seen() as seen:
        y = layer(x)
    assert seen.names == ["moe_quantized"]
    biases = [None if child.bias is None else child.bias.double() for child in (layer.gate_proj, layer.down_proj)]  # type: ignore[union-attr, operator]
    z = x.double()
    hidden = F.silu(F.linear(z, w["gate_proj"], biases[0])) * F.linear(z, w["up_proj"])
    exact = F.linear(hidden, w["down_proj"], biases[1])
    size = float(exact.detach().abs().max())
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5 * size)
    grads = [torch.autograd.grad(each.double().sum(), x)[0] for each in (y, exact)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5 * float(grads[1].abs().max()))
    half = layer(x.bfloat16().detach()) if name in TURNED and "compressed" not in name else None
    assert half is None or (half - exact).norm() < 0.02 * exact.norm()  # biases of their own dtype
    ffn_ops.restore(layer)
    assert type(layer) is Mlp
    for each, t in tensors(layer).items():
        assert t.data_ptr() == held[each].data_ptr() and torch.equal(t.double(), before[each].double())


@pytest.mark.parametrize("name", ("torchao int8", "transformers fp8, blocks", "compressed-tensors int4", "gptq"))
def test_bytes_are_read_as_they_are_now(name: str) -> None:
    """Written to in place, and exchanged; those that lie as they are held once."""
    from ffn_ops._quantized.linear import weight_of

    layer, _ = {**ZERO_COPY, **TURNED}[name]()
    other, _ = {**ZERO_COPY, **TURNED}[name]()
    x = torch.randn(3, 64, generator=generator(5))
    ffn_ops.replace(layer)
    first = layer(x)
    assert torch.equal(layer(x), first)
    held = weight_of(layer.down_proj)
    assert held is not None and held is not weight_of(other.down_proj)
    mine = {t.data_ptr() for t in tensors(layer).values()}
    assert (held[0].codes.data_ptr() in mine) is (name in ZERO_COPY)
    with torch.no_grad():
        for each, t in tensors(layer.up_proj).items():  # type: ignore[arg-type]
            if each.split(".")[0] in ("scales", "weight_scale", "weight_scale_inv") or each.endswith(".scale"):
                t.mul_(2)
    assert not torch.allclose(layer(x), first)
    layer.up_proj = other.up_proj
    torch.testing.assert_close(layer(x), first)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (lambda q: q.Int8DynamicActivationInt8WeightConfig(), "its input is quantised or scaled too"),
        (lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32),
                                          mapping_type=q.MappingType.ASYMMETRIC), "zero points other than 0"),
    ],
)  # fmt: skip
def test_what_no_format_holds_is_called_and_said(config: Any, why: str) -> None:
    plain, _ = by_torchao(config)
    layer, x = ffn_ops.replace(copy.deepcopy(plain)), torch.randn(3, 64, generator=generator(6))
    torch.testing.assert_close(layer(x), plain(x))
    (entry,) = ffn_ops.replace_report(layer).entries
    assert entry.status == "partly"
    assert f"up_proj is called (quantised otherwise than the operators take it: {why})" in entry.why


def test_gptq_in_another_order_is_said() -> None:
    layer, _ = by_hand(GPTQ)
    layer.up_proj.g_idx = layer.up_proj.g_idx.flip(0)  # type: ignore[union-attr, operator]
    layer.down_proj.bits = 3  # type: ignore[union-attr]
    (entry,) = ffn_ops.replace_report(layer).entries
    assert "up_proj is called (quantised otherwise than the operators take it: g_idx: expected k // 32" in entry.why
    assert "down_proj is called (quantised otherwise than the operators take it: 3 bits)" in entry.why


@pytest.mark.skipif(not TRACED, reason="dynamo takes no constants of modules; the children are called")
@pytest.mark.parametrize("name", ZERO_COPY)
def test_compiled_calls_are_the_operator_on_the_bytes_of_that_moment(name: str, dynamo: None) -> None:
    layer, _ = ZERO_COPY[name]()
    ffn_ops.replace(layer)
    targets: list[str] = []

    def recording(graph: Any, inputs: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return aot_eager(graph, inputs)

    x = torch.randn(3, 64, generator=generator(7), requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend=recording)
    for _ in range(2):
        y, again = layer(x), compiled(x)
        assert torch.equal(again, y)
        assert torch.equal(*(torch.autograd.grad(each.sum(), x)[0] for each in (again, y)))
        with torch.no_grad():  # written to in place: the graph reads what is there
            for each, t in tensors(layer).items():
                t.mul_(2) if "scale" in each.split(".")[-1] and t.dtype.itemsize > 1 else None
    assert [each for each in targets if each.startswith("ffn_ops")] == ["ffn_ops.moe_quantized.default"]


def test_what_is_turned_is_called_in_a_compiled_call_and_the_report_says_so(dynamo: None) -> None:
    layer, _ = TURNED["gptq"]()
    (entry,) = ffn_ops.replace_report(ffn_ops.replace(layer)).entries
    assert entry.status == "replaced"
    reason = "its bytes are turned" if TRACED else "torch is older than 2.15"
    turned = ", ".join(f"{each} ({reason})" for each in NAMES)
    assert entry.why == f"in torch.compile the linear layers are called: {turned}"
    with pytest.raises(Exception, match="forward"):  # the class that stands for gptqmodel's has none
        torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(3, 64))
    if TRACED:
        (entry,) = ffn_ops.replace_report(ffn_ops.replace(ZERO_COPY["torchao int8"]()[0])).entries
        assert entry.why == ""
