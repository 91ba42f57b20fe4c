#!/usr/bin/env bash
# torch 2.15.0: FlopCounterMode books backward FLOPs under the wrong module where a module is called by keyword.
#
# Behaviour: the counter closes a module's backward at a node that it puts around the module's positional inputs. A module
# called as second(input=...) has none, so it stays open while the modules before it run backward, and gets their FLOPs
# too. Totals are right. A guess that a module's count depends on the module alone, not on how it is called, is wrong.
# Seen: "second: 6144 FLOPs by position, 8192 by keyword". Date: 2026-11-30.
#
# Why it matters here: transformers calls self_attn by keyword, so counts per module of its models mix attention with what
# stands before it. ffn_ops.profile tells modules apart by the autograd nodes of their outputs and inputs instead.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check "torch==2.15.0" "numpy==2.4.6"
cd "$work"
"$work/venv/bin/python" - <<'PY'
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


class Two(nn.Module):
    def __init__(self, by_keyword: bool) -> None:
        super().__init__()
        self.first = nn.Linear(8, 32, bias=False)
        self.second = nn.Linear(32, 8, bias=False)
        self.by_keyword = by_keyword

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.second(input=h) if self.by_keyword else self.second(h)


def counts(by_keyword: bool) -> tuple[int, int]:
    with FlopCounterMode(display=False) as counter:
        Two(by_keyword)(torch.randn(4, 8)).sum().backward()
    flops = {name: sum(per.values()) for name, per in counter.get_flop_counts().items()}
    return flops["Two.second"], flops["Global"]


one_product = 2 * 4 * 8 * 32
(by_position, total), (by_keyword, same_total) = counts(False), counts(True)
print(f"second: {by_position} FLOPs by position, {by_keyword} by keyword")
assert total == same_total == 5 * one_product  # x of the first layer needs no gradient
assert by_position == 3 * one_product  # forward, its input's gradient, its weight's
assert by_keyword == 4 * one_product  # and the gradient of the first layer's weight
PY
