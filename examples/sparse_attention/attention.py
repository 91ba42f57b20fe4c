# SPDX-License-Identifier: BSD-3-Clause
"""Causal attention of three kinds in plain torch: dense, over the keys that a lightning indexer chooses, and over a
sliding window. One head of keys and values serves all heads of queries, as in DeepSeek-V3.2's attention. This file
holds no training.

Letters: B sequences, T tokens, H heads of queries, d width of a head, I heads of the indexer, i their width, K keys
that a query attends to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn_ops.ops._route import top_k_of  # the choice of ffn_ops.routing.top_k, without its sort by experts

from .clock import Clock

SCORE_BLOCK = 64  # queries whose scores of all keys exist at a time
ATTEND_BLOCK = 256  # queries whose chosen keys are gathered at a time
EVERY = slice(None)


def rotated(x: Tensor, begin: int) -> Tensor:
    """Rotary positions ``begin``, ``begin + 1``, ... on the first half of the width of x [B, T, ..., d]."""
    quarter = x.shape[-1] // 4
    rate = 10_000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(begin, begin + x.shape[1], dtype=torch.float64)[:, None] * rate
    shape = (x.shape[1], *(1,) * (x.dim() - 3), quarter)
    cos, sin = (f(angle).to(x.dtype).view(shape) for f in (torch.cos, torch.sin))
    a, b, rest = x[..., :quarter], x[..., quarter : 2 * quarter], x[..., 2 * quarter :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)


def index_scores(q: Tensor, w: Tensor, k: Tensor) -> Tensor:
    """``sum_h w_h relu(q_h k_s)``: q [N, T, I, i], w [N, T, I], k [N, S, i] to [N, T, S]."""
    N, T, heads, width = q.shape
    products = (q.reshape(N, T * heads, width) @ k.transpose(1, 2)).relu_().view(N * T, heads, -1)
    return (w.reshape(N * T, 1, heads) @ products).view(N, T, -1)


@torch.no_grad()
def choose(q: Tensor, w: Tensor, k: Tensor, keys: int) -> Tensor:
    """For each query the positions [B, T, K] of its ``keys`` highest index scores, ties to the lowest position.

    K is ``min(keys, T)``; a query with fewer keys before it also gets later ones, which :func:`attend` leaves out.
    Blocks of queries: the memory is that of SCORE_BLOCK rows of scores, whatever T is. The time is still T x T.
    """
    T = q.shape[1]
    keys = min(keys, T)
    found = []
    for begin in range(0, T, SCORE_BLOCK):
        end = min(begin + SCORE_BLOCK, T)
        seen = max(end, keys)
        scores = index_scores(q[:, begin:end], w[:, begin:end], k[:, :seen])
        later = torch.arange(begin, seen)[None, :] > torch.arange(begin, end)[:, None]
        scores[:, :, begin:].masked_fill_(later, -torch.inf)
        found.append(top_k_of(scores.flatten(0, 1), keys, by_logits=True)[1].view(len(q), end - begin, keys))
    return torch.cat(found, 1)


def _attend_block(
    q: Tensor, index_q: Tensor, index_w: Tensor, chosen: Tensor, real: Tensor, with_loss: bool
) -> tuple[Tensor, Tensor]:
    """N queries over their K chosen keys: q [N, H, d], index_q [N, I, i], index_w [N, I], chosen [N, K, 2d + i]: key,
    value and the indexer's key; real [N, K]. Returns [N, H, d] and the sum of the losses."""
    width = q.shape[2]
    k, v, index_k = chosen.split([width, width, chosen.shape[2] - 2 * width], 2)
    mask = real[:, None, :]
    out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=mask[:, None])[:, 0]
    if not with_loss:
        return out, q.new_zeros(())
    with torch.no_grad():
        p = ((q @ k.transpose(1, 2)) * width**-0.5).masked_fill_(~mask, -torch.inf).softmax(2).mean(1)
    scores = index_scores(index_q[:, None], index_w[:, None], index_k)[:, 0]
    return out, divergence(p, scores, real)


def divergence(p: Tensor, scores: Tensor, real: Tensor) -> Tensor:
    """The sum over all rows of ``KL(p || softmax(scores))`` over the keys that are ``real``."""
    log_q = scores.masked_fill(~real, -torch.inf).log_softmax(-1).masked_fill(~real, 0)
    return (torch.special.xlogy(p, p) - p * log_q).sum()


class _Attend(torch.autograd.Function):
    """:func:`_attend_block` for all queries [N, ...], of the rows [N, K] of a table [S, 2d + i]. Forward keeps no
    gathered row; backward gathers each block again and adds to one gradient of the table: so no more than ATTEND_BLOCK
    queries' keys exist at a time, and neither memory nor time grows with more than the number of queries."""

    @staticmethod
    def forward(ctx: Any, with_loss: bool, rows: Tensor, real: Tensor, table: Tensor, *queries: Tensor) -> Any:
        ctx.with_loss = with_loss
        ctx.save_for_backward(rows, real, table, *queries)
        outs, losses = [], []
        for block in _blocks(len(rows)):
            chosen = _gathered(table, rows[block])
            out, loss = _attend_block(*_cut(queries, block), chosen, real[block], with_loss)
            outs.append(out)
            losses.append(loss)
        return torch.cat(outs), torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *d: Tensor) -> Any:
        rows, real, table, *queries = ctx.saved_tensors
        d_out, d_loss = d
        d_table = torch.zeros_like(table)
        d_queries = [torch.empty_like(t) for t in queries]
        for block in _blocks(len(rows)):
            leaves = [*_cut(queries, block), _gathered(table, rows[block])]
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            with torch.enable_grad():
                out, loss = _attend_block(*_cut(leaves[:3]), leaves[3], real[block], ctx.with_loss)
            results, d_results = ([out, loss], [d_out[block], d_loss]) if ctx.with_loss else ([out], [d_out[block]])
            *found, d_chosen = torch.autograd.grad(results, leaves, d_results, materialize_grads=True)
            for whole, part in zip(d_queries, found, strict=True):
                whole[block] = part
            d_table.index_add_(0, rows[block].flatten(), d_chosen.flatten(0, 1))
        return None, None, None, d_table, *d_queries


def _blocks(count: int) -> list[slice]:
    return [slice(begin, begin + ATTEND_BLOCK) for begin in range(0, count, ATTEND_BLOCK)]


def _cut(queries: Sequence[Tensor], block: slice = EVERY) -> tuple[Tensor, Tensor, Tensor]:
    q, index_q, index_w = queries
    return q[block], index_q[block], index_w[block]


def _gathered(table: Tensor, rows: Tensor) -> Tensor:
    return table.index_select(0, rows.flatten()).view(*rows.shape, -1)


def attend(
    q: Tensor, kv: Tensor, chosen: Tensor, index: tuple[Tensor, Tensor, Tensor], with_loss: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, T, H, d] over the ``chosen`` [B, T, K] rows of kv [B, T, 2d], and the indexer's loss a query:
    gathers the rows and calls torch's ``scaled_dot_product_attention``."""
    B, T = q.shape[:2]
    index_q, index_w, index_k = index
    table = torch.cat([kv, index_k], 2).flatten(0, 1)
    real = (chosen <= torch.arange(T)[:, None]).flatten(0, 1)
    rows = (chosen + torch.arange(0, B * T, T)[:, None, None]).flatten(0, 1)
    queries = (t.flatten(0, 1) for t in (q, index_q, index_w))
    out, loss = _Attend.apply(with_loss, rows, real, table, *queries)
    return out.view(q.shape), loss / (B * T)


def attend_dense(q: Tensor, kv: Tensor) -> Tensor:
    k, v = kv.unsqueeze(1).chunk(2, 3)
    heads = (-1, q.shape[2], -1, -1)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.expand(heads), v.expand(heads), is_causal=True)
    return out.transpose(1, 2)


@torch.no_grad()
def dense_probabilities(q: Tensor, kv: Tensor) -> Tensor:
    """Of each query, the mean over the heads: [B, T, T]. It needs the memory of T x T."""
    T, width = q.shape[1], q.shape[3]
    scores = torch.einsum("bthd,bsd->bhts", q, kv[..., :width]) * width**-0.5
    return scores.masked_fill_(~_seen(T), -torch.inf).softmax(3).mean(1)


def _seen(T: int) -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).tril()


def dense_loss(q: Tensor, kv: Tensor, index: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The indexer's loss a query, over all keys: that of the dense warm-up."""
    p = dense_probabilities(q, kv)
    return divergence(p, index_scores(*index), _seen(q.shape[1])) / q.shape[:2].numel()


def attend_window(q: Tensor, kv: Tensor, window: int) -> Tensor:
    """Each query over itself and the ``window - 1`` keys before it; blocks of queries over two blocks of keys."""
    B, T, heads, width = q.shape
    short = -T % window
    blocks = (T + short) // window
    q = F.pad(q, (0, 0, 0, 0, 0, short)).view(B * blocks, window, heads, width).transpose(1, 2)
    kv = F.pad(kv, (0, 0, window, short)).view(B, blocks + 1, window, 2 * width)
    pairs = torch.cat([kv[:, :-1], kv[:, 1:]], 2).view(B * blocks, 1, 2 * window, 2 * width)
    k, v = pairs.expand(-1, heads, -1, -1).chunk(2, 3)
    query, key = torch.arange(window)[:, None] + window, torch.arange(2 * window)[None, :]
    near = (key <= query) & (key > query - window)
    there = torch.arange(blocks)[:, None, None] * window + key >= window  # not the padding before the first block
    mask = (near & there).repeat(B, 1, 1).unsqueeze(1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    return out.reshape(B, T + short, heads, width)[:, :T]


@dataclass
class Cache:
    """What decoding keeps of the earlier tokens of one layer: [B, length, 2d] and [B, length, i]."""

    kv: Tensor
    index_k: Tensor
    length: int = field(default=0)

    def bytes(self) -> int:
        return self.kv.nbytes + self.index_k.nbytes


class Attention(nn.Module):
    """``mode`` is what is computed: ``dense``; ``warmup``, dense with the indexer's loss; ``sparse``; ``window``.

    The lightning indexer scores ``I_ts = sum_h w_th relu(q_th k_s)``, and a query attends to the ``keys`` keys with
    the highest scores. Its input is detached, and its loss alone trains it: ``KL(p_t || softmax(I_t))``, with p the
    attention's own probabilities, averaged over the heads and detached: over all keys in the warm-up, in which nothing
    else is trained, and then over the chosen keys, while the language model's loss trains the rest.

    Source: DeepSeek-V3.2 (2025, arXiv 2512.02556), section 2.1, equations 1 to 4; the scale of the scores and the
        norm of the indexer's keys as in its implementation in transformers.
    """

    def __init__(self, d_model: int, heads: int, width: int, index_heads: int, index_width: int, keys: int) -> None:
        super().__init__()
        self.heads, self.width, self.keys = heads, width, keys
        self.index_heads, self.index_width = index_heads, index_width
        self.mode = "dense"
        self.norm = nn.RMSNorm(d_model)
        self.q = nn.Linear(d_model, heads * width, bias=False)
        self.kv = nn.Linear(d_model, 2 * width, bias=False)
        self.out = nn.Linear(heads * width, d_model, bias=False)
        self.indexer = nn.ModuleDict() if index_heads == 0 else nn.ModuleDict(
            {
                "q": nn.Linear(d_model, index_heads * index_width, bias=False),
                "k": nn.Linear(d_model, index_width, bias=False),
                "k_norm": nn.LayerNorm(index_width),
                "w": nn.Linear(d_model, index_heads, bias=False),
            }
        )  # fmt: skip

    def project(self, x: Tensor, begin: int = 0) -> tuple[Tensor, Tensor]:
        """q [B, T, H, d] and kv [B, T, 2d] of normed x at positions from ``begin``."""
        q = rotated(self.q(x).unflatten(2, (self.heads, self.width)), begin)
        k, v = self.kv(x).chunk(2, 2)
        return q, torch.cat([rotated(k, begin), v], 2)

    def index(self, x: Tensor, begin: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """The indexer's q [B, T, I, i], w [B, T, I] and k [B, T, i]; no gradient reaches x."""
        x = x.detach()
        q = rotated(self.indexer["q"](x).unflatten(2, (self.index_heads, self.index_width)), begin)
        k = rotated(self.indexer["k_norm"](self.indexer["k"](x)), begin)
        return q, self.indexer["w"](x) * (self.index_heads * self.index_width) ** -0.5, k

    def forward(self, x: Tensor, clock: Clock | None = None) -> tuple[Tensor, Tensor]:
        """What is added to x [B, T, D], and the indexer's loss a query (0 without a graph of it)."""
        x = self.norm(x)
        q, kv = self.project(x)
        loss = x.new_zeros(())
        if self.mode == "sparse":
            index = self.index(x)
            if clock:
                clock.stamp("indexer", True)
            chosen = choose(*index, self.keys)
            if clock:
                clock.stamp("indexer", False)
            out, loss = attend(q, kv, chosen, index, with_loss=self.training)
        elif self.mode == "window":
            out = attend_window(q, kv, self.keys)
        else:
            out = attend_dense(q, kv)
            if self.mode == "warmup":
                loss = dense_loss(q, kv, self.index(x))
        return self.out(out.flatten(2)), loss

    def cache(self, batch: int, length: int) -> Cache:
        """An empty one for ``length`` tokens; a window never needs more than its own."""
        if self.mode == "window":
            length = 0
        like = self.out.weight
        index = self.index_width if self.mode == "sparse" else 0
        return Cache(like.new_zeros(batch, length, 2 * self.width), like.new_zeros(batch, length, index))

    def decode(self, x: Tensor, cache: Cache, clock: Clock | None = None) -> Tensor:
        """``forward`` for the next token, x [B, 1, D]; it goes into the cache."""
        x, t = self.norm(x), cache.length
        q, new = self.project(x, t)
        cache.length += 1
        if self.mode == "window":
            cache.kv = torch.cat([cache.kv, new], 1)[:, -self.keys :]
            kv = cache.kv
        else:
            cache.kv[:, t] = new[:, 0]
            kv = cache.kv[:, : t + 1]
        if self.mode == "sparse":
            if clock:
                clock.stamp("indexer", True)
            index_q, index_w, index_k = self.index(x, t)
            cache.index_k[:, t] = index_k[:, 0]
            if t + 1 > self.keys:
                scores = index_scores(index_q, index_w, cache.index_k[:, : t + 1])[:, 0]
                chosen = top_k_of(scores, self.keys, by_logits=True)[1]
                kv = kv.gather(1, chosen.unsqueeze(2).expand(-1, -1, kv.shape[2]))
            if clock:
                clock.stamp("indexer", False)
        k, v = kv.unsqueeze(1).chunk(2, 3)
        out = F.scaled_dot_product_attention(q, k, v)  # the heads of the query stand in the place of its length
        return self.out(out.flatten(2))
