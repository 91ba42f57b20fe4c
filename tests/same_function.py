# SPDX-License-Identifier: BSD-3-Clause
"""A comparison of two models by the rule of accuracy, and what a replaced model ran. No tests here."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device import generator
from seen import Seen
from tolerance import assert_error_like_eagers
from torch import Tensor, nn

import ffn_ops


def results(model: nn.Module, call: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """The output of a call and the gradient of every parameter."""
    model.zero_grad()
    y = call(model)
    y.square().mean().backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), **named}


# In one draw all gradients err along one direction, as a rounding early on goes into whatever follows. The ratio to
# eager's error scatters by a third (24 draws of a Llama with adapters: .52 to 1.68, geometric mean .92).
DRAWS = 8


def assert_same_function(
    actual: nn.Module, plain: nn.Module, call: Callable[[nn.Module], Tensor], draws: int = DRAWS
) -> None:
    """Output and every gradient are as near to float64 as the untouched model's are, over several draws of the weights;
    one weight for each tensor."""
    pooled: list[list[Tensor]] = [[], [], []]
    weights = [[p for p in model.parameters() if type(p) is nn.Parameter] for model in (actual, plain)]
    drawn = [p.detach().clone() for p in weights[1]]
    g = generator()
    for draw in range(draws if len(weights[0]) == len(drawn) else 1):
        for here, there, start in zip(*weights, drawn, strict=True):
            assert here.shape == there.shape
            if draw and start.is_floating_point():
                value = start * (1 + torch.randn(start.shape, generator=g, dtype=torch.float32).to(start) / 64)
                here.data.copy_(value), there.data.copy_(value)
        exact = results(copy.deepcopy(plain).double(), lambda m: call(m))
        ours, eager = results(actual, call), results(plain, call)
        assert list(ours) == list(eager) == list(exact)
        sizes = {name: value.square().mean().sqrt().item() for name, value in exact.items()}
        least = 1e-4 * max(sizes.values())  # some gradients are zero but for rounding, such as those of a key's bias
        for name, value in exact.items():
            scale = 2.0 ** -round(math.log2(max(sizes[name], least)))  # a power of two: no rounding of its own
            for into, tensor in zip(pooled, (ours[name], eager[name], value), strict=True):
                assert tensor.shape == value.shape, name
                into.append((tensor * scale).flatten())
    for here, there, start in zip(*weights, drawn, strict=True):
        here.data.copy_(start), there.data.copy_(start)
    assert_error_like_eagers(*[torch.cat(tensors) for tensors in pooled])


def like_parameters(model: nn.Module, x: Tensor) -> Tensor:
    return x.to(next(model.parameters()).dtype)


def on(x: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(like_parameters(model, x))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def operators(layer: nn.Module, x: Tensor) -> list[str]:
    """Those of ours that a call runs."""
    with Seen() as seen:
        layer(x)
    return seen.names


def left_alone(layer: nn.Module) -> Any:
    """Replaces nothing; what the report says of the layer."""
    with pytest.warns(UserWarning, match="no layer was replaced"):
        ffn_ops.replace(layer)
    (entry,) = [each for each in ffn_ops.replace_report(layer).entries if not each.path]
    assert entry.status == "left"
    return entry
