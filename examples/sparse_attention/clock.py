# SPDX-License-Identifier: BSD-3-Clause
"""Where the time of a step goes: marks on the tensors that enter and leave a part, which also read the clock on the
way back. It counts on the CPU, where an operator has ended when it returns."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor


class Clock:
    """``seconds`` of each part: the times at which it was left less the times at which it was entered."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def stamp(self, part: str, enters: bool) -> None:
        now = time.perf_counter()
        self.seconds[part] += -now if enters else now

    def mark(self, x: Tensor, part: str, enters: bool) -> Tensor:
        return _Mark.apply(x, self, part, enters)  # type: ignore[no-any-return]


class _Mark(torch.autograd.Function):
    """x; backward goes through a part from its end to its beginning."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, part: str, enters: bool) -> Tensor:
        ctx.arguments = clock, part, not enters
        clock.stamp(part, enters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *d_x: Any) -> Any:
        clock, part, enters = ctx.arguments
        clock.stamp(part, enters)
        return (*d_x, None, None, None)


def mark(clock: Clock | None, x: Tensor, part: str, enters: bool) -> Tensor:
    return x if clock is None else clock.mark(x, part, enters)
