# SPDX-License-Identifier: BSD-3-Clause
"""A provider, ready to be called and timed: in this process, or in one of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from .providers import ENOUGH, Inputs, groups
from .worker import OtherProcess
from .workloads import Mode, Row, Shape

if TYPE_CHECKING:
    from .harness import Case


def run_once(
    module: nn.Module, args: Sequence[Tensor], d_y: Tensor | None, leaves: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The output or outputs, and the gradients of the leaves if there are any. Freeing them is part of a step.

    An expert that no token chooses may have no gradient.
    """
    y = module(*args)
    if leaves:
        return (y, *torch.autograd.grad(y, leaves, d_y, allow_unused=True))
    return y if isinstance(y, tuple) else (y,)


class Runner(Protocol):
    """A provider, ready to run one row."""

    def check(self, case: Case) -> tuple[float | None, float]:
        """Runs once: the worst quotient of error and limit, and the seconds it took. Raises WrongResultError."""

    def sample(self, repeats: int) -> float:
        """Seconds of one call, from ``repeats`` of them."""

    def saved_bytes(self) -> int | None: ...

    forward: float | None
    """Seconds of forward in the last sample, where it is told apart from backward."""


class Local:
    """A provider in this process."""

    forward: float | None = None

    def __init__(self, inputs: Inputs, shape: Shape, mode: Mode) -> None:
        self.module, self.draws, self.mode = inputs.module, inputs.draws, mode
        self.parameters = tuple(self.module.parameters())
        self.groups = list(groups(self.module).values())
        self.slack = inputs.slack
        args, d_y = self.draws[0]
        self.leaves = () if mode == "inference" or d_y is None else (*args, *self.parameters)
        self.first_call = math.nan
        # Every provider has the same dropout after it: timed, but not verified.
        self.module.train(mode == "training" and not shape.dropout)

    def results(self) -> list[Tensor]:
        """Output and gradients; small ones stacked from so many draws that they have ``ENOUGH`` numbers."""
        pools: list[list[Tensor]] = []

        def wanted(number: int, tensors: Sequence[Tensor]) -> bool:
            return number * sum(t.numel() for t in tensors) < ENOUGH

        with torch.inference_mode(self.mode == "inference"):
            for number, (args, d_y) in enumerate(self.draws):
                all_groups = [*((a,) for a in args), *self.groups] if self.leaves else []
                chosen = [place for place, group in enumerate(all_groups) if wanted(number, group)]
                leaves = [leaf for place in chosen for leaf in all_groups[place]]
                if number and not leaves and not any(wanted(number, pool[:1]) for pool in pools):
                    break
                start = time.perf_counter()
                found = list(run_once(self.module, args, d_y, leaves))
                if number == 0:
                    self._wait()
                    self.first_call = time.perf_counter() - start
                outputs = [t.detach() for t in found[: len(found) - len(leaves)] if t is not None]
                del found[: len(outputs)]
                outputs = list(getattr(self.module, "compared", lambda *y: y)(*outputs))
                if number == 0:
                    pools = [[] for _ in (*outputs, *all_groups)]
                for pool, output in zip(pools, outputs, strict=False):
                    if wanted(number, [output]):
                        pool.append(output)
                for place in chosen:
                    group = all_groups[place]
                    grads = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, group, strict=False)]
                    del found[: len(group)]  # the largest are gigabytes
                    pools[len(outputs) + place].append(grads[0] if len(grads) == 1 else torch.stack(grads))
        return [pool[0] if len(pool) == 1 else torch.stack(pool) for pool in pools]

    def _wait(self) -> None:
        if self.draws[0][0][0].is_cuda:
            torch.cuda.synchronize()

    def begin(self) -> None:
        """Called after verification, before timing."""
        self.module.train(self.mode == "training")

    def check(self, case: Case) -> tuple[float | None, float]:
        quotient = case.worst(self.results(), self.slack)
        self.begin()
        return quotient, self.first_call

    def sample(self, repeats: int) -> float:
        module, leaves = self.module, self.leaves
        args, d_y = self.draws[0]
        with torch.inference_mode(self.mode == "inference"):
            start = time.perf_counter()
            for _ in range(repeats):
                run_once(module, args, d_y, leaves)
            return (time.perf_counter() - start) / repeats

    def saved_bytes(self) -> int | None:
        """Storages that autograd keeps between forward and backward, the parameters' own not counted."""
        if self.mode == "inference":
            return None
        from ffn_ops.compare.layers import saved_for_backward

        return saved_for_backward(self.module, *self.draws[0][0])


class Remote:
    """A provider in another process."""

    forward = None

    def __init__(self, process: OtherProcess, row: Row) -> None:
        self.process, self.row = process, row

    def check(self, case: Case) -> tuple[float | None, float]:
        found, seconds = self.process.prepare(self.row)
        case.check_norms(found)
        return None, seconds

    def sample(self, repeats: int) -> float:
        return self.process.sample(repeats)

    def saved_bytes(self) -> int | None:
        return None
