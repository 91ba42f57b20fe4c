# SPDX-License-Identifier: BSD-3-Clause
"""A small causal transformer over bytes whose feed-forward layer is exchangeable. Holds the model, not its training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn_ops import MoEFFN

from .mixtures import Routed
from .settings import ModelSize

VOCABULARY = 256
FFN_SEED_OFFSET = 1_000_003


class Block(nn.Module):
    """Pre-norm attention and feed-forward; the model sets ``ffn``."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm_attention = nn.LayerNorm(size.d_model)
        self.qkv = nn.Linear(size.d_model, 3 * size.d_model)
        self.proj = nn.Linear(size.d_model, size.d_model)
        self.norm_ffn = nn.LayerNorm(size.d_model)
        self.ffn: nn.Module = nn.Identity()

    def attend(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return out


class LanguageModel(nn.Module):
    """Builds everything but the feed-forward layers first, from ``seed`` alone, so that it is equal for all
    architectures."""

    def __init__(self, size: ModelSize, make_ffn: Callable[[], nn.Module], seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.token = nn.Embedding(VOCABULARY, size.d_model)
            self.position = nn.Embedding(size.context, size.d_model)
            for embedding in (self.token, self.position):
                nn.init.normal_(embedding.weight, std=0.02)
            self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
            self.norm = nn.LayerNorm(size.d_model)
            self.head = nn.Linear(size.d_model, VOCABULARY)
            torch.manual_seed(seed + FFN_SEED_OFFSET)
            for block in self._blocks():
                block.ffn = make_ffn()

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def ffn_layers(self) -> list[nn.Module]:
        return [block.ffn for block in self._blocks()]

    def forward(
        self, tokens: Tensor, ffn_inputs: list[Tensor] | None = None, routed: list[Routed] | None = None
    ) -> Tensor:
        """Logits [B, length, 256]; ``ffn_inputs``, where given, collects what each feed-forward layer received, and
        ``routed`` what each mixture chose.

        Lists and not hooks: a hooked layer would not run its fused path.
        """
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self._blocks():
            x = block.attend(x)
            hidden = block.norm_ffn(x)
            if ffn_inputs is not None:
                ffn_inputs.append(hidden.flatten(0, 1))
            if routed is not None and isinstance(block.ffn, MoEFFN):
                y, chosen, logits = block.ffn(hidden, return_routing=True)
                routed.append((chosen, logits))
            else:
                y = block.ffn(hidden)
            x = x + y
        out: Tensor = self.head(self.norm(x))
        return out
