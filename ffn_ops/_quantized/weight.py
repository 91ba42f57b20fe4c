# SPDX-License-Identifier: BSD-3-Clause
"""QuantizedWeight: a weight in the bytes of its checkpoint. How other libraries lay them out is in readers.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import _checks as check
from .._library import overload
from .formats import FORMATS, check_groups, check_parts, columns
from .readers import Readers

_dequantize = overload("dequantize")


class QuantizedWeight(Readers, nn.Module):
    """A constant weight ``[N, K]`` or ``[E, N, K]``, held as codes and scales, which operators take as a weight.

    It has no gradient: x, the routing's weights and biases do. It is a module without a forward, so that its tensors
    are buffers of the layer that holds it: in the state dict, moved by ``to`` (which leaves their dtypes), copied and
    pickled; :meth:`as_parameters` makes parameters of them. Format and shape do not change. It is also a pytree of its
    tensors.

    Args:
        format: ``mxfp4``, ``nvfp4``, ``fp8`` (e4m3), ``int8``, ``int4`` (symmetric, stored plus 8), ``uint4`` (with a
            zero for each group), or GGUF's ``q8_0``, ``q4_0``, ``q4_k``, ``q5_k``, ``q6_k``, ``gguf_mxfp4``.
        codes: uint8 ``[..., N, bytes]``. 4-bit codes lie two in a byte, the low nibble first.
        scales: ``[..., ceil(N / rows), ceil(K / columns)]``, one for each block; None for GGUF, which holds them in its
            codes. uint8 stands for e8m0, in ``nvfp4`` for e4m3.
        zeros: of ``uint4``: uint8, nibbles of neighbouring groups in a byte, the low nibble first.
        factor: of ``nvfp4``: float32, for each expert, of all its scales.
        block: rows and columns of a scale.

    The value of an element is its code times its scale: in ``uint4`` code minus zero, in ``nvfp4`` the scale times the
    factor, rounded, in ``q4_k`` and ``q5_k`` minus the block's minimum. Each step is rounded to float32.

    Raises:
        TypeError, ValueError: with the argument, what was expected and what came.

    Source:
        OCP Microscaling Formats (MX) Specification 1.0 (2023); DeepSeek-V3 (2024), section 3.3; ggml's
        ``ggml-quants.c``.

    Example:
        >>> w = ffn_ops.quantize(torch.randn(64, 128), "mxfp4")
        >>> w
        QuantizedWeight(mxfp4, [64, 128], 0.0 of 0.0 MB in bfloat16)
        >>> w.nbytes, w.dequantize().shape
        (4352, torch.Size([64, 128]))
    """

    format: str
    block: tuple[int, int]
    codes: Tensor

    def __init__(
        self,
        format: str,
        codes: Tensor,
        scales: Tensor | None = None,
        *,
        zeros: Tensor | None = None,
        factor: Tensor | None = None,
        block: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__()
        check.choice("format", format, tuple(FORMATS))
        if not isinstance(block, (tuple, list)) or len(block) != 2:
            raise ValueError(f"block: expected a pair of rows and columns, got {block!r}")
        for each in block:
            check.positive("block", each)
        given = {"codes": codes, "scales": scales, "zeros": zeros, "factor": factor}
        wanted = ("codes", *FORMATS[format].parts)
        for name, t in given.items():
            if name in wanted and not isinstance(t, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor in {format}, got {type(t).__name__}")
            if name not in wanted and t is not None:
                raise TypeError(f"{name}: expected None in {format}, got {type(t).__name__}")
        parts: dict[str, Any] = {name: given[name] for name in wanted}
        check_parts(format, block, parts)
        for name, t in parts.items():
            self.register_buffer(name, t.detach().contiguous())
        object.__setattr__(self, "block", (int(block[0]), int(block[1])))
        object.__setattr__(self, "format", format)

    @property
    def parts(self) -> list[Tensor]:
        """Codes, then scales, then zeros or the factor: what the format has."""
        return list(self.named_parts().values())

    def named_parts(self) -> dict[str, Tensor]:
        """The same by their names."""
        held: Any = {**self._parameters, **self._buffers}
        return {name: held[name] for name in ("codes", *FORMATS[self.format].parts)}

    @property
    def shape(self) -> torch.Size:
        """``[N, K]`` or ``[E, N, K]``."""
        return torch.Size((*self.codes.shape[:-1], columns(self.format, self.codes)))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.nbytes for t in self.parts)

    def dim(self) -> int:
        return self.codes.dim()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """All values as a dense tensor: computed in float32, rounded once to a 16-bit ``dtype``."""
        if dtype not in check.DTYPES:
            name = str(dtype).removeprefix("torch.")
            raise TypeError(f"dtype: expected float64, float32, float16 or bfloat16, got {name}")
        check_groups("w", self.codes, self.format, self.block)
        parts, name = self.stacked()
        inner = torch.float32 if dtype is torch.float64 else dtype
        values: Tensor = _dequantize(parts, name, str(inner).removeprefix("torch."))
        return values.reshape(self.shape).to(dtype)

    def stacked(self) -> tuple[list[Tensor], str]:
        """The tensors with a dimension of experts, and the format's name, as operators take them."""
        parts = self.parts if self.codes.dim() == 3 else [t.unsqueeze(0) for t in self.parts]
        return parts, f"{self.format}:{self.block[0]}x{self.block[1]}"

    def requires_grad_(self, requires_grad: bool = True) -> QuantizedWeight:
        if requires_grad:
            raise TypeError(
                "requires_grad: expected False of a QuantizedWeight, which is a constant without a gradient, got True;"
                " train LoRA adapters beside it, or its dequantize()"
            )
        return self

    def as_parameters(self) -> QuantizedWeight:
        """Turns its tensors of bytes into parameters without a gradient, for libraries that look at parameters only.

        FSDP2's ``fully_shard``, from torch 2.15 on, shards them by ``Shard(0)`` and gathers them for a call. Scales of
        a floating-point dtype stay buffers, of which every rank has all: mixed precision would round them.
        ``requires_grad_(True)`` of the whole model then raises torch's error: bytes have no gradient.

        Example:
            >>> layer = ffn_ops.FeedForward(dim=64, d_ff=96)
            >>> layer.w2 = ffn_ops.QuantizedLinear(ffn_ops.quantize(layer.w2.weight, "mxfp4"))
            >>> layer.w2.weight.as_parameters()
            QuantizedWeight(mxfp4, [64, 96], 0.0 of 0.0 MB in bfloat16)
            >>> [name for name, _ in layer.named_parameters()]
            ['w1.weight', 'w3.weight', 'w2.weight.codes', 'w2.weight.scales']
        """
        for name, t in tuple(self._buffers.items()):
            if t is not None and t.dtype is torch.uint8:
                del self._buffers[name]
                self._hold(name, t)
        return self

    def _hold(self, name: str, t: Tensor) -> None:
        """As a buffer where it is one, else as a parameter."""
        if name in self._buffers:
            self._buffers[name] = t
        else:
            self._parameters[name] = nn.Parameter(t, requires_grad=False)

    def extra_repr(self) -> str:
        dense = 2e-6 * self.shape.numel()
        return f"{self.format}, {list(self.shape)}, {self.nbytes * 1e-6:.1f} of {dense:.1f} MB in bfloat16"

    def __setattr__(self, name: str, value: Any) -> None:
        if "format" in self.__dict__ and not name.startswith("_") and name != "training":
            old: Any = self._buffers.get(name, self._parameters.get(name))
            same = isinstance(value, Tensor) and isinstance(old, Tensor) and value.shape == old.shape
            if not same or value.dtype is not old.dtype:  # type: ignore[union-attr]
                raise AttributeError(f"{name}: a QuantizedWeight does not change, make another one")
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedWeight:
        """Moves bytes, so that a change of the model's dtype leaves scales as they are."""
        for name, t in self.named_parts().items():
            local: Any = t.data.to_local() if check.is_dtensor(t) else t.data  # type: ignore[attr-defined]
            moved = fn(local.reshape(-1).view(torch.uint8))
            if moved.dtype is torch.uint8:
                self._hold(name, _as(t, moved.view(t.dtype).reshape(local.shape)))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["format"] = self.stacked()[1]

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        """Loads no bytes that mean something else, of which nobody would notice but by the values."""
        wanted = self.stacked()[1]
        wrong = []
        if (saved := local_metadata.get("format", wanted)) != wanted:
            wrong.append(f"{prefix[:-1]}: expected a quantised weight in {wanted}, got one in {saved}")
        for name, t in self.named_parts().items():
            new = state_dict.get(prefix + name)
            if isinstance(new, Tensor) and isinstance(t, Tensor) and new.dtype is not t.dtype:
                want, got = (str(each.dtype).removeprefix("torch.") for each in (t, new))
                wrong.append(f"{prefix}{name}: expected dtype {want} as the model's weight in {wanted} has, got {got}")
        if wrong:
            errors.extend(wrong)
            return
        if not FORMATS[self.format].parts and not check.is_dtensor(self.codes):
            self._hold("codes", self.codes.clone())  # else it would write to the mapped file
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


def _as(t: Any, local: Tensor) -> Tensor:
    """``local`` in the place of a tensor, or of a DTensor's shard."""
    if not check.is_dtensor(t):
        return local
    return t.from_local(  # type: ignore[no-any-return]
        local, t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride()
    )


def of_graph(format: str, block: tuple[int, int], parts: list[Tensor]) -> QuantizedWeight:
    """A weight inside of a graph: what operators read, without the rest of a module, whose __init__ dynamo refuses."""
    w = QuantizedWeight.__new__(QuantizedWeight)
    buffers = dict(zip(("codes", *FORMATS[format].parts), parts, strict=True))
    for name, value in (("_parameters", {}), ("_modules", {}), ("_buffers", buffers), ("block", block)):
        object.__setattr__(w, name, value)
    object.__setattr__(w, "format", format)
    return w


def _flatten(w: QuantizedWeight) -> tuple[list[Any], Any]:
    return w.parts, (w.format, w.block)


def _unflatten(parts: Any, context: Any) -> QuantizedWeight:
    """Takes what a tree map returns, which need not be tensors."""
    w = QuantizedWeight.__new__(QuantizedWeight)
    nn.Module.__init__(w)
    format, block = context
    for name, t in zip(("codes", *FORMATS[format].parts), parts, strict=True):
        w._buffers[name] = t
    object.__setattr__(w, "block", block)
    object.__setattr__(w, "format", format)
    return w


def _with_keys(w: QuantizedWeight) -> tuple[list[Any], Any]:
    return [(pytree.GetAttrKey(name), t) for name, t in w.named_parts().items()], _flatten(w)[1]


pytree.register_pytree_node(
    QuantizedWeight,
    _flatten,
    _unflatten,
    serialized_type_name="ffn_ops.QuantizedWeight",
    flatten_with_keys_fn=_with_keys,
)
