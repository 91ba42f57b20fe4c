# SPDX-License-Identifier: BSD-3-Clause
"""For test_memory.py: forks children while two threads run steps, as data loaders do. Each child calls the operators
of a step directly, because torch's autograd engine promises nothing after a fork in the middle of its work. All must
end with the right gradient. Prints how many did."""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading
import time

import torch

import ffn_ops

FORKS, AT_ONCE, SECONDS = 200, 4, 10.0


def ended_well(child: int) -> bool:
    """Waits for a child, and kills it if it does not end in time."""
    end = time.monotonic() + SECONDS
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid != 0:
            return status == 0
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.001)


def main() -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = ffn_ops.FeedForward(64, 128, 32, 0.0)
    x = torch.randn(4, 64)

    weights = [t.detach() for t in (layer.w1.weight, layer.w3.weight, layer.w2.weight)]
    form = (True, False, "silu", [0.0, 0.0])

    def operators() -> torch.Tensor:
        y, gate, up = torch.ops.ffn_ops.ffn(x, *weights, None, None, None, *form, True)
        needs = [False, False, False, True, False, False, False]
        return torch.ops.ffn_ops.ffn_backward(y, x, *weights, None, None, gate, up, *form, needs)[3]

    expected = operators()
    stop = threading.Event()

    def run() -> None:
        own = copy.deepcopy(layer)
        while not stop.is_set():
            own(x).sum().backward()

    threads = [threading.Thread(target=run, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    children: list[int] = []
    done = 0
    for fork in range(FORKS + AT_ONCE):
        if fork < FORKS:
            child = os.fork()
            if child == 0:
                os._exit(0 if torch.equal(operators(), expected) else 3)
            children.append(child)
        if len(children) > AT_ONCE or fork >= FORKS:
            done += ended_well(children.pop(0))
    for child in children:
        done += ended_well(child)
    stop.set()
    for thread in threads:
        thread.join()
    print(done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
