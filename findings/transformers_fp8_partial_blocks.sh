#!/usr/bin/env bash
# transformers 5.24.0: FP8 checkpoints whose widths are no multiple of 128 load with wrong weights under dequantize=True.
#
# Behaviour: such a checkpoint has a scale for each block of 128 x 128, the last blocks partial: 448 rows have 4 scales, of
# 128, 128, 128 and 64 rows. Dequantising divides the rows by the number of scales instead, and gives each scale 112 rows.
# Where that is even (448 / 4), nothing is said. Widths of full blocks load exactly.
# Seen, relative error of a whole weight: width 384: 0; width 448: gate_proj 0.17, up_proj 0.19, down_proj 0.04.
# Date: 2026-11-29.
#
# Why it matters here: dequantize=True is how transformers runs FP8 checkpoints on a CPU. ffn_ops.QuantizedWeight.from_fp8
# reads the same bytes with partial blocks; tests/test_quantized_weight.py compares it with the formula at such widths.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check "torch==2.15.0" "numpy==2.4.6" "transformers==5.24.0" "accelerate==1.15.0"
"$work/venv/bin/python" - "$work" <<'PY'
import json, sys, pathlib
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

folder = pathlib.Path(sys.argv[1])
BLOCK = 128

def quantised(w):
    """e4m3 codes and one float32 scale for each block of 128 x 128, the last ones partial."""
    grid = [-(-n // BLOCK) for n in w.shape]
    of = [torch.arange(n) // BLOCK for n in w.shape]
    scale = torch.zeros(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            scale[i, j] = w[of[0] == i][:, of[1] == j].abs().max() / 448
    full = scale[of[0]][:, of[1]]
    codes = (w / full).to(torch.float8_e4m3fn)
    return codes, scale, codes.float() * full

def worst(width):
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=256, intermediate_size=width, num_hidden_layers=1, num_attention_heads=4,
                         num_key_value_heads=4, vocab_size=64)
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # rows of different sizes, as trained weights have
        for name in ("gate_proj", "up_proj"):
            w = getattr(model.model.layers[0].mlp, name).weight
            w *= torch.linspace(0.1, 1, width)[:, None]
    model.save_pretrained(folder / str(width))
    state, right = load_file(folder / str(width) / "model.safetensors"), {}
    for name in [n for n in state if "_proj" in n]:
        state[name], state[f"{name}_scale_inv"], right[name] = quantised(state[name])
    save_file(state, folder / str(width) / "model.safetensors", {"format": "pt"})
    path = folder / str(width) / "config.json"
    text = json.loads(path.read_text())
    text["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    path.write_text(json.dumps(text))
    loaded = AutoModelForCausalLM.from_pretrained(folder / str(width), dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True))
    found = dict(loaded.named_parameters())
    return {n.split(".")[-2]: ((found[n] - w).norm() / w.norm()).item() for n, w in right.items()}

exact, partial = worst(384), worst(448)
print({384: exact, 448: partial})
assert max(exact.values()) < 1e-6
assert max(partial.values()) > 0.1, "transformers now scales partial blocks by their own scales"
PY
