# SPDX-License-Identifier: BSD-3-Clause
"""``from_pretrained`` of the transformers integration with a GGUF file that gguf-py wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Auto, check_like, check_saved, held, is_mapped, transformers
from torch import Tensor

from ffn_ops import QuantizedWeight
from ffn_ops.integrations.transformers import from_pretrained, report

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.cpu_only("quantised weights have no CUDA kernels")
KINDS = gguf.GGMLQuantizationType

QWEN = dict(
    vocab_size=64, hidden_size=64, intermediate_size=96, moe_intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=4, num_experts_per_tok=2,
    norm_topk_prob=True,
)  # fmt: skip


def written(path: Path, model: Any, architecture: str = "qwen3moe") -> dict[str, Tensor]:
    """The file as llama.cpp names its tensors and settings. Returns the values that gguf-py reads from it."""
    config = model.config
    file = gguf.GGUFWriter(path, architecture)
    file.add_name("tiny")
    file.add_context_length(64)
    file.add_block_count(config.num_hidden_layers)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
    file.add_expert_count(config.num_experts if hasattr(config, "num_experts") else config.num_local_experts)
    file.add_expert_used_count(config.num_experts_per_tok)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_key_length(config.head_dim)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(config.rope_parameters["rope_theta"])
    file.add_vocab_size(config.vocab_size)

    def add(name: str, t: Tensor, kind: Any) -> Tensor:
        values = t.detach().contiguous().numpy()
        if kind is None:
            file.add_tensor(name, values)
            return t.detach()
        blocks = gguf.quantize(values, kind)
        file.add_tensor(name, blocks, raw_dtype=kind)
        return torch.from_numpy(gguf.dequantize(blocks, kind).copy())

    if architecture == "minimax-m2":
        file.add_rope_dimension_count(config.rotary_dim)
        file.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    arch = gguf.MODEL_ARCH.MINIMAXM2 if architecture == "minimax-m2" else gguf.MODEL_ARCH.QWEN3MOE
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    values: dict[str, Tensor] = {}
    for name, t in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        if t.dim() == 3:
            block = f"blk.{name.split('.')[2]}.ffn"
            if suffix == "down_proj":
                values[name] = add(f"{block}_down_exps.weight", t, KINDS.Q4_0)
            else:
                halves = zip(("gate", "up"), t.chunk(2, 1), strict=True)
                values[name] = torch.cat([add(f"{block}_{each}_exps.weight", w, KINDS.Q8_0) for each, w in halves], 1)
        elif suffix == "e_score_correction_bias":
            values[name] = add(f"blk.{name.split('.')[2]}.exp_probs_b.bias", t, None)
        else:
            kind = KINDS.Q8_0 if t.dim() == 2 and not stem.endswith("mlp.gate") else None
            values[name] = add(f"{names.get_name(stem)}.{suffix}", t, kind)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return values


def test_a_mixture_in_a_gguf_file(tmp_path: Path) -> None:
    """Of a width that transformers 5.24 does not read from the file."""
    torch.manual_seed(0)
    dense = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**QWEN)).eval()
    dense.load_state_dict(written(tmp_path / "tiny.gguf", dense))
    model = from_pretrained(Auto, tmp_path, gguf_file="tiny.gguf")
    assert held(model) <= 1.05 * (tmp_path / "tiny.gguf").stat().st_size
    assert not is_mapped(tmp_path / "tiny.gguf")
    values = dict(dense.named_parameters())
    paths = report(model).paths("quantised")
    assert len(paths) == 14 and not report(model).paths("dequantised")
    for path in paths:
        assert torch.equal(model.get_submodule(path).dequantize(), values[path])
    assert isinstance(model.model.embed_tokens.weight, QuantizedWeight)
    check_like(model, dense)
    check_saved(model, tmp_path / "saved")


MINIMAX = dict(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, num_local_experts=4, num_experts_per_tok=2, rotary_dim=16,
)  # fmt: skip


def test_minimax_in_a_gguf_file(tmp_path: Path) -> None:
    """With the bias of its router, which moves the choice of experts."""
    torch.manual_seed(0)
    dense = transformers.MiniMaxM2ForCausalLM(transformers.MiniMaxM2Config(**MINIMAX)).eval()
    for name, buffer in dense.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(4))
    dense.load_state_dict(written(tmp_path / "tiny.gguf", dense, "minimax-m2"))
    model = from_pretrained(Auto, tmp_path, gguf_file="tiny.gguf")
    assert held(model) <= 1.05 * (tmp_path / "tiny.gguf").stat().st_size
    assert len(report(model).paths("quantised")) == 14 and not report(model).paths("dequantised")
    check_like(model, dense)
    check_saved(model, tmp_path / "saved")


def test_tied_tables_are_dequantised_and_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**{**QWEN, "tie_word_embeddings": True})
    dense = transformers.Qwen3MoeForCausalLM(config).eval()
    state = written(tmp_path / "tiny.gguf", _without_head(dense))
    dense.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    with pytest.warns(UserWarning, match="1 quantised weights were dequantised, because it is tied to another weight"):
        model = from_pretrained(Auto, tmp_path, gguf_file="tiny.gguf")
    assert report(model).paths("dequantised") == ["model.embed_tokens.weight"]
    check_like(model, dense)
    check_saved(model, tmp_path / "saved")


class _without_head:  # noqa: N801
    def __init__(self, model: Any) -> None:
        self.config, self._model = model.config, model

    def state_dict(self) -> dict[str, Tensor]:
        return {name: t for name, t in self._model.state_dict().items() if name != "lm_head.weight"}


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    written(tmp_path / "tiny.gguf", transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**QWEN)), "llama")
    with pytest.raises(ValueError, match="gguf_file: expected one of minimax-m2, qwen2moe, qwen3moe, got 'llama'"):
        from_pretrained(Auto, tmp_path, gguf_file="tiny.gguf")
