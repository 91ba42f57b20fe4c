# SPDX-License-Identifier: BSD-3-Clause
"""Expert parallelism on 1, 2 and 4 processes with gloo: the one-process layer's results, checkpoints, failures."""

from __future__ import annotations

from pathlib import Path

import expert_checks
import pytest
import quantized_checks
import ranks

pytestmark = pytest.mark.cpu_only("of gloo between processes; a GPU would need one device for each")


@pytest.mark.parametrize("count", [1, 2, 4])
def test_equals_one_process(count: int) -> None:
    ranks.run(expert_checks.everything, count, count)


def test_ranks_that_do_not_fit_are_told() -> None:
    ranks.run(expert_checks.errors, 2)


@pytest.mark.parametrize("how", ["dies", "sleeps", "in backward"])
def test_a_missing_rank_is_an_error_within_the_limit(how: str) -> None:
    limit = 2.0
    message, seconds = ranks.run(expert_checks.failing, 2, how, collective_limit=limit)[0]
    assert message.startswith("RuntimeError: expert parallelism: an all-to-all of 2 ranks failed"), message
    assert seconds < limit + 20  # a busy machine; without a limit torch waits for 30 minutes


def test_checkpoint_of_two_ranks_loads_on_others(tmp_path: Path) -> None:
    ranks.run(expert_checks.save, 2, str(tmp_path))
    for count in (1, 4):
        ranks.run(expert_checks.load, count, count, str(tmp_path))


def test_quantised_experts_of_each_rank() -> None:
    ranks.run(quantized_checks.everything, 2, 2)


def test_quantised_experts_within_fsdp() -> None:
    ranks.run(quantized_checks.sharded, 2)
