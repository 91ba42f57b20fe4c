# SPDX-License-Identifier: BSD-3-Clause
"""Tiny checkpoints of transformers' models, and what must hold of a model that keeps one quantised. No tests here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ffn_ops.integrations.transformers import from_pretrained

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])
Auto: Any = transformers.AutoModelForCausalLM


def checkpoint(folder: Path, config: Any, settings: dict[str, Any], change: Callable[[str, Tensor], Any]) -> Path:
    """A checkpoint of a model with random weights. ``change`` returns for some tensors the quantised ones, by what is
    added to the name, and the values that they stand for, which a dense checkpoint beside it holds in float32."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    state, dense = {}, {}
    for name, t in safetensors.load_file(folder / "model.safetensors").items():
        changed = change(name, t)
        parts, values = changed if changed else ({name: t}, t)
        state |= parts
        dense[name] = values.float().contiguous()
    safetensors.save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "dense").mkdir()
    safetensors.save_file(dense, folder / "dense" / "model.safetensors", {"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    (folder / "dense" / "config.json").write_text(json.dumps(text))
    (folder / "config.json").write_text(json.dumps({**text, "quantization_config": settings}))
    return folder


def held(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def is_mapped(path: Path, t: Tensor | None = None) -> bool:
    """Whether this process, or this tensor, holds pages of a file, where the system can tell."""
    maps = Path("/proc/self/maps")
    for line in maps.read_text().splitlines() if maps.exists() else ():
        start, end = (int(each, 16) for each in line.split()[0].split("-"))
        if line.endswith(str(path)) and (t is None or start <= t.data_ptr() < end):
            return True
    return False


def logits_and_gradient(model: Any) -> tuple[Tensor, Tensor]:
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=x).logits
    (grad,) = torch.autograd.grad(logits.square().sum(), x)
    return logits.detach(), grad


def check_like(model: Any, dense: Any) -> None:
    """Values and gradients within the rounding of float32, and the same text."""
    for actual, expected in zip(logits_and_gradient(model), logits_and_gradient(dense), strict=True):
        assert expected.norm() > 0
        assert (actual - expected).norm() < 1e-5 * expected.norm()
    options: Any = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), dense.generate(IDS, **options))


def check_saved(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    expected = logits_and_gradient(model)
    for again in (
        from_pretrained(Auto, folder, dtype=torch.float32),
        Auto.from_pretrained(folder, dtype=torch.float32, experts_implementation="ffn_ops"),
    ):
        assert all(map(torch.equal, logits_and_gradient(again), expected))
