# SPDX-License-Identifier: BSD-3-Clause
"""setuptools' build backend, which asks for torch only where the environment has none that fits: pip's isolated build
then takes the headers of the torch that the libraries will run on, and does not install a second one."""

from __future__ import annotations

from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

from build_tools.environment import OLDEST_TORCH, find_torch


def _torch() -> list[str]:
    torch = find_torch()
    fits = torch is not None and torch.release >= OLDEST_TORCH
    return [] if fits else ["torch>={}.{}".format(*OLDEST_TORCH)]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch()]
