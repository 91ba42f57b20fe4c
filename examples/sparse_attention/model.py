# SPDX-License-Identifier: BSD-3-Clause
"""THE list of models, each with the same active FLOPs per token, and the model itself. This file trains nothing."""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import ffn_ops
from ffn_ops import Routing, routing

from .attention import Attention, Cache, Indexer

BYTES, KINDS, VALUES = 256, 4, 16  # the vocabulary: bytes, then needles of each kind and value, then questions
VOCABULARY = BYTES + KINDS * VALUES + KINDS


@dataclass(frozen=True)
class Size:
    """``d_ff`` is that of the dense attention's SwiGLU; the others get the width with the same FLOPs per token."""

    d_model: int = 64
    d_ff: int = 256
    layers: int = 2
    heads: int = 4
    width: int = 32
    index_heads: int = 2
    index_width: int = 16
    keys: int = 64
    experts: int = 8
    top_k: int = 2
    context: int = 512


@dataclass(frozen=True)
class Arm:
    """A model: its kind of attention, and whether its feed-forward layers are mixtures."""

    key: str
    name: str
    attention: str  # dense, sparse or window
    mixture: bool


ARMS = (
    Arm("dense_swiglu", "dense, SwiGLU", "dense", False),
    Arm("dense_moe", "dense, MoE", "dense", True),
    Arm("sparse_swiglu", "sparse, SwiGLU", "sparse", False),
    Arm("sparse_moe", "sparse, MoE", "sparse", True),
    Arm("window_moe", "window, MoE", "window", True),
)
BASELINE = ARMS[0]
BY_KEY = {arm.key: arm for arm in ARMS}


def attention_flops(size: Size, kind: str, position: int) -> int:
    """Of one layer's forward for the token at ``position`` (0 is the first), 2 for each multiply-add."""
    D, wide, seen = size.d_model, size.heads * size.width, position + 1
    keys = seen if kind == "dense" else min(seen, size.keys)
    flops = 2 * D * (2 * wide + 2 * size.width) + 4 * wide * keys
    if kind == "sparse":
        index = size.index_heads * size.index_width
        flops += 2 * D * (index + size.index_width + size.index_heads)
        if seen > size.keys:
            flops += 2 * (index + size.index_heads) * seen
    return flops


def ffn_flops(size: Size, mixture: bool, width: int) -> int:
    """``width``: of the SwiGLU, or of each expert."""
    per_expert = 6 * size.d_model * width
    return per_expert * size.top_k + 2 * size.d_model * size.experts if mixture else per_expert


def model_flops(size: Size, arm: Arm, position: int) -> int:
    layer = attention_flops(size, arm.attention, position) + ffn_flops(size, arm.mixture, ffn_width(size, arm))
    return size.layers * layer + 2 * size.d_model * VOCABULARY


def mean_attention_flops(size: Size, kind: str) -> float:
    """Over the tokens of a training window."""
    return sum(attention_flops(size, kind, position) for position in range(size.context)) / size.context


@functools.cache
def ffn_width(size: Size, arm: Arm) -> int:
    """The width that spends what the baseline's layer spends for the mean token of a training window."""
    whole = mean_attention_flops(size, BASELINE.attention) + ffn_flops(size, False, size.d_ff)
    left = whole - mean_attention_flops(size, arm.attention)
    fixed = ffn_flops(size, arm.mixture, 0)
    return max(1, round((left - fixed) / (ffn_flops(size, arm.mixture, 1) - fixed)))


class Router(nn.Module):
    """The choice of a mixture, which owns the parameters. As a module of its own it has a row in a profile."""

    def __init__(self, ffn: ffn_ops.MoEFFN) -> None:
        super().__init__()
        self.of = (ffn,)  # not registered again

    def forward(self, x: Tensor) -> Routing:
        return self.of[0].route(self.of[0].logits(x))


class Block(nn.Module):
    """``mode`` is what is computed: ``dense``; ``warmup``, dense with the indexer's loss; ``sparse``; ``window``."""

    def __init__(self, size: Size, arm: Arm) -> None:
        super().__init__()
        self.size, self.mode = size, arm.attention
        self.attention_norm, self.norm = nn.RMSNorm(size.d_model), nn.RMSNorm(size.d_model)
        window = size.keys if arm.attention == "window" else None
        self.attention = Attention(size.d_model, size.heads, size.width, window)
        if arm.attention == "sparse":
            self.indexer = Indexer(size.d_model, size.index_heads, size.index_width, size.keys)
        width = ffn_width(size, arm)
        self.ffn: Any = ffn_ops.FeedForward(size.d_model, d_ff=width, bias=False)
        if arm.mixture:  # the router of DeepSeek-V3: a bias moves against the load
            choose = routing.BiasedTopK(size.experts, size.top_k)
            self.ffn = ffn_ops.MoEFFN(
                size.d_model, width, size.experts, size.top_k, router=choose, gated=True, activation="silu", bias=False
            )
            self.router = Router(self.ffn)

    def forward(self, x: Tensor, routed: list[Routing] | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, D] after this block, and the indexer's loss a query (0 without a graph of it)."""
        h, index, chosen = self.attention_norm(x), None, None
        if self.mode in ("warmup", "sparse"):
            index, chosen = self.indexer(h, self.mode == "sparse")
        y, loss = self.attention(h, index, chosen)
        return self.feed_forward(x + y, routed), loss

    def feed_forward(self, x: Tensor, routed: list[Routing] | None = None) -> Tensor:
        h = self.norm(x)
        if not isinstance(self.ffn, ffn_ops.MoEFFN):
            return x + self.ffn(h)
        chosen = self.router(h)
        if routed is not None:
            routed.append(chosen)
        return x + self.ffn(h, routing=chosen)

    def cache(self, batch: int, length: int) -> Cache:
        """An empty one for ``length`` tokens; a window never needs more than its own."""
        size, new = self.size, self.norm.weight.new_zeros
        rows = min(length, size.keys) if self.mode == "window" else length
        return Cache(
            new(batch, rows, 2 * size.width), new(batch, length, size.index_width if self.mode == "sparse" else 0)
        )

    def decode(self, x: Tensor, cache: Cache) -> Tensor:
        """``forward`` for the next token, x [B, 1, D]; it goes into the cache."""
        h = self.attention_norm(x)
        chosen = self.indexer.decode(h, cache) if self.mode == "sparse" else None
        return self.feed_forward(x + self.attention.decode(h, cache, chosen))


class LanguageModel(nn.Module):
    """Over bytes, needles and questions. A parameter's first values depend on the seed, its name and its shape alone,
    so that models of one seed begin alike where they are alike."""

    def __init__(self, size: Size, arm: Arm, seed: int) -> None:
        super().__init__()
        self.size, self.arm = size, arm
        self.token = nn.Embedding(VOCABULARY, size.d_model)
        self.blocks: Any = nn.ModuleList(Block(size, arm) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.d_model)
        self.head = nn.Linear(size.d_model, VOCABULARY, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
                std = 1.0 if name == "token.weight" else parameter.shape[-1] ** -0.5
                nn.init.normal_(parameter, std=std, generator=generator)

    def set_mode(self, mode: str) -> None:
        for block in self.blocks:
            block.mode = mode

    def indexers(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if ".indexer." in name]

    def others(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if ".indexer." not in name]

    def forward(self, tokens: Tensor, routed: list[Routing] | None = None) -> tuple[Tensor, Tensor]:
        """Logits [B, T, vocabulary], and the mean of the layers' losses of their indexers."""
        x, losses = self.token(tokens), []
        for block in self.blocks:
            x, loss = block(x, routed)
            losses.append(loss)
        return self.head(self.norm(x)), torch.stack(losses).mean()

    def caches(self, batch: int, length: int) -> list[Cache]:
        return [block.cache(batch, length) for block in self.blocks]

    @torch.no_grad()
    def decode(self, token: Tensor, caches: list[Cache]) -> Tensor:
        """Logits [B, 1, vocabulary] after the next token [B, 1], which goes into the caches."""
        x = self.token(token)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block.decode(x, cache)
        return self.head(self.norm(x))
