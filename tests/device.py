# SPDX-License-Identifier: BSD-3-Clause
"""The device that the tests run on: torch's default device, which conftest.py sets from ``--device`` before anything is
collected. Tests create tensors without naming a device; random numbers come from ``generator``. No tests here."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

DEVICE = torch.get_default_device().type


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def gradcheck(*arguments: Any, **options: Any) -> bool:
    with _own_random_numbers():
        return torch.autograd.gradcheck(*arguments, **options)


def gradgradcheck(*arguments: Any, **options: Any) -> bool:
    with _own_random_numbers():
        return torch.autograd.gradgradcheck(*arguments, **options)


def _own_random_numbers() -> contextlib.AbstractContextManager[Any]:
    """torch's checks draw from a CPU generator on the default device, which fails on a GPU."""
    return contextlib.nullcontext() if DEVICE == "cpu" else torch.device("cpu")
