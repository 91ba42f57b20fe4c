# SPDX-License-Identifier: BSD-3-Clause
"""Routers: functions from logits ``[T, E]`` to a :class:`ffn_ops.Routing`. Any callable that returns one can take
their place.

In the formulas z is the logits in float32 (float64 for float64), and p = softmax(z). Ties go to the lowest index. NaN
logits rank last, and the weight shows them. ``mask`` (bool, one for each token, False for padding) leaves tokens out of
everything.
"""

import torch.fx

from ._base import base
from ._biased import BiasedTopK, solve_bias, update_bias
from ._expert_choice import expert_choice
from ._glam import glam_top2
from ._hash import hash, hash_table
from ._losses import load_balancing_loss, z_loss
from ._routing import Routing, Statistics
from ._sparse_mixer import sparse_mixer
from ._switch import jitter, switch
from ._token_rounding import token_rounding
from ._top_k import top_k

__all__ = [
    "BiasedTopK",
    "Routing",
    "Statistics",
    "base",
    "expert_choice",
    "glam_top2",
    "hash",
    "hash_table",
    "jitter",
    "load_balancing_loss",
    "solve_bias",
    "sparse_mixer",
    "switch",
    "token_rounding",
    "top_k",
    "update_bias",
    "z_loss",
]

for _name in __all__:
    if _name not in ("BiasedTopK", "Routing", "Statistics"):
        torch.fx.wrap(_name)  # symbolic_trace keeps the call as one node of its graph
