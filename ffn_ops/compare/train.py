# SPDX-License-Identifier: BSD-3-Clause
"""Train the language model with each architecture and record losses, gradient norms, dead units and step times.

The architectures of one seed advance in lockstep: each step uses the same batch, and slow moments of the machine affect
all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import text as text_module
from .architectures import ARCHITECTURES, BASELINE, BY_KEY, Layer, count_parameters, width_for_budget
from .mixtures import LayerLoad, Mixture, Routed, balancing_loss, layer_load
from .model import LanguageModel
from .settings import Settings
from .text import Text

DEAD_BELOW = 1e-3
CLIP_NORM = 1.0
GRADIENT_POINTS = 50


@dataclass
class Run:
    """One architecture, one seed. ``steps`` are the evaluations' steps; a diverged run has no final loss."""

    architecture: str
    seed: int
    learning_rate: float
    d_ff: int
    ffn_parameters: int
    model_parameters: int
    steps: list[int] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    dead_share: list[list[float]] = field(default_factory=list)  # per evaluation, per layer
    gradient_steps: list[int] = field(default_factory=list)
    gradient_norms: list[list[float]] = field(default_factory=list)  # per measured step, per layer
    training_loads: list[list[LayerLoad]] = field(default_factory=list)  # per measured step, per layer of a mixture
    validation_loads: list[list[LayerLoad]] = field(default_factory=list)  # per evaluation, per layer of a mixture
    final_validation: float | None = None
    units: int = 0
    dead_at_start: int = 0
    dead_at_end: int = 0
    died: int = 0  # alive before the first step, dead after the last
    revived: int = 0  # dead at some evaluation, alive after the last
    step_ms: list[float] = field(default_factory=list)  # every step in order
    diverged: bool = False


def budget_widths(settings: Settings) -> dict[str, int]:
    """Each architecture's ``d_ff`` for the baseline's parameter count."""
    size = settings.model
    with torch.device("meta"):
        budget = count_parameters(BY_KEY[BASELINE].eager(size.d_model, size.d_ff))
    return {a.key: width_for_budget(a, size.d_model, budget) for a in ARCHITECTURES}


def _width(layer: Layer, budget: dict[str, int], settings: Settings) -> int:
    """``d_ff``: a mixture's for the baseline's active FLOPs, any other's for the baseline's parameters."""
    return layer.width(settings.model.d_ff) if isinstance(layer, Mixture) else budget[layer.key]


def rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first tenth, then a cosine to a tenth of the peak."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def validation_loss(model: LanguageModel, x: Tensor, y: Tensor, batch: int = 32) -> float:
    total = 0.0
    for rows, targets in zip(torch.split(x, batch), torch.split(y, batch), strict=True):
        total += F.cross_entropy(model(rows).flatten(0, 1), targets.flatten(), reduction="sum").item()
    return total / y.numel()


@torch.no_grad()
def probe(
    model: LanguageModel, layer: Layer, x: Tensor, y: Tensor, routed: list[Routed] | None = None
) -> tuple[float, list[Tensor]]:
    """The loss, and per layer bool [U]: the unit's output stays within ±DEAD_BELOW on every token of ``x``."""
    inputs: list[Tensor] = []
    loss = F.cross_entropy(model(x, inputs, routed).flatten(0, 1), y.flatten()).item()
    layers = zip(model.ffn_layers(), inputs, strict=True)
    return loss, [layer.units(ffn, hidden).abs().amax(0).lt(DEAD_BELOW) for ffn, hidden in layers]


def _gradient_norm(layer: nn.Module) -> float:
    squares = [p.grad.square().sum() for p in layer.parameters() if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


class Trainer:
    """One layer, one seed: ``evaluate``, then ``step`` for every batch, then ``finish``."""

    def __init__(
        self, layer: Layer, d_ff: int, text: Text, settings: Settings, seed: int, rate: float, steps: int
    ) -> None:
        size, self.device = settings.model, torch.device(settings.device)
        model = LanguageModel(size, lambda: layer.fused(size.d_model, d_ff), seed).to(self.device)
        ffn_parameters = sum(count_parameters(ffn) for ffn in model.ffn_layers())
        self.run = Run(layer.key, seed, rate, d_ff, ffn_parameters, count_parameters(model))
        self.layer, self.model, self.text, self.settings, self.steps = layer, model, text, settings, steps
        self.balance = layer.balance if isinstance(layer, Mixture) else 0.0
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
        self.check = self._validation(settings.validation_windows)
        self.evaluate_at = {round(i * steps / settings.evaluations) for i in range(settings.evaluations + 1)}
        self.gradient_every = max(1, steps // GRADIENT_POINTS)
        self.dead: list[Tensor] = []  # per evaluation, bool over the units of all layers

    def _validation(self, count: int) -> tuple[Tensor, Tensor]:
        context = self.settings.model.context
        starts = text_module.validation_starts(self.text.validation, count, context)
        x, y = text_module.windows(self.text.validation, starts, context)
        return x.to(self.device), y.to(self.device)

    def evaluate(self, step: int) -> None:
        """Evaluates in eval mode: no noise on the router's input, no balancing in BASE."""
        routed: list[Routed] = []
        self.model.eval()
        loss, dead = probe(self.model, self.layer, *self.check, routed)
        self.model.train()
        if routed:
            self.run.validation_loads.append([layer_load(chosen) for chosen, _ in routed])
        self.run.steps.append(step)
        self.run.validation.append(loss)
        self.run.dead_share.append([layer.float().mean().item() for layer in dead])
        self.dead.append(torch.cat(dead))

    def step(self, step: int, x: Tensor, y: Tensor) -> None:
        """Makes one update, unless the run has diverged."""
        if self.run.diverged:
            return
        began = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = rate(step, self.steps, self.run.learning_rate)
        self.optimizer.zero_grad(set_to_none=True)
        routed: list[Routed] = []
        loss = F.cross_entropy(self.model(x, routed=routed).flatten(0, 1), y.flatten())
        if self.balance:
            loss = loss + self.balance * balancing_loss(routed)
        loss.backward()  # type: ignore[no-untyped-call]
        if step % self.gradient_every == 0:
            self.run.gradient_steps.append(step)
            self.run.gradient_norms.append([_gradient_norm(layer) for layer in self.model.ffn_layers()])
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        if isinstance(self.layer, Mixture) and self.layer.after_step is not None:
            for ffn, (chosen, logits) in zip(self.model.ffn_layers(), routed, strict=True):
                self.layer.after_step(ffn, chosen, logits)  # type: ignore[arg-type]
        finite = math.isfinite(loss.item())  # item() waits for the device: the step's time is complete
        self.run.step_ms.append(round(1e3 * (time.perf_counter() - began), 3))
        if routed and step % self.gradient_every == 0:
            self.run.training_loads.append([layer_load(chosen) for chosen, _ in routed])
        if not finite:
            _diverge(self.run)
        elif step + 1 in self.evaluate_at:
            self.evaluate(step + 1)

    def finish(self) -> Run:
        run = self.run
        if run.diverged:
            return run
        self.model.eval()
        run.final_validation = validation_loss(self.model, *self._validation(self.settings.final_windows))
        start, end, ever = self.dead[0], self.dead[-1], torch.stack(self.dead).any(0)
        run.units, run.dead_at_start, run.dead_at_end = end.numel(), int(start.sum()), int(end.sum())
        run.died, run.revived = int((end & ~start).sum()), int((ever & ~end).sum())
        if not math.isfinite(run.final_validation):
            _diverge(run)
        return run


def train_together(
    layers: Sequence[Layer],
    text: Text,
    settings: Settings,
    *,
    seed: int,
    steps: int,
    learning_rate: float,
    advance: Callable[[], object],
) -> list[Run]:
    """``advance`` is called once per step and layer."""
    budget = budget_widths(settings)
    trainers = [Trainer(a, _width(a, budget, settings), text, settings, seed, learning_rate, steps) for a in layers]
    context, device = settings.model.context, torch.device(settings.device)
    starts = text_module.training_starts(text.train, seed, steps, settings.batch, context)
    for trainer in trainers:
        trainer.evaluate(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # only the noise on a router's input is drawn in training
        for step in range(steps):
            x, y = (t.to(device) for t in text_module.windows(text.train, starts[step], context))
            for trainer in trainers if step % 2 == 0 else reversed(trainers):
                trainer.step(step, x, y)
                advance()
    return [trainer.finish() for trainer in trainers]


def _diverge(run: Run) -> None:
    """Keeps only the finite part of the record: results hold no NaN."""
    run.diverged, run.final_validation = True, None
    keep = [i for i, loss in enumerate(run.validation) if math.isfinite(loss)]
    run.steps, run.validation = [run.steps[i] for i in keep], [run.validation[i] for i in keep]
    run.dead_share = [run.dead_share[i] for i in keep]
    run.validation_loads = [run.validation_loads[i] for i in keep if run.validation_loads]
    finite = [i for i, norms in enumerate(run.gradient_norms) if all(map(math.isfinite, norms))]
    run.gradient_steps = [run.gradient_steps[i] for i in finite]
    run.gradient_norms = [run.gradient_norms[i] for i in finite]
    run.training_loads = [run.training_loads[i] for i in finite if run.training_loads]
