# SPDX-License-Identifier: BSD-3-Clause
"""profile: whose time it is, by a clock that the test moves; and that nothing is left on the model."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from device import generator
from test_profile import D, F, T, clean, limits, rows  # noqa: F401  (limits is a fixture)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ffn_ops

pytestmark = pytest.mark.cpu_only("the clock and torch's profiler are the CPU's")


class Spend(torch.autograd.Function):
    """Moves the clock."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Any, there: int, back: int) -> Tensor:
        ctx.clock, ctx.back = clock, back
        ctx.save_for_backward(x)  # else a checkpoint has nothing to compute again
        clock[0] += there
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        assert ctx.saved_tensors
        ctx.clock[0] += ctx.back
        if ctx.back < 0:
            raise ValueError("backward fails")
        return grad, None, None, None


class Spender(nn.Module):
    def __init__(self, clock: list[int], there: int, back: int) -> None:
        super().__init__()
        self.clock, self.there, self.back = clock, there, back

    def forward(self, x: Tensor) -> Tensor:
        return Spend.apply(x, self.clock, self.there, self.back)  # type: ignore[no-any-return, no-untyped-call]


class Block(nn.Module):
    """Its own code, two parts beside a feed-forward layer, and a residual connection."""

    def __init__(self, clock: list[int], again: bool | None = None) -> None:
        super().__init__()
        self.norm, self.attention = Spender(clock, 1, 2), Spender(clock, 10, 20)
        self.ffn = nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D))
        self.clock, self.again, self.fails = clock, again, False

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        h = self.attention(h) if self.again is None else checkpoint(self.attention, h, use_reentrant=self.again)
        if self.fails:
            raise KeyError("forward fails")
        h = x + Spend.apply(h, self.clock, 100, 200)  # type: ignore[no-untyped-call]
        return h + self.ffn(self.norm(h))  # type: ignore[no-any-return]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    now = [0]
    monkeypatch.setattr(ffn_ops.Profile, "_now", lambda self: now[0])
    yield now


def times(prof: ffn_ops.Profile) -> dict[str, tuple[int, int]]:
    found = {
        path: (round(1e9 * row["forward_seconds"]), round(1e9 * row["backward_seconds"]))
        for path, row in rows(prof).items()
    }
    assert sum(map(sum, found.values())) == round(
        1e9 * (prof.as_dict()["total_seconds"] + prof.as_dict()["other_threads_seconds"])
    )
    return found


def ran(block: nn.Module, clock: list[int]) -> None:
    x = torch.randn(T, D, generator=generator(3), requires_grad=True)
    clock[0] += 1000  # outside of the model
    (Spend.apply(block(x), clock, 3000, 5000)).sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("again", [None, False, True], ids=["as it is", "checkpoint", "reentrant checkpoint"])
def test_time_is_that_of_its_row(clock: list[int], again: bool | None) -> None:
    block = ffn_ops.replace(Block(clock, again))
    with ffn_ops.profile(block) as prof:
        ran(block, clock)
        ran(block, clock)
    assert times(prof) == {
        "outside": (18000, 0),
        "Block": (200, 400),
        "norm": (4, 8),
        "attention": (20, 40 + (20 if again is not None else 0)),
        "ffn": (0, 0),
    }
    found = rows(prof)
    assert found["norm"]["calls"] == 4 and found["attention"]["calls"] == 2 and found["ffn"]["calls"] == 2
    assert found["attention"]["recomputed"] == (0 if again is None else 2)


def test_errors_inside_leave_the_rest_right(clock: list[int]) -> None:
    block = ffn_ops.replace(Block(clock))
    with ffn_ops.profile(block) as prof:
        block.fails = True
        with pytest.raises(KeyError):
            ran(block, clock)
        block.fails = False
        block.attention.back = -1
        with pytest.raises(ValueError, match="backward fails"):
            ran(block, clock)
        block.attention.back = 20
        ran(block, clock)
    assert times(prof)["norm"] == (1 + 2 + 2, 2 + 4) and times(prof)["Block"] == (200, 400)
    assert clean(block)
    with pytest.raises(KeyError), ffn_ops.profile(block) as prof:
        block.fails = True
        ran(block, clock)
    assert times(prof)["attention"] == (10, 0) and clean(block)


def test_profiles_nest_overlap_and_see_all_threads(clock: list[int]) -> None:
    block = ffn_ops.replace(Block(clock))
    first, second = ffn_ops.profile(block), ffn_ops.profile(block)
    first.__enter__()
    ran(block, clock)
    second.__enter__()
    ran(block, clock)
    first.__exit__(None, None, None)
    ran(block, clock)
    second.__exit__(None, None, None)
    assert clean(block)
    for prof in (first, second):
        assert times(prof)["attention"] == (20, 40) and rows(prof)["ffn"]["operators"]["ffn"]["calls"] == 2
    with ffn_ops.profile(block) as prof:
        thread = threading.Thread(target=ran, args=(block, clock))
        thread.start()
        thread.join()
    assert times(prof)["attention"] == (10, 20) and rows(prof)["attention"]["calls"] == 1
    assert round(1e9 * prof.as_dict()["other_threads_seconds"]) == 333 + 3


def test_nothing_is_left_on_the_model(clock: list[int]) -> None:
    block = ffn_ops.replace(Block(clock))
    before, keys = {n: set(vars(m)) for n, m in block.named_modules()}, list(block.state_dict())
    with ffn_ops.profile(block) as prof:
        ran(block, clock)
        assert list(block.state_dict()) == keys
        copies = [copy.deepcopy(block), pickle.loads(pickle.dumps(block))]
        assert ffn_ops.replace_report(block).paths("replaced") == ["ffn"]
        y = block(torch.randn(T, D, requires_grad=True))
    assert {n: set(vars(m)) for n, m in block.named_modules()} == before
    for each in copies:
        assert all("_compiled_call_impl" not in vars(m) for m in each.modules())
        ran(each, clock)
    found = times(prof)
    y.sum().backward()  # of a graph that was made inside
    assert times(prof) == found and rows(prof)["attention"]["calls"] == 2


def test_ranges_stand_in_the_trace(tmp_path: Path, clock: list[int]) -> None:
    block = ffn_ops.replace(Block(clock))
    expected = {f"ffn_ops: {name}{way}" for name in ("Block", "ffn", "attention") for way in ("", " (backward)")}
    with ffn_ops.profile(block, trace=True) as prof:
        ran(block, clock)
    with pytest.raises(FileNotFoundError):
        prof.export_chrome_trace(tmp_path / "missing" / "trace.json")
    prof.export_chrome_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert expected <= {event.get("name") for event in events}
    with torch.profiler.profile() as outer:
        with ffn_ops.profile(block) as prof:
            ran(block, clock)
        with pytest.raises(RuntimeError, match="trace: expected False"):
            ffn_ops.profile(block, trace=True).__enter__()
    assert expected <= {event.key for event in outer.key_averages()} and clean(block)
    with pytest.raises(RuntimeError, match="expected a profile with trace=True"):
        prof.export_chrome_trace(tmp_path / "none.json")
