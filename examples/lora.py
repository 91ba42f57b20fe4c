# SPDX-License-Identifier: BSD-3-Clause
"""LoRA fine-tuning with peft of a small Llama whose feed-forward layers ffn_ops computes.

    pip install "ffn_ops[transformers,peft]" && python examples/lora.py

The model learns Python's help topics, byte by byte, then adapters on its feed-forward layers learn Python's source
code, while the model itself stays frozen. Everything ships with Python; on a CPU it takes less than a minute.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import ffn_ops

CONTEXT, BATCH = 64, 16


def text_of(module: str) -> Tensor:
    """The bytes of a module's source, as tokens."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return torch.frombuffer(bytearray(Path(spec.origin).read_bytes()), dtype=torch.uint8).long()


def windows(text: Tensor, seed: int, count: int = BATCH) -> Tensor:
    starts = torch.randint(len(text) - CONTEXT, (count, 1), generator=torch.Generator().manual_seed(seed))
    return text[starts + torch.arange(CONTEXT)]


def train(model: nn.Module, parameters: Iterable[nn.Parameter], text: Tensor, steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(parameters, rate)
    for step in range(steps):
        ids = windows(text, seed=step)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def loss_on(model: nn.Module, text: Tensor) -> float:
    ids = windows(text, seed=-1, count=32)
    return float(model(input_ids=ids, labels=ids).loss)


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Losses on source code before and after the adapters have learnt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of each of the two trainings (default 200)")
    steps = parser.parse_args(arguments).steps
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=CONTEXT,
    )  # fmt: skip
    model = ffn_ops.replace(LlamaForCausalLM(config))
    print(ffn_ops.replace_report(model))

    topics, code = text_of("pydoc_data.topics"), text_of("argparse")
    began = time.perf_counter()
    train(model, model.parameters(), topics, steps, 2e-3)
    before = loss_on(model, code)
    print(f"trained on help topics: {time.perf_counter() - began:.1f} s, {before:.3f} nats/byte on source code")

    # The replaced layers notice the adapters, and compute them in the same operator.
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["gate_proj", "up_proj", "down_proj"])
    adapted = get_peft_model(model, lora)
    print(ffn_ops.replace_report(adapted))
    adapted.print_trainable_parameters()
    began = time.perf_counter()
    train(adapted, [p for p in adapted.parameters() if p.requires_grad], code, steps, 5e-3)
    after = loss_on(adapted, code)
    print(f"adapters trained on source code: {time.perf_counter() - began:.1f} s, {after:.3f} nats/byte")

    merged = adapted.merge_and_unload()
    print(ffn_ops.replace_report(merged))
    print(f"merged into the weights, fused again: {loss_on(merged, code):.3f} nats/byte")
    return before, after


if __name__ == "__main__":
    main()
