# SPDX-License-Identifier: BSD-3-Clause
"""Whose time it is: the line of a thread charges every nanosecond to one row and one direction. No counting of work.

The autograd engine runs the nodes of a graph in the reverse order of their creation. So a hook before the node of a
row's result, and one before the node of each of its inputs, tell when the backward of the row begins and ends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from .counts import Counts

OUTSIDE = 0  # the row of what runs in no module
ELSEWHERE = -1  # a mark: whatever the thread does outside of the model
_task: Callable[[], int] = torch._C._current_graph_task_id  # -1 outside of a backward pass
profiling: Callable[[], bool] = torch.autograd._profiler_enabled  # type: ignore[attr-defined]


def tensors_in(*values: Any) -> list[Tensor]:
    """Also in lists, tuples and mappings; not in other objects."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += tensors_in(*value)
        elif isinstance(value, Mapping):
            found += tensors_in(*value.values())
    return found


class Line:
    """The time of one thread. Cell ``2 * row`` is a row's forward, the next its backward."""

    def __init__(self, now: Callable[[], int], names: list[str], enters: bool) -> None:
        self.now, self.names = now, names
        self.times = [0] * (2 * len(names) + 1)  # nanoseconds; the last is thrown away
        self.calls, self.again = [0] * len(names), [0] * len(names)  # in forward; in a backward pass: recomputed
        self.idle = 2 * OUTSIDE if enters else 2 * len(names)  # other threads have other things to do
        self.cell, self.last = self.idle, now()
        self.stack: list[int] = []
        self.passes: list[tuple[int, int]] = []  # backward passes that run, with the cell that each interrupted
        self.range: Any = None
        self.looking = False
        self.counts = Counts()

    def switch(self, cell: int) -> None:
        now = self.now()
        self.times[self.cell] += now - self.last
        self.cell, self.last = cell, now

    def begin(self, row: int) -> Any:
        """Returns the range in the trace of a torch profiler that runs, which belongs to ``end``."""
        backward = _task() != -1
        if self.passes and not backward:  # an error has ended them
            self.switch(self.passes[0][1])
            self.passes.clear()
            self._close()
        (self.again if backward else self.calls)[row] += 1
        self.stack.append(self.cell)
        self.switch(2 * row + backward)
        if not profiling():
            return None
        return record_function(self.names[row]).__enter__()

    def end(self, range_: Any) -> None:
        if range_ is not None:
            range_.__exit__(None, None, None)
        self.switch(self.stack.pop())

    def begin_backward(self, cell: int) -> None:
        task = _task()
        if not self.passes or self.passes[-1][0] != task:
            self.passes.append((task, self.cell))
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)  # type: ignore[attr-defined]
        self._close()
        self.switch(self.idle if cell == ELSEWHERE else cell)
        if cell != ELSEWHERE and profiling():
            self.range = record_function(f"{self.names[cell >> 1]} (backward)").__enter__()

    def _end_backward(self) -> None:
        self._close()
        if self.passes:
            self.switch(self.passes.pop()[1])

    def _close(self) -> None:
        if self.range is not None:
            self.range.__exit__(None, None, None)
            self.range = None

    def owner(self) -> int:
        """The cell to which the backward of what runs now belongs."""
        return ELSEWHERE if self.cell == self.idle else self.cell | 1


class Clock:
    """The lines of all threads, and the marks in the graphs that they build."""

    def __init__(self, now: Callable[[], int], names: list[str], of_thread: Any) -> None:
        self.active = True
        self._new = functools.partial(Line, now, names)
        self._of_thread, self._key = of_thread, object()
        self.entered = self._new(True)
        self.lines = [self.entered]
        of_thread.line = self.entered

    def line(self) -> Line:
        """Of this thread."""
        line: Line | None = getattr(self._of_thread, "line", None)
        if line is None:
            line = self._of_thread.line = self._new(False)
            self.lines.append(line)
        return line

    def stop(self) -> None:
        self.active = False
        for line in self.lines:
            line.switch(line.idle)

    def mark(self, tensors: list[Tensor], line: Line, cell: int) -> None:
        """From the nodes of these tensors on, backward belongs to ``cell``. The first mark holds: it is of who has
        made the node."""
        for t in tensors:
            node: Any = t.grad_fn
            if node is not None and self._key not in node.metadata:
                node.metadata[self._key] = True
                node.register_prehook(functools.partial(self._reached, line, cell))

    def _reached(self, line: Line, cell: int, _grads: Any) -> None:
        if self.active:
            if getattr(self._of_thread, "line", None) is None:  # a thread of the engine works for the one that waits
                self._of_thread.line = line
            self.line().begin_backward(cell)
