# SPDX-License-Identifier: BSD-3-Clause
"""Checks of arguments, which every public function makes before any work. Messages give the argument, the expected
value and the actual one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy as Proxy

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def is_dtensor(t: Any) -> bool:
    """Compares names, because a plain call must not import torch.distributed."""
    return type(t).__name__ == "DTensor"


def tensor(name: str, value: Any, shape: Sequence[int | str] | None = None, like: Tensor | None = None) -> None:
    """``shape`` holds sizes, or letters where any size is allowed; ``like`` sets dtype and device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    _strided(name, value)
    if like is None:
        if value.dtype not in DTYPES:
            raise TypeError(
                f"{name}: expected dtype float64, float32, float16 or bfloat16, got {dtype_name(value.dtype)}"
            )
    else:
        if value.dtype is not like.dtype:
            raise TypeError(f"{name}: expected dtype {dtype_name(like.dtype)} as x has, got {dtype_name(value.dtype)}")
        device(name, value, like)
    if shape is not None:
        _shape(name, value, shape)


def first(name: str, value: Any) -> None:
    """What a public function asks of its first tensor before it calls the operator, which asks for the rest."""
    if type(value) is not Tensor:
        tensor(name, value)


def wide(name: str, value: Any) -> None:
    """A float32 or float64 tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    _strided(name, value)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected dtype float32 or float64, got {dtype_name(value.dtype)}")


def _strided(name: str, value: Tensor) -> None:
    if type(value) is not Tensor and is_dtensor(value):
        placements = list(value.placements)  # type: ignore[attr-defined]
        raise TypeError(f"{name}: expected a plain tensor, such as a local shard, got a DTensor of {placements}")
    if value.layout is not torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else value.layout
        raise ValueError(f"{name}: expected a strided tensor, got layout {layout}")


def _shape(name: str, value: Tensor, shape: Sequence[int | str]) -> None:
    actual = value.shape
    if len(actual) != len(shape) or any(
        not isinstance(extent, str) and extent != actual[i] for i, extent in enumerate(shape)
    ):
        wanted = ", ".join(str(extent) for extent in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(actual)}")


def leading(name: str, value: Tensor) -> None:
    """A tensor with any number of dimensions before the last one."""
    tensor(name, value)
    if value.dim() < 1:
        raise ValueError(f"{name}: expected shape [..., D], got {list(value.shape)}")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a name, one of {', '.join(allowed)}, got {type(value).__name__}")
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # torch.compile cannot trace math.isfinite of a symbolic number
        raise ValueError(f"{name}: expected a finite number, got {value}")


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def at_least(name: str, value: Any, least: int, most: Any = None) -> None:
    if (
        isinstance(value, Tensor) and torch._C._get_tracing_state() is not None
    ):  # a size: torch.jit.trace makes tensors of them
        return
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        wanted = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{name}: expected {wanted}, got {value}")


def positive(name: str, value: Any) -> None:
    at_least(name, value, 1)


def device(name: str, value: Tensor, like: Tensor, of: str = "x") -> None:
    if value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} as {of} has, got {value.device}")


def indices(name: str, value: Any, shape: Sequence[int | str] = ("R",)) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype is not torch.int64:
        raise TypeError(f"{name}: expected dtype int64, got {dtype_name(value.dtype)}")
    _strided(name, value)
    _shape(name, value, shape)


def integers(name: str, value: Any) -> None:
    """Of any integer dtype and shape."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected an integer dtype, got {value.dtype}")
    _strided(name, value)


def is_routing(value: Any) -> None:
    if getattr(value, "_fields", ())[:5] != ("token", "weight", "offsets", "row", "slot_offsets"):
        raise TypeError(f"routing: expected an ffn_ops.Routing, got {type(value).__name__}")


def routing(value: Any, like: Tensor | None = None, of: str = "x") -> None:
    """Checks that a :class:`ffn_ops.Routing` is consistent; ``like``, named ``of``, sets the device."""
    is_routing(value)
    for name in ("token", "offsets", "row", "slot_offsets"):
        indices(f"routing.{name}", getattr(value, name))
    rows = value.token.shape[0]
    indices("routing.row", value.row, (rows,))
    if not isinstance(value.weight, Tensor) or value.weight.dtype not in DTYPES:
        got = dtype_name(value.weight.dtype) if isinstance(value.weight, Tensor) else type(value.weight).__name__
        raise TypeError(f"routing.weight: expected a tensor of float32, float64, float16 or bfloat16, got {got}")
    _strided("routing.weight", value.weight)
    _shape("routing.weight", value.weight, (rows,))
    for name in ("offsets", "slot_offsets"):
        if getattr(value, name).shape[0] < 1:
            raise ValueError(f"routing.{name}: expected at least one element, got none")
    if like is not None:
        for name in value._fields:
            field = getattr(value, name)
            if field is not None:  # a mask may be empty
                device(f"routing.{name}", field, like, of)


def refuse_script(module: Any) -> Any:
    """Used as ``__prepare_scriptable__``, which torch.jit.script calls before it compiles a module's source."""
    raise NotImplementedError(
        f"{type(module).__name__}: torch.jit.script cannot compile it. Use torch.export or torch.jit.trace, or"
        " ffn_ops.restore(model) first where ffn_ops.replace has changed it"
    )


def leaf(module: Any, proxy: Proxy) -> Any:
    """For torch.fx.symbolic_trace: a function that records the call of ``module`` as one node, because its forward
    inspects its input."""
    tracer: Any = proxy.tracer
    path = tracer.path_of_module(module)
    if not path:
        raise TypeError(
            f"{type(module).__name__}: torch.fx.symbolic_trace cannot trace this module alone; trace a model that"
            " contains it"
        )
    return lambda *args, **kwargs: tracer.create_proxy("call_module", path, args, kwargs)
