# SPDX-License-Identifier: BSD-3-Clause
"""profile: where a model's time goes, and what its feed-forward layers do with it.

clock.py says whose time it is, counts.py what operators do, rows.py which modules have a row, table.py prints.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.parameter import is_lazy

from .. import _checks as check
from .. import _library, _peak
from .clock import OUTSIDE, Clock, Line, profiling, tensors_in
from .counts import COUNTS_ATTENTION, Call, Sum, TorchOperators, flops, is_product, merged, moved, offsets_at, shapes
from .rows import Place, Timed, entries, places
from .table import text

_KINDS_OF_CALLS = 8  # with other shapes of inputs, of which each is looked at once for what it keeps
_running: list[Profile] = []
_lock = threading.Lock()


class Profile:
    """The result of :func:`profile`: ``print`` shows a table, in which layers alike are one row.

    Example:
        >>> model = nn.Sequential(nn.LayerNorm(8), ffn_ops.FeedForward(8, 24))
        >>> with ffn_ops.profile(model) as prof:
        ...     y = model(torch.randn(4, 8))
        >>> [row["kind"] for row in prof.as_dict()["rows"]]
        ['outside', 'own code', 'norm', 'feed-forward']
    """

    def __init__(self, model: nn.Module, operators: bool, trace: bool) -> None:
        self._model, self._operators, self._trace = model, operators, trace
        self._clock: Clock | None = None
        self._found: dict[str, Any] | None = None
        self._torch: Any = None  # torch's profiler, with trace=True

    def __enter__(self) -> Profile:
        if self._clock is not None and self._clock.active:
            raise RuntimeError("profile: expected one `with` at a time, got a second one of the same profile")
        if self._trace and profiling():
            raise RuntimeError("trace: expected False inside of another torch profiler, whose trace has the ranges too")
        self._found = None
        found = entries(self._model)
        self._places = places(self._model, {path for path, entry in found.items() if entry.status == "ffn_ops"})
        self._on_cpu = all(p.device.type in ("cpu", "meta") for p in self._model.parameters())
        self._saved: dict[int, int] = {}
        self._by_torch: set[int] = set()  # rows in whose calls torch computes products
        self._looked: set[Any] = set()
        self._model_calls = {path: (e.fused_calls, e.own_calls) for path, e in found.items()}
        self._undo = contextlib.ExitStack()
        if self._trace:
            self._torch = torch.profiler.profile()
            self._undo.enter_context(self._torch)
        if self._operators:
            self._undo.enter_context(TorchOperators(self._seen))
        self._local = threading.local()
        for row, place in enumerate(self._places):
            if row != OUTSIDE:
                timed = Timed(place.module, partial(self._call, row, place))
                self._undo.callback(timed.remove, place.module)
        with _lock:
            _running.append(self)
            _library.observer = _observe
        self._began = self._now()
        names = [f"ffn_ops: {place.name}" for place in self._places]
        self._clock = Clock(self._now, names, self._local)
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._clock is not None
        self._clock.stop()
        with _lock:
            _running.remove(self)
            _library.observer = _observe if _running else None
        self._undo.close()
        self._entries = entries(self._model)

    def _now(self) -> int:
        if not self._on_cpu:
            torch.accelerator.synchronize()
        return time.perf_counter_ns()

    def _call(self, row: int, place: Place, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls the module."""
        clock = self._clock
        traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        if traced or clock is None or not clock.active:
            return inner(*args, **kwargs)
        line, grad = clock.line(), torch.is_grad_enabled()
        given = tensors_in(args, kwargs)
        if grad:
            clock.mark(given, line, line.owner())
        range_ = line.begin(row)
        try:
            kind = (row, grad, place.module.training, *[(t.shape, t.dtype) for t in given])
            if kind in self._looked or place.compiled or not (grad or place.layer) or len(self._looked) > self._most():
                out = inner(*args, **kwargs)
            else:
                self._looked.add(kind)
                with self._looking(line, row, grad and not line.cell & 1, place):
                    out = inner(*args, **kwargs)
            if grad:
                clock.mark(tensors_in(out), line, 2 * row + 1)
            return out
        finally:
            line.end(range_)

    def _most(self) -> int:
        return _KINDS_OF_CALLS * len(self._places)

    @contextlib.contextmanager
    def _looking(self, line: Line, row: int, grad: bool, place: Place) -> Iterator[None]:
        """Looks at what calls keep for backward, and whether torch computes products in a layer."""
        kept: dict[tuple[int, int], dict[int, int]] = {}  # by row and call: bytes of storages
        grad = grad and torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
        if grad:
            self._saved.setdefault(row, 0)
        held: set[int] = set()
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        outer = None if hooks is None else hooks[0]

        def pack(t: Tensor) -> Any:
            packed = t if outer is None else outer(t)
            row = line.cell >> 1
            storages = kept.setdefault((row, line.calls[row] if row < len(line.calls) else 0), {})
            for each in tensors_in(packed):  # a checkpoint keeps none
                if each.layout is torch.strided and (at := each.untyped_storage()._cdata) not in held:
                    storages[at] = each.untyped_storage().nbytes()
            return packed

        with contextlib.ExitStack() as stack:
            if place.layer and not (self._operators and line is self._clock.entered):  # type: ignore[union-attr]
                stack.enter_context(TorchOperators(lambda op, *_: self._by_torch.add(row) if is_product(op) else None))
            if grad and not line.looking:
                held |= _storages(self._model)  # now: functional_call puts others into it
                unpack = (lambda packed: packed) if hooks is None else hooks[1]
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, unpack))
                line.looking = True
                stack.callback(setattr, line, "looking", False)
            yield
        for (each, _), storages in kept.items():
            self._saved[each] = max(self._saved.get(each, 0), sum(storages.values()))

    def _seen(self, op: Any, args: Any, kwargs: dict[str, Any], out: Any, nanoseconds: int = 0) -> None:
        """One call of an operator."""
        if self._clock is None or not self._clock.active or not _is_run(args):
            return
        line = self._clock.line()
        cell = 2 * OUTSIDE if line.cell == line.idle else line.cell
        named = tuple([(name, shapes(value)) for name, value in kwargs.items()]) if kwargs else ()
        call = Call(cell, op, shapes(args), named, shapes(out))
        at = offsets_at(op)
        line.counts.add(call, nanoseconds, None if at is None else args[at])

    def as_dict(self) -> dict[str, Any]:
        """Everything that was found, ready for ``json.dumps``. Times are in seconds, rates in GFLOP/s and GB/s.

        ``total_seconds`` is the time of the ``with`` block in the thread that entered it: the sum of the seconds of all
        rows, without those in ``other_threads_seconds``.

        Raises:
            RuntimeError: before the end of the ``with`` block.

        Example:
            >>> model = ffn_ops.FeedForward(8, 24)
            >>> with ffn_ops.profile(model) as prof:
            ...     model(torch.randn(4, 8)).sum().backward()
            >>> row = prof.as_dict()["rows"][1]
            >>> row["calls"], row["flops"]["forward"], row["flops"]["backward"]  # 6 T D F; x needs no gradient
            (1, 3072, 4096)
        """
        if self._clock is None or self._clock.active:
            raise RuntimeError("profile: expected the end of the `with` block before its result is read")
        if self._found is None:
            self._found = self._result(self._clock)
        return self._found

    def __str__(self) -> str:
        return text(self.as_dict())

    def export_chrome_trace(self, path: str | Path) -> None:
        """Writes the trace of torch's profiler, with a range for each call of a row and each backward of it.

        Raises:
            RuntimeError: without ``trace=True``, before the end of the ``with`` block, or the second time.
            OSError: if the file cannot be written.

        Example:
            >>> import tempfile
            >>> model, file = ffn_ops.FeedForward(8, 24), tempfile.NamedTemporaryFile(suffix=".json")
            >>> with ffn_ops.profile(model, trace=True) as prof:
            ...     y = model(torch.randn(4, 8))
            >>> prof.export_chrome_trace(file.name)
        """
        self.as_dict()
        if self._torch is None:
            raise RuntimeError("export_chrome_trace: expected a profile with trace=True, got trace=False")
        Path(path).open("wb").close()  # torch would only log an error
        self._torch.export_chrome_trace(str(path))

    def _result(self, clock: Clock) -> dict[str, Any]:
        sums, tokens = merged([line.counts for line in clock.lines])
        cells = range(2 * len(self._places))
        times = [sum(line.times[cell] for line in clock.lines) for cell in cells]
        others = sum(sum(line.times[cell] for cell in cells) for line in clock.lines if line is not clock.entered)
        of_rows: dict[int, list[tuple[Call, Sum]]] = {}
        for call, total in sums.items():
            of_rows.setdefault(call.cell >> 1, []).append((call, total))
        limits = None
        if self._on_cpu:
            threads = torch.get_num_threads()
            isa = str(torch.ops.ffn_ops._isa())
            limits = {"isa": isa, "threads": threads, **_peak.limits(isa, threads)}
        rows = []
        for row, place in enumerate(self._places):
            calls, again = (sum(getattr(line, name)[row] for line in clock.lines) for name in ("calls", "again"))
            if row == OUTSIDE or calls or again or place.layer:
                found = self._row(row, place, times[2 * row : 2 * row + 2], of_rows.get(row, []), limits)
                rows.append({**found, "calls": calls, "recomputed": again, "tokens": _tokens(tokens.get(row))})
        seen = any(row["calls"] for row in rows)
        notes = []
        if not seen:
            notes.append("no call of the model was seen: where compiled code calls it, profile what was compiled")
        compiled = any(row["kind"] == "compiled" for row in rows)
        if compiled:
            notes.append("of compiled modules calls and time are known, and what this package's operators do in them")
        if seen and not compiled and not any(place.layer for place in self._places):
            notes.append("no feed-forward layer was found in the model")
        if self._operators and not COUNTS_ATTENTION:
            notes.append(
                f"torch {torch.__version__} has no formula for attention on a CPU: its products are not counted"
            )
        if limits is None:
            notes.append("on this device each row waits for the device, and its limits are not measured")
        return {
            "total_seconds": sum(clock.entered.times[cell] for cell in cells) * 1e-9,
            "other_threads_seconds": others * 1e-9,
            "limits": limits,
            "rows": rows,
            "notes": notes,
        }

    def _row(
        self, row: int, place: Place, times: list[int], calls: list[tuple[Call, Sum]], limits: dict[str, Any] | None
    ) -> dict[str, Any]:
        seconds = sum(times) * 1e-9
        clock: Any = self._clock
        others = [line for line in clock.lines if line is not clock.entered]  # torch's operators in them are not seen
        by_name: dict[str, dict[str, Any]] = {}
        counted = {"flops": [0, 0], "bytes": [0, 0]}
        for call, total in calls:
            counted["flops"][call.cell & 1] += flops(call) * total.calls
            counted["bytes"][call.cell & 1] += moved(call, total)
            if call.ours:
                each = by_name.setdefault(call.name, {"calls": 0, "seconds": 0.0})
                each["calls"] += total.calls
                each["seconds"] += total.nanoseconds * 1e-9
        seen = self._operators and not any(line.calls[row] or line.again[row] for line in others)
        whole = not place.compiled and (seen or (place.layer and row not in self._by_torch))
        known = bool(seconds) and (whole or bool(by_name))
        work = {
            name: {"forward": forward, "backward": backward} if known else None
            for name, (forward, backward) in counted.items()
        }
        entry = self._entries.get(place.path) if place.layer else None
        before = self._model_calls.get(place.path, (0, 0))
        return {
            "path": place.path,
            "module": type(place.module).__name__ if row != OUTSIDE else "",
            "kind": place.kind,
            "calls": 0,
            "recomputed": 0,
            "forward_seconds": times[0] * 1e-9,
            "backward_seconds": times[1] * 1e-9,
            **work,
            "counted": None if not known else "all" if whole else "ffn_ops",
            "of_fma_peak": _share(work["flops"], seconds, limits, "fma_gflops"),
            "of_read_bandwidth": _share(work["bytes"], seconds, limits, "read_gbs"),
            "saved_bytes": self._saved.get(row),
            "operators": by_name,
            "layer": None if entry is None else {
                "status": entry.status, "computes": entry.computes, "why": entry.why,
                "fused_calls": entry.fused_calls - before[0], "own_calls": entry.own_calls - before[1],
            },
        }  # fmt: skip


def _is_run(args: Any) -> bool:
    """False of a call that a compiler traces, with tensors without values, or that a torch.func level hands down."""
    given = tensors_in(args)
    return not isinstance(next(iter(given), None), (FakeTensor, FunctionalTensor)) and not (
        torch._C._are_functorch_transforms_active() and any(map(is_functorch_wrapped_tensor, given))
    )


def _storages(module: nn.Module) -> set[int]:
    """Of parameters and buffers. By address, as tensors on the meta device have no data."""
    own = (*module.parameters(), *module.buffers())
    return {t.untyped_storage()._cdata for t in own if t.layout is torch.strided and not is_lazy(t)}


def _share(work: dict[str, int] | None, seconds: float, limits: dict[str, Any] | None, name: str) -> float | None:
    if work is None or limits is None or not seconds:
        return None
    return float(sum(work.values()) / seconds / limits[name] * 1e-9)


def _tokens(counts: Counter[int] | None) -> list[int] | None:
    return None if counts is None else [counts[e] for e in sorted(counts)]


def _observe(op: Any, args: tuple[Any, ...]) -> Any:
    """Runs an operator of this package, and tells every profile."""
    running = tuple(_running)
    now = running[0]._now if running else time.perf_counter_ns
    began = now()
    out = op(*args)
    took = now() - began
    for each in running:
        each._seen(op, args, {}, out, took)
    return out


def profile(model: nn.Module, *, operators: bool = False, trace: bool = False) -> Profile:
    """A context manager that measures where the time of ``model`` goes: the feed-forward layers, and the rest.

    Each feed-forward layer and mixture has a row, whether :func:`replace` has replaced it, transformers calls it
    (``experts_implementation="ffn_ops"``), or it is one of this package's modules; and so has each module that stands
    beside them (attention, router, norm). A row has the time that is spent in it and in no other row, so the rows add
    up to the time of the ``with`` block. What runs in no module (loss, optimiser) is the row "outside".

    Columns and keys of :meth:`Profile.as_dict`:

    - calls; forward and backward time. Backward is what the autograd engine does from the node of a layer's result to
      the nodes of its inputs. A forward that a checkpoint runs again is backward time, and ``recomputed``.
    - FLOPs: 2 M N K for a product, as ``torch.utils.flop_counter`` counts, by the shapes of each call.
    - bytes that must move: each operator reads each of its arguments once, of stacked experts those that have rows,
      and writes each result once. Caches are not modelled, so a share of the bandwidth can be above 1.
    - their shares of this machine's float32 FMA peak and read bandwidth for torch's number of threads, measured at the
      first result of a process.
    - kept for backward: the storages that one call saves, without parameters and buffers; the largest if shapes vary.
    - tokens of each expert; what is fused, what is called, and why (:func:`replace_report`).

    FLOPs and bytes are those of this package's operators. Where torch computes products in a layer, as adapters have
    it, ``counted`` is "ffn_ops" and the table says "at least". ``operators=True`` counts torch's operators too, in
    every row.

    The model is the same afterwards, and inside: no hook is set, no layer computes otherwise. Profiles may be nested,
    threads may call the model. A compiled module is one row with its calls and time; of a model inside of compiled
    code nothing is seen. On a GPU each row waits for the device.

    Args:
        model: any model; without a feed-forward layer it has a row for each of its children.
        operators: counts torch's operators too, which costs some 10 microseconds for each.
        trace: runs torch's profiler beside, for :meth:`Profile.export_chrome_trace`, at its cost. Without it, a torch
            profiler around or inside of the ``with`` block gets the named ranges.

    Raises:
        TypeError: if ``model`` is not an ``nn.Module``, or an option is no bool.
        RuntimeError: when entered, if ``trace=True`` inside of another torch profiler, or entered twice at a time.

    Source:
        ``torch.utils.flop_counter`` for FLOPs; the columns are those of DeepSpeed's flops profiler and of a roofline
        (Williams et al., 2009).

    Example:
        >>> model = nn.Sequential(nn.LayerNorm(8), ffn_ops.MoEFFN(8, 16, num_experts=4, top_k=2))
        >>> with ffn_ops.profile(model) as prof:
        ...     model(torch.randn(5, 8)).sum().backward()
        >>> row = prof.as_dict()["rows"][-1]
        >>> row["kind"], row["calls"], sum(row["tokens"]), sorted(row["operators"])[:2]
        ('experts', 1, 10, ['moe', 'moe_backward'])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    check.flag("operators", operators)
    check.flag("trace", trace)
    return Profile(model, operators, trace)


__all__ = ["Profile", "profile"]
