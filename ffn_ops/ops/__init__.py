# SPDX-License-Identifier: BSD-3-Clause
"""The public functions. One file per operator: public function, fake kernel, autograd.

The kernels see two-dimensional tensors. These functions fold leading dimensions, as views if strides allow.
"""

import torch.fx

from .._gate import activations
from ._ffn import ffn
from ._gated_act import gated_act
from ._gated_linear import gated_linear
from ._learned_act import learned_act
from ._moe import moe, moe_experts
from ._route_linear import route_linear
from ._rows import moe_combine, moe_dispatch

__all__ = [
    "activations",
    "ffn",
    "gated_act",
    "gated_linear",
    "learned_act",
    "moe",
    "moe_combine",
    "moe_dispatch",
    "moe_experts",
    "route_linear",
]

for _name in __all__:
    torch.fx.wrap(_name)  # symbolic_trace keeps the call as one node of its graph
