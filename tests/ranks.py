# SPDX-License-Identifier: BSD-3-Clause
"""Runs a function in several processes with a gloo group between them, under a hard time limit. No tests here.

The processes are forked from a server that has imported torch, which is most of the cost of a new process.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

PRELOADED = [
    "torch",
    "ffn_ops",
    "torch.distributed.tensor.parallel",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch._dynamo.backends.debugging",  # what torch.compile imports in its first call
]
LIMIT = 90.0  # seconds for all processes of a call
COLLECTIVE_LIMIT = 30.0  # seconds of a collective: a rank that failed must not keep the others


class Died:
    """Stands for the result of a process that ended without one."""


def run(
    function: Callable[..., Any], ranks: int, *arguments: Any, collective_limit: float = COLLECTIVE_LIMIT
) -> list[Any]:
    """``function(rank, *arguments)`` in each process; results by rank, or an AssertionError with every traceback."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"result{rank}" for rank in range(ranks)]
        store = Path(folder) / "store"
        processes = [
            context.Process(
                target=_process, args=(function, rank, ranks, arguments, store, files[rank], collective_limit)
            )
            for rank in range(ranks)
        ]
        end = time.monotonic() + LIMIT
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(max(0.0, end - time.monotonic()))
            late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        found = [pickle.loads(file.read_bytes()) if file.exists() else (Died, None) for file in files]
    errors = [f"rank {rank}:\n{text}" for rank, (_, text) in enumerate(found) if text]
    assert not late and not errors, f"ranks {late} out of time\n" + "\n".join(errors)
    return [result for result, _ in found]


def _process(
    function: Callable[..., Any], rank: int, ranks: int, arguments: Any, store: Path, file: Path, limit: float
) -> None:
    import torch
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=limit)
        )
        found = (function(rank, *arguments), None)
    except BaseException:
        found = (None, traceback.format_exc())
    part = file.with_suffix(".part")
    part.write_bytes(pickle.dumps(found))
    part.rename(file)
    os._exit(0)  # without waiting for ranks that failed


def raised(call: Callable[[], Any]) -> str:
    """Class and message of the error that ``call`` raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
