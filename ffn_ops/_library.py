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
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

LIBRARY = Path(__file__).with_name("libffn_ops_cpu.so")
CUDA_LIBRARY = Path(__file__).with_name("libffn_ops_cuda.so")
CUDA_BUILD = Path(__file__).with_name("cuda_build.json")  # what setup.py built, or why not


def _load() -> None:
    if not LIBRARY.exists():
        raise ImportError(
            f"ffn_ops: {LIBRARY.name} is not built for this installation. Run `pip install -e .` in the source folder"
            f" (platform {sysconfig.get_platform()})."
        )
    torch.ops.load_library(str(LIBRARY))
    # A wrong FFN_OPS_ISA must fail at import, not in the middle of a model.
    if "FFN_OPS_ISA" in os.environ:
        torch.ops.ffn_ops._isa()


def _load_cuda() -> str | None:
    """Adds the CUDA kernels, for which neither a GPU nor its driver is needed. Returns why there are none, or None."""
    if not CUDA_LIBRARY.exists():
        return f"not built: {cuda_build().get('reason', 'nothing is known about the build')}"
    try:
        torch.ops.load_library(str(CUDA_LIBRARY))
    except OSError as error:  # such as a torch without CUDA, or of another CUDA: the CPU does not care
        return f"does not load on torch {torch.__version__}: {error}"
    return None


def cuda_build() -> dict[str, str]:
    try:
        record: dict[str, str] = json.loads(CUDA_BUILD.read_text())
    except (OSError, ValueError):
        record = {}
    return record


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


class _Asked:
    """A context whose ``needs_input_grad`` says what was asked for, with lists where the operator has them. The context
    itself is not touched: other threads may be running backward through it."""

    def __init__(self, ctx: Any, needs_input_grad: tuple[Any, ...]) -> None:
        self._ctx, self.needs_input_grad = ctx, needs_input_grad

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


# Below this many numbers in gradients the engine's answers cost more than computing what nobody asked for.
_WORTH_ASKING = 1 << 16


def _asked_for(ctx: Any, grads: Sequence[Any]) -> tuple[bool, ...]:
    """Which inputs' gradients this backward pass uses: ``autograd.grad(y, x)`` of trainable weights asks for x alone.

    ``needs_input_grad`` says what requires a gradient. The engine knows which functions it will run next: a python
    Function's next functions are those of its tensors, None where one requires no gradient. About a leaf that
    ``autograd.grad`` asks for the engine raises, at 20 microseconds each, so small layers stop at the first one.
    """
    needs: tuple[bool, ...] = ctx.needs_input_grad
    if _will_run is None or torch.compiler.is_compiling():
        return needs
    functions = [function for function, _ in ctx.next_functions if function is not None]
    if len(functions) != sum(needs):
        return needs
    places = [place for place, need in enumerate(needs) if need]
    asked = list(needs)
    for i, (place, function) in enumerate(zip(places, functions, strict=True)):
        try:
            asked[place] = _will_run(function)
        except RuntimeError:  # a leaf that is asked for, or no engine runs: needed
            if i == 0 or all(asked[p] is True for p in places[:i]):
                leaves = sum(f.variable.numel() for f in functions if hasattr(f, "variable"))
                if leaves + sum(g.numel() for g in grads if g is not None) < _WORTH_ASKING:
                    break
    return tuple(asked)


_will_run = getattr(torch._C, "_will_engine_execute_node", None)
_IMPLEMENTATIONS = torch.library.Library("ffn_ops", "IMPL")


def differentiable(
    name: str,
    setup_context: Callable[..., None],
    formula: Callable[..., Any],
    tangent: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Registers ``formula`` as the operator's backward and returns the function that calls it.

    ``tangent(ctx, *tangents)`` is its forward mode: from the inputs' tangents, None where there is none, those of the
    outputs; ``ctx`` is as in backward. One autograd.Function serves both. The operator's kernel for autograd applies it
    for raw calls, torch.func, forward mode, compile and export; the function returned goes to it directly in eager
    mode, where the dispatcher's way through python takes longer than a small layer.
    """
    op = overload(name)
    takes_lists = any(str(each.type) == "List[Tensor]" for each in op._schema.arguments)

    def without_autocast(ctx: Any, *grads: Any) -> Any:
        """In the dtypes that were saved, also where autocast is on around it, as for second derivatives it may be."""
        if not torch._C._is_any_autocast_enabled():
            return formula(ctx, *grads)
        device = next((grad.device.type for grad in grads if isinstance(grad, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return formula(ctx, *grads)

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *flat: Any) -> Any:
            lengths = flat[-1]
            args = _unflatten(flat[:-1], lengths)
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*args)
            ctx.arg_lengths = lengths
            setup_context(ctx, args, output)
            if forward_ad._current_level >= 0:
                ctx.save_for_forward(*ctx.to_save)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            lengths, needs = ctx.arg_lengths, _asked_for(ctx, grads)
            if lengths is None:
                asked = ctx if needs == ctx.needs_input_grad else _Asked(ctx, needs)
                return *without_autocast(asked, *grads), None
            result = without_autocast(_Asked(ctx, _unflatten(needs[:-1], lengths)), *grads)
            flat: list[Any] = []
            for grad, length in zip(result, lengths, strict=True):
                flat.extend([grad] if length is None else grad if isinstance(grad, (list, tuple)) else [grad] * length)
            return *flat, None

        @staticmethod
        def jvp(ctx: Any, *flat: Any) -> Any:
            if tangent is None:
                raise NotImplementedError(f"ffn_ops::{name}: no forward-mode derivative (jvp) of this operator")
            return tangent(ctx, *_unflatten(flat[:-1], ctx.arg_lengths))

    def autograd_kernel(*args: Any) -> Any:
        in_func = torch._C._are_functorch_transforms_active()
        if not in_func and forward_ad._current_level < 0:
            leaves = _flatten(args)[0] if takes_lists else args
            if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*leaves)):
                with torch._C._AutoDispatchBelowAutograd():
                    return op(*args)
        flat, lengths = _flatten(args) if takes_lists else (args, None)
        if in_func:  # the dispatcher has come to one level of torch.func; the call below it goes on to the next
            with enable_single_level_autograd_function():
                return super(torch.autograd.Function, Derivative).apply(*flat, lengths)
        return Derivative.apply(*flat, lengths)

    _IMPLEMENTATIONS.impl(name, autograd_kernel, "Autograd")

    def call(*args: Any, grad: bool = True) -> Any:
        """``grad=False`` says that nothing needs a gradient: autograd is then stepped over."""
        if (
            torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
        ):
            return op(*args)
        if not (grad and torch.is_grad_enabled()):
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)
        flat, lengths = _flatten(args) if takes_lists else (args, None)
        return Derivative.apply(*flat, lengths)

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
