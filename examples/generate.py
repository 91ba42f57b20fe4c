# SPDX-License-Identifier: BSD-3-Clause
"""Text generation by a small Llama, untouched and with its feed-forward layers replaced: both write the same
tokens.

    pip install "ffn_ops[transformers]" && python examples/generate.py

The model first learns Python's help topics, which ship with Python, byte by byte. On a CPU it takes less than a minute.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import ffn_ops

CONTEXT, BATCH = 64, 16


def help_topics() -> Tensor:
    """The bytes of the help topics, as tokens."""
    spec = importlib.util.find_spec("pydoc_data.topics")
    assert spec is not None and spec.origin is not None
    return torch.frombuffer(bytearray(Path(spec.origin).read_bytes()), dtype=torch.uint8).long()


def train(model: LlamaForCausalLM, text: Tensor, steps: int) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)
    loss = torch.tensor(float("nan"))
    loss = torch.zeros(())
    for _ in range(steps):
        ids = text[torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=generator) + torch.arange(CONTEXT)]
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def generate(model: LlamaForCausalLM, prompt: str, tokens: int) -> tuple[str, float]:
    """Generates greedily with a cache; also returns tokens per second."""
    ids = torch.tensor([list(prompt.encode())])
    began = time.perf_counter()
    out = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    seconds = time.perf_counter() - began
    return bytes(out[0].tolist()).decode(errors="replace"), tokens / seconds


def main(arguments: list[str] | None = None) -> tuple[str, str]:
    """Returns the texts of the untouched and the replaced model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of training (default 400)")
    parser.add_argument("--tokens", type=int, default=120, help="bytes to write (default 120)")
    parser.add_argument("--prompt", default="The statement ")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = ffn_ops.replace(LlamaForCausalLM(config))
    print(ffn_ops.replace_report(model))
    began = time.perf_counter()
    loss = train(model, help_topics(), options.steps)
    print(f"{options.steps} steps in {time.perf_counter() - began:.1f} s, loss {loss:.3f} nats/byte")

    model.eval()
    replaced, fast = generate(model, options.prompt, options.tokens)
    untouched, plain = generate(ffn_ops.restore(model), options.prompt, options.tokens)
    print(f"{replaced!r}\n{fast:.0f} tokens/s replaced, {plain:.0f} untouched; same text: {replaced == untouched}")
    return untouched, replaced


if __name__ == "__main__":
    main()
