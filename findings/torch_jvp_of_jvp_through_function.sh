#!/usr/bin/env bash
# torch 2.15.0: a second forward-mode derivative through a torch.autograd.Function with a jvp is 0, without an error.
#
# Behaviour: torch runs a Function's jvp with forward mode turned off. What jvp computes from saved tensors therefore has no
# tangent for an outer level, so jvp(jvp(f)) gives 0 where the second derivative is 12. The same formula written in plain
# torch operations gives 12. Seen: "Function 0.0, plain 12.0". Date: 2026-11-29.
#
# Why it matters here: an operator whose derivatives are Functions would give a wrong Hessian in silence. Ours turns forward
# mode on again inside jvp (ffn_ops/_library.py), and tests/test_transforms.py compares second orders with the plain formula.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check "torch==2.15.0" "numpy==2.4.6"
"$work/venv/bin/python" - <<'PY'
import torch
from torch.func import jvp


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * tangent


def second(f):
    one = torch.tensor(1.0)
    return jvp(lambda x: jvp(f, (x,), (one,))[1], (torch.tensor(2.0),), (one,))[1].item()


function, plain = second(Cube.apply), second(lambda x: x**3)
print(f"Function {function}, plain {plain}")
assert plain == 12.0
assert function == 0.0, "torch now differentiates a Function's jvp"
PY
