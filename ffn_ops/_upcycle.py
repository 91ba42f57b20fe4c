# SPDX-License-Identifier: BSD-3-Clause
"""upcycle: makes a mixture that computes the same as a trained dense layer."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import _checks as check
from .modules import FeedForward, PlainFFN, is_plain_linear
from .moe_ffn import MoEFFN
from .routing import Routing
from .routing import top_k as _top_k


def upcycle(
    ffn: nn.Module, num_experts: int, *, top_k: int = 2, router: Callable[..., Routing] | None = None
) -> MoEFFN:
    """Returns a mixture whose experts are copies of a trained dense FFN.

    With the default router (top-k, renormalised) the weights of a token sum to 1, so the mixture starts as the same
    function as ``ffn``, up to rounding. Weights that do not sum to 1 (those of :class:`MoEFFN`'s default, Switch and
    BASE) and dropped rows scale the output, so passing a ``router`` warns.

    Args:
        ffn: a :class:`PlainFFN` (ReLUFFN, GELUFFN, SwishFFN) or :class:`FeedForward` with plain linear children.
        num_experts, top_k: E and K.
        router: None for renormalised top-k.

    Raises:
        TypeError: for a layer that experts cannot compute.
        ValueError: for a layer with adapters, hooks or dropout, which experts do not have.

    Source: Komatsuzaki et al., Sparse Upcycling (2022).

    Example:
        >>> dense, x = ffn_ops.GELUFFN(8, 16), torch.randn(5, 8)
        >>> torch.testing.assert_close(ffn_ops.upcycle(dense, num_experts=4)(x), dense(x))
    """
    check.positive("num_experts", num_experts)
    check.positive("top_k", top_k)
    if not isinstance(ffn, (PlainFFN, FeedForward)):
        raise TypeError(f"ffn: expected a PlainFFN or a FeedForward, got {type(ffn).__name__}")
    gated = isinstance(ffn, FeedForward)
    layers: list[Any] = [ffn.w1, ffn.w3, ffn.w2] if isinstance(ffn, FeedForward) else [ffn.linear1, ffn.linear2]
    if not all(is_plain_linear(layer) for layer in layers):
        raise ValueError("ffn: expected plain nn.Linear children without adapters and hooks")
    if isinstance(ffn, FeedForward) and ffn.dropout.p > 0:
        raise ValueError(f"ffn: expected dropout 0, because experts have no dropout, got {ffn.dropout.p}")
    if router is None:
        router = functools.partial(_top_k, k=top_k, renormalize=True)
    else:
        warnings.warn(
            "upcycle: the mixture computes the dense layer's function only where the router's weights sum to 1",
            UserWarning,
            stacklevel=2,
        )
    down = layers[-1]
    moe = MoEFFN(
        down.out_features, down.in_features, num_experts, top_k, router=router, gated=gated,
        activation=ffn.activation, bias=any(layer.bias is not None for layer in layers),
        recompute=ffn.recompute,
    ).to(down.weight)  # fmt: skip
    moe.train(ffn.training)
    with torch.no_grad():
        moe.w_in.copy_(torch.cat([layer.weight for layer in layers[:-1]]))
        moe.w_down.copy_(down.weight)
        if moe.b_in is not None and moe.b_down is not None:
            zeros = [layer.weight.new_zeros(layer.out_features) for layer in layers]
            biases = [zero if layer.bias is None else layer.bias for layer, zero in zip(layers, zeros, strict=True)]
            moe.b_in.copy_(torch.cat(biases[:-1]))
            moe.b_down.copy_(biases[-1])
    return moe
