#!/usr/bin/env bash
# transformers 5.24.0: a GGUF file of Qwen3-MoE loads only where its experts are 768 wide, the default of the config.
#
# Behaviour: the file says the width of experts (qwen3moe.expert_feed_forward_length), but GGUF_CONFIG_MAPPING of qwen3_moe
# lacks that key, so the config keeps its default, and the file's feed_forward_length, which no expert has, becomes
# intermediate_size. Qwen3-30B-A3B is 768 wide and loads. Another width, such as the 1536 of Qwen3-235B-A22B, is a
# RuntimeError about mismatched sizes; with ignore_mismatched_sizes=True the experts are random.
# Seen: "width 96: config 768, RuntimeError". Date: 2026-11-30.
#
# Why it matters here: from_pretrained(..., gguf_file=) of ffn_ops reads the width from the experts' tensors
# (ffn_ops/integrations/_gguf.py).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check "torch==2.15.0" "numpy==2.4.6" "transformers==5.24.0" "gguf==0.19.0" "accelerate==1.15.0"
cd "$work"
"$work/venv/bin/python" - <<'PY'
import gguf
import torch
import transformers

WIDTH = 96
config = transformers.Qwen3MoeConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, moe_intermediate_size=WIDTH, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=4, num_experts_per_tok=2,
)
model = transformers.Qwen3MoeForCausalLM(config)
file = gguf.GGUFWriter("tiny.gguf", "qwen3moe")
file.add_context_length(64)
file.add_block_count(1)
file.add_embedding_length(64)
file.add_feed_forward_length(96)
file.add_expert_feed_forward_length(WIDTH)
file.add_expert_count(4)
file.add_expert_used_count(2)
file.add_head_count(2)
file.add_head_count_kv(1)
file.add_key_length(32)
file.add_layer_norm_rms_eps(1e-6)
file.add_vocab_size(64)
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, 1)
for name, t in model.state_dict().items():
    t = t.detach().contiguous()
    if name.endswith("gate_up_proj"):
        for each, half in zip(("gate", "up"), t.chunk(2, 1)):
            file.add_tensor(f"blk.0.ffn_{each}_exps.weight", half.contiguous().numpy())
    elif name.endswith("down_proj"):
        file.add_tensor("blk.0.ffn_down_exps.weight", t.numpy())
    else:
        file.add_tensor(names.get_name(name.removesuffix(".weight")) + ".weight", t.numpy())
file.write_header_to_file()
file.write_kv_data_to_file()
file.write_tensors_to_file()
file.close()

width = transformers.AutoConfig.from_pretrained(".", gguf_file="tiny.gguf").moe_intermediate_size
try:
    transformers.AutoModelForCausalLM.from_pretrained(".", gguf_file="tiny.gguf")
    loaded = "loaded"
except RuntimeError as error:
    loaded = "RuntimeError" if "ignore_mismatched_sizes" in str(error) else str(error)
print(f"width {WIDTH}: config {width}, {loaded}")
assert (width, loaded) == (768, "RuntimeError"), "transformers now reads the width"
PY
