#!/usr/bin/env bash
# transformers 5.24.0: NLLB-MoE routes tokens to all of its experts and computes two of them.
#
# Behaviour: the block hands its experts the router's top-1 mask, one-hot rows [tokens, experts] of zeros and ones, where
# they read expert numbers. So expert_1 computes every token's first choice and expert_0 every second choice, whatever the
# router chose. No error, no warning; the gradients of the other experts are never made.
# Seen, with 8 experts and 64 random tokens: "router's first choices: 8 experts; experts that ran: expert_0, expert_1".
# The exact output equals p1 expert_1(x) + p2 expert_0(x). Date: 2026-11-29.
#
# Why it matters here: our operator for this class (ffn_ops/integrations/_forwards.py) computes what transformers does, as
# exchanging experts must not change a model. Whoever fine-tunes NLLB-MoE trains two experts of each block.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check "torch==2.15.0" "numpy==2.4.6" "transformers==5.24.0"
"$work/venv/bin/python" - <<'PY'
import torch
from transformers import NllbMoeConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

torch.manual_seed(0)
config = NllbMoeConfig(d_model=16, num_experts=8, moe_token_dropout=0.0, expert_capacity=64)
block = NllbMoeSparseMLP(config, ffn_dim=32).eval()
ran, routed = set(), []
for name, expert in block.experts.items():
    if name.startswith("expert_"):
        expert.register_forward_hook(lambda *_, name=name: ran.add(name))
block.router.register_forward_hook(lambda _m, _x, out: routed.append(out))
x = torch.randn(1, 64, 16)
with torch.no_grad():
    y = block(x)[0]
    mask, weights, *_ = routed[0]
    first = (weights * mask).sum(1, keepdim=True)
    second = (weights * (1 - mask)).sum(1, keepdim=True)
    two = first * block.experts["expert_1"](x[0]) + second * block.experts["expert_0"](x[0])
chosen = mask.argmax(1).unique().numel()
print(f"router's first choices: {chosen} experts; experts that ran: {', '.join(sorted(ran))}")
assert chosen == 8
assert torch.allclose(y, two, atol=1e-6)
assert ran == {"expert_0", "expert_1"}, "transformers now computes the experts that the router chose"
PY
