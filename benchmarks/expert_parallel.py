# SPDX-License-Identifier: BSD-3-Clause
"""``python -m benchmarks.expert_parallel``: a layer's experts on 1, 2 and 4 processes of this machine, with gloo: bytes
sent, and time in collectives and outside of them. Each process checks its results before anything is timed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from ffn_ops import Routing, expert_parallel, reference
from ffn_ops._accuracy import limit, worst
from ffn_ops._files import file_name
from ffn_ops._timing import Timed

from .command import ROOT, machine, save
from .report import machine_text, table, time_text

RANKS = (1, 2, 4)
TIME_LIMIT = 600.0  # seconds of one number of processes
SAMPLES = 15


@dataclass(frozen=True)
class Row:
    """One training step of the operator: forward and all gradients, T tokens on each process."""

    T: int
    D: int
    F: int
    E: int
    K: int
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"T {self.T} a rank, {self.D}/{self.F}, E {self.E} K {self.K}, SwiGLU, {self.dtype}"


ROWS = (
    Row(512, 512, 2048, 8, 2),
    Row(512, 512, 256, 64, 8),
    Row(128, 512, 256, 64, 8, "bfloat16"),  # eager's own 16-bit products, which verify it, are slow
    Row(16, 512, 256, 64, 8),
)
QUICK = (Row(32, 64, 48, 8, 2),)


class Meter:
    """Replaces :func:`ffn_ops.expert_parallel.exchange`, and adds up its seconds and the bytes sent to other ranks."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks, self.exchange = rank, ranks, expert_parallel.exchange
        self.reset()

    def reset(self) -> None:
        self.seconds, self.bytes, self.calls = 0.0, 0, 0

    def __call__(self, tensors: Sequence[Tensor], send: Any, receive: Any, group: Any) -> list[Tensor]:
        start = time.perf_counter()
        found = self.exchange(tensors, send, receive, group)
        self.seconds += time.perf_counter() - start
        for t in tensors:
            rows = t.shape[0] * (self.ranks - 1) // self.ranks if send is None else sum(send) - send[self.rank]
            self.bytes += rows * t[:1].numel() * t.element_size()
            self.calls += 1
        return found


class Layer:
    """The tensors of a row: all tokens and experts, from which each process takes its own."""

    NAMES = ("w_in", "w_down")

    def __init__(self, row: Row, rank: int, ranks: int) -> None:
        self.row, self.rank, self.ranks = row, rank, ranks
        g = torch.Generator().manual_seed(0)
        dtype = getattr(torch, row.dtype)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=g) * scale).to(dtype)

        tokens = row.T * ranks
        self.whole = {
            "x": normal(tokens, row.D),
            "w_in": normal(row.E, 2 * row.F, row.D, scale=row.D**-0.5),
            "w_down": normal(row.E, row.D, row.F, scale=row.F**-0.5),
        }
        self.d_y = normal(tokens, row.D)
        self.ids = torch.rand(tokens, row.E, generator=g).topk(row.K).indices
        self.weights = torch.rand(tokens, row.K, generator=g)
        self.mine = slice(rank * row.T, (rank + 1) * row.T)
        self.experts = slice(*expert_parallel.experts_of(row.E, ranks, rank))
        self.leaves = {n: self.own(n, t).clone().requires_grad_() for n, t in self.whole.items()}
        self.leaves["weights"] = self.weights[self.mine].clone().requires_grad_()

    def own(self, name: str, t: Tensor) -> Tensor:
        return t[self.experts] if name in self.NAMES else t[self.mine]

    def step(self, mesh: Any) -> list[Tensor]:
        x, w_in, w_down, weights = self.leaves.values()
        routing = Routing.from_topk(self.ids[self.mine], weights, self.row.E)
        options: dict[str, Any] = {"gated": True, "activation": "silu"}
        y = expert_parallel.moe(x, routing, w_in, w_down, mesh=mesh, **options)
        return [y.detach(), *torch.autograd.grad(y, list(self.leaves.values()), self.d_y[self.mine])]

    def plain(self, dtype: torch.dtype) -> list[Tensor]:
        """This process's part of the plain formula's output and gradients for the tokens of all."""
        leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in self.whole.items()}
        weights = self.weights.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        y = reference.moe(**leaves, ids=self.ids, weights=weights, gated=True, activation="silu")  # type: ignore[arg-type]
        grads = torch.autograd.grad(y, [*leaves.values(), weights], self.d_y.to(y.dtype))
        names = [*leaves, "weights"]
        return [y.detach()[self.mine], *(self.own(n, g) for n, g in zip(names, grads, strict=True))]

    def verify(self, mesh: Any) -> float:
        """The tests' rule: the worst quotient of error and allowed error."""
        found = self.step(mesh)
        exact = self.plain(torch.float64)
        eager = self.plain(getattr(torch, self.row.dtype))
        limits = [limit(e, x) for e, x in zip(eager, exact, strict=True)]
        return worst(("y", *(f"d_{n}" for n in self.leaves)), found, exact, limits)


def rank_rows(rank: int, ranks: int, rows: Sequence[Row], samples: int) -> list[dict[str, Any]]:
    """One process's records of all rows."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (ranks,))
    meter = Meter(rank, ranks)
    records = []
    for row in rows:
        layer = Layer(row, rank, ranks)
        error = layer.verify(mesh)
        expert_parallel.exchange = meter  # type: ignore[assignment]
        total, collectives = Timed("all"), Timed("collectives")
        for _ in range(samples + 1):
            meter.reset()
            dist.barrier()
            start = time.perf_counter()
            layer.step(mesh)
            total.seconds.append(time.perf_counter() - start)
            collectives.seconds.append(meter.seconds)
        expert_parallel.exchange = meter.exchange
        del total.seconds[0], collectives.seconds[0]  # warming up
        outside = Timed("kernels", [a - c for a, c in zip(total.seconds, collectives.seconds, strict=True)])
        received = int(sum(((layer.ids >= layer.experts.start) & (layer.ids < layer.experts.stop)).flatten()))
        records.append(
            {
                "rank": rank,
                "error": error,
                "bytes": meter.bytes,
                "calls": meter.calls,
                "rows_computed": received,
                **{each.provider: each.record() for each in (total, collectives, outside)},
            }
        )
    return records


def _process(rank: int, ranks: int, rows: Sequence[Row], samples: int, store: str, pipe: Any) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        limit_ = timedelta(seconds=TIME_LIMIT / 2)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=limit_)
        pipe.send(rank_rows(rank, ranks, rows, samples))
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        pipe.send(traceback.format_exc())


def run_ranks(ranks: int, rows: Sequence[Row], samples: int) -> list[list[dict[str, Any]]]:
    """The records of every process."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(ranks):
            here, there = context.Pipe(duplex=False)
            arguments = (rank, ranks, rows, samples, f"{folder}/store", there)
            processes.append(context.Process(target=_process, args=arguments, daemon=True))
            pipes.append(here)
        try:
            for process in processes:
                process.start()
            found: list[Any] = [pipe.recv() if pipe.poll(TIME_LIMIT) else "out of time" for pipe in pipes]
            errors = [each for each in found if isinstance(each, str)]
            if errors:
                raise RuntimeError("\n".join(errors))
            for process in processes:
                process.join(10)
        finally:
            for process in processes:
                process.kill()
    return found


def summary(row: Row, ranks: int, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of all processes: the slowest's times, the mean of what each sends."""
    slowest = max(found, key=lambda record: record["all"]["median"])
    return {
        **asdict(row),
        "name": row.name,
        "ranks": ranks,
        "bytes_per_rank": sum(record["bytes"] for record in found) // ranks,
        "slowest": slowest["rank"],
        "processes": list(found),
    }


def text(records: Sequence[dict[str, Any]]) -> str:
    heads = [
        "layer, forward and backward",
        "ranks",
        "MB sent by a rank",
        "step",
        "spread",
        "kernels",
        "collectives",
        "share",
        "error",
    ]
    lines = []
    for record in records:
        slow = record["processes"][record["slowest"]]
        step, kernels, collectives = (slow[name] for name in ("all", "kernels", "collectives"))
        lines.append(
            [
                record["name"],
                str(record["ranks"]),
                f"{record['bytes_per_rank'] * 1e-6:.2f}",
                time_text(step["median"]),
                f"{step['spread']:.0%}",
                time_text(kernels["median"]),
                time_text(collectives["median"]),
                f"{collectives['median'] / step['median']:.0%}",
                f"{max(each['error'] for each in record['processes']):.2f}",
            ]
        )
    return table(heads, lines)


LEGEND = (
    "of the slowest process; kernels: the step without its collectives · collectives: with the wait for the others, on"
    " a machine with fewer cores than processes for their turn too · MB: to other processes, in seven all-to-alls of a"
    " step · error: worst tensor's error against float64 / what is allowed"
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.expert_parallel")
    parser.add_argument("--quick", action="store_true", help="one small row")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS), help="numbers of processes")
    parser.add_argument("--out", type=file_name, help="the JSON file")
    options = parser.parse_args(arguments)
    rows, samples = (QUICK, 3) if options.quick else (ROWS, SAMPLES)
    facts = {**machine({1}), "backend": "gloo", "threads_per_rank": 1}
    print(machine_text(facts), flush=True)
    records = []
    for ranks in options.ranks:
        found = run_ranks(ranks, rows, samples)
        records += [summary(row, ranks, [each[i] for each in found]) for i, row in enumerate(rows)]
    records.sort(key=lambda record: [row.name for row in rows].index(record["name"]))
    print(f"\n{text(records)}\n\n{LEGEND}")
    name = f"expert-parallel-{facts['isa']}.json"
    file = options.out or ROOT / ("out/benchmarks" if options.quick else "benchmarks/results") / name
    save(file, {"machine": facts, "rows": records})
    return 0


if __name__ == "__main__":
    sys.exit(main())
