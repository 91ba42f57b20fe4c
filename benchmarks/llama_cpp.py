# SPDX-License-Identifier: BSD-3-Clause
"""``python -m benchmarks.llama_cpp``: a mixture of gpt-oss-20b on MXFP4 against llama.cpp's own kernels.

Both multiply the same codes. llama.cpp rounds activations to 8 bits and multiplies integers, ffn_ops multiplies in
float32: so each one's error against float64 on the dequantised weights stands beside its time. All experts have the
values of one and memory of their own.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ffn_ops
from ffn_ops._accuracy import WrongResultError, errors, limit, sizes, worst
from ffn_ops._timing import Timed, take_turns, verified

from .command import row_options, run_rows
from .harness import threads
from .report import table, time_text

INSTALL = "pip install llama-cpp-python==0.3.36"
OURS = ("ffn_ops mxfp4", "ffn_ops gguf_mxfp4")
THEIRS = {"llama.cpp": False, "llama.cpp repacked": True}  # whether weights are rearranged at loading, its default
MXFP4, FLOAT32, INT32 = 39, 0, 26  # of ggml
MOST_ERROR = 0.05  # of llama.cpp, against the size of the result: more is not rounding
REST = 0.03  # seconds before a sample: the other library's threads spin for a while after their last work
CALLS = 5  # of a sample, which is their median


@dataclass(frozen=True)
class Row:
    D: int
    F: int
    E: int
    K: int
    T: int
    threads: int

    @property
    def name(self) -> str:
        return f"gpt-oss-20b, T {self.T}, {self.D}/{self.F}, E {self.E}, K {self.K}, {self.threads} thread(s)"


class Problem:
    """Codes, routing and tokens of a row, and the layer's float64 result."""

    def __init__(self, row: Row) -> None:
        self.row = row
        generator = torch.Generator().manual_seed(row.T)
        self.w = [
            ffn_ops.quantize(torch.randn(rows, cols, generator=generator) * cols**-0.5, "mxfp4")
            for rows, cols in ((2 * row.F, row.D), (row.D, row.F))
        ]
        self.x = torch.randn(row.T, row.D, generator=generator)
        values, self.experts = torch.randn(row.T, row.E, generator=generator).topk(row.K)
        self.weights = values.softmax(-1)

    def right(self, dtype: torch.dtype) -> Tensor:
        """By torch: all experts are one, so the weights' sum of a token multiplies its result."""
        w_in, w_down = (w.dequantize(torch.float32).to(dtype) for w in self.w)
        gate, up = (self.x.to(dtype) @ w_in.T).chunk(2, -1)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        y = (gate * torch.sigmoid(1.702 * gate) * (up + 1)) @ w_down.T
        return y * self.weights.to(dtype).sum(-1, keepdim=True)


def gguf_blocks(w: ffn_ops.QuantizedWeight) -> Tensor:
    """MXFP4 codes as GGUF holds them: the scale first, then element i beside element i + 16 of a block."""
    codes, scales = w.parts[:2]
    pairs = codes.unflatten(-1, (-1, 16))
    elements = torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)
    packed = elements[..., :16] | elements[..., 16:] << 4
    return torch.cat((scales.view(torch.uint8).unsqueeze(-1), packed), -1).flatten(-2)


class Ours:
    def __init__(self, problem: Problem, provider: str) -> None:
        experts = problem.row.E
        if provider.endswith("gguf_mxfp4"):
            stacks = [gguf_blocks(w).repeat(experts, 1, 1) for w in problem.w]
            self.w = [ffn_ops.QuantizedWeight("gguf_mxfp4", codes) for codes in stacks]
        else:
            self.w = [
                ffn_ops.QuantizedWeight(
                    "mxfp4", w.parts[0].repeat(experts, 1, 1), scales=w.parts[1].repeat(experts, 1, 1), block=w.block
                )
                for w in problem.w
            ]
        self.x = problem.x
        self.routing = ffn_ops.Routing.from_topk(problem.experts, problem.weights, experts)
        self.gate = ffn_ops.Gate("swiglu_oai")

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return ffn_ops.moe(self.x, self.routing, *self.w, gated=True, activation=self.gate)


class _Params(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class Ggml:
    """The functions of ggml's libraries that a graph on the CPU needs."""

    def __init__(self, folder: Path) -> None:
        names = [next(iter(sorted(folder.glob(f"libggml{part}.so*"))), None) for part in ("-base", "-cpu")]
        missing = [part for part, name in zip(("-base", "-cpu"), names, strict=True) if name is None]
        if missing:
            raise FileNotFoundError(f"{folder}: expected libggml{missing[0]}.so")
        self.libraries = [ctypes.CDLL(str(name), ctypes.RTLD_GLOBAL) for name in names]
        self.silent = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda *_: None)
        self.call("log_set", self.silent, None, returns=None)

    def call(self, name: str, *arguments: Any, returns: Any = c_void_p) -> Any:
        for library in self.libraries:
            if hasattr(library, f"ggml_{name}"):
                function = getattr(library, f"ggml_{name}")
                function.restype = returns
                return function(*arguments)
        raise AttributeError(f"ggml_{name}: not in this version of ggml")

    def context(self) -> Any:
        return c_void_p(self.call("init", _Params(1 << 20, None, True)))

    def tensor(self, context: Any, type_: int, *shape: int) -> Any:
        sizes = [c_int64(n) for n in shape]
        return c_void_p(self.call(f"new_tensor_{len(shape)}d", context, c_int(type_), *sizes))

    def op(self, name: str, context: Any, *arguments: Any) -> Any:
        return c_void_p(self.call(name, context, *arguments))


class LlamaCpp:
    """The layer as llama.cpp builds it: ``mul_mat_id`` for gate, up and down, weights, and the sum of experts."""

    def __init__(self, problem: Problem, provider: str, folder: Path) -> None:
        row, g = problem.row, Ggml(folder)
        self.ggml, self.shape = g, (row.T, row.D)
        self.backend = c_void_p(g.call("backend_cpu_init"))
        g.call("backend_cpu_set_n_threads", self.backend, c_int(row.threads), returns=None)
        self.held = weights = g.context()
        gate_up, down = problem.w
        blocks = [*gguf_blocks(gate_up).chunk(2), gguf_blocks(down)]
        stacks = [
            g.tensor(weights, MXFP4, cols, rows, row.E)
            for rows, cols in ((row.F, row.D), (row.F, row.D), (row.D, row.F))
        ]
        if THEIRS[provider]:
            buffer = g.call("backend_alloc_ctx_tensors_from_buft", weights, self.repacking())
        else:
            buffer = g.call("backend_alloc_ctx_tensors", weights, self.backend)
        if not buffer:
            raise MemoryError("ggml: no memory for weights")
        for stack, block in zip(stacks, blocks, strict=True):
            self.put(stack, block.repeat(row.E, 1, 1))

        c = g.context()
        x = g.tensor(c, FLOAT32, row.D, 1, row.T)
        ids = g.tensor(c, INT32, row.K, row.T)
        weight = g.tensor(c, FLOAT32, 1, row.K, row.T)
        gate, up = (g.op("mul_mat_id", c, w, x, ids) for w in stacks[:2])
        h = g.op("swiglu_oai", c, gate, up, c_float(1.702), c_float(7.0))
        y = g.op("mul", c, g.op("mul_mat_id", c, stacks[2], h, ids), weight)
        step, token = c_size_t(4 * row.D), c_size_t(4 * row.D * row.K)
        views = [
            g.op("view_2d", c, y, c_int64(row.D), c_int64(row.T), token, c_size_t(i * step.value)) for i in range(row.K)
        ]
        self.out = functools.reduce(lambda a, b: g.op("add", c, a, b), views)
        self.graph = c_void_p(g.call("new_graph", c))
        for view in views:  # in front of their sums, as llama.cpp orders them
            g.call("build_forward_expand", self.graph, view, returns=None)
        g.call("build_forward_expand", self.graph, self.out, returns=None)
        if not g.call("backend_alloc_ctx_tensors", c, self.backend):
            raise MemoryError("ggml: no memory for activations")
        self.put(x, problem.x)
        self.put(ids, problem.experts.int())
        self.put(weight, problem.weights)

    def repacking(self) -> Any:
        """The buffer type in which ggml rearranges weights for its faster kernels."""
        g = self.ggml
        registry = c_void_p(g.call("backend_cpu_reg"))
        device = c_void_p(g.call("backend_reg_dev_get", registry, c_size_t(0)))
        name = c_char_p(b"ggml_backend_dev_get_extra_bufts")
        address = g.call("backend_reg_get_proc_address", registry, name)
        types = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(device)
        for i in range(8):
            if not types[i]:
                break
            if b"REPACK" in g.call("backend_buft_name", c_void_p(types[i]), returns=c_char_p):
                return c_void_p(types[i])
        raise RuntimeError("this build of ggml rearranges no weights")

    def put(self, tensor: Any, values: Tensor) -> None:
        values = values.contiguous()
        size = c_size_t(values.nbytes)
        self.ggml.call("backend_tensor_set", tensor, c_void_p(values.data_ptr()), c_size_t(0), size, returns=None)

    def compute(self) -> None:
        status = self.ggml.call("backend_graph_compute", self.backend, self.graph, returns=c_int)
        if status != 0:
            raise RuntimeError(f"ggml: status {status}")

    def __call__(self) -> Tensor:
        self.compute()
        y = torch.empty(self.shape)
        size = c_size_t(y.nbytes)
        self.ggml.call("backend_tensor_get", self.out, c_void_p(y.data_ptr()), c_size_t(0), size, returns=None)
        return y


def sample(call: Callable[[], object]) -> float:
    time.sleep(REST)
    call()  # wakes the threads
    taken = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def prepared(timed: Timed, problem: Problem, exact: Tensor, found: dict[str, float], folder: Path) -> Any:
    """What to call, once its result is right; `found` gets its error, relative to the result's size."""
    layer: Any
    if timed.provider in OURS:
        layer = Ours(problem, timed.provider)
        timed.error = worst(("y",), [layer()], [exact], [limit(problem.right(torch.float32), exact)])
    else:
        layer = LlamaCpp(problem, timed.provider, folder)
    error = errors(layer(), exact)[1] / sizes(exact)[1]
    if not error <= MOST_ERROR:
        raise WrongResultError(f"y: rms error {error:.3g} of its size, allowed {MOST_ERROR}")
    found[timed.provider] = error
    return layer


def measured(row: Row, rounds: int, folder: Path) -> tuple[list[Timed], str, dict[str, Any]]:
    problem, relative, running = Problem(row), dict[str, float](), []
    exact = problem.right(torch.float64)
    found = [Timed(name) for name in (*OURS, *THEIRS)]
    with threads(row.threads):
        for timed in found:
            layer = verified(timed, functools.partial(prepared, timed, problem, exact, relative, folder))
            if layer is not None:
                call = layer.compute if isinstance(layer, LlamaCpp) else layer
                running.append((timed, functools.partial(sample, call), rounds))
        take_turns(running)
    return found, row_text(row, found, relative), {"relative_error": relative}


def row_text(row: Row, found: list[Timed], relative: dict[str, float]) -> str:
    """How many times as fast as each of llama.cpp's kernels, the median over rounds; errors beside the faster one's."""
    theirs = [each for each in found if each.provider in THEIRS and each.seconds]
    best = min(theirs, key=lambda each: each.median, default=None)
    lines = []
    for each in found:
        if not each.seconds:
            lines.append([each.provider, each.note, *[""] * (3 + len(theirs))])
            continue
        speed = [
            f"{statistics.median(a / b for a, b in zip(other.seconds, each.seconds, strict=True)):.2f}"
            for other in theirs
        ]
        error = relative[each.provider]
        beside = f"{error / relative[best.provider]:.2g}" if best else "–"
        lines.append([each.provider, time_text(each.median), f"{each.spread:.0%}", *speed, f"{error:.2g}", beside])
    heads = ["", "median", "spread", *[f"x {each.provider}" for each in theirs], "error", "of the faster one's"]
    return f"{row.name}\n{table(heads, lines)}"


def library_folder(chosen: Path | None) -> Path:
    if chosen:
        return chosen
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"llama-cpp-python is not installed: {INSTALL}, or --ggml FOLDER with libggml-cpu.so")
    return Path(spec.submodule_search_locations[0]) / "lib"


def main(arguments: list[str] | None = None) -> int:
    parser = row_options("llama_cpp", rounds=15)
    parser.add_argument("--ggml", type=Path, metavar="FOLDER", help="with ggml's libraries; else those of llama_cpp")
    options = parser.parse_args(arguments)
    folder = library_folder(options.ggml)
    rows = [Row(2880, 2880, 32, 4, T, options.threads) for T in (1, 16)]
    return run_rows(parser, options, rows, lambda row: measured(row, options.rounds, folder))


if __name__ == "__main__":
    sys.exit(main())
