# SPDX-License-Identifier: BSD-3-Clause
"""Weights that stay in the bytes of a checkpoint: the type, its readers of other libraries' layouts, quantisation."""

from .quantize import QuantizationError, quantize
from .weight import QuantizedWeight

__all__ = ["QuantizationError", "QuantizedWeight", "quantize"]
