# SPDX-License-Identifier: BSD-3-Clause
"""Records which operators of this package ran. No tests here."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Seen(TorchDispatchMode):
    """The names of our operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.startswith("ffn_ops::"):
            self.names.append(func._schema.name.removeprefix("ffn_ops::"))
        return func(*args, **(kwargs or {}))
