# SPDX-License-Identifier: BSD-3-Clause
"""Causal attention of three kinds in plain torch: dense, over the keys that a lightning indexer chooses, and over a
sliding window. One head of keys and values serves all heads of queries, as in DeepSeek-V3.2's attention. This file
holds no training.

Letters: B sequences, T tokens, H heads of queries, d width of a head, I heads of the indexer, i their width, K keys
that a query attends to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn_ops.ops._route import top_k_of  # the choice of ffn_ops.routing.top_k, without its sort by experts

SCORE_BLOCK = 64  # queries whose scores of all keys exist at a time
ATTEND_BLOCK = 256  # queries whose chosen keys are gathered at a time
EVERY = slice(None)
Index = tuple[Tensor, Tensor, Tensor]  # the indexer's q [B, T, I, i], w [B, T, I] and k [B, T, i]


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


def attend(q: Tensor, kv: Tensor, chosen: Tensor, index: Index, with_loss: bool = False) -> tuple[Tensor, Tensor]:
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


def dense_loss(q: Tensor, kv: Tensor, index: Index) -> Tensor:
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
    """What decoding keeps of the earlier tokens of one layer: [B, length, 2d] and [B, length, i]. A window's ``kv`` is
    a ring: the order of keys does not matter."""

    kv: Tensor
    index_k: Tensor
    length: int = 0


class Indexer(nn.Module):
    """The lightning indexer scores ``I_ts = sum_h w_th relu(q_th k_s)``; a query attends to the ``keys`` best keys.

    Its input is detached, and its loss alone trains it: ``KL(p_t || softmax(I_t))``, with p the attention's own
    probabilities, averaged over the heads and detached: over all keys in the warm-up, in which nothing else is trained,
    and then over the chosen keys, while the language model's loss trains the rest.

    Source: DeepSeek-V3.2 (2025, arXiv 2512.02556), section 2.1, equations 1 to 4; the scale of the scores and the
        norm of the indexer's keys as in its implementation in transformers.
    """

    def __init__(self, d_model: int, heads: int, width: int, keys: int) -> None:
        super().__init__()
        self.heads, self.width, self.keys = heads, width, keys
        self.q = nn.Linear(d_model, heads * width, bias=False)
        self.k = nn.Linear(d_model, width, bias=False)
        self.k_norm = nn.LayerNorm(width)
        self.w = nn.Linear(d_model, heads, bias=False)

    def project(self, x: Tensor, begin: int = 0) -> Index:
        """q [B, T, I, i], w [B, T, I] and k [B, T, i]; no gradient reaches x."""
        x = x.detach()
        q = rotated(self.q(x).unflatten(2, (self.heads, self.width)), begin)
        return q, self.w(x) * (self.heads * self.width) ** -0.5, rotated(self.k_norm(self.k(x)), begin)

    def forward(self, x: Tensor, chooses: bool) -> tuple[Index, Tensor | None]:
        index = self.project(x)
        return index, choose(*index, self.keys) if chooses else None

    def decode(self, x: Tensor, cache: Cache) -> Tensor | None:
        """The keys [B, 1, K] of the next token, x [B, 1, D]; None while there are no more than K."""
        t = cache.length
        q, w, k = self.project(x, t)
        cache.index_k[:, t] = k[:, 0]
        if t < self.keys:
            return None
        return top_k_of(index_scores(q, w, cache.index_k[:, : t + 1])[:, 0], self.keys, by_logits=True)[1]


class Attention(nn.Module):
    """Over the chosen keys where there are some, else over a ``window`` if there is one, else over all keys."""

    def __init__(self, d_model: int, heads: int, width: int, window: int | None = None) -> None:
        super().__init__()
        self.heads, self.width, self.window = heads, width, window
        self.q = nn.Linear(d_model, heads * width, bias=False)
        self.kv = nn.Linear(d_model, 2 * width, bias=False)
        self.out = nn.Linear(heads * width, d_model, bias=False)

    def project(self, x: Tensor, begin: int = 0) -> tuple[Tensor, Tensor]:
        """q [B, T, H, d] and kv [B, T, 2d] of normed x at positions from ``begin``."""
        q = rotated(self.q(x).unflatten(2, (self.heads, self.width)), begin)
        k, v = self.kv(x).chunk(2, 2)
        return q, torch.cat([rotated(k, begin), v], 2)

    def forward(self, x: Tensor, index: Index | None = None, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Of normed x [B, T, D]: the output, and the loss a query of the indexer that gave ``index`` (else 0)."""
        q, kv = self.project(x)
        loss = x.new_zeros(())
        if index is not None and chosen is not None:
            out, loss = attend(q, kv, chosen, index, with_loss=self.training)
        elif self.window is not None:
            out = attend_window(q, kv, self.window)
        else:
            out = attend_dense(q, kv)
            if index is not None:
                loss = dense_loss(q, kv, index)
        return self.out(out.flatten(2)), loss

    def decode(self, x: Tensor, cache: Cache, chosen: Tensor | None) -> Tensor:
        """``forward`` for the next token, x [B, 1, D]; it goes into the cache."""
        t = cache.length
        q, new = self.project(x, t)
        cache.kv[:, t % cache.kv.shape[1]] = new[:, 0]
        cache.length += 1
        kv = cache.kv[:, : t + 1]
        if chosen is not None:
            kv = kv.gather(1, chosen.unsqueeze(2).expand(-1, -1, kv.shape[2]))
        k, v = kv.unsqueeze(1).chunk(2, 3)
        out = F.scaled_dot_product_attention(q, k, v)  # the heads of the query stand in the place of its length
        return self.out(out.flatten(2))
