# SPDX-License-Identifier: BSD-3-Clause
"""Training on text with planted needles, in the stages of DeepSeek-V3.2, and what the trained models know: their loss
on held-out text, how many needles they recall, and how evenly their experts are loaded."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn_ops import Routing, routing
from ffn_ops.compare.mixtures import BIAS_RATE, LayerLoad, layer_load
from ffn_ops.compare.text import Text, training_starts, validation_starts, windows
from ffn_ops.compare.train import rate

from .attention import dense_probabilities
from .model import BYTES, KINDS, VALUES, Arm, Block, LanguageModel, Size

RATE, INDEX_RATE, CLIP = 4e-3, 1e-2, 1.0
QUESTIONS = BYTES + KINDS * VALUES  # the token of the first kind's question


@dataclass(frozen=True)
class Plan:
    """Steps of training; the sparse models spend half of ``steps`` dense, then ``warmup`` more on their indexers."""

    steps: int = 300
    warmup: int = 40
    batch: int = 4
    asked: int = 8  # questions for each needle in training
    seeds: int = 3
    windows: int = 64  # of validation
    recall_lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    recall_tokens: int = 16384  # of each length; at least 4 sequences

    def recall_count(self, length: int) -> int:
        return max(4, self.recall_tokens // length)


@dataclass
class Run:
    """One model, one seed. Losses in nats per token; ``recall`` is a share for each length of the plan."""

    arm: str
    seed: int
    parameters: int
    losses: list[float] = field(default_factory=list)  # of each step, on text
    answers: list[float] = field(default_factory=list)  # of each step, on the needles' values
    index_losses: list[float] = field(default_factory=list)  # of each step that trains the indexer
    validation: float = math.nan
    recall: list[float] = field(default_factory=list)
    covered: tuple[float, float] | None = None  # shares of the dense attention's probability: chosen keys, last keys
    loads: list[LayerLoad] = field(default_factory=list)  # on the validation text, of each layer
    seconds: float = 0.0


def plant(text: Tensor, generator: torch.Generator, asked: int = 1) -> Tensor:
    """A copy of text [B, T + 1] with one needle of each kind: a token that names its kind and its value. Behind it
    stands ``asked`` times, anywhere, the question of that kind with the needle again as its answer; with ``asked`` of
    1 all questions stand at the end."""
    text = text.clone()
    length, kinds = text.shape[1], torch.arange(KINDS)
    for row in text:
        needles = BYTES + VALUES * kinds + torch.randint(VALUES, (KINDS,), generator=generator)
        if asked > 1:
            places = 2 * torch.randperm((length - 1) // 2, generator=generator)[: KINDS * (asked + 1)]
            first, *questions = places.view(KINDS, -1).sort(1).values.unbind(1)
        else:
            first = torch.randperm(length - 2 * KINDS, generator=generator)[:KINDS]
            questions = [length - 2 * KINDS + 2 * kinds]
        row[first] = needles
        for question in questions:
            row[question], row[question + 1] = QUESTIONS + kinds, needles
    return text


def losses(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of text and of the answers to the questions, each a mean; needles and questions themselves are not scored."""
    each = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(logits.shape[:2])
    answers = tokens[:, :-1] >= QUESTIONS
    return each[tokens[:, 1:] < BYTES].mean(), each[answers].mean()


class Trainer:
    def __init__(self, size: Size, arm: Arm, plan: Plan, text: Text, seed: int) -> None:
        self.model = LanguageModel(size, arm, seed)
        self.run = Run(arm.key, seed, sum(p.numel() for p in self.model.parameters()))
        self.size, self.arm, self.plan, self.text, self.seed = size, arm, plan, text, seed
        self.optimizer = _adam(self.model.others(), RATE)
        self.index_optimizer = _adam(self.model.indexers(), INDEX_RATE) if self.model.indexers() else None

    def batches(self, seed: int, steps: int) -> Iterable[Tensor]:
        """Text [batch, context + 1] with needles, the same for every model of a seed."""
        generator = torch.Generator().manual_seed(seed)
        for starts in training_starts(self.text.train, seed, steps, self.plan.batch, self.size.context):
            x, y = windows(self.text.train, starts, self.size.context)
            yield plant(torch.cat([x, y[:, -1:]], 1), generator, self.plan.asked)

    def train(self) -> None:
        began, plan = time.perf_counter(), self.plan
        sparse = self.arm.attention == "sparse"
        for step, tokens in enumerate(self.batches(self.seed, plan.steps)):
            if sparse and step == 0:
                self.model.set_mode("dense")
            if sparse and step == plan.steps // 2:
                self.warm_up()
                self.model.set_mode("sparse")
            self.step(tokens, rate(step, plan.steps, 1.0))
        self.run.seconds = time.perf_counter() - began

    def step(self, tokens: Tensor, share: float) -> None:
        """The language model's loss trains all but the indexers; theirs trains them, in the same backward."""
        routed: list[Routing] = []
        logits, index_loss = self.model(tokens[:, :-1], routed=routed)
        text, answers = losses(logits, tokens)
        (text + answers + index_loss).backward()
        nn.utils.clip_grad_norm_(self.model.others(), CLIP)
        _advance(self.optimizer, RATE * share)
        if self.index_optimizer is not None:
            _advance(self.index_optimizer, INDEX_RATE * share)
        with torch.no_grad():
            for block, chosen in zip(self.model.blocks, routed, strict=False):
                routing.update_bias(block.ffn.choose.bias, chosen, BIAS_RATE)
        self.run.losses.append(text.item())
        self.run.answers.append(answers.item())
        if index_loss.requires_grad:
            self.run.index_losses.append(index_loss.item())

    def warm_up(self) -> None:
        """Dense attention; all but the indexers is frozen."""
        self.model.set_mode("warmup")
        for parameter in self.model.others():
            parameter.requires_grad_(False)
        assert self.index_optimizer is not None
        for tokens in self.batches(self.seed + 1_000_003, self.plan.warmup):
            _, index_loss = self.model(tokens[:, :-1])
            index_loss.backward()
            _advance(self.index_optimizer, INDEX_RATE)
            self.run.index_losses.append(index_loss.item())
        for parameter in self.model.others():
            parameter.requires_grad_(True)

    @torch.no_grad()
    def evaluate(self) -> Run:
        self.model.eval()
        context, plan = self.size.context, self.plan
        starts = validation_starts(self.text.validation, plan.windows, context)
        x, y = windows(self.text.validation, starts, context)
        routed: list[Routing] = []
        logits, _ = self.model(x, routed=routed)
        self.run.validation = F.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
        self.run.loads = [layer_load(chosen) for chosen in routed]
        self.run.recall = [self.recall(length) for length in plan.recall_lengths]
        if self.arm.attention == "sparse":
            shares, h = [], self.model.token(x[:4])
            for block in self.model.blocks:
                shares.append(coverage(block, h))
                h = block(h)[0]
            self.run.covered = (fmean(chosen for chosen, _ in shares), fmean(last for _, last in shares))
        return self.run

    def recall(self, length: int) -> float:
        """The share of needles that the model names when asked at the end of ``length`` tokens of held-out text."""
        text, generator = self.text.validation, torch.Generator().manual_seed(length)
        count, right = self.plan.recall_count(length), 0
        starts = torch.randint(len(text) - length, (count,), generator=generator)
        for begin in starts:
            tokens = plant(text[begin : begin + length].long()[None], generator)
            logits, _ = self.model(tokens[:, :-1])
            asked = tokens[:, :-1] >= QUESTIONS
            right += int((logits[asked].argmax(1) == tokens[:, 1:][asked]).sum())
        return right / (count * KINDS)


@torch.no_grad()
def coverage(block: Block, x: Tensor) -> tuple[float, float]:
    """The share of the dense attention's probability on the chosen keys, and on as many last keys."""
    h = block.attention_norm(x)
    p = dense_probabilities(*block.attention.project(h))
    chosen = p.gather(2, block.indexer(h, True)[1]).sum(2)
    return chosen.mean().item(), p.triu(1 - block.size.keys).sum(2).mean().item()


def _adam(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, rate, betas=(0.9, 0.95), weight_decay=0.01)


def _advance(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
