"""Runs a layer's own forward on a hollow copy of the layer, and writes down what it does with its children.

In the copy every layer with parameters is a stub that returns fresh random numbers. What flows from stub to stub is the
layer's own arithmetic and nothing else, whatever the weights are (meta, quantised, sharded, wrapped by adapters); the
layer itself, its hooks, buffers and the random state of the program are not touched.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..modules import has_own_forward

# Kinks, clips and tails of activations lie between these; two forms of one activation differ between 1 and 4.
_SIZES = (0.0, 1e-3, 0.3, 0.7, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.5, 7.5, 11.0, 25.0, 90.0, 600.0, 3e4)
_TELLING = [sign * size for size in _SIZES for sign in (1.0, -1.0)]
_LARGEST_HALF = 200.0  # in float16, so that products stay finite
_ENOUGH = 160  # numbers per stub
_MOST_OWN = 1 << 16  # numbers of a tensor of a layer's own, which may be on a device or on none
ORIGINAL = "_ffn_ops_original"  # of a class that replace() made: the class in whose place it stands


class ProbeError(Exception):
    """The layer does with its children what no feed-forward layer does."""


@dataclass(frozen=True)
class Event:
    """One call of a stub."""

    kind: str  # linear, dropout, other
    path: str
    input: Tensor
    output: Tensor


@dataclass
class Trace:
    x: Tensor
    events: list[Event] = field(default_factory=list)
    run: list[str] = field(default_factory=list)  # modules whose own forward ran, by path
    reads_weights: bool = False  # forward asks for a child's weight, to cast to its dtype as T5 does
    y: Any = None


def original_class(module: nn.Module) -> type[nn.Module]:
    return getattr(type(module), ORIGINAL, type(module))


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of whatever maps rows to rows: nn.Linear, an adapter or quantised layer in its place, Conv1D."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        sizes = [getattr(module, name, None) for name in names]
        if all(type(size) is int for size in sizes):
            return sizes[0], sizes[1]  # type: ignore[return-value]
    weight = getattr(module, "weight", None)
    if type(getattr(module, "nf", None)) is int and isinstance(weight, Tensor) and weight.dim() == 2:
        return weight.shape[0], weight.shape[1]
    return None


class WithoutDropout(TorchFunctionMode):
    """``F.dropout`` in a forward's own code returns its input."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") == "dropout":
            return args[0] if args else kwargs["input"]
        return function(*args, **(kwargs or {}))


class _Stub(nn.Module):
    kind: str
    path: str
    probe: _Probe
    shape: tuple[int, int] | None

    def __init__(self, kind: str, path: str, of: nn.Module, probe: _Probe) -> None:
        super().__init__()
        # Sizes, probabilities, flags: forwards ask for them.
        self.__dict__.update({k: v for k, v in vars(of).items() if isinstance(v, (int, float, str, bool, type(None)))})
        self.__dict__.update(kind=kind, path=path, probe=probe, shape=linear_shape(of))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A shape and a dtype. Not asked of the layer itself: parametrisations may count how often that is done."""
        self.probe.trace.reads_weights = True
        return torch.empty((self.shape or (1, 1))[::-1], dtype=self.probe.dtype, device="meta")

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise ProbeError(f"{self.path} is called with other arguments than one tensor")
        given = args[0]
        width = given.shape[-1] if given.dim() else 0
        if self.shape is not None:
            if width != self.shape[0]:
                raise ProbeError(f"{self.path} is called with width {width}, not {self.shape[0]}")
            width = self.shape[1]
        output = self.probe.numbers((*given.shape[:-1], width), given.dtype)
        self.probe.trace.events.append(Event(self.kind, self.path, given.clone(), output.clone()))
        return output


class _Probe:
    """One run: its random numbers, its hollow modules, its trace."""

    def __init__(self, dtype: torch.dtype, training: bool, seed: int, disturbed: bool = False) -> None:
        self.dtype, self.training, self.disturbed = dtype, training, disturbed
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.hollow: dict[int, nn.Module] = {}
        self.trace = Trace(torch.empty(0))

    def numbers(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        values = 2 * torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu")
        flat = values.view(-1)
        telling = torch.tensor(_TELLING, dtype=torch.float32, device="cpu")[: flat.numel()]
        places = torch.randperm(flat.numel(), generator=self.generator, device="cpu")[: telling.numel()]
        flat[places] = telling
        if self.disturbed:
            values.view(-1, shape[-1])[0] += 1
        if dtype is torch.float16:
            values.clamp_(-_LARGEST_HALF, _LARGEST_HALF)
        return values.to(dtype)

    def hollow_of(self, module: nn.Module, path: str) -> nn.Module:
        known = self.hollow.get(id(module))
        if known is None:
            known = self.hollow[id(module)] = self._make(module, path)
        return known

    def _make(self, module: nn.Module, path: str) -> nn.Module:
        if path and linear_shape(module) is not None:
            return _Stub("linear", path, module, self)
        if type(module) is nn.Dropout:
            return _Stub("dropout", path, module, self)
        if path and not module._modules and (module._parameters or module._buffers):
            return _Stub("other", path, module, self)
        cls = original_class(module)
        copy: nn.Module = object.__new__(cls)
        for name, value in vars(module).items():
            if name == "forward" and has_own_forward(module):
                continue  # bound to the layer itself
            # So that what forward writes down about its calls stays in the copy.
            copy.__dict__[name] = value.copy() if isinstance(value, (list, dict, set)) else value
        for name in [name for name in copy.__dict__ if name.endswith("_hooks") and isinstance(vars(copy)[name], dict)]:
            copy.__dict__[name] = type(vars(copy)[name])()
        copy.__dict__.update(training=self.training, _compiled_call_impl=None)
        copy._forward_pre_hooks[-1] = lambda *_: self.trace.run.append(path)
        for name, child in module._modules.items():
            if child is not None:
                copy._modules[name] = self.hollow_of(child, f"{path}.{name}" if path else name)
        return copy


def _rows(rank: int, width: int) -> tuple[int, ...]:
    """Leading dimensions for so many dimensions in all, with enough numbers at that width."""
    if rank == 1:
        return ()
    rows = max(6, -(-_ENOUGH // max(1, width)))
    return {2: (rows,), 3: (2, -(-rows // 2)), 4: (2, 2, -(-rows // 4))}[rank]


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """No gradients, casts, warnings, global hooks; random numbers that are drawn in here are not missed outside."""
    state = random.getstate()
    of_module = vars(nn.modules.module).items()
    hooks = [(d, d.copy()) for name, d in of_module if name.startswith("_global_") and isinstance(d, dict)]
    for of_all, _ in hooks:
        of_all.clear()
    with (
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            random.setstate(state)
            for of_all, before in hooks:
                of_all.update(before)


def trace(
    layer: nn.Module,
    method: str,
    width: int,
    narrowest: int,
    *,
    rank: int,
    dtype: torch.dtype,
    training: bool,
    seed: int,
    given: dict[str, Any],
) -> Trace:
    """What ``method`` of the layer does with one tensor of so many dimensions and ``width`` columns.

    ``given``: further arguments, by name.

    Raises: ProbeError, or whatever the layer's own code raises.
    """
    probe = _Probe(dtype, training, seed)
    with _aside():
        x = probe.numbers((*_rows(rank, narrowest), width), dtype)
        probe.trace.x = x.clone()
        hollow = probe.hollow_of(layer, "")
        if method == "forward":
            probe.trace.y = hollow(x, **given)
        else:
            probe.trace.y = getattr(hollow, method)(x, **given)
        if not torch.equal(x, probe.trace.x):
            raise ProbeError("it writes into its input")
    if not isinstance(probe.trace.y, Tensor):
        raise ProbeError(f"it returns a {type(probe.trace.y).__name__}, not one tensor")
    return probe.trace


def events_of(layer: nn.Module, width: int, narrowest: int, *, rank: int, disturbed: bool) -> tuple[list[Event], bool]:
    """The calls of children, up to where forward fails if it does, and whether it ran to its end.

    ``disturbed``: the first row of x and of every child's output has other numbers.
    """
    probe = _Probe(torch.float32, False, 0, disturbed)
    with _aside():
        try:
            hollow = probe.hollow_of(layer, "")
            for module in probe.hollow.values():
                tensors: list[dict[str, Any]] = [module._parameters, module._buffers]
                for own in tensors:
                    for name, tensor in own.items():
                        if tensor is not None and tensor.numel() <= _MOST_OWN:
                            own[name] = probe.numbers(tuple(tensor.shape), tensor.dtype)
            hollow(probe.numbers((*_rows(rank, narrowest), width), torch.float32))
            whole = True
        except Exception:  # the layer's own code, called in a way that it may not expect
            whole = False
    return probe.trace.events, whole


def result_of(function: Any, x: Tensor) -> Any:
    """Of a function, or of a module without children, of which a copy is called."""
    with _aside():
        if isinstance(function, nn.Module):
            function = _Probe(x.dtype, False, 0).hollow_of(function, "")
        return function(x.clone())
