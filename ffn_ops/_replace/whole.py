# SPDX-License-Identifier: BSD-3-Clause
"""A whole layer as one call of ``ffn``, from its weights and biases. Which these are is not decided here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from .. import ops
from .._lora import Lora
from .children import Held
from .form import Form


def whole_ffn(form: Form, x: Tensor, held: list[Held], lora: Lora | None) -> Tensor:
    (w_in, b_in), *up, (w_down, b_down) = held
    rest: dict[str, Any] = {"b_down": b_down, "activation": form.gate, "lora": lora}
    if up:
        w_up, b_up = up[0]
        return ops.ffn(x, w_in, w_down, w_up=w_up, b_in=b_in, b_up=b_up, **rest)
    if form.halves == "up first":
        w_up, w_in = w_in.chunk(2)
        b_up, b_in = (None, None) if b_in is None else b_in.chunk(2)
        if lora is not None and lora.a_in is not None and lora.b_in is not None:
            of_up, of_gate = lora.b_in.chunk(2)
            rest["lora"] = replace(lora, b_in=of_gate, a_up=lora.a_in, b_up=of_up)
        return ops.ffn(x, w_in, w_down, w_up=w_up, b_in=b_in, b_up=b_up, **rest)
    return ops.ffn(x, w_in, w_down, gated=form.halves is not None, b_in=b_in, **rest)
