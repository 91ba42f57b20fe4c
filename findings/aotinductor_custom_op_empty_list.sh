#!/usr/bin/env bash
# torch 2.15.0: an AOTInductor package hands an empty Tensor[] argument of a custom operator to its kernel as None.
#
# Behaviour: a custom operator with a `Tensor[]` argument that is empty in the graph runs in eager mode, torch.compile
# and torch.export. The package compiles and loads; its first call raises "Expected a value of type 'List[Tensor]' for
# argument 'more' but instead found type 'NoneType'". A list of one tensor works. Seen: "one tensor: equal, none: RuntimeError".
# Date: 2026-11-30.
#
# Why it matters here: operators on quantised weights take the parts of a weight as Tensor[], empty for a weight that a layer
# does not have. While a layer is exported, ffn_ops passes another weight's parts there, which the operator does not read.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check "torch==2.15.0" "numpy==2.4.6" "setuptools==80.9.0"
cd "$work"
TORCHINDUCTOR_CACHE_DIR="$work/cache" "$work/venv/bin/python" - <<'PY'
import torch
from torch import Tensor, nn


@torch.library.custom_op("demo::total", mutates_args=())
def total(x: Tensor, more: list[Tensor]) -> Tensor:
    return sum(more, x.clone())


@total.register_fake
def _(x: Tensor, more: list[Tensor]) -> Tensor:
    return torch.empty_like(x)


class Layer(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.ones(3) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return total(x, list(self.parts)) * 2


def packaged(count: int) -> str:
    x = torch.arange(3.0)
    layer = Layer(count).eval()
    with torch.no_grad():
        expected = layer(x)
        path = torch._inductor.aoti_compile_and_package(torch.export.export(layer, (x,)), package_path=f"{count}.pt2")
        run = torch._inductor.aoti_load_package(path)
        try:
            return "equal" if torch.equal(run(x), expected) else "another value"
        except RuntimeError as error:
            return "RuntimeError" if "NoneType" in str(error) else str(error)


one, none = packaged(1), packaged(0)
print(f"one tensor: {one}, none: {none}")
assert (one, none) == ("equal", "RuntimeError"), "AOTInductor now passes empty lists"
PY
