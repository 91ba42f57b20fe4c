"""Fused feed-forward layers for PyTorch."""

from .ops import activations, ffn, gated_act, gated_linear

__all__ = ["activations", "ffn", "gated_act", "gated_linear"]
