# SPDX-License-Identifier: BSD-3-Clause
"""``python -m benchmarks.dense``: the dense layers."""

from __future__ import annotations

from .command import Suite, main
from .gpu_rows import dense_rows
from .providers import PROVIDERS
from .workloads import all_rows, quick_rows, target_rows

SUITE = Suite("dense", all_rows, target_rows, quick_rows, dense_rows, PROVIDERS, huge=True)

if __name__ == "__main__":
    raise SystemExit(main(SUITE))
