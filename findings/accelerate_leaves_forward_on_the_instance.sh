#!/usr/bin/env bash
# accelerate 1.15.0: after its hooks are removed, every module it offloaded keeps a `forward` in its own __dict__.
#
# Behaviour: cpu_offload(model) followed by remove_hook_from_submodules(model) does not delete the attribute that it set: it
# sets it to the class's own bound method. `"forward" in vars(module)` stays true for good, although calling the module runs
# its class's forward and nothing else. Seen: "before False, after True, the class's own True". Date: 2026-11-29.
#
# Why it matters here: code that takes a forward on the instance for a wrapped one would call such layers as if they were
# wrapped for ever. ffn_ops compares the attribute with the class's method (has_own_forward in ffn_ops/modules.py).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check "torch==2.15.0" "numpy==2.4.6" "accelerate==1.15.0"
"$work/venv/bin/python" - <<'PY'
import accelerate
import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import nn

model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
layer, x = model[0], torch.ones(1, 4)
expected, before = model(x), "forward" in vars(layer)
accelerate.cpu_offload(model, torch.device("cpu"))
remove_hook_from_submodules(model)
after = "forward" in vars(layer)
own = after and vars(layer)["forward"].__func__ is nn.Linear.forward
print(f"before {before}, after {after}, the class's own {own}")
assert torch.equal(model(x), expected)
assert (before, after, own) == (False, True, True), "accelerate now deletes what it set"
PY
