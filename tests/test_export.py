# SPDX-License-Identifier: BSD-3-Clause
"""Programs and files with a Routing or Statistics: torch.export.save and torch.load."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ffn_ops
from ffn_ops.routing import Routing, Statistics


class Takes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = ffn_ops.MoEFFN(8, 6, 4)

    def forward(self, x: Tensor, routing: Routing) -> Any:
        return self.layer(x, routing=routing), routing.statistics()


class Returns(Takes):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        y, routing, _logits = self.layer(x, return_routing=True)
        return y, routing, routing.statistics()


def assert_same(actual: Any, expected: Any) -> None:
    """Types, and every tensor's dtype and bits."""
    assert type(actual) is type(expected)
    if isinstance(expected, Tensor):
        assert actual.dtype is expected.dtype and torch.equal(actual, expected)
    else:
        for a, b in zip(actual, expected, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("kind", [Takes, Returns])
def test_saved_programs(kind: type[Takes], strict: bool, dynamo: None) -> None:
    """One program for every T."""
    torch.manual_seed(0)
    model = kind().requires_grad_(False)

    def draw(T: int) -> tuple[Any, ...]:
        x = torch.randn(T, 8)
        return (x,) if kind is Returns else (x, ffn_ops.routing.top_k(torch.randn(T, 4), 2))

    any_size = torch.export.Dim.AUTO
    by_row, whole = {0: any_size}, {}
    shapes = (by_row, Routing(by_row, by_row, whole, by_row, by_row, whole))  # type: ignore[arg-type]
    program = torch.export.export(model, draw(5), dynamic_shapes=shapes[: 1 + (kind is Takes)], strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for T in (5, 9):
        given = draw(T)
        assert_same(loaded(*given), model(*given))


def test_load_weights_only() -> None:
    """torch.load's default takes them, in any structure."""
    routing = ffn_ops.routing.top_k(torch.randn(5, 4), 2)
    file = io.BytesIO()
    torch.save({"step": [routing, routing.statistics()]}, file)
    file.seek(0)
    found = torch.load(file, weights_only=True)["step"]
    assert [type(t) for t in found] == [Routing, Statistics]
    assert_same(found, [routing, routing.statistics()])
