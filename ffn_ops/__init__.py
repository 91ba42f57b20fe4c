# SPDX-License-Identifier: BSD-3-Clause
"""Fused feed-forward layers for PyTorch: one schema per operator, with a CPU and a CUDA kernel behind it.

Letters in names and docstrings: T tokens, D model width (d_model), F FFN width (d_ff), E experts, K experts per token,
R routed rows (T * K), G gate branches.
"""

import torch.fx

from . import _flops, expert_parallel, ops, routing  # noqa: F401  (_flops registers the formulas)
from ._gate import Gate
from ._info import info
from ._lora import Lora
from ._memory import empty_cache, set_cache_limit, use_huge_pages
from ._profile import Profile, profile
from ._quantized import QuantizationError, QuantizedWeight, quantize
from ._quantized.linear import QuantizedLinear
from ._quantized.model import quantize_
from ._replace import ReplaceEntry, ReplaceReport, replace, replace_report, restore
from ._upcycle import upcycle
from ._version import __version__ as __version__
from .modules import GELUFFN, GLU, FeedForward, GatedFFN, PlainFFN, ReLUFFN, SwishFFN
from .moe_ffn import MoEFFN
from .ops import (
    activations,
    ffn,
    gated_act,
    gated_linear,
    learned_act,
    moe,
    moe_combine,
    moe_dispatch,
    moe_experts,
    route_linear,
)
from .routing import Routing

__all__ = [
    "GELUFFN",
    "GLU",
    "FeedForward",
    "Gate",
    "GatedFFN",
    "Lora",
    "MoEFFN",
    "PlainFFN",
    "Profile",
    "QuantizationError",
    "QuantizedLinear",
    "QuantizedWeight",
    "ReLUFFN",
    "ReplaceEntry",
    "ReplaceReport",
    "Routing",
    "SwishFFN",
    "activations",
    "empty_cache",
    "expert_parallel",
    "ffn",
    "gated_act",
    "gated_linear",
    "info",
    "learned_act",
    "moe",
    "moe_combine",
    "moe_dispatch",
    "moe_experts",
    "profile",
    "quantize",
    "quantize_",
    "replace",
    "replace_report",
    "restore",
    "route_linear",
    "routing",
    "set_cache_limit",
    "upcycle",
    "use_huge_pages",
]

for _name in ops.__all__:
    torch.fx.wrap(_name)
