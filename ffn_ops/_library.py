# SPDX-License-Identifier: BSD-3-Clause
"""Loads the operator libraries, and makes operators differentiable. This file defines no operator."""

from __future__ import annotations

import contextlib
import json
import os
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from . import _checks as check

LIBRARY = Path(__file__).with_name("libffn_ops_cpu.so")
CUDA_LIBRARY = Path(__file__).with_name("libffn_ops_cuda.so")
HOW_TO_GET_CUDA = "Run `FFN_OPS_CUDA=1 pip install -e .` in the source folder, with a CUDA toolkit, to build it."
# written by setup.py: what was built or why not, and the file's size
CUDA_BUILD = Path(__file__).with_name("cuda_build.json")


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
    # A wrong environment variable must fail at import, not in the middle of a model.
    if "FFN_OPS_ISA" in os.environ:
        torch.ops.ffn_ops._isa()
    if "FFN_OPS_CACHE_LIMIT" in os.environ:
        torch.ops.ffn_ops._cache_limit()


def _load_cuda() -> str | None:
    """Loads the CUDA kernels, which needs neither a GPU nor a driver. Returns None, or the reason why it failed."""
    if not CUDA_LIBRARY.exists():
        return f"not built: {cuda_build().get('reason', 'nothing is known about the build')}. {HOW_TO_GET_CUDA}"
    wrong = _wrong_size(CUDA_LIBRARY)
    if wrong is not None:
        return f"does not load: {wrong}"
    try:
        torch.ops.load_library(str(CUDA_LIBRARY))
    except OSError as error:  # such as a torch without CUDA, or with another CUDA version; the CPU kernels still work
        return f"does not load on torch {torch.__version__}: {error}"
    return None


def cuda_build() -> dict[str, Any]:
    """What the build recorded; empty if the file cannot be read, which is not an error."""
    try:
        record = json.loads(CUDA_BUILD.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _wrong_size(library: Path) -> str | None:
    """Checks the file's size: loading a truncated library would crash the process."""
    sizes = cuda_build().get("bytes")
    built = sizes.get(library.name) if isinstance(sizes, dict) else None
    size = library.stat().st_size
    return None if built in (None, size) else f"{library.name} has {size} bytes, the build wrote {built}"


def _refuse_cuda(reason: str) -> torch.library.Library:
    """Registers a stub for each kernel that raises an error with the reason."""
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
    """Registers the fake kernel, which computes shapes without data. All tensors must share a device: a call that mixes
    meta and CPU tensors comes here too, and would return uninitialised memory."""
    names = [argument.name for argument in overload(name)._schema.arguments]

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def on_one_device(*args: Any) -> Any:
            first: tuple[str, Tensor] | None = None
            for each, arg in zip(names, args, strict=True):
                for t in arg if isinstance(arg, (list, tuple)) else (arg,):
                    if isinstance(t, Tensor):
                        first = first or (each, t)
                        check.device(each, t, first[1], first[0])
            return function(*args)

        registered: Callable[..., Any] = torch.library.register_fake(f"ffn_ops::{name}", on_one_device)
        return registered

    return register


def _flatten(args: Sequence[Any]) -> tuple[list[Any], tuple[int | None, ...]]:
    """Flattens lists among the arguments, because autograd.Function only sees tensors outside of lists; also returns
    their lengths."""
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


class ContextWith:
    """Wraps a context and overrides some attributes, such as ``needs_input_grad`` or ``saved_tensors``. It does not
    modify the context, because other threads may be running backward through it."""

    def __init__(self, ctx: Any, **attributes: Any) -> None:
        self._ctx = ctx
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


# For inputs of fewer elements, asking the engine for leaves costs more than computing gradients that nobody asked for.
_WORTH_ASKING = 1 << 18


def _asked_for(ctx: Any) -> tuple[bool, ...]:
    """Which inputs' gradients this backward pass uses. ``autograd.grad(y, x)`` with trainable weights uses only x's.

    ``needs_input_grad`` only says which inputs require a gradient. The engine knows which functions it will run next:
    the next functions of a Python Function are those of its tensors, or None for a tensor that requires no gradient.
    For a leaf that ``autograd.grad`` asks for, the engine raises, which costs 20 microseconds, so small layers do not
    ask for leaves.
    """
    needs: tuple[bool, ...] = ctx.needs_input_grad
    if not ctx.asks or _will_run is None or torch.compiler.is_compiling():
        return needs
    functions = [function for function, _ in ctx.next_functions if function is not None]
    if len(functions) != sum(needs):
        return needs
    places = [place for place, need in enumerate(needs) if need]
    asked = list(needs)
    for place, function in zip(places, functions, strict=True):
        if ctx.small and type(function) is _LEAF:
            continue
        # it raises if autograd.grad asks for this leaf, or if no engine is running: the gradient is needed
        with contextlib.suppress(RuntimeError):
            asked[place] = _will_run(function)
    return tuple(asked)


def _set_up_asking(ctx: Any, flat: Sequence[Any]) -> None:
    elements: Any = 0
    leaves = True
    for t in flat:
        if isinstance(t, Tensor):
            elements += t.numel()
            leaves = leaves and t.is_leaf
    ctx.small = type(elements) is int and elements < _WORTH_ASKING  # a graph may have numbers without values
    ctx.asks = not (ctx.small and leaves)


def is_transformed() -> bool:
    """True where a call of an operator means more than its result and its backward."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._dispatch_tls_is_dispatch_key_included(GRADS_BATCHED)
    )


observer: Callable[[Any, tuple[Any, ...]], Any] | None = None  # calls an operator in its place, for `profile`
_LEAF: Any = getattr(torch._C._functions, "AccumulateGrad", None)  # the type of a leaf's function in the graph
_will_run = getattr(torch._C, "_will_engine_execute_node", None)
GRADS_BATCHED: Any = torch._C._parse_dispatch_key("VmapMode")  # active in the vmap of is_grads_batched=True
_IMPLEMENTATIONS = torch.library.Library("ffn_ops", "IMPL")


def differentiable(
    name: str,
    setup_context: Callable[..., None],
    formula: Callable[..., Any],
    tangent: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Registers ``formula`` as the operator's backward and returns the function that calls it.

    ``formula(ctx, *grads)`` gives the gradients of the operator's arguments; the last ones may be left out for None.
    ``tangent(ctx, *tangents)`` is the forward-mode derivative. It maps the inputs' tangents (None for a missing one) to
    the outputs'; ``ctx`` is the context of backward. The operator's autograd kernel serves raw calls, torch.func,
    forward mode, compile and export. The returned function bypasses the dispatcher in eager mode, because its way
    through Python takes longer than a small layer. (torch.library.register_autograd supports neither torch.func nor
    forward mode.)
    """
    op = overload(name)

    takes_lists = any(str(each.type) == "List[Tensor]" for each in op._schema.arguments)

    def below_autograd(args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            look = observer  # another thread may set it
            return op(*args) if look is None else look(op, args)

    def without_autocast(ctx: Any, *grads: Any) -> Any:
        """Runs in the saved dtypes even under autocast, which may be on when second derivatives are computed."""
        device = next((grad.device.type for grad in grads if isinstance(grad, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return formula(ctx, *grads)

    def set_up(ctx: Any, flat: tuple[Any, ...], args: tuple[Any, ...], output: Any) -> None:
        ctx.arg_lengths = flat[-1]
        setup_context(ctx, args, output)
        _set_up_asking(ctx, flat)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(*(ctx.to_save or ()))

    def flat_backward(ctx: Any, *grads: Any) -> Any:
        lengths, needs = ctx.arg_lengths, _asked_for(ctx)
        in_autocast = torch._C._is_any_autocast_enabled()
        if lengths is None:
            asked = ctx if needs == ctx.needs_input_grad else ContextWith(ctx, needs_input_grad=needs)
            result = without_autocast(asked, *grads) if in_autocast else formula(asked, *grads)
            return *result, *(None,) * (len(needs) - len(result))
        run = without_autocast if in_autocast else formula
        result = run(ContextWith(ctx, needs_input_grad=_unflatten(needs[:-1], lengths)), *grads)
        flat: list[Any] = []
        for grad, length in zip(result, lengths, strict=False):
            flat.extend([grad] if length is None else grad if isinstance(grad, (list, tuple)) else [grad] * length)
        return *flat, *(None,) * (len(needs) - len(flat))

    def flat_tangent(ctx: Any, *flat: Any) -> Any:
        if tangent is None:
            raise NotImplementedError(f"ffn_ops::{name}: no forward-mode derivative (jvp) of this operator")
        # torch turns forward mode off here, and outer levels would lose their tangents
        with forward_ad._set_fwd_grad_enabled(True):
            saved = tuple(None if t is None else forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors)
            return tangent(ContextWith(ctx, saved_tensors=saved), *_unflatten(flat[:-1], ctx.arg_lengths))

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *flat: Any) -> Any:
            args = _unflatten(flat[:-1], flat[-1])
            output = below_autograd(args)
            set_up(ctx, flat, args, output)
            return output

        backward = staticmethod(flat_backward)
        jvp = staticmethod(flat_tangent)

    class OneLevel(torch.autograd.function._SingleLevelFunction):
        """Handles the torch.func transformation at the top of the stack. The levels below need modes that a Function
        turns off."""

        @staticmethod
        def forward(*flat: Any) -> Any:
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return below_autograd(_unflatten(flat[:-1], flat[-1]))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            set_up(ctx, inputs, _unflatten(inputs[:-1], inputs[-1]), output)

        backward = staticmethod(flat_backward)
        jvp = staticmethod(flat_tangent)

    def autograd_kernel(*args: Any) -> Any:
        in_func = torch._C._are_functorch_transforms_active()
        flat, lengths = _flatten(args) if takes_lists else (args, None)
        if in_func:
            with enable_single_level_autograd_function():
                return OneLevel.apply(*flat, lengths)  # type: ignore[attr-defined]
        if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and torch._C._any_requires_grad(*flat)):
            return Eager.apply(*flat, lengths)
        return below_autograd(args)

    _IMPLEMENTATIONS.impl(name, autograd_kernel, "Autograd")

    def call(*args: Any, grad: bool = True) -> Any:
        """``grad=False`` says that nothing needs a gradient; the call then bypasses autograd."""
        if is_transformed():
            return op(*args)
        if not (grad and torch.is_grad_enabled()):
            return below_autograd(args)
        if torch._C._get_tracing_state() is not None:  # torch.jit.trace keeps operators, not autograd.Functions
            return op(*args)
        flat, lengths = _flatten(args) if takes_lists else (args, None)
        return Eager.apply(*flat, lengths)

    call.function = Eager  # type: ignore[attr-defined]
    return call


def vmap_by_loop(name: str) -> None:
    """Implements ``torch.vmap`` of an operator: one call for each example, results stacked. Any argument may be
    batched."""
    op = overload(name)

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        def example(i: int) -> list[Any]:
            return [pick(arg, dim, i) for arg, dim in zip(args, in_dims, strict=True)]

        def pick(arg: Any, dim: Any, i: int) -> Any:
            if isinstance(arg, (list, tuple)) and isinstance(dim, (list, tuple)):
                return [pick(each, d, i) for each, d in zip(arg, dim, strict=True)]
            if not isinstance(arg, Tensor) or not isinstance(dim, int):
                return arg
            # no examples: one call with zeros gives the shape
            return arg.select(dim, i) if info.batch_size else arg.sum(dim)

        results = [op(*example(i)) for i in range(max(1, info.batch_size))]
        if info.batch_size == 0:
            empty = [t.new_empty(0, *t.shape) for t in pytree.tree_leaves(results)]
            return (empty[0], 0) if isinstance(results[0], Tensor) else (tuple(empty), (0,) * len(empty))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0,) * len(results[0])

    torch.library.register_vmap(f"ffn_ops::{name}", rule)

    def gradients_batched(*args: Any) -> Any:
        """For ``is_grads_batched=True``, which uses an older vmap; torch's fallback for it does not support lists."""
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        size = 0

        def batched(t: Any) -> bool:
            return isinstance(t, Tensor) and torch._C._functorch.is_legacy_batchedtensor(t)

        def outside(t: Any) -> Any:
            nonlocal size
            if not batched(t):
                return t
            t = torch._remove_batch_dim(t, level, 1, 0)
            size = t.shape[0]
            return t

        def each(function: Callable[[Any], Any]) -> list[Any]:
            return [[function(t) for t in arg] if isinstance(arg, list) else function(arg) for arg in args]

        dims, plain = each(lambda t: 0 if batched(t) else None), each(outside)
        result, _ = rule(SimpleNamespace(batch_size=size), dims, *plain)
        if isinstance(result, Tensor):
            return torch._add_batch_dim(result, 0, level)
        return tuple(torch._add_batch_dim(t, 0, level) for t in result)

    _IMPLEMENTATIONS.impl(name, gradients_batched, "Batched")
