# SPDX-License-Identifier: BSD-3-Clause
"""QLoRA with peft: adapters on a small mixture of experts whose weights are kept in MXFP4, beside the same in bfloat16.

    pip install "ffn_ops[transformers,peft]" && python examples/qlora.py

The mixture learns Python's help topics, byte by byte. Then adapters on its experts learn Python's source code, over the
experts in bfloat16 and over the same experts in MXFP4, with several seeds each. The script prints both loss curves and
the memory of a step, saves the adapter, loads it into a quantised model and generates. Everything ships with Python;
on two cores of a CPU it takes less than two minutes.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import importlib.util
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import ffn_ops
from ffn_ops.integrations.transformers import register

CONTEXT, BATCH = 64, 8
BASES = ("bfloat16", "mxfp4")


def text_of(*modules: str) -> Tensor:
    """The bytes of modules' sources, as tokens."""
    origins = [importlib.util.find_spec(module).origin for module in modules]  # type: ignore[union-attr]
    return torch.frombuffer(bytearray(b"".join(Path(str(o)).read_bytes() for o in origins)), dtype=torch.uint8).long()


def windows(text: Tensor, seed: int, count: int = BATCH) -> Tensor:
    starts = torch.randint(len(text) - CONTEXT, (count, 1), generator=torch.Generator().manual_seed(seed))
    return text[starts + torch.arange(CONTEXT)]


def mixture(width: int, experts: int) -> Any:
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=width, moe_intermediate_size=width, intermediate_size=width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=experts, num_experts_per_tok=2,
        norm_topk_prob=True, max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, experts_implementation="ffn_ops")


def base_of(model: nn.Module, base: str) -> nn.Module:
    """A copy in bfloat16, with its experts in MXFP4 where asked for."""
    model = copy.deepcopy(model).bfloat16()
    if base == "mxfp4":
        ffn_ops.quantize_(model, "mxfp4")
    return model


def adapted(model: nn.Module) -> Any:
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=8, target_modules=[], target_parameters=targets))  # type: ignore[arg-type]


def train(
    model: Any, parameters: Iterable[nn.Parameter], text: Tensor, seeds: Sequence[int], rate: float
) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, rate)
    losses = []
    for seed in seeds:
        ids = windows(text, seed)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def loss_on(model: Any, text: Tensor) -> float:
    ids = windows(text, seed=-1, count=64)
    return float(model(input_ids=ids, labels=ids).loss)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def resident(field: str) -> float:
    """MB of this process: VmRSS at present, VmHWM at most since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def give_memory_back() -> None:
    gc.collect()
    ffn_ops.empty_cache()
    ctypes.CDLL(None).malloc_trim(0)


def peak_of_steps(base: str, width: int, experts: int, text: Tensor) -> float:
    """MB that a model, its adapters and two training steps take at most."""
    give_memory_back()
    before = resident("VmRSS")
    model = adapted(base_of(mixture(width, experts), base))
    give_memory_back()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    train(model, trainable(model), text, range(2), 1e-3)
    return resident("VmHWM") - before


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Losses on held-out source code after training, of each seed, by the base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of each of the adapters' trainings (default 100)")
    parser.add_argument("--seeds", type=int, default=3, help="of the adapters' trainings (default 3)")
    parser.add_argument("--quick", action="store_true", help="a tiny mixture, for a few seconds")
    options = parser.parse_args(arguments)
    trained_sizes, large = ((64, 4), (64, 8)) if options.quick else ((128, 16), (512, 64))  # width, experts
    steps, seeds = (8, 1) if options.quick else (options.steps, options.seeds)
    register()
    torch.manual_seed(0)
    topics, code = text_of("pydoc_data.topics"), text_of("argparse", "typing", "inspect")
    code, held_out = code[: len(code) * 9 // 10], code[len(code) * 9 // 10 :]

    if Path("/proc/self/clear_refs").exists():
        peak_of_steps("mxfp4", 64, 2, code)  # what the first step of a process loads is not counted
        peaks = [peak_of_steps(base, *large, code) for base in BASES]
        sizes = f"width {large[0]}, {large[1]} experts in each of 2 layers"
        print(
            f"model and training step, {sizes}: {peaks[0]:.0f} MB in bfloat16, {peaks[1]:.0f} MB in MXFP4,"
            f" {peaks[1] / peaks[0]:.2f} times"
        )

    began = time.perf_counter()
    trained = mixture(*trained_sizes)
    train(trained, trained.parameters(), topics, range(2 * steps), 2e-3)
    print(f"trained on help topics in {time.perf_counter() - began:.0f} s")

    curves: dict[str, list[Tensor]] = {base: [] for base in BASES}
    result: dict[str, list[float]] = {base: [] for base in BASES}
    seconds = dict.fromkeys(BASES, 0.0)
    model: Any = None
    for seed in range(seeds):
        for base in BASES:
            torch.manual_seed(seed)
            model = adapted(base_of(trained, base))
            began = time.perf_counter()
            losses = train(model, trainable(model), code, range(1000 * (seed + 1), 1000 * (seed + 1) + steps), 3e-3)
            seconds[base] += time.perf_counter() - began
            curves[base].append(torch.tensor(losses))
            result[base].append(loss_on(model, held_out))
    print("adapters on source code, nats/byte, mean and spread of the seeds")
    for begin in range(0, steps, max(1, steps // 6)):
        end = begin + max(1, steps // 6)
        parts = [torch.stack([c[begin:end].mean() for c in curves[base]]) for base in BASES]
        print(f"  steps {begin + 1:3d} to {min(end, steps):3d}: " + ", ".join(
            f"{base} {p.mean():.3f} ({p.min():.3f} to {p.max():.3f})" for base, p in zip(BASES, parts, strict=True)
        ))  # fmt: skip
    for base in BASES:
        found = torch.tensor(result[base])
        print(f"  held out: {base} {found.mean():.3f} ({found.min():.3f} to {found.max():.3f}), {seconds[base]:.0f} s")

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = sum(p.stat().st_size for p in Path(folder).rglob("*.safetensors"))
        loaded: Any = PeftModel.from_pretrained(base_of(trained, "mxfp4"), folder).eval()
    assert loss_on(loaded, held_out) == loss_on(model.eval(), held_out)
    prompt = torch.tensor([list(b"def __init__(self, ")])
    out = loaded.generate(input_ids=prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)
    print(f"adapter of {size / 1e6:.1f} MB, saved and loaded: {bytes(out[0].tolist()).decode(errors='replace')!r}")
    return result


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    main()
