# SPDX-License-Identifier: BSD-3-Clause
"""``python -m benchmarks.expert_parallel_model``: the cost of expert parallelism on paper, the tables of
docs/expert-parallel.md. It measures nothing: it computes from published speeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

GPUS = 8  # of a node
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
ELEMENT = 2  # bytes of bfloat16, for both ways


@dataclass(frozen=True)
class Links:
    """Of one GPU, one direction. Sources in docs/expert-parallel.md."""

    node: float = 450e9  # bytes/s: NVLink 4, half of 900 GB/s
    net: float = 50e9  # bytes/s: ConnectX-7, 400 Gb/s
    node_message: float = 3.4e-6  # s: NCCL's own tables, ring and Simple
    net_message: float = 9.6e-6
    start: float = 8.4e-6
    flops: float = 0.5 * 989.4e12  # dense bfloat16 of an H100, at an assumed half of it


@dataclass(frozen=True)
class Mixture:
    name: str
    T: int  # tokens of a rank
    D: int
    F: int
    E: int  # at least as many as ranks: beyond them the model has more experts, each as wide
    K: int
    nodes: int | None = None  # the most nodes whose experts a token may take

    @property
    def kernels(self) -> float:
        """Seconds of the experts of one rank for forward and backward, balanced: 6 and 12 FLOPs a weight and row."""
        return 18.0 * self.T * self.K * self.D * self.F / LINKS.flops

    def copies(self, nodes: int) -> float:
        """Other nodes that a token's rows go to, expected, of experts drawn independently."""
        among = nodes if self.nodes is None else min(nodes, self.nodes)
        return (nodes - 1) / nodes * among * (1 - (1 - 1 / among) ** self.K)


LINKS = Links()
MIXTURES = (
    Mixture("DeepSeek-V3", T=4096, D=7168, F=2048, E=256, K=8, nodes=4),
    Mixture("Qwen3-30B-A3B", T=8192, D=2048, F=768, E=128, K=8),
)


@dataclass(frozen=True)
class Exchange:
    """One all-to-all of rows, as one rank sees it."""

    node_bytes: float
    net_bytes: float
    node_messages: int
    net_messages: int
    steps: int = 1  # one after the other

    @property
    def least(self) -> float:
        """Seconds if the messages of a step are all under way together, and both kinds of link too."""
        wait = LINKS.net_message if self.net_messages else LINKS.node_message
        if self.steps == 1:
            return LINKS.start + wait + max(self.node_bytes / LINKS.node, self.net_bytes / LINKS.net)
        return self.steps * LINKS.start + LINKS.node_message + wait + self.bytes_time

    @property
    def most(self) -> float:
        """Seconds if every message waits for the one before it."""
        messages = self.node_messages * LINKS.node_message + self.net_messages * LINKS.net_message
        return self.steps * LINKS.start + messages + self.bytes_time

    @property
    def bytes_time(self) -> float:
        return self.node_bytes / LINKS.node + self.net_bytes / LINKS.net


def flat(mixture: Mixture, ranks: int) -> Exchange:
    """What ``ffn_ops.expert_parallel`` does: every row by itself, straight to its rank."""
    rows = mixture.T * mixture.K * mixture.D * ELEMENT / ranks
    inside = min(ranks, GPUS)
    return Exchange(rows * (inside - 1), rows * (ranks - inside), inside - 1, ranks - inside)


def two_level(mixture: Mixture, ranks: int, *, one_copy: bool) -> Exchange:
    """Within the node to the GPU with the target's place there, then to its node; or the token once to each node,
    where it is spread (and, on the way back, summed)."""
    nodes = ranks // GPUS
    if nodes < 2:
        return flat(mixture, ranks)
    width = mixture.T * mixture.D * ELEMENT
    copies = mixture.copies(nodes) if one_copy else mixture.K * (nodes - 1) / nodes
    return Exchange(width * mixture.K * (GPUS - 1) / GPUS, width * copies, GPUS - 1, nodes - 1, steps=2)


def counts(mixture: Mixture, ranks: int) -> Exchange:
    """The numbers of rows before them: seven facts and the counts of each rank's experts, eight bytes each, in units
    of 64."""
    experts = max(mixture.E, ranks)
    message = 8 * 64 * -(-(7 + -(-experts // ranks)) // 64)
    inside = min(ranks, GPUS)
    return Exchange(message * (inside - 1), message * (ranks - inside), inside - 1, ranks - inside)


def _span(least: float, most: float) -> str:
    low, high = f"{least * 1e3:.2f}", f"{most * 1e3:.2f}"
    return low if low == high else f"{low}–{high}"


def exchange_lines(mixture: Mixture) -> Iterator[str]:
    """Of one all-to-all."""
    yield "| ranks | MB to other nodes: rows | one copy a node | counts, ms | flat, ms | two-level, ms | one copy, ms |"
    yield "|---|---|---|---|---|---|---|"
    for ranks in RANKS:
        ways = [flat(mixture, ranks), *(two_level(mixture, ranks, one_copy=once) for once in (False, True))]
        first = counts(mixture, ranks)
        times = [_span(way.least, way.most) for way in (first, *ways)]
        yield f"| {ranks} | {ways[0].net_bytes * 1e-6:.0f} | {ways[2].net_bytes * 1e-6:.0f} | {' | '.join(times)} |"


def step_lines(mixture: Mixture) -> Iterator[str]:
    """Of forward and backward of a layer: four all-to-alls of rows and one of counts around the experts' products."""
    each = "collectives, ms | share of the step | overlapped, ms"
    yield f"| ranks | experts' products, ms | flat: {each} | one copy: {each} |"
    yield "|---|---|---|---|---|---|---|---|"
    for ranks in RANKS:
        cells = [f"{ranks}", f"{mixture.kernels * 1e3:.2f}"]
        for way in (flat(mixture, ranks), two_level(mixture, ranks, one_copy=True)):
            time = 4 * way.least + counts(mixture, ranks).least
            share = time / (time + mixture.kernels)
            cells += [f"{time * 1e3:.2f}", f"{share:.0%}", f"{max(time, mixture.kernels) * 1e3:.2f}"]
        yield f"| {' | '.join(cells)} |"


def tables() -> str:
    """As they stand in the document."""
    parts = []
    for m in MIXTURES:
        limit = "" if m.nodes is None else f", experts of at most {m.nodes} nodes for a token"
        head = f"**{m.name}**: T {m.T} a rank, D {m.D}, F {m.F}, E max({m.E}, ranks), K {m.K}{limit}"
        parts += [head, "\n".join(exchange_lines(m)), "\n".join(step_lines(m))]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(tables(), end="")
