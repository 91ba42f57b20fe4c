# SPDX-License-Identifier: BSD-3-Clause
"""FSDP2 and tensor parallelism on two processes, both with expert parallelism on four; the lines of distributed.md."""

from __future__ import annotations

import re
from pathlib import Path

import parallel_checks
import pytest
import ranks

pytestmark = pytest.mark.cpu_only("of gloo between processes; a GPU would need one device for each")


@pytest.mark.parametrize(
    "check", ["fsdp", "fsdp_mixed", "fsdp_routing", "tensor_parallel", "dtensors", "extra_experts"]
)
def test_equals_one_process(check: str) -> None:
    ranks.run(getattr(parallel_checks, check), 2)


def test_expert_parallel_under_fsdp() -> None:
    ranks.run(parallel_checks.expert_and_fsdp, 4)


@pytest.mark.parametrize("count", [2, 4])
def test_balance_of_all_ranks(count: int) -> None:
    ranks.run(parallel_checks.balance, count, count)


def test_lines_of_the_page() -> None:
    text = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 4
    ranks.run(parallel_checks.lines, 2, blocks)


def test_benchmark_counts_what_it_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    found = ranks.run(parallel_checks.benchmark, 2)
    others = sum(record["others"] for record in found)  # rows of the two that the other computes
    width = 64 * 4  # bytes of a row: four ways, two of them with a weight; the counts before them fill a unit each
    assert sum(record["bytes"] for record in found) == others * (4 * width + 2 * 4) + 2 * 64 * 8
    for record in found:
        assert record["calls"] == 7 and record["error"] <= 1 and record["refused"].startswith("WrongResultError: ")
        assert record["all"]["n"] == 2 and record["all"]["median"] > record["kernels"]["median"] > 0
    assert sum(record["rows_computed"] for record in found) == 2 * 32 * 2


def test_document_has_the_models_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The document has the tables that the script computes, and simple cases agree with sums by hand."""
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(str(root))
    from benchmarks import expert_parallel_model as model

    text = (root / "docs" / "expert-parallel.md").read_text(encoding="utf-8")
    assert text.split("<!-- computed -->\n")[1].split("<!-- end -->")[0] == model.tables()
    layer = model.Mixture("by hand", T=1000, D=100, F=10, E=64, K=4)
    assert model.flat(layer, 16).net_bytes == 1000 * 4 * 100 * 2 / 2
    assert model.flat(layer, 16).node_bytes == 1000 * 4 * 100 * 2 * 7 / 16
    # Two nodes: of four experts at least one stands in the other with probability 15/16.
    assert model.two_level(layer, 16, one_copy=True).net_bytes == pytest.approx(1000 * 100 * 2 * 15 / 16)
    assert model.two_level(layer, 4096, one_copy=False).net_messages == 511
