# SPDX-License-Identifier: BSD-3-Clause
"""Files that commands write. A file is written completely or not at all, even if the command is killed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def file_name(text: str) -> Path:
    """The type of an ``--out`` option. It refuses an empty name, which as a path would mean the working directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"expected a name, got {text!r}")
    return Path(text)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a temporary file beside ``path``, and renames it to ``path`` at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield fresh
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
