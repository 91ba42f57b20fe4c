# SPDX-License-Identifier: BSD-3-Clause
"""``python -m benchmarks.moe``: the mixtures of experts."""

from __future__ import annotations

from .command import Suite, main
from .gpu_rows import moe_rows
from .providers import MOE_PROVIDERS
from .workloads import moe_all_rows, moe_quick_rows, moe_target_rows

SUITE = Suite("moe", moe_all_rows, moe_target_rows, moe_quick_rows, moe_rows, MOE_PROVIDERS, huge=False)

if __name__ == "__main__":
    raise SystemExit(main(SUITE))
