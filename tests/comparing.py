# SPDX-License-Identifier: BSD-3-Clause
"""Helpers for the tests of the comparison: tiny sizes, and the command as a terminal calls it. No tests here."""

from __future__ import annotations

import argparse
import functools
import math

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from ffn_ops import compare
from ffn_ops.compare.settings import LayerSize, ModelSize, Settings

TINY = functools.partial(
    Settings,
    batch=4,
    model=ModelSize(d_model=32, d_ff=64, layers=2, heads=2, context=32),
    layer=LayerSize(tokens=16, d_model=32, d_ff=48),
)
STEPS = 24
UNIFORM = math.log(256)


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return parser.parse_args(list(arguments))


def command(*arguments: str) -> int:
    return compare.run(parsed(*arguments))
