# SPDX-License-Identifier: BSD-3-Clause
"""Reads what ptxas -v says of a build of the CUDA library: registers and spills of every kernel, on each architecture.
Fails where a kernel spills that is not listed here with its reason."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

MAY_SPILL = (
    # Operands that only fit element by element, odd widths.
    r"GemmInstance<\S*(Half|BFloat16|float), \(\S*GemmShape\)1, false, \w+, \w+, false>",
)


def kernels(log: str) -> list[tuple[str, str, int, int]]:
    """Name, architecture, registers and bytes of spills."""
    found = []
    pattern = r"Compiling entry function '(\w+)' for '(\w+)'(.*?)Used (\d+) registers"
    for name, arch, between, registers in re.findall(pattern, log, re.DOTALL):
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", between))
        found.append((name, arch, int(registers), spills))
    names = "\n".join(name for name, *_ in found)
    demangled = subprocess.run(["c++filt", "-p"], input=names, capture_output=True, text=True, check=True).stdout
    return [(name, *rest) for name, (_, *rest) in zip(demangled.splitlines(), found, strict=True)]  # type: ignore[misc]


def main() -> int:
    found = kernels(Path(sys.argv[1]).read_text())
    if not found:
        sys.exit("no kernels in this log: is it of a build with -Xptxas=-v?")
    print(f"{'registers':>9} {'spills':>6} {'arch':7} kernel")
    for name, arch, registers, spills in sorted(found, key=lambda k: (k[1], -k[3], -k[2], k[0])):
        print(f"{registers:9} {spills:6} {arch:7} {name.replace('ffn_ops::cuda::', '')}")
    bad = [k for k in found if k[3] > 0 and not any(re.search(pattern, k[0]) for pattern in MAY_SPILL)]
    if bad:
        print(f"{len(bad)} kernels spill that must not: see above", file=sys.stderr)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
