# SPDX-License-Identifier: BSD-3-Clause
"""A GGUF file as a state dict whose quantised tensors are QuantizedWeight on the mapped file. It imports transformers
and gguf; ``from_pretrained`` imports it."""

from __future__ import annotations

import os
from typing import Any

import torch
from gguf import GGUFReader
from transformers import AutoConfig
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, get_gguf_hf_weights_map
from transformers.utils.hub import cached_file

from .. import _checks as check
from .._quantized import QuantizedWeight
from .._quantized.readers import _GGUF

# Of which llama.cpp only renames and stacks, and the attribute of their configs that is the width of experts.
ARCHITECTURES = {
    "minimax-m2": "intermediate_size",
    "qwen2moe": "moe_intermediate_size",
    "qwen3moe": "moe_intermediate_size",
}
_PLAIN = {"F32": torch.float32, "F16": torch.float16}


class Ready:
    """Looks to transformers like a tensor that it reads from a file."""

    def __init__(self, w: QuantizedWeight) -> None:
        self.w = w

    def get_dtype(self) -> str:
        return "U8"

    def __getitem__(self, _: Any) -> QuantizedWeight:
        return self.w


def opened(model_class: Any, name: Any, gguf_file: str, hub: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The model's own class, its config, and tensors by the names of its parameters."""
    path = os.fspath(cached_file(name, gguf_file, **hub))
    reader = GGUFReader(path)
    field = reader.get_field("general.architecture")
    architecture: Any = None if field is None else field.contents()
    check.choice("gguf_file", architecture, tuple(ARCHITECTURES))
    config = AutoConfig.from_pretrained(name, gguf_file=gguf_file, **hub)
    for tensor in reader.tensors:
        known = (*_GGUF, *_PLAIN, "BF16")
        check.choice(tensor.name, tensor.tensor_type.name, known)
        if tensor.name.endswith(".ffn_gate_exps.weight"):
            setattr(config, ARCHITECTURES[architecture], int(tensor.shape[1]))  # transformers 5.24 does not read Qwen's
    with torch.device("meta"):
        model = model_class.from_config(config) if hasattr(model_class, "from_config") else model_class(config)
    processor = TENSOR_PROCESSORS[architecture](config=config.to_dict())
    names = get_gguf_hf_weights_map(model, processor)
    state: dict[str, Any] = {}
    for tensor in reader.tensors:
        stem = tensor.name.removesuffix(".weight")
        target = names.get(tensor.name) or names.get(stem) or tensor.name
        branch = next((i for i, each in enumerate(("gate", "up")) if stem.endswith(f".ffn_{each}_exps")), None)
        t = _tensor(tensor, copied=branch is None)
        if stem.endswith(".ffn_gate_inp_shexp"):
            t = t.unsqueeze(0)
        state[target if branch is None else f"{target}.{branch}.weight"] = t
    return type(model), config, state


def _tensor(tensor: Any, copied: bool) -> Any:
    """Gate and up become one tensor, a copy. A view of the file beside it would keep all of its pages, so others are
    copied as well."""
    kind = tensor.tensor_type.name
    if kind in _GGUF:
        w = QuantizedWeight.from_gguf(tensor)
        return Ready(QuantizedWeight(w.format, w.codes.clone()) if copied else w)
    values = torch.from_numpy(tensor.data.copy())
    return values.view(torch.bfloat16) if kind == "BF16" else values
