# SPDX-License-Identifier: BSD-3-Clause
"""``python -m ffn_ops info | compare | verify``."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ffn_ops", description="Fused feed-forward layers for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print version, torch, instruction sets, threads and the CUDA library")
    from . import compare, verify

    verify.add_arguments(commands.add_parser("verify", help="tests, sanitizers and benchmarks on one device, saved"))
    compare.add_arguments(commands.add_parser("compare", help="train and time every layer of the study guides"))
    options = parser.parse_args(arguments)
    if options.command == "compare":
        return compare.run(options)
    if options.command == "verify":
        return verify.run(options)
    from . import info

    for name, value in info().items():
        print(f"{name:8} {' '.join(value) if isinstance(value, list) else value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
