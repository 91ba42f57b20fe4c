# SPDX-License-Identifier: BSD-3-Clause
"""A provider in a process of its own: both ends of the pipe.

Some providers cannot share the harness's process. torch reads its huge-page switch once, when it allocates first, and
a process loads one library of ours. The process lives as long as the run and sleeps between samples; its samples
interleave with the others round by round.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .workloads import Elementwise, Mixture, Row, Shape

ROOT = Path(__file__).parents[1]
KINDS = {kind.__name__: kind for kind in (Shape, Elementwise, Mixture)}


def norms(results: Sequence[Tensor]) -> list[float]:
    """Norms, by which the two processes compare their results."""
    return [float(torch.linalg.vector_norm(t.detach().to(torch.float64))) for t in results]


class OtherProcess:
    """The harness's end: ``provider`` as the package in ``folder`` computes it, called ``name`` in reports."""

    def __init__(
        self,
        name: str,
        provider: str,
        serves: Callable[[Row], bool] = lambda row: True,
        environment: Mapping[str, str] | None = None,
        folder: Path = ROOT,
    ) -> None:
        self.name, self.provider, self.serves = name, provider, serves
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # spinning would disturb the others' samples
            env={**os.environ, "OMP_WAIT_POLICY": "passive", **(environment or {})},
            cwd=folder,
        )

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process of {self.name} ended with status {self.process.wait()}")
        reply: dict[str, Any] = json.loads(answer)
        if "failed" in reply:
            raise RuntimeError(reply["failed"])
        return reply

    def prepare(self, row: Row) -> tuple[list[float], float]:
        """Makes the row's tensors and runs once: the norms of the results and the seconds."""
        answer = self._ask(
            {
                "provider": self.provider,
                "kind": type(row.shape).__name__,
                "shape": asdict(row.shape),
                "dtype": row.dtype,
                "mode": row.mode,
                "threads": row.threads,
            }
        )
        return answer["norms"], answer["seconds"]

    def sample(self, repeats: int) -> float:
        return float(self._ask({"repeats": repeats})["seconds"])

    def close(self) -> None:
        self.process.communicate()  # the end of its input ends it


class Worker:
    """The other end: the row at hand."""

    def __init__(self) -> None:
        self.runner: Any = None
        self.inputs: Any = None
        self.of: tuple[Shape, str] | None = None

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        from .providers import MOE_PROVIDERS, PROVIDERS, eager_inputs
        from .runners import Local

        if "shape" not in question:
            return {"seconds": self.runner.sample(question["repeats"])}
        torch.set_num_threads(question["threads"])
        shape, dtype = KINDS[question["kind"]](**question["shape"]), question["dtype"]
        self.runner = None
        if self.of != (shape, dtype):
            self.inputs = None  # free first
            self.inputs, self.of = eager_inputs(shape, dtype), (shape, dtype)
        providers = MOE_PROVIDERS if isinstance(shape, Mixture) else PROVIDERS
        build = next(each.build for each in providers if each.name == question["provider"])
        self.runner = Local(build(self.inputs, shape), shape, question["mode"])
        found = norms(self.runner.results())
        self.runner.begin()
        return {"norms": found, "seconds": self.runner.first_call}


def main() -> None:
    """One line of JSON in, one out. What fails, fails for its row: another commit may not know a provider's call."""
    worker = Worker()
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Exception as failure:
            answer = {"failed": f"{type(failure).__name__}: {failure}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
