#!/usr/bin/env bash
# compressed-tensors 0.20.1: a compressed model decompresses itself in its first call, and stays dense.
#
# Behaviour: ModelCompressor.compress_model registers a forward pre-hook, ct_decompress_hook, on the model. The first call
# replaces every weight_packed by a dense weight and says nothing but a progress bar. A guess that weights are decompressed
# within each call, or that compressed weights save memory at run time, is wrong.
# Seen: "compressed 40976 bytes, after a call 270352". Date: 2026-11-30.
#
# Why it matters here: ffn_ops.replace computes on compressed weights as they lie, if model.ct_decompress_hook.remove() was
# called before the first call (docs/quantisation.md).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check "torch==2.15.0" "numpy==2.4.6" "transformers==5.24.0" "compressed-tensors==0.20.1"
cd "$work"
"$work/venv/bin/python" - <<'PY'
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from torch import nn

model = nn.Sequential(nn.Linear(256, 256, bias=False))
weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
groups = {"group": QuantizationScheme(targets=["Linear"], weights=weights)}
config = QuantizationConfig(config_groups=groups, format="pack-quantized")
apply_quantization_config(model, config)
model[0].weight_scale.data.fill_(0.02)
ModelCompressor(quantization_config=config).compress_model(model)


def held() -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


before = held()
with torch.no_grad():
    model(torch.randn(1, 256))
print(f"compressed {before} bytes, after a call {held()}")
assert held() > 6 * before, "compressed-tensors now keeps weights compressed"
PY
