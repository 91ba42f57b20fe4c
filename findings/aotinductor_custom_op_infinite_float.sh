#!/usr/bin/env bash
# torch 2.15.0: AOTInductor packages a custom operator's infinite float argument, and the package then cannot be loaded.
#
# Behaviour: torch.export and aoti_compile_and_package accept a custom operator that is called with float("inf"), as a
# number or in a list of numbers; the exported program runs. aoti_load_package then raises
# "[json.exception.type_error.302] type must be number, but is string": the arguments of custom operators stand in the
# package as JSON, where infinity is written as a string. A finite number loads and gives the right values.
# Seen: "7.0: loads; inf: type must be number, but is string". Date: 2026-11-29.
#
# Why it matters here: "no limit" of a clamped gate is naturally an infinite limit in an operator's schema. A layer so
# written exports, compiles and packages without a word, and fails on the machine that serves it. Our schemas write 0 for
# "no limit" (ffn_ops/_gate.py), and tests/test_compile.py loads a package.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TORCHINDUCTOR_CACHE_DIR="$work/cache"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check "torch==2.15.0" "numpy==2.4.6"
"$work/venv/bin/python" - "$work" <<'PY'
import sys

import torch
from torch import Tensor


@torch.library.custom_op("finding::clamped", mutates_args=())
def clamped(x: Tensor, bounds: list[float]) -> Tensor:
    return x.clamp(max=bounds[0])


@clamped.register_fake
def _(x, bounds):
    return torch.empty_like(x)


class Clamp(torch.nn.Module):
    def __init__(self, bound):
        super().__init__()
        self.bound = bound

    def forward(self, x):
        return torch.ops.finding.clamped(x, [self.bound]) + 1


x = torch.tensor([-1.0, 2.0, 9.0])
seen = {}
for bound in (7.0, float("inf")):
    program = torch.export.export(Clamp(bound), (x,))
    expected = x.clamp(max=bound) + 1
    assert torch.equal(program.module()(x), expected)
    package = torch._inductor.aoti_compile_and_package(program, package_path=f"{sys.argv[1]}/{bound}.pt2")
    try:
        assert torch.equal(torch._inductor.aoti_load_package(package)(x), expected)
        seen[bound] = "loads"
    except RuntimeError as error:
        seen[bound] = str(error)
print("; ".join(f"{bound}: {what}" for bound, what in seen.items()))
assert seen[7.0] == "loads"
assert "type must be number, but is string" in seen[float("inf")], "torch now loads infinite arguments"
PY
