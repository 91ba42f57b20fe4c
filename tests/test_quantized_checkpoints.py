# SPDX-License-Identifier: BSD-3-Clause
"""``from_pretrained`` of the transformers integration: tiny checkpoints in the layouts that people publish, made here,
against the same models dequantised by transformers or by the formula."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Auto, check_like, check_saved, checkpoint, held, is_mapped, safetensors, transformers
from device import generator
from torch import Tensor, nn
from torch.nn import functional as F

import ffn_ops
from ffn_ops import QuantizedWeight
from ffn_ops.integrations.transformers import from_pretrained, report

pytestmark = pytest.mark.cpu_only("checkpoints stay quantised on the CPU")

GPT_OSS = dict(
    vocab_size=50, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
)  # fmt: skip


def deepseek(width: int) -> dict[str, Any]:
    return dict(
        vocab_size=50, hidden_size=256, intermediate_size=width, moe_intermediate_size=width, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=160, kv_lora_rank=96, qk_rope_head_dim=32,
        qk_nope_head_dim=32, v_head_dim=48, n_shared_experts=1, pad_token_id=0,
    )  # fmt: skip


def mxfp4(name: str, t: Tensor) -> Any:
    if not name.endswith(("gate_up_proj", "down_proj")):
        return None
    E, K, N = t.shape
    blocks = torch.randint(256, (E, N, K // 32, 16), dtype=torch.uint8, generator=generator(N))
    scales = torch.randint(118, 122, (E, N, K // 32), dtype=torch.uint8, generator=generator(K))
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, t


def fp8(name: str, t: Tensor) -> Any:
    if "_proj" not in name:
        return None
    block = [torch.arange(n) // 128 for n in t.shape]
    scale = torch.rand([-(-n // 128) for n in t.shape], generator=generator(len(name))) * 1e-3 + 1e-4
    codes = (30 * torch.randn(t.shape, generator=generator(t.shape[0]))).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scale}, codes.float() * scale[block[0]][:, block[1]]


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"}


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: Any) -> Path:
    config = transformers.GptOssConfig(**GPT_OSS)
    return checkpoint(tmp_path_factory.mktemp("gpt_oss"), config, {"quant_method": "mxfp4"}, mxfp4)


def test_gpt_oss_stays_in_the_bytes_of_its_file(gpt_oss: Path, tmp_path: Path) -> None:
    file = gpt_oss / "model.safetensors"
    model = from_pretrained(Auto, gpt_oss)
    assert model.dtype is torch.bfloat16 and held(model) <= 1.05 * file.stat().st_size
    weights = [w for w in model.modules() if isinstance(w, QuantizedWeight)]
    assert len(weights) == 4 and all(w.format == "mxfp4" for w in weights)
    if Path("/proc/self/maps").exists():
        assert all(is_mapped(file, t) for w in weights for t in w.parts)
        assert not is_mapped(file, weights[0].codes.clone())
    model = from_pretrained(Auto, gpt_oss, dtype=torch.float32)
    check_like(model, Auto.from_pretrained(gpt_oss, dtype=torch.float32))
    check_saved(model, tmp_path)


@pytest.mark.parametrize("width", [448, 576, 300])
def test_deepseek_with_partial_blocks(width: int, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, transformers.DeepseekV3Config(**deepseek(width)), FP8, fp8)
    model = from_pretrained(Auto, folder)
    assert held(model) <= 1.05 * (folder / "model.safetensors").stat().st_size
    assert not is_mapped(folder / "model.safetensors")
    model, dense = (
        from_pretrained(Auto, folder, dtype=torch.float32),
        Auto.from_pretrained(folder / "dense", dtype=torch.float32),
    )
    values = dict(dense.named_parameters())
    paths = report(model).paths("quantised")
    assert len(paths) == 18 and not report(model).paths("dequantised")
    for path in paths:
        assert torch.equal(model.get_submodule(path).dequantize(), values[path])
    check_like(model, dense)
    check_saved(model, tmp_path / "saved")


QWEN = dict(
    vocab_size=50, hidden_size=64, intermediate_size=96, moe_intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=4, num_experts_per_tok=2,
    mlp_only_layers=[0], pad_token_id=0,
)  # fmt: skip


def words(nibbles: Tensor) -> Tensor:
    """Eight neighbours of the first dimension in an int32, the first in its lowest bits."""
    shifts = torch.arange(0, 32, 4).view(8, *[1] * (nibbles.dim() - 1))
    packed = (nibbles.unflatten(0, (-1, 8)).long() << shifts).sum(1)
    return torch.where(packed < 2**31, packed, packed - 2**32).int()


def gptq(name: str, t: Tensor) -> Any:
    """Groups of 32 along K; zeros are stored less one, by a subtraction of whole words."""
    if "_proj" not in name:
        return None
    (N, K), g = t.shape, generator(len(name) + t.shape[0])
    codes, zeros = torch.randint(16, (K, N), generator=g), torch.randint(16, (K // 32, N), generator=g)
    scales = (torch.rand(K // 32, N, generator=g) * 0.02).half()
    group = torch.arange(K) // 32
    stem = name.removesuffix("weight")
    parts = {
        "qweight": words(codes),
        "qzeros": (words(zeros.T) - 0x11111111).T.contiguous(),
        "scales": scales,
        "g_idx": group.int(),
    }
    values = ((codes - zeros[group]) * scales[group].float()).T
    return {stem + each: part for each, part in parts.items()}, values


def awq(name: str, t: Tensor) -> Any:
    if "_proj" not in name:
        return None
    (N, K), g = t.shape, generator(len(name) + t.shape[0])
    codes, zeros = torch.randint(16, (K, N), generator=g), torch.randint(16, (K // 32, N), generator=g)
    scales = (torch.rand(K // 32, N, generator=g) * 0.02).half()
    order = torch.arange(N).view(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].flatten()
    stem = name.removesuffix("weight")
    parts = {"qweight": words(codes[:, order].T).T, "qzeros": words(zeros[:, order].T).T, "scales": scales}
    group = torch.arange(K) // 32
    values = ((codes - zeros[group]) * scales[group].float()).T
    return {stem + each: part.contiguous() for each, part in parts.items()}, values


def compressed(
    format: str, weights: dict[str, Any], whole_of: Callable[[str], float] = lambda name: 3000.0 + len(name)
) -> tuple[dict[str, Any], Callable[[str, Tensor], Any]]:
    """Settings, and what compressed-tensors makes of a weight; ``whole_of``: the divisor of all scales of a tensor."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.utils import calculate_qparams

    group = {"targets": ["Linear"], "weights": weights, "format": format}
    scheme = QuantizationScheme(**group)
    compressor = BaseCompressor.get_value_from_registry(format)

    def change(name: str, t: Tensor) -> Any:
        if "_proj" not in name:
            return None
        columns = weights.get("group_size") or t.shape[1]
        cells = t.float().unflatten(1, (-1, columns))
        nvfp4 = format == "nvfp4-pack-quantized"
        whole = torch.full((1,), whole_of(name)) if nvfp4 else None
        scale, zero = calculate_qparams(cells.amin(-1), cells.amax(-1), scheme.weights, whole)
        state = {"weight": t.float(), "weight_scale": scale.to(torch.bfloat16), "weight_zero_point": zero}
        if nvfp4:
            state = {"weight": t.float(), "weight_scale": scale, "weight_global_scale": whole}
        parts = compressor.compress({**state, "weight_scale": state["weight_scale"].float()}, scheme)
        if nvfp4:  # its decompress rounds to bfloat16
            codes = unpack_fp4_from_uint8(parts["weight_packed"], *t.shape, torch.float32)
            scale = parts["weight_scale"].float()
            values = dequantize(codes, scale, args=scheme.weights, global_scale=whole, dtype=torch.float32)
        else:
            values = compressor.decompress(dict(parts), scheme)["weight"]
        if parts["weight_scale"].dtype is torch.float32:
            parts["weight_scale"] = state["weight_scale"]
        stem = name.removesuffix("weight")
        return {stem + each: part.contiguous() for each, part in parts.items()}, values

    settings = {
        "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"],
    }  # fmt: skip
    return settings, change


GROUPS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True,
         "scale_dtype": "torch.float8_e4m3fn"}  # fmt: skip
ROWS = {"num_bits": 8, "symmetric": True, "strategy": "channel"}
METHODS: dict[str, Any] = {
    "gptq": lambda: ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}, gptq),
    "awq": lambda: ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq),
    "int4": lambda: compressed("pack-quantized", {**GROUPS, "symmetric": True}),
    "uint4": lambda: compressed("pack-quantized", {**GROUPS, "symmetric": False}),
    "mxfp4": lambda: compressed(
        "mxfp4-pack-quantized", {**GROUPS, "type": "float", "symmetric": True, "scale_dtype": "torch.uint8"}
    ),
    "nvfp4": lambda: compressed("nvfp4-pack-quantized", NVFP4, lambda name: 3000.0 + ("down" in name)),
    "int8": lambda: compressed("int-quantized", {**ROWS, "type": "int"}),
    "float8": lambda: compressed("float-quantized", {**ROWS, "type": "float"}),
}


@pytest.mark.parametrize("method", METHODS)
def test_qwen_in_the_layouts_of_other_libraries(method: str, tmp_path: Path) -> None:
    settings, change = METHODS[method]()
    folder = checkpoint(tmp_path, transformers.Qwen3MoeConfig(**QWEN), settings, change)
    assert held(from_pretrained(Auto, folder)) <= 1.05 * (folder / "model.safetensors").stat().st_size
    model = from_pretrained(Auto, folder, dtype=torch.float32)
    dense = Auto.from_pretrained(folder / "dense", dtype=torch.float32)
    values = dict(dense.named_parameters())
    paths = report(model).paths("quantised")
    assert len(paths) == 13 and not report(model).paths("dequantised")
    for path in paths:
        torch.testing.assert_close(model.get_submodule(path).dequantize(), values[path], rtol=1e-6, atol=0)
    check_like(model, dense)
    check_saved(model, tmp_path / "saved")


def test_factors_that_gate_and_up_do_not_share_are_said(tmp_path: Path) -> None:
    settings, change = compressed("nvfp4-pack-quantized", NVFP4, lambda name: 3000.0 + ("up_proj" in name))
    folder = checkpoint(tmp_path, transformers.Qwen3MoeConfig(**QWEN), settings, change)
    with pytest.warns(UserWarning, match="because gate and up of an expert have different factors"):
        model = from_pretrained(Auto, folder, dtype=torch.float32)
    assert [path.rpartition(".")[2] for path in report(model).paths("dequantised")] == ["gate_up_proj", "down_proj"]
    check_like(model, Auto.from_pretrained(folder / "dense", dtype=torch.float32))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"quant_method": "gptq", "bits": 8}, "bits: expected 4 of a quantised checkpoint, got 8"),
        ({"quant_method": "gptq", "bits": 4, "desc_act": True}, "desc_act: expected False of a .* got True"),
        (
            {"quant_method": "awq", "bits": 4, "version": "gemv"},
            "version: expected 'gemm' or 'GEMM' of a .* got 'gemv'",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"g": {"weights": {"num_bits": 3, "type": "int"}}},
            },
            "num_bits: expected 4 of a quantised checkpoint, got 3",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "mxfp8-quantized",
                "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float"}}},
            },
            "format: expected 'pack-quantized' or .* got 'mxfp8-quantized'",
        ),
    ],
)
def test_variants_without_a_format_are_refused(settings: dict[str, Any], match: str, gpt_oss: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(gpt_oss)
    config.quantization_config = settings
    with pytest.raises(ValueError, match=match):
        from_pretrained(Auto, gpt_oss, config=config)


def test_fp4_codes_in_an_fp8_checkpoint(tmp_path: Path) -> None:
    """Experts as DeepSeek-V4 has them: two codes in a byte, e8m0 scales under another name."""

    def change(name: str, t: Tensor) -> Any:
        if ".experts." not in name:
            return fp8(name, t)
        codes = torch.randint(256, (t.shape[0], t.shape[1] // 2), dtype=torch.uint8, generator=generator(1))
        scale = torch.randint(118, 122, (t.shape[0], t.shape[1] // 32), dtype=torch.uint8, generator=generator(2))
        values = QuantizedWeight.from_mxfp4(codes, scale).dequantize()
        renamed = name.replace(".weight", ".scale")
        return {name: codes.view(torch.int8), renamed: scale.view(torch.float8_e8m0fnu)}, values

    folder = checkpoint(tmp_path, transformers.DeepseekV3Config(**deepseek(64)), FP8, change)
    model = from_pretrained(Auto, folder, dtype=torch.float32)
    assert model.model.layers[1].mlp.experts.down_proj.format == "mxfp4"
    check_like(model, Auto.from_pretrained(folder / "dense", dtype=torch.float32))


def test_what_cannot_be_kept_is_dequantised_and_said(tmp_path: Path) -> None:
    """Experts whose up projections the checkpoint has left dense; their down projections must then be dense too."""

    def change(name: str, t: Tensor) -> Any:
        return None if ".experts." in name and "up_proj" in name else fp8(name, t)

    folder = checkpoint(tmp_path, transformers.DeepseekV3Config(**deepseek(300)), FP8, change)
    with pytest.warns(UserWarning, match="2 quantised weights were dequantised, because some of its experts are not"):
        model = from_pretrained(Auto, folder, dtype=torch.float32)
    dense = Auto.from_pretrained(folder / "dense", dtype=torch.float32)
    for each in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{each}"
        (entry,) = (entry for entry in report(model).entries if entry.path == name)
        assert (entry.status, entry.computes) == ("dequantised", "float32")
        assert torch.equal(model.get_parameter(name), dense.get_parameter(name))
    check_like(model, dense)


def test_refusals_before_any_work(gpt_oss: Path, tmp_path: Path) -> None:
    def refused(match: str, folder: Path = gpt_oss, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            from_pretrained(Auto, folder, **options)

    refused("quantization_config: expected a quant_method, one of mxfp4, fp8, .* got None", gpt_oss / "dense")
    config = transformers.AutoConfig.from_pretrained(gpt_oss)
    config.quantization_config = {"quant_method": "bitsandbytes"}
    refused("quant_method: expected one of mxfp4, fp8, .*, got 'bitsandbytes'", config=config)
    refused("device_map: expected the CPU, .* got 'cuda'", device_map="cuda")
    refused(r"device_map: expected the CPU, .* got {'lm_head': 'cpu', '': 1}", device_map={"lm_head": "cpu", "": 1})
    refused("quantization_config: expected None", quantization_config=transformers.Mxfp4Config())
    refused("experts_implementation: expected 'ffn_ops', got 'eager'", experts_implementation="eager")
    for arguments, match in (((str(gpt_oss), Auto), "model_class: expected a class .* got str"),
                             ((Auto, None), "name: expected a path or a name on the hub, got NoneType")):  # fmt: skip
        with pytest.raises(TypeError, match=match):
            from_pretrained(*arguments)
    state = safetensors.load_file(gpt_oss / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_scales"
    state[name] = state[name][:, :-1].contiguous()
    safetensors.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((gpt_oss / "config.json").read_text())
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        from_pretrained(Auto, tmp_path)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_that_was_quantised_here_is_saved(wrapped: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**QWEN)
    Auto.from_config(config).save_pretrained(tmp_path / "dense")
    model = Auto.from_pretrained(tmp_path / "dense", experts_implementation="ffn_ops")
    assert len(ffn_ops.quantize_(nn.Sequential(model) if wrapped else model, "int8").paths("quantised")) == 1
    check_saved(model, tmp_path / "saved")
    again = from_pretrained(Auto, tmp_path / "saved")
    experts = [each.model.layers[1].mlp.experts for each in (model, again)]
    assert all(map(torch.equal, *(each.gate_up_proj.parts for each in experts)))


@pytest.mark.parametrize("bias", [False, True])
def test_linear_layers(bias: bool) -> None:
    g = generator(3)
    w = ffn_ops.quantize(torch.randn(24, 64, generator=g), "mxfp4")
    b = nn.Parameter(torch.randn(24, generator=g)) if bias else None
    layer, dense = ffn_ops.QuantizedLinear(w, b), w.dequantize()
    x = torch.randn(2, 3, 64, generator=g, requires_grad=True)
    inputs = (x, b) if bias else (x,)
    y, expected = layer(x), F.linear(x, dense, b)
    d = torch.randn(y.shape, generator=g)
    torch.testing.assert_close(y, expected)
    for actual, wanted in zip(torch.autograd.grad(y, inputs, d), torch.autograd.grad(expected, inputs, d), strict=True):
        torch.testing.assert_close(actual, wanted)
    half = layer.to(torch.bfloat16)(x.bfloat16())
    assert torch.equal(half, F.linear(x.bfloat16().float(), dense, b.float() if bias else None).bfloat16())
    with pytest.raises(ValueError, match=r"x: expected shape \[..., 64\], got \[2, 3\]"):
        layer(x[..., 0])
    with pytest.raises(TypeError, match="x: expected dtype float32, float16 or bfloat16 where weights are"):
        layer(x.double())
