# SPDX-License-Identifier: BSD-3-Clause
"""A tiny DeepSeek-V3.2 of transformers: untouched, with its experts run by ffn_ops, and with quantised experts.

The indexer of transformers' model runs under ``no_grad``, so this model's indexer keeps its random weights; all other
parameters are trained here for a few steps."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ffn_ops
from ffn_ops.compare.text import Text, training_starts, validation_starts, windows

CONTEXT, BATCH = 128, 4
VARIANTS = ("untouched", "ffn_ops", "int8", "mxfp4")


@dataclass(frozen=True)
class Variant:
    name: str
    same_tokens: float  # share of the generated tokens that are the untouched model's
    same_choice: float  # share of held-out positions whose most likely byte is the untouched model's
    loss: float  # held out, nats per byte
    prompt_ms: float
    token_ms: float
    expert_mb: float


def build(width: int, experts: int) -> Any:
    from transformers import AutoModelForCausalLM, DeepseekV32Config

    from ffn_ops.integrations.transformers import register

    register()
    config = DeepseekV32Config(
        vocab_size=256, hidden_size=width, intermediate_size=2 * width, moe_intermediate_size=width // 2,
        num_hidden_layers=3, first_k_dense_replace=1, num_attention_heads=4, num_key_value_heads=4,
        n_routed_experts=experts, num_experts_per_tok=4, n_group=4, topk_group=2, n_shared_experts=1,
        q_lora_rank=64, kv_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32, head_dim=16,
        index_topk=64, index_head_dim=32, index_n_heads=4, max_position_embeddings=2048, pad_token_id=0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, experts_implementation="ffn_ops")


def train(model: Any, text: Text, steps: int) -> None:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 2e-3)
    for starts in training_starts(text.train, 0, steps, BATCH, CONTEXT):
        ids, _ = windows(text.train, starts, CONTEXT)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def variant_of(model: Any, name: str) -> Any:
    """A copy in bfloat16. ``untouched``: transformers' own choice of experts; a format: quantised experts."""
    model = copy.deepcopy(model).bfloat16().eval()
    if name == "untouched":
        model.set_experts_implementation("grouped_mm")
    elif name != "ffn_ops":
        ffn_ops.quantize_(model, name)
    return model


def expert_bytes(model: Any) -> int:
    experts = [layer for layer in model.modules() if type(layer).__name__ == "DeepseekV32Experts"]
    return sum(layer.gate_up_proj.nbytes + layer.down_proj.nbytes for layer in experts)


@torch.no_grad()
def look(model: Any, prompt: Tensor, held_out: Tensor, tokens: int) -> tuple[Tensor, Tensor, float, float, float]:
    """Generated tokens, the most likely bytes of held-out text, its loss, and the times of prompt and token."""
    out = model(input_ids=held_out, labels=held_out)

    def generate(count: int) -> tuple[Tensor, float]:
        began = time.perf_counter()
        found = model.generate(input_ids=prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return found[:, prompt.shape[1] :], time.perf_counter() - began

    first = min(generate(1)[1] for _ in range(3))
    generated, whole = generate(tokens)
    return generated, out.logits.argmax(-1), float(out.loss), first, (whole - first) / max(1, tokens - 1)


def compare(text: Text, width: int, experts: int, steps: int, tokens: int) -> list[Variant]:
    torch.manual_seed(0)
    model = build(width, experts)
    train(model, text, steps)
    held_out, _ = windows(text.validation, validation_starts(text.validation, 8, CONTEXT), CONTEXT)
    prompt = held_out[:1]
    rows: list[Variant] = []
    base: tuple[Tensor, Tensor] | None = None
    for name in VARIANTS:
        other = variant_of(model, name)
        generated, likely, loss, first, each = look(other, prompt, held_out, tokens)
        base = base or (generated, likely)
        same, choice = ((a == b).double().mean().item() for a, b in zip((generated, likely), base, strict=True))
        rows.append(Variant(name, same, choice, loss, 1e3 * first, 1e3 * each, expert_bytes(other) / 2**20))
    return rows
