#!/usr/bin/env bash
# peft 0.21.2: after two threads have called a model with adapters on stacked experts at once, all its later outputs are wrong.
#
# Behaviour: LoraConfig(target_parameters=[...]) registers a parametrization on the experts' module at the start of each
# forward and removes it at the end. If a second thread enters before the first has left, neither removes its own (a warning
# is all that is said). The parametrizations stay: every later call, by one thread, in eval mode and under no_grad, adds the
# adapter once more than the call before, and disable_adapter() no longer takes it away.
# Seen: "adapter counted: alone 1.00 1.00, later calls 3.00 4.00, disabled 4.00". Date: 2026-11-30.
#
# Why it matters here: servers call one model from several threads. Experts that run as ffn_ops' operator take PEFT's factors
# as arguments of the call, kept per thread (ffn_ops/integrations/_peft.py), and register nothing.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check "torch==2.15.0" "numpy==2.4.6" "transformers==5.24.0" "peft==0.21.2"
"$work/venv/bin/python" - <<'PY'
import threading

import peft
import torch
from torch import nn


class Experts(nn.Module):
    """Stacked experts, [E, D_out, D_in], as transformers stores them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8, 6))
        self.meet = threading.Barrier(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.meet.wait(30)  # both threads are inside the forward
        y = torch.einsum("td,eod->teo", x, self.weight)
        self.meet.wait(30)
        return y


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x)


torch.manual_seed(0)
config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.weight"], init_lora_weights=False)
model = peft.get_peft_model(Model(), config).eval()
experts = next(module for module in model.modules() if isinstance(module, Experts))
x = torch.randn(5, 6)
with torch.no_grad():
    with model.disable_adapter():
        base = model(x)
    delta = model(x) - base


@torch.no_grad()
def counted() -> float:
    """How many times the output contains the adapter."""
    return ((model(x) - base) * delta).sum().item() / delta.square().sum().item()


alone = [counted(), counted()]
experts.meet = threading.Barrier(2)
threads = [threading.Thread(target=counted) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
experts.meet = threading.Barrier(1)
later = [counted(), counted()]
with model.disable_adapter():
    disabled = counted()
print(f"adapter counted: alone {alone[0]:.2f} {alone[1]:.2f}, later calls {later[0]:.2f} {later[1]:.2f}, disabled {disabled:.2f}")
assert max(abs(c - 1) for c in alone) < 1e-3
assert later[1] > later[0] > 1.5 and disabled > 1.5, "peft's adapters on parameters now stand two threads"
PY
