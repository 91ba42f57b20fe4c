# SPDX-License-Identifier: BSD-3-Clause
"""Lora: low-rank additions to the weights of a feed-forward layer. It holds tensors; the operators compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import _checks as check


@dataclass(frozen=True, eq=False)
class Lora:
    """``w_in + scale * b_in a_in`` and ``w_down + scale * b_down a_down`` in the place of an operator's weights.

    No such weight is formed: ``scale * (x a_in^T) b_in^T`` is added to ``x w_in^T`` before bias and activation, and
    likewise after the activation. A ``Lora`` is frozen, and is a pytree of the tensors it has.

    Args:
        a_in, b_in: ``[E, r, D]`` and ``[E, F, r]`` (gated ``[E, 2F, r]``, rows in the order of ``w_in``'s), or as PEFT
            stores them, ``[r * E, D]`` with the expert as the slower index and ``[F, r * E]`` with the expert as the
            faster one. In :func:`ffn_ops.ffn` ``[r, D]`` and ``[F, r]`` (gated with one weight ``[2F, r]``). Both, or
            None.
        a_down, b_down: ``[E, r, F]`` and ``[E, D_out, r]``, or ``[r * E, F]`` and ``[D_out, r * E]``, or ``[r, F]`` and
            ``[D_out, r]``. Each pair may have a rank of its own. Both, or None.
        scale: a number.
        a_up, b_up: ``[r, D]`` and ``[F, r]`` for the ``w_up`` of :func:`ffn_ops.ffn`. Both, or None.

    Tensors have x's dtype, or float32 with 16-bit weights; autocast casts those of 16 bits. Products with them are
    summed in float32 (float64 for float64), and nothing between a and b is rounded.

    Raises:
        TypeError: if a field is neither a tensor nor None, or ``scale`` is no number.
        ValueError: if one of a pair is missing, or ``scale`` is not finite. The operators check shapes and dtypes.

    Source:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models (2021), equation 3.

    Example:
        >>> x, w_in, w_down = torch.randn(5, 8), torch.randn(4, 16, 8), torch.randn(4, 8, 16)  # E 4, F 16
        >>> routing = ffn_ops.routing.top_k(torch.randn(5, 4), k=2)
        >>> a, b = torch.randn(4, 2, 8), torch.randn(4, 16, 2)  # rank 2
        >>> y = ffn_ops.moe(x, routing, w_in, w_down, lora=ffn_ops.Lora(a, b, scale=0.5))
        >>> torch.testing.assert_close(y, ffn_ops.moe(x, routing, w_in + 0.5 * b @ a, w_down))
    """

    a_in: Tensor | None = None
    b_in: Tensor | None = None
    a_down: Tensor | None = None
    b_down: Tensor | None = None
    scale: float = 1.0
    a_up: Tensor | None = None
    b_up: Tensor | None = None

    def __post_init__(self) -> None:
        pairs = (self.a_in, self.b_in), (self.a_down, self.b_down), (self.a_up, self.b_up)
        if not all((a is None and b is None) or (isinstance(a, Tensor) and isinstance(b, Tensor)) for a, b in pairs):
            self._refuse()
        check.number("scale", self.scale)

    def _refuse(self) -> None:
        for name in _TENSORS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor or None, got {type(value).__name__}")
        for place in _PLACES:
            a, b = getattr(self, f"a_{place}"), getattr(self, f"b_{place}")
            if (a is None) != (b is None):
                raise ValueError(f"a_{place}, b_{place}: expected both or neither, got one")


_PLACES = ("in", "up", "down")
_TENSORS = ("a_in", "b_in", "a_down", "b_down", "a_up", "b_up")


def _given(lora: Lora) -> list[str]:
    return [name for name in _TENSORS if getattr(lora, name) is not None]


def _context(lora: Lora) -> tuple[tuple[str, ...], float]:
    return tuple(_given(lora)), lora.scale


def _unflatten(tensors: Any, context: Any) -> Lora:
    names, scale = context
    lora = object.__new__(Lora)  # without checks: torch puts its own objects in the leaves' places
    fields = dict.fromkeys(_TENSORS) | dict(zip(names, tensors, strict=True)) | {"scale": scale}
    for name, value in fields.items():
        object.__setattr__(lora, name, value)
    return lora


pytree.register_pytree_node(
    Lora,
    lambda lora: ([getattr(lora, name) for name in _given(lora)], _context(lora)),
    _unflatten,
    serialized_type_name="ffn_ops.Lora",
    flatten_with_keys_fn=lambda lora: (
        [(pytree.GetAttrKey(name), getattr(lora, name)) for name in _given(lora)],
        _context(lora),
    ),
)


def together(adapters: Sequence[Lora], experts: int) -> Lora:
    """Several adapters at once: their ranks side by side, each b times its scale."""
    if len(adapters) == 1:
        return adapters[0]
    pairs: dict[str, Any] = {}
    for place in ("in", "down"):
        found = [each for each in adapters if getattr(each, f"a_{place}") is not None]
        stacked = [stack(getattr(each, f"a_{place}"), getattr(each, f"b_{place}"), experts) for each in found]
        pairs[f"a_{place}"] = torch.cat([a for a, _ in stacked], 1) if found else None
        scaled = [b * each.scale for (_, b), each in zip(stacked, found, strict=True)]
        pairs[f"b_{place}"] = torch.cat(scaled, 2) if found else None
    return Lora(**pairs)


def stack(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """``[E, r, in]`` and ``[E, out, r]`` of what PEFT stores."""
    if a.dim() == 2 and a.shape[0] % experts == 0:
        a = a.reshape(experts, a.shape[0] // experts, a.shape[1])
    if b.dim() == 2 and b.shape[1] % experts == 0:
        b = b.reshape(b.shape[0], b.shape[1] // experts, experts).permute(2, 0, 1)
    return a, b


def check_pair(
    place: str, a: Tensor | None, b: Tensor | None, out: Any, width: Any, x: Tensor, experts: int | None
) -> Any:
    """Returns both as ``[E, r, width]`` and ``[E, out, r]``; E is 1 in a dense layer, where ``experts`` is None."""
    if a is None or b is None:
        if (a is None) != (b is None):
            raise ValueError(f"lora: expected a_{place} and b_{place} together, or none of them, got one")
        return None, None
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    for name, t in ((f"lora.a_{place}", a), (f"lora.b_{place}", b)):
        check.tensor(name, t)
        check.device(name, t, x)
        if t.dtype not in (x.dtype, wide):
            expected = " or ".join(dict.fromkeys(check.dtype_name(d) for d in (x.dtype, wide)))
            raise TypeError(f"{name}: expected dtype {expected}, got {check.dtype_name(t.dtype)}")
    if b.dtype is not a.dtype:
        wanted, got = check.dtype_name(a.dtype), check.dtype_name(b.dtype)
        raise TypeError(f"lora.b_{place}: expected dtype {wanted} as a_{place} has, got {got}")
    leading = () if experts is None else (experts,)
    if experts is not None:
        a, b = stack(a, b, experts)
    check.tensor(f"lora.a_{place}", a, (*leading, "r", width))
    if a.shape[-2] < 1:
        raise ValueError(f"lora.a_{place}: expected a rank of at least 1, got shape {list(a.shape)}")
    check.tensor(f"lora.b_{place}", b, (*leading, out, a.shape[-2]))
    return (a.unsqueeze(0), b.unsqueeze(0)) if experts is None else (a, b)


def pair(a: Any, b: Any, experts: int | None) -> Any:
    """What ``check_pair`` returns, without its checks: the operator checks."""
    if a is None or b is None:
        return a, b
    return (a.unsqueeze(0), b.unsqueeze(0)) if experts is None else stack(a, b, experts)


def check_lora(value: Any) -> Lora:
    if not isinstance(value, Lora):
        raise TypeError(f"lora: expected an ffn_ops.Lora or None, got {type(value).__name__}")
    return value
