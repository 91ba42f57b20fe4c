#!/usr/bin/env bash
# peft 0.21.2: saved adapters of target_parameters carry no parameter's name, so another order of parameters swaps them.
#
# Behaviour: two adapted parameters of one module become nested wrappers, and the file names them by depth
# (experts.base_layer.lora_A and experts.lora_A). Which parameter is which follows from the order in which the module has
# them. Loaded into a module that has the same parameters in another order, each adapter goes to the other parameter,
# without an error or a warning where the shapes fit. Adapters of target_modules carry the modules' names.
# Seen: "same order 0.0, other order: right only with the adapters swapped". Date: 2026-11-30.
#
# Why it matters here: whatever deletes and sets a parameter again (offloading, quantisation, a file read in its own order)
# moves it to the end. ffn_ops shows PEFT the parameters of quantised experts in the order that dense ones have
# (ffn_ops/integrations/_peft.py).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check "torch==2.15.0" "numpy==2.4.6" "transformers==5.24.0" "peft==0.21.2"
cd "$work"
"$work/venv/bin/python" - <<'PY'
import copy

import peft
import torch
from torch import nn


class Experts(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.zeros(3, 8, 8)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.einsum("td,efd->etf", x, self.first)
        return torch.einsum("etf,eof->eto", h.tanh(), self.second)


class Model(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        self.experts = Experts(*names)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x)


torch.manual_seed(0)
weights = {name: torch.randn(3, 8, 8) for name in ("first", "second")}
x = torch.randn(5, 8)


def model(*order: str) -> nn.Module:
    made = Model(*order)
    made.experts.load_state_dict(weights)
    return made


config = peft.LoraConfig(
    r=2, target_modules=[], target_parameters=["experts.first", "experts.second"], init_lora_weights=False
)
adapted = peft.get_peft_model(model("first", "second"), config).eval()
with torch.no_grad():
    y = adapted(x)
    adapted.save_pretrained("adapter")
    same = peft.PeftModel.from_pretrained(model("first", "second"), "adapter").eval()(x)
    other = peft.PeftModel.from_pretrained(model("second", "first"), "adapter").eval()(x)

    def wrappers(layer: nn.Module) -> dict[str, nn.Module]:
        return {m.parameter_name: m for m in layer.modules() if type(m).__name__ == "ParamWrapper"}

    swapped = copy.deepcopy(adapted)
    of = wrappers(swapped)
    for kind in ("lora_A", "lora_B"):
        a, b = (getattr(of[name], kind)["default"].weight for name in ("first", "second"))
        a.data, b.data = b.data.clone(), a.data.clone()
    exchanged = swapped(x)

right = torch.allclose(other, y, atol=1e-5)
print(f"same order {(same - y).abs().max().item()}, other order:", end=" ")
print("right" if right else "right only with the adapters swapped" if torch.allclose(other, exchanged, atol=1e-5) else "other")
assert torch.equal(same, y) and not right and torch.allclose(other, exchanged, atol=1e-5), "peft now names parameters"
PY
