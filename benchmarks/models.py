# SPDX-License-Identifier: BSD-3-Clause
"""``python -m benchmarks.models``: whole transformers models, replaced against untouched, by time and peak memory.

A small Llama (width 512, 8 layers) and a mixture like Qwen3-MoE's (64 experts, 8 per token): a training step (forward,
loss, backward) on T tokens, and decoding token by token from a static cache.
"""

from __future__ import annotations

import copy
import functools
import gc
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

import ffn_ops
from ffn_ops._accuracy import Limit, limit, worst
from ffn_ops._timing import Timed, ready, take_turns
from ffn_ops.integrations.transformers import register

from .command import row_options, run_rows
from .harness import threads
from .report import table, time_text
from .workloads import DTYPES

VOCABULARY, PROMPT, DECODED = 4096, 32, 8  # tokens before the first decoded one, and decoded in a sample
VERIFIED = 32  # tokens of the comparison with float64
GATHERED = 2 << 30  # bytes of weights that batched_mm may copy in a step, which keeps them all for backward
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "max_position_embeddings": 2048, "eos_token_id": None,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"intermediate_size": 1408, "num_hidden_layers": 8}),
    "moe": (
        "Qwen3Moe",
        {"num_hidden_layers": 4, "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 256,
         "intermediate_size": 1408, "norm_topk_prob": True},
    ),
}  # fmt: skip
IMPLEMENTATIONS = {"llama": ("untouched", "ffn_ops"), "moe": ("eager", "batched_mm", "grouped_mm", "ffn_ops")}
COMPILED = " compiled"


@dataclass(frozen=True)
class Row:
    model: str
    mode: str  # training, decode
    dtype: str
    T: int
    threads: int

    @property
    def name(self) -> str:
        T = self.T if self.mode == "training" else 1
        return f"{self.model} {self.mode} {self.dtype}, T {T}, {self.threads} thread(s)"


def build(model: str, dtype: str) -> Any:
    import transformers

    family, options = MODELS[model]
    config = getattr(transformers, f"{family}Config")(**SMALL, **options)
    torch.manual_seed(0)
    implementation = {} if model == "llama" else {"experts_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_config(config, **implementation).to(DTYPES[dtype])


def provided(model: str, original: Any, provider: str) -> Any:
    """A model with the same weights that computes in this provider's way."""
    implementation = provider.removesuffix(COMPILED)
    changed = copy.deepcopy(original)
    if model == "moe":
        register()
        changed.set_experts_implementation(implementation)
    elif implementation == "ffn_ops":
        package: Any = ffn_ops
        package.replace(changed)
    return torch.compile(changed) if provider.endswith(COMPILED) else changed


def tokens(count: int) -> Tensor:
    return torch.randint(VOCABULARY, (1, count), generator=torch.Generator().manual_seed(1))


def training(model: Any, count: int) -> Callable[[], float]:
    ids = tokens(count)
    model.train()

    def sample() -> float:
        begin = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        seconds = time.perf_counter() - begin
        model.zero_grad(set_to_none=True)
        return seconds

    return sample


def decode(model: Any) -> Callable[[], float]:
    import transformers

    prompt = tokens(PROMPT)
    cache = transformers.StaticCache(config=model.config, max_cache_len=PROMPT + DECODED + 1)
    model.eval()

    def sample() -> float:
        with torch.no_grad():
            cache.reset()
            logits = model(input_ids=prompt, past_key_values=cache).logits
            begin = 0.0
            for i in range(DECODED + 1):  # the first is not timed: it warms up after the prompt
                if i == 1:
                    begin = time.perf_counter()
                logits = model(input_ids=logits[:, -1:].argmax(-1), past_key_values=cache).logits
        return (time.perf_counter() - begin) / DECODED

    return sample


def sampler(row: Row, model: Any) -> Callable[[], float]:
    return training(model, row.T) if row.mode == "training" else decode(model)


def results(model: Any, mode: str) -> list[Tensor]:
    """Logits and, in training, the gradient of the embedding, into which all layers' gradients go."""
    ids = tokens(VERIFIED)
    if mode == "decode":
        with torch.no_grad():
            return [model.eval()(input_ids=ids, use_cache=False).logits]
    model.train()
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    grad = model.get_input_embeddings().weight.grad
    model.zero_grad(set_to_none=True)
    return [out.logits.detach(), grad]


def memory(row: Row, provider: str, answer: Any) -> None:
    """In a process of its own: the most it holds during two steps, above what it held before."""
    torch.set_num_threads(row.threads)
    sample = sampler(row, provided(row.model, build(row.model, row.dtype), provider))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on: building took more
    before = resident("VmRSS")
    for _ in range(2):
        sample()
    answer.put(resident("VmHWM") - before)


def resident(what: str) -> int:
    """Bytes that this process holds now, or held at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what + ":"))


def peak_bytes(memory: Callable[[Any, str, Any], None], row: Any, provider: str) -> int | None:
    spawn = multiprocessing.get_context("spawn")
    answer = spawn.Queue()
    process = spawn.Process(target=memory, args=(row, provider, answer))
    process.start()
    process.join()
    return int(answer.get()) if process.exitcode == 0 else None


def unfit(row: Row, provider: str) -> str:
    """Why a provider is not run, or nothing."""
    if not provider.startswith("batched_mm"):
        return ""
    options = MODELS[row.model][1]
    copies = row.T * options["num_hidden_layers"] if row.mode == "training" else PROMPT
    rows = copies * options["num_experts_per_tok"]
    size = rows * 3 * SMALL["hidden_size"] * options["moe_intermediate_size"] * DTYPES[row.dtype].itemsize
    return "" if size <= GATHERED else f"not run: it would hold {size >> 20} MiB of copied weights"


def prepared(row: Row, timed: Timed, original: Any, exact: list[Tensor], limits: list[Limit]) -> Callable[[], float]:
    model = provided(row.model, original, timed.provider)
    timed.error = worst(("logits", "d_embedding")[: len(exact)], results(model, row.mode), exact, limits)
    sample = sampler(row, model)
    begin = time.perf_counter()
    sample()
    timed.first_call = time.perf_counter() - begin
    sample()
    return sample


def measure(row: Row, providers: list[str], rounds: int, with_memory: bool) -> list[Timed]:
    torch._dynamo.reset()
    original = build(row.model, row.dtype)
    exact = results(copy.deepcopy(original).double(), row.mode)
    eager = results(copy.deepcopy(original), row.mode)
    limits = [limit(e, x) for e, x in zip(eager, exact, strict=True)]
    found = [Timed(provider, note=unfit(row, provider)) for provider in providers]
    prepare = functools.partial(prepared, row, original=original, exact=exact, limits=limits)
    with threads(row.threads):
        take_turns(ready([timed for timed in found if not timed.note], prepare, rounds))
    del original, prepare
    if with_memory:
        for timed in found:
            if timed.seconds and not timed.provider.endswith(COMPILED):
                timed.peak_bytes = peak_bytes(memory, row, timed.provider)
    return found


def row_text(row: Row, found: list[Timed]) -> str:
    """Times, and how many times faster ours is than each: the median over rounds, which share their noise."""
    ours = next((each for each in found if each.provider == "ffn_ops" and each.seconds), None)
    lines = []
    for each in found:
        record = each.record()
        if not each.seconds:
            lines.append([each.provider, each.note, "", "", "", ""])
            continue
        ratio = "" if ours is None else statistics.median(
            a / b for a, b in zip(each.seconds, ours.seconds, strict=True)
        )  # fmt: skip
        lines.append([
            each.provider, time_text(record["median"]), f"{record['spread']:.0%}",
            f"{ratio:.2f}" if ratio else "–", f"{each.error:.2f}",
            "–" if each.peak_bytes is None else f"{each.peak_bytes / 2**20:.0f} MiB",
        ])  # fmt: skip
    heads = ["provider", "median", "spread", "/ ffn_ops", "error / limit", "peak memory"]
    return f"{row.name}\n{table(heads, lines)}"


def main(arguments: list[str] | None = None) -> int:
    parser = row_options("models", rounds=7)
    parser.add_argument("--quick", action="store_true", help="T 128 and three rounds")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--no-memory", action="store_true", help="without the processes that measure peak memory")
    options = parser.parse_args(arguments)
    T, rounds = (128, 3) if options.quick else (1024, options.rounds)
    rows = [
        Row(model, mode, dtype, T, options.threads)
        for model in MODELS
        for mode in ("training", "decode")
        for dtype in ("float32", "bfloat16")
    ]

    def measured(row: Row) -> tuple[list[Timed], str, dict[str, Any]]:
        providers = list(IMPLEMENTATIONS[row.model])
        providers += [] if options.no_compile else [name + COMPILED for name in providers]
        # All models run the same code, and past the limit on its recompilations torch would go on in eager mode.
        with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
            found = measure(row, providers, rounds, not options.no_memory)
        return found, row_text(row, found), {}

    return run_rows(parser, options, rows, measured)


if __name__ == "__main__":
    sys.exit(main())
