# SPDX-License-Identifier: BSD-3-Clause
"""One layer at the guides' size: fused against plain PyTorch and torch.compile.

Agreement with float64 first; then time, every layer and provider in one interleaved loop; then memory kept for
backward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from .._accuracy import PLENTY, limit, worst
from .._timing import Timed, take_turns, verified
from .architectures import LAYERS, Architecture, count_parameters, disagreement, state
from .settings import Settings

COMPILED_BY_DEFAULT = ("gelu", "swiglu", "gated_ffn")
WARM_UPS = 2
# torch.compile keeps one entry per layer instance and grad mode for a forward shared by all; its default limit is 8.
RECOMPILE_LIMIT = 64

Name = TypeVar("Name", bound=Hashable)
Call = Callable[[], object]


@dataclass
class Provider:
    forward: Timed
    forward_backward: Timed
    saved_bytes: int
    error: float  # largest difference to float64 of output and input gradient, relative to their largest value


@dataclass
class LayerResult:
    architecture: str
    parameters: int
    providers: dict[str, Provider] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    refused: bool = False


@dataclass
class Prepared:
    """The providers of one architecture that agree with float64, with equal weights, and their errors."""

    layers: dict[str, nn.Module]
    errors: dict[str, float]
    result: LayerResult


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(calls: dict[Name, Call], repeats: int, device: torch.device, advance: Call) -> dict[Name, Timed]:
    """Times every call once per round, after rounds that warm up."""

    def sampler(call: Call) -> Callable[[], float]:
        def sample() -> float:
            synchronize(device)
            began = time.perf_counter()
            call()
            synchronize(device)
            return time.perf_counter() - began

        return sample

    timed = {name: Timed(str(name)) for name in calls}
    take_turns([(timed[name], sampler(call), WARM_UPS + repeats) for name, call in calls.items()], advance)
    for each in timed.values():
        del each.seconds[:WARM_UPS]
    return timed


def saved_for_backward(layer: nn.Module, *inputs: Tensor) -> int:
    """Bytes of the distinct storages that forward keeps for backward, with inputs, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        # Detached, because an output that is kept would hold the graph that holds it.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(*inputs)
    del y
    return sum(kept.values())


def _gradients(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    return y.detach(), dx


def _error(got: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> float:
    pairs = zip(got, exact, strict=True)
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> Call:
    """Forward and backward for the input and every parameter; the plain loop skips experts without tokens."""
    leaf = x.detach().requires_grad_()
    wanted = [leaf, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(leaf), wanted, dy, allow_unused=True)


def _forward(layer: nn.Module, x: Tensor) -> Call:
    def call() -> None:
        with torch.no_grad():
            layer(x)

    return call


def _inputs(settings: Settings, least: int = 1) -> tuple[Tensor, Tensor]:
    """``x`` and the gradient of the output, both [T, D], of at least ``least`` numbers each."""
    generator = torch.Generator().manual_seed(0)
    D = settings.layer.d_model
    shape = (max(settings.layer.tokens, -(-least // D)), D)
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    return x.to(settings.device), dy.to(settings.device)


def prepare(architecture: Architecture, settings: Settings) -> Prepared:
    """Builds the providers and keeps those that run and agree with float64; marks a fused layer that does not as
    refused."""
    x, dy = _inputs(settings, PLENTY)
    size, device = settings.layer, torch.device(settings.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        eager = architecture.eager(size.d_model, size.d_ff).to(device)
        fused = architecture.fused(size.d_model, size.d_ff).to(device)
        exact_layer = architecture.eager(size.d_model, size.d_ff).to(device).double()
    result = LayerResult(architecture.key, count_parameters(eager))
    layers: dict[str, nn.Module] = {"eager": eager, "fused": fused}
    if differing := disagreement(fused, eager):
        result.refused = True
        result.notes.append(f"fused refused: the layers' state dicts differ in {', '.join(differing)}")
        del layers["fused"]
    else:
        fused.load_state_dict(state(eager))
    exact_layer.load_state_dict(eager.state_dict())
    exact = _gradients(exact_layer, x.double(), dy.double())
    plain = _gradients(eager, x, dy)
    errors = {"eager": _error(plain, exact)}
    limits = [limit(ours, right) for ours, right in zip(plain, exact, strict=True)]
    if architecture.key in compiled_keys(settings.compile):
        compiled = torch.compile(eager)
        assert isinstance(compiled, nn.Module)
        layers["compile"] = compiled
    elif architecture.data_dependent and settings.compile != "none":
        result.notes.append(
            "torch.compile left out: shapes depend on the data, so that the loop over experts stays eager"
        )
    for name in [n for n in layers if n != "eager"]:

        def agreeing(layer: nn.Module = layers[name]) -> float:
            found = _gradients(layer, x, dy)
            worst(("y", "d_x"), found, exact, limits)
            return _error(found, exact)

        timed = Timed(name)
        if (error := verified(timed, agreeing)) is None:
            result.refused = result.refused or name == "fused"
            result.notes.append(f"{'torch.compile' if name == 'compile' else name} {timed.note}")
            del layers[name]
        else:
            errors[name] = error
    return Prepared(layers, errors, result)


def progress_length(settings: Settings) -> int:
    """How often ``measure`` calls ``advance``."""
    return len(LAYERS) + 2 * (WARM_UPS + settings.repeats)


def measure(settings: Settings, advance: Call) -> list[LayerResult]:
    device = torch.device(settings.device)
    x, dy = _inputs(settings)
    prepared: dict[str, Prepared] = {}
    # one setting's name differs between the torch versions served
    most = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    with torch._dynamo.config.patch({most: RECOMPILE_LIMIT}):
        for architecture in LAYERS:
            prepared[architecture.key] = prepare(architecture, settings)
            advance()
        layers = {(key, name): layer for key, p in prepared.items() for name, layer in p.layers.items()}
        forward_calls = {at: _forward(layer, x) for at, layer in layers.items()}
        step_calls = {at: _step(layer, x, dy) for at, layer in layers.items()}
        forward = interleaved(forward_calls, settings.repeats, device, advance)
        both = interleaved(step_calls, settings.repeats, device, advance)
        for (key, name), layer in layers.items():
            at, found = (key, name), prepared[key]
            saved = saved_for_backward(layer, x.detach().requires_grad_())
            found.result.providers[name] = Provider(forward[at], both[at], saved, found.errors[name])
    return [p.result for p in prepared.values()]


def compiled_keys(choice: str) -> list[str]:
    """The architectures that are also timed under torch.compile."""
    if choice == "none":
        return []
    possible = [a.key for a in LAYERS if not a.data_dependent]
    return [key for key in possible if choice == "all" or key in COMPILED_BY_DEFAULT]
