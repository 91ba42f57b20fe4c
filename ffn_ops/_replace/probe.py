# SPDX-License-Identifier: BSD-3-Clause
"""Runs a layer's own forward on a stub copy of the layer, whose linear layers return random values, and records what it
does with its children.

In the copy every layer with parameters is a stub that returns fresh random values. So the values between stubs show
only the layer's own arithmetic, whatever the weights are (meta, quantised, sharded, wrapped by adapters). The probe
does not touch the layer itself, its hooks, its buffers or the random state of the program.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..modules import has_own_forward
from .alike import ABSENT, OF_EVERY_MODULE, WATCH, Reads, watched
from .learned import learned

# This range covers kinks, clips and tails of activations. Two forms of one activation differ between 1 and 4.
_SIZES = (0.0, 1e-3, 0.3, 0.7, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.5, 7.5, 11.0, 25.0, 90.0, 600.0, 3e4)
_TELLING = [sign * size for size in _SIZES for sign in (1.0, -1.0)]
_LARGEST_HALF = 200.0  # in float16, so that products stay finite
_ENOUGH = 160  # values per stub
_MOST_OWN = 1 << 16  # elements up to which the copy has a layer's own tensors, with random values
_MANY = 1 << 13
_OF_STUBS = OF_EVERY_MODULE | {"kind", "path", "probe", "shape", "norm", "learned"}
ORIGINAL = "_ffn_ops_original"  # attribute of a class that replace() made: the original class
EXCHANGED = "_ffn_ops_called"  # of an instance that integrations/transformers.py exchanged: children that it calls


class ProbeError(Exception):
    """Raised if the layer does something with its children that no feed-forward layer does."""


@dataclass(frozen=True)
class Event:
    """One call of a stub."""

    kind: str  # linear, dropout, norm (its parameters have one dimension at most), other
    path: str
    input: Tensor
    output: Tensor
    learned: str = ""  # the activation that it computes, with parameters of its own


@dataclass
class Trace:
    x: Tensor
    events: list[Event] = field(default_factory=list)
    run: list[str] = field(default_factory=list)  # modules whose own forward ran, by path
    run_at: list[int] = field(default_factory=list)  # and the number of stub calls before it
    reads_weights: bool = False  # forward reads a child's weight, as T5 does to cast to its dtype
    y: Any = None


@dataclass(frozen=True)
class Run:
    """What is looked at of a layer: a method, or a function of the layer and one tensor."""

    name: str
    function: Any = None
    children: frozenset[str] | None = None  # that the function may ask for; None: any

    def signature(self, layer: nn.Module) -> inspect.Signature:
        return inspect.signature(self.function or getattr(original_class(layer), self.name))

    def __call__(self, stub: Any, x: Tensor, given: dict[str, Any]) -> Any:
        if self.function is not None:
            return self.function(stub, x)
        return stub(x, **given) if self.name == "forward" else getattr(stub, self.name)(x, **given)


def original_class(module: nn.Module) -> type[nn.Module]:
    return getattr(type(module), ORIGINAL, type(module))


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a layer that maps rows to rows: nn.Linear, an adapter or quantised layer in its place, Conv1D."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        sizes = [getattr(module, name, None) for name in names]
        if all(type(size) is int for size in sizes):
            return sizes[0], sizes[1]  # type: ignore[return-value]
    weight = getattr(module, "weight", None)
    if type(getattr(module, "nf", None)) is int and isinstance(weight, Tensor) and weight.dim() == 2:
        return weight.shape[0], weight.shape[1]
    return None


class _WithoutDropout(TorchFunctionMode):
    """Makes ``F.dropout`` in a forward's own code return its input."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") == "dropout":
            return args[0] if args else kwargs["input"]
        return function(*args, **(kwargs or {}))


def why_eval_only(in_training: Callable[[], bool], which: str) -> str:
    """What a layer does differently in training, or nothing. ``in_training``: whether it computes the same."""
    if in_training():
        return ""
    with _WithoutDropout():
        dropout = in_training()
    return f"it calls dropout, with p > 0, {which}" if dropout else "it computes something else"


def norm_width(module: nn.Module) -> int | None:
    """For a layer whose parameters have one dimension: the width of its input."""
    parameters = [p for p in module._parameters.values() if isinstance(p, Tensor)]
    sizes = {p.shape[0] for p in parameters if p.dim() == 1} - {1} or {1}
    return sizes.pop() if len(sizes) == 1 and all(p.dim() < 2 for p in parameters) else None


class _Stub(nn.Module):
    kind: str
    path: str
    probe: Probe
    shape: tuple[int, int] | None
    norm: int | None  # the width that it normalises
    learned: str

    def __init__(self, kind: str, path: str, of: nn.Module, probe: Probe, learned: str = "") -> None:
        super().__init__()
        # Sizes, probabilities and flags, which forwards read.
        self.__dict__.update({k: v for k, v in vars(of).items() if isinstance(v, (int, float, str, bool, type(None)))})
        self.__dict__.update(kind=kind, path=path, probe=probe, shape=linear_shape(of), norm=norm_width(of))
        self.__dict__["learned"] = learned

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A shape and a dtype. It does not read the layer's own weight, because parametrisations may count reads."""
        self.probe.trace.reads_weights = True
        return torch.empty((self.shape or (1, 1))[::-1], dtype=self.probe.dtype, device="meta")

    def __getattribute__(self, name: str) -> Any:
        own = object.__getattribute__(self, "__dict__")
        if WATCH in own and name in own and name not in _OF_STUBS:
            own[WATCH](name)
        return super().__getattribute__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise ProbeError(f"{self.path} is called with arguments other than one tensor")
        given = args[0]
        width = given.shape[-1] if given.dim() else 0
        if self.shape is not None:
            if width != self.shape[0]:
                raise ProbeError(f"{self.path} is called with width {width}, not {self.shape[0]}")
            width = self.shape[1]
        elif self.norm not in (None, 1, width):
            raise ProbeError(f"{self.path} is called with width {width}, not {self.norm}")
        return self.answer(given, width)

    def answer(self, given: Tensor, width: int) -> Tensor:
        """Random values with so many columns."""
        output = self.probe.numbers((*given.shape[:-1], width), given.dtype)
        self.probe.trace.events.append(Event(self.kind, self.path, given.clone(), output.clone(), self.learned))
        return output


class Probe:
    """One run: its random values, its stub modules, its trace."""

    def __init__(
        self,
        dtype: torch.dtype,
        training: bool,
        seed: int,
        reads: Reads,
        *,
        of: Run | None = None,
    ) -> None:
        self.of, self.disturbed = of, False
        self.dtype, self.training, self.reads = dtype, training, reads
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.stub: dict[int, nn.Module] = {}
        self.trace = Trace(torch.empty(0))

    def numbers(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        values = 2 * torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu")
        flat = values.view(-1)
        telling = torch.tensor(_TELLING, dtype=torch.float32, device="cpu")[: flat.numel()]
        n = flat.numel()
        if n > _MANY:  # a permutation would take longer than everything else
            places = torch.randint(n, telling.shape, generator=self.generator, device="cpu")
        else:
            places = torch.randperm(n, generator=self.generator, device="cpu")[: telling.numel()]
        flat[places] = telling
        if self.disturbed:
            values.view(-1, shape[-1])[0] += 1
        if dtype is torch.float16:
            values.clamp_(-_LARGEST_HALF, _LARGEST_HALF)
        return values.to(dtype)

    def stub_of(self, module: nn.Module, path: str) -> nn.Module:
        known = self.stub.get(id(module))
        if known is None:
            known = self.stub[id(module)] = self._make(module, path)
            of = vars(module)
            known.__dict__[WATCH] = lambda name: self.reads.setdefault((path, name), of.get(name, ABSENT))
        return known

    def _ran(self, path: str) -> None:
        self.trace.run.append(path)
        self.trace.run_at.append(len(self.trace.events))

    def _make(self, module: nn.Module, path: str) -> nn.Module:
        if path and linear_shape(module) is not None:
            return _Stub("linear", path, module, self)
        if type(module) is nn.Dropout:
            return _Stub("dropout", path, module, self)
        if path and (act := learned(module, original_class(module), self.reads, path)):
            return _Stub("norm", path, module, self, act)
        if path and not module._modules and (module._parameters or module._buffers):
            return _Stub("other" if norm_width(module) is None else "norm", path, module, self)
        cls: Any = original_class(module)
        copy: nn.Module = object.__new__(watched(cls))
        for name, value in vars(module).items():
            if name == "forward" and has_own_forward(module):
                continue  # bound to the layer itself
            # What forward records about its calls then stays in the copy.
            copy.__dict__[name] = value.copy() if isinstance(value, (list, dict, set)) else value
        for name in [name for name in copy.__dict__ if name.endswith("_hooks") and isinstance(vars(copy)[name], dict)]:
            copy.__dict__[name] = type(vars(copy)[name])()
        copy.__dict__.update(training=self.training, _compiled_call_impl=None)
        copy._forward_pre_hooks[-1] = lambda *_: self._ran(path)
        only = None
        if self.of is not None and self.of.function is not None and not path:  # of the rest nothing is there
            only = self.of.children
            for name in [name for name, value in copy.__dict__.items() if isinstance(value, Tensor)]:
                del copy.__dict__[name]
            for kind in ("_parameters", "_buffers", "_modules"):
                copy.__dict__[kind] = {}
        for name, child in module._modules.items():
            if child is not None and (only is None or name in only):
                copy._modules[name] = self.stub_of(child, f"{path}.{name}" if path else name)
        return copy


def enough_rows(rank: int, width: int) -> tuple[int, ...]:
    """Leading dimensions for so many dimensions in all, with enough values at that width. Rows are a multiple of 4, for
    layers that merge 2 x 2 patches."""
    if rank == 1:
        return ()
    fours = -(-_ENOUGH // max(4, 4 * width))
    return {2: (4 * fours,), 3: (2, 2 * fours), 4: (2, 2, fours)}[rank]


def asked_besides(function: Any) -> int:
    """The number of parameters of a method without a default, besides the first."""
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    others = list(inspect.signature(function).parameters.values())[2:]
    return sum(p.default is p.empty and p.kind in plain for p in others)


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Turns off gradients, casts, warnings and global hooks, and restores the random state at the end."""
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
    run: Run,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype,
    training: bool,
    seed: int,
    given: dict[str, Any],
    reads: Reads,
) -> Trace:
    """What ``run`` of the layer does with one tensor of that shape; ``reads`` gets the attributes that it reads.

    ``given``: further arguments, by name.

    Raises: ProbeError, or any error of the layer's own code.
    """
    probe = Probe(dtype, training, seed, reads, of=run)
    with aside():
        x = probe.numbers(shape, dtype)
        probe.trace.x = x.clone()
        probe.trace.y = run(probe.stub_of(layer, ""), x, given)
        if not torch.equal(x, probe.trace.x):
            raise ProbeError("it modifies its input in place")
    if not isinstance(probe.trace.y, Tensor):
        raise ProbeError(f"it returns a {type(probe.trace.y).__name__}, not one tensor")
    return probe.trace


def events_of(layer: nn.Module, shape: tuple[int, ...], *, disturbed: bool, reads: Reads) -> tuple[list[Event], bool]:
    """Returns the calls of children until forward ends or fails, and whether it ended. All further arguments are None.

    ``disturbed``: the first row of x and of every child's output has other numbers.
    """
    probe = Probe(torch.float32, False, 0, reads)
    with aside():
        try:
            stub = probe.stub_of(layer, "")
            for module in probe.stub.values():
                tensors: list[dict[str, Any]] = [module._parameters, module._buffers]
                for own in tensors:
                    for name, tensor in own.items():
                        if tensor is not None and tensor.numel() <= _MOST_OWN:
                            shape_of, dtype = tuple(tensor.shape), tensor.dtype
                            index = not dtype.is_floating_point  # or a mask: 0 is one everywhere
                            own[name] = torch.zeros(shape_of, dtype=dtype) if index else probe.numbers(shape_of, dtype)
            probe.disturbed = disturbed
            stub(probe.numbers(shape, torch.float32), *[None] * asked_besides(original_class(layer).forward))
            whole = True
        except Exception:  # the layer's own code may not expect this call
            whole = False
    return probe.trace.events, whole


def result_of(function: Any, x: Tensor, path: str, reads: Reads) -> Any:
    """Calls a copy of a function, or of a module without children and parameters, at ``path``."""
    with aside():
        if isinstance(function, nn.Module):
            function = Probe(x.dtype, False, 0, reads).stub_of(function, path)
        return function(x.clone())
