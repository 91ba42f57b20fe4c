"""Loads the operator libraries and makes an operator differentiable. No operator is defined here."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

LIBRARY = Path(__file__).with_name("libffn_ops_cpu.so")
CUDA_LIBRARY = Path(__file__).with_name("libffn_ops_cuda.so")
CUDA_BUILD = Path(__file__).with_name("cuda_build.json")  # what setup.py built, or why not, and how large


def _load() -> None:
    if not LIBRARY.exists():
        raise ImportError(
            f"ffn_ops: {LIBRARY.name} is not built for this installation. Run `pip install -e .` in the source folder"
            f" (platform {sysconfig.get_platform()})."
        )
    wrong = _wrong_size(LIBRARY)
    if wrong is not None:
        raise ImportError(f"ffn_ops: {wrong}. Run `pip install -e .` in the source folder, or install it again.")
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise ImportError(f"ffn_ops: {LIBRARY.name} does not load on torch {torch.__version__}: {error}") from error
    # A wrong FFN_OPS_ISA must fail at import, not in the middle of a model.
    if "FFN_OPS_ISA" in os.environ:
        torch.ops.ffn_ops._isa()


def _load_cuda() -> str | None:
    """Adds the CUDA kernels, for which neither a GPU nor its driver is needed. Returns why there are none, or None."""
    if not CUDA_LIBRARY.exists():
        return f"not built: {cuda_build().get('reason', 'nothing is known about the build')}"
    wrong = _wrong_size(CUDA_LIBRARY)
    if wrong is not None:
        return f"does not load: {wrong}"
    try:
        torch.ops.load_library(str(CUDA_LIBRARY))
    except OSError as error:  # such as a torch without CUDA, or of another CUDA: the CPU does not care
        return f"does not load on torch {torch.__version__}: {error}"
    return None


def cuda_build() -> dict[str, Any]:
    """What the build wrote down; nothing where that cannot be read, which is no reason not to work."""
    try:
        record = json.loads(CUDA_BUILD.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _wrong_size(library: Path) -> str | None:
    """A library that was cut short in a copy would end the process inside the loader."""
    sizes = cuda_build().get("bytes")
    built = sizes.get(library.name) if isinstance(sizes, dict) else None
    size = library.stat().st_size
    return None if built in (None, size) else f"{library.name} has {size} bytes, the build wrote {built}"


def _refuse_cuda(reason: str) -> torch.library.Library:
    """In the place of each kernel, who calls it is told why it is not there."""
    library = torch.library.Library("ffn_ops", "IMPL")
    for name in sorted(torch._C._dispatch_get_all_op_names()):
        if not name.startswith("ffn_ops::") or name.startswith("ffn_ops::_"):
            continue

        def refuse(*_: Any, name: str = name) -> Any:
            raise RuntimeError(f"{name}: no CUDA kernels in this installation of ffn_ops. CUDA library: {reason}")

        library.impl(name.removeprefix("ffn_ops::"), refuse, "CUDA")
    return library


_load()
CUDA_ABSENT = _load_cuda()
_REFUSALS = None if CUDA_ABSENT is None else _refuse_cuda(CUDA_ABSENT)


def overload(name: str) -> Any:
    return getattr(torch.ops.ffn_ops, name).default


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    decorator: Callable[[Callable[..., Any]], Callable[..., Any]] = torch.library.register_fake(f"ffn_ops::{name}")
    return decorator


def _flatten(args: Sequence[Any]) -> tuple[list[Any], tuple[int | None, ...]]:
    """Arguments with lists of them spread out, as an autograd.Function sees tensors, and how long each list was."""
    flat: list[Any] = []
    for arg in args:
        flat.extend(arg) if isinstance(arg, list) else flat.append(arg)
    return flat, tuple([len(arg) if isinstance(arg, list) else None for arg in args])


def _unflatten(flat: Sequence[Any], lengths: Sequence[int | None] | None) -> tuple[Any, ...]:
    if lengths is None:  # no lists
        return tuple(flat)
    args, at = [], 0
    for length in lengths:
        args.append(flat[at] if length is None else list(flat[at : at + length]))
        at += 1 if length is None else length
    return tuple(args)


class _WithLists:
    """A context whose ``needs_input_grad`` has lists where the operator has them. The context itself is not touched:
    other threads may be running backward through it."""

    def __init__(self, ctx: Any, needs_input_grad: tuple[Any, ...]) -> None:
        self._ctx, self.needs_input_grad = ctx, needs_input_grad

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def differentiable(name: str, setup_context: Callable[..., None], formula: Callable[..., Any]) -> Callable[..., Any]:
    """Registers ``formula`` as the operator's backward and returns the function that calls it.

    ``torch.library.register_autograd`` serves compile, export and raw calls of the operator. In eager mode it spends
    longer on a small layer than the layer takes, so an autograd.Function with the same pair of functions stands in for
    it. torch.func needs one with a ``setup_context`` of its own; so does forward mode, where the operator itself would
    silently drop the tangent and the Function raises.
    """
    op = overload(name)
    takes_lists = any(str(each.type) == "List[Tensor]" for each in op._schema.arguments)

    def backward(ctx: Any, *grads: Any) -> Any:
        """In the dtypes that were saved, also where autocast is on around it, as for second derivatives it may be."""
        if not torch._C._is_any_autocast_enabled():
            return formula(ctx, *grads)
        device = next((grad.device.type for grad in grads if isinstance(grad, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return formula(ctx, *grads)

    torch.library.register_autograd(f"ffn_ops::{name}", backward, setup_context=setup_context)

    def flat_backward(ctx: Any, *grads: Any) -> Any:
        lengths = ctx.arg_lengths
        if lengths is None:
            return *backward(ctx, *grads), None
        result = backward(_WithLists(ctx, _unflatten(ctx.needs_input_grad[:-1], lengths)), *grads)
        flat: list[Any] = []
        for grad, length in zip(result, lengths, strict=True):
            flat.extend([grad] if length is None else grad if isinstance(grad, (list, tuple)) else [grad] * length)
        return *flat, None

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *flat: Any) -> Any:
            lengths = flat[-1]
            args = _unflatten(flat[:-1], lengths)
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*args)
            ctx.arg_lengths = lengths
            setup_context(ctx, args, output)
            return output

        backward = staticmethod(flat_backward)

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*flat: Any) -> Any:
            return op(*_unflatten(flat[:-1], flat[-1]))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.arg_lengths = inputs[-1]
            setup_context(ctx, _unflatten(inputs[:-1], inputs[-1]), output)

        backward = staticmethod(flat_backward)

    def call(*args: Any, grad: bool = True) -> Any:
        """``grad=False`` says that nothing needs a gradient: autograd is then stepped over."""
        if torch.compiler.is_compiling():
            return op(*args)
        transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        if not transformed and not (grad and torch.is_grad_enabled()):
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)
        if torch._C._is_tracing():  # torch.jit.trace keeps operators, not autograd.Functions
            return op(*args)
        flat, lengths = _flatten(args) if takes_lists else (args, None)
        return (Transformed if transformed else Eager).apply(*flat, lengths)

    return call


def vmap_by_loop(name: str) -> None:
    """``torch.vmap`` of an operator: one call for each example, stacked. Right for any batched argument."""
    op = overload(name)

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        def example(i: int) -> list[Any]:
            return [pick(arg, dim, i) for arg, dim in zip(args, in_dims, strict=True)]

        def pick(arg: Any, dim: Any, i: int) -> Any:
            if isinstance(arg, (list, tuple)) and isinstance(dim, (list, tuple)):
                return [pick(each, d, i) for each, d in zip(arg, dim, strict=True)]
            if not isinstance(arg, Tensor) or not isinstance(dim, int):
                return arg
            return arg.select(dim, i) if info.batch_size else arg.sum(dim)  # no examples: one of the right shape

        results = [op(*example(i)) for i in range(max(1, info.batch_size))]
        if info.batch_size == 0:
            empty = [t.new_empty(0, *t.shape) for t in pytree.tree_leaves(results)]
            return (empty[0], 0) if isinstance(results[0], Tensor) else (tuple(empty), (0,) * len(empty))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0,) * len(results[0])

    torch.library.register_vmap(f"ffn_ops::{name}", rule)
