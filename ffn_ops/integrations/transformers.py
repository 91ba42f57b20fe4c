"""Hugging Face transformers: ``experts_implementation="ffn_ops"``. transformers is imported in ``register`` alone."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from ..ops import moe, moe_combine, moe_dispatch, moe_experts
from ..routing import Routing
from ._gates import gate_of

NAME = "ffn_ops"
OLDEST = (5, 23)


def register() -> None:
    """Makes ``experts_implementation="ffn_ops"`` known to ``from_pretrained``, ``from_config`` and
    ``model.set_experts_implementation``. Calling it again changes nothing.

    Raises:
        ImportError: transformers is missing or older than 5.23.

    Source: ``ExpertsInterface`` of ``transformers/integrations/moe.py``.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError("ffn_ops: transformers is not installed, run pip install 'ffn_ops[transformers]'") from error
    version = str(transformers.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise ImportError(f"transformers: expected at least {'.'.join(map(str, OLDEST))}, got {version}")
    importlib.import_module("transformers.integrations.moe").ExpertsInterface.register(NAME, experts_forward)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What a module with ``use_experts_implementation`` computes, in one operator.

    Args:
        self: the experts: ``gate_up_proj [E, 2F, D]`` (``up_proj [E, F, D]`` without a gate), ``down_proj [E, D, F]``,
            each the other way round where ``is_transposed``, ``*_bias [E, ...]`` where ``has_bias``; the gate's rows
            before those of up where ``is_concatenated``, else in turns.
        hidden_states: ``[T, D]``.
        top_k_index, top_k_weights: ``[T, K]``; ids from ``num_experts`` on are another rank's: skipped.

    Returns:
        ``[T, D]``. The weights are applied and summed in float32.

    Raises:
        TypeError, ValueError: for weights that do not fit, and for a gate that the operator does not have.
    """
    first = "gate_up_proj" if self.has_gate else "up_proj"
    w_in, w_down = getattr(self, first), self.down_proj
    if self.is_transposed:
        w_in, w_down = w_in.transpose(1, 2), w_down.transpose(1, 2)
    gate = gate_of(self)
    routing = Routing.from_topk(top_k_index, top_k_weights, self.num_experts)
    experts: dict[str, Any] = {
        "gated": self.has_gate,
        "interleaved": self.has_gate and not self.is_concatenated,
        "b_in": getattr(self, f"{first}_bias") if self.has_bias else None,
        "b_down": self.down_proj_bias if self.has_bias else None,
        "activation": gate.activation,
        "beta": gate.beta,
        "limit": gate.limit,
        "up_shift": gate.up_shift,
    }
    if not getattr(self, "has_post_expert_norm", False):
        return moe(hidden_states, routing, w_in, w_down, **experts)
    rows = moe_experts(moe_dispatch(hidden_states, routing), routing.offsets, w_in, w_down, **experts)
    return moe_combine(self.post_expert_norm(rows), routing)
