# SPDX-License-Identifier: BSD-3-Clause
"""The problems that the tests run: every operator in its forms, as ours and as the plain formula, on the same named
tensors. The plain formulas are in ffn_ops/reference.py. No tolerances and no tests here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from device import DEVICE, generator
from torch import Tensor

import ffn_ops
from ffn_ops import Gate, reference

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = ffn_ops.activations()
BETA = 1.7  # not the default, so that a forgotten parameter shows
LIMITS = {"limit": 1.1, "up_shift": 0.6}  # limit of a gate: a quarter of the pre-activations are beyond it
FFN_FORMS = ("plain", "gated", "fused")
MOE_FORMS = ("moe", "moe_gated", "moe_limited")  # in the last one gate and up rows alternate
RECOMPUTING = (*FFN_FORMS, *MOE_FORMS)
FORMS = ("act", "gated_act", "gated_linear", "branches", *RECOMPUTING)
# Those whose bits depend on neither the batch nor strides: on a GPU dense layers take cuBLAS's products, which choose
# their way by both.
INVARIANT_FORMS = FORMS if DEVICE == "cpu" else ("act", "gated_act", *MOE_FORMS)
BRANCHES = 3


def gate_of(activation: str, **form: Any) -> Gate:
    """With parameters of its own that matter for numbers of order 1; limits where the gate takes them."""
    own = {name: BETA + 0.3 * i for i, name in enumerate(Gate(activation).own)}
    if activation in reference.UPS:
        form = {name: value for name, value in form.items() if name not in LIMITS}
    return Gate(activation, **own, **form)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Problem:
    """One form of an operator: ``shapes`` names its tensors, ``bias`` says whether it gets its biases."""

    form: str
    T: int = 7
    D: int = 5
    F: int = 6
    O: int = 4
    activation: str = "silu"
    bias: bool = True
    E: int = 5
    K: int = 2
    scale: float = 1.0  # of the routing weights

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        T, D, F, O = self.T, self.D, self.F, self.O
        if self.form == "act":
            return {"gate": (T, F)}
        if self.form == "gated_act":
            return {"gate": (T, F), "up": (T, F)}
        shapes: dict[str, tuple[int, ...]] = {"x": (T, D)}
        if self.form in ("gated_linear", "branches"):
            for g in range(BRANCHES if self.form == "branches" else 1):
                shapes |= {f"w_gate{g}": (F, D), f"w_up{g}": (F, D)}
                shapes |= {f"b_gate{g}": (F,), f"b_up{g}": (F,)} if self.bias else {}
            return shapes
        if self.form in MOE_FORMS:
            E, rows = self.E, F if self.form == "moe" else 2 * F
            shapes |= {"logits": (T, E), "w_in": (E, rows, D), "w_down": (E, O, F)}
            return shapes | ({"b_in": (E, rows), "b_down": (E, O)} if self.bias else {})
        rows = 2 * F if self.form == "fused" else F
        shapes |= {"w_in": (rows, D), "w_down": (O, F)}
        shapes |= {"w_up": (F, D)} if self.form == "gated" else {}
        if self.bias:
            shapes |= {"b_in": (rows,), "b_down": (O,)}
            shapes |= {"b_up": (F,)} if self.form == "gated" else {}
        return shapes

    @property
    def out_shape(self) -> tuple[int, int]:
        return (self.T, self.O if self.form in RECOMPUTING else self.F)

    def draw(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], Tensor]:
        """Tensors of the size that layers have (pre-activations of order 1) and a gradient of the output."""
        g = generator(seed)

        def normal(name: str, shape: tuple[int, ...]) -> Tensor:
            scale = shape[-1] ** -0.5 if name.startswith("w") and shape[-1] else 1.0
            return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(dtype)

        tensors = {name: normal(name, shape) for name, shape in self.shapes.items()}
        return tensors, normal("d", self.out_shape)

    def ours(self, *, recompute: bool = False, **tensors: Tensor) -> Tensor:
        keywords: dict[str, Any] = {"recompute": recompute} if self.form in RECOMPUTING else {}
        if self.form in MOE_FORMS:
            logits = tensors.pop("logits")
            x = tensors.pop("x")
            routing = ffn_ops.routing.top_k(logits, self.K, scale=self.scale)
            return ffn_ops.moe(x, routing, **tensors, **self._experts(), **keywords)
        return self._call(ffn_ops.gated_act, ffn_ops.gated_linear, ffn_ops.ffn, tensors, keywords)

    def plain(self, **tensors: Tensor) -> Tensor:
        def gated_linear(x: Tensor, w_gate: Any, w_up: Any, *, b_gate: Any, b_up: Any, **act: Any) -> Tensor:
            if not isinstance(w_gate, list):
                return reference.gated_linear(x, w_gate, w_up, b_gate=b_gate, b_up=b_up, **act)
            parts = [
                reference.gated_linear(x, *pair, b_gate=b[0], b_up=b[1], **act)
                for pair, b in zip(zip(w_gate, w_up, strict=True), _pairs(b_gate, b_up, len(w_gate)), strict=True)
            ]
            return sum(parts[1:], start=parts[0])

        if self.form in MOE_FORMS:
            logits = tensors.pop("logits")
            x = tensors.pop("x")
            ids, weights = reference.top_k(logits, self.K, scale=self.scale)
            return reference.moe(x, ids, weights, **tensors, **self._experts())
        return self._call(reference.gated_act, gated_linear, reference.ffn, tensors, {})

    def _experts(self) -> dict[str, Any]:
        form: dict[str, Any] = {"interleaved": True, **LIMITS} if self.form == "moe_limited" else {}
        return {"gated": self.form != "moe", "activation": gate_of(self.activation, **form)}

    def _call(
        self,
        gated_act: Callable[..., Tensor],
        gated_linear: Callable[..., Tensor],
        ffn: Callable[..., Tensor],
        t: dict[str, Tensor],
        keywords: dict[str, Any],
    ) -> Tensor:
        act = {"activation": gate_of(self.activation), **keywords}
        if self.form in ("act", "gated_act"):
            return gated_act(*t.values(), **act)
        if self.form == "gated_linear":
            biases = {"b_gate": t.get("b_gate0"), "b_up": t.get("b_up0")}
            return gated_linear(t["x"], t["w_gate0"], t["w_up0"], **biases, **act)
        if self.form == "branches":
            lists = {n: [t[f"{n}{g}"] for g in range(BRANCHES) if f"{n}{g}" in t] for n in ("w_gate", "w_up")}
            biases = {n: [t[f"{n}{g}"] for g in range(BRANCHES)] if self.bias else None for n in ("b_gate", "b_up")}
            return gated_linear(t["x"], **lists, **biases, **act)
        return ffn(**t, gated=self.form != "plain", **act)


def _pairs(b_gate: Any, b_up: Any, count: int) -> list[tuple[Any, Any]]:
    return [(None, None)] * count if b_gate is None else list(zip(b_gate, b_up, strict=True))


def results(call: Callable[..., Tensor], tensors: dict[str, Tensor], d_y: Tensor) -> dict[str, Tensor]:
    """The output and the gradient of every tensor, by name."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y = call(**leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), d_y)
    return {"y": y.detach(), **{f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str = "") -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), f"{what} {name} differs"


def assert_same_numbers(form: str, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compares results for equal operands at other addresses: the same bits if the form promises it, else up to a few
    roundings of the largest value or of 1, by which sums in another order may differ."""
    if form in INVARIANT_FORMS:
        return assert_same_bits(actual, expected)
    for name, value in expected.items():
        few = 16 * torch.finfo(value.dtype).eps * max(1.0, float(value.abs().max())) if value.numel() else 0.0
        torch.testing.assert_close(actual[name], value, rtol=0, atol=few, msg=lambda text, name=name: f"{name}: {text}")
