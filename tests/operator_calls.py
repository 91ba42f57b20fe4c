# SPDX-License-Identifier: BSD-3-Clause
"""A call of every operator in every form, for torch's operator checks and for the stubs of absent CUDA kernels."""

from __future__ import annotations

from typing import Any

import torch
from device import DEVICE, generator
from problems import FFN_FORMS
from torch import Tensor

import ffn_ops

OPS = torch.ops.ffn_ops


def operator_calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every operator with arguments that require grad, in every form that changes what it returns."""
    g = generator(0)

    def t(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    T, D, F, O, G = 3, 4, 5, 6, 2
    act = ("swish", [0.0, 0.0, 1.5])
    limited = ("swish", [1.1, 0.6, 1.5])
    gates, ups = [t(F, D) for _ in range(G)], [t(F, D) for _ in range(G)]
    biases = [t(F) for _ in range(G)]
    backward = str(OPS.gated_linear_backward.default._schema)
    passed_on = (biases, biases) if "b_gate" in backward.split("->")[0] else ()
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "gated_act": (OPS.gated_act, (t(T, F), t(T, F), *act)),
        "gated_act limited": (OPS.gated_act, (t(T, F), t(T, F), *limited)),
        "gated_act_backward limited": (OPS.gated_act_backward, (t(T, F), t(T, F), t(T, F), *limited, [True, True])),
        "gated_act plain": (OPS.gated_act, (t(T, F), None, *act)),
        "gated_act_backward": (OPS.gated_act_backward, (t(T, F), t(T, F), t(T, F), *act, [True, True])),
        "gated_act_backward of gate": (OPS.gated_act_backward, (t(T, F), t(T, F), None, *act, [True, False])),
        "gated_act_double_backward": (
            OPS.gated_act_double_backward,
            tuple(x.detach() for x in (t(T, F), t(T, F), t(T, F), t(T, F), t(T, F))) + act,
        ),
        "learned_act": (OPS.learned_act, (t(T, F), t(4), "xielu")),
        "learned_act_backward": (OPS.learned_act_backward, (t(T, F), t(T, F), t(4), "xielu", [True, True])),
        "learned_act_backward of x": (OPS.learned_act_backward, (t(T, F), t(T, F), t(2), "star_relu", [True, False])),
        "learned_act_backward slope": (OPS.learned_act_backward, (t(T, F), t(T, F), t(1), "leaky_relu", [False, True])),
        "learned_act_double_backward": (
            OPS.learned_act_double_backward, (*(x.detach() for x in (t(T, F), t(T, F), t(T, F), t(4))), "xielu"),
        ),
        "gated_linear": (OPS.gated_linear, (t(T, D), gates, ups, biases, biases, *limited, True)),
        "gated_linear_backward": (
            OPS.gated_linear_backward,
            (t(T, F), t(T, D), gates, ups, *passed_on, t(G, T, F).detach(), t(G, T, F).detach(), *limited,
             [True] * 5),
        ),
        "gated_linear_backward of x": (
            OPS.gated_linear_backward,
            (t(T, F), t(T, D), gates, ups, *(() if not passed_on else ([], [])), t(G, T, F).detach(),
             t(G, T, F).detach(), *limited, [True, False, False, False, False]),
        ),
    }  # fmt: skip
    saved = (t(T, F).detach(), t(T, F).detach())
    none = (torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.float64))
    for form in FFN_FORMS:
        rows = 2 * F if form == "fused" else F
        w_up, b_up = (t(F, D), t(F)) if form == "gated" else (None, None)
        gated, options = form != "plain", (form != "plain", form == "fused", *act)
        args = (t(T, D), t(rows, D), w_up, t(O, F), t(rows), b_up)
        up = saved[1] if gated else none[1]
        for save in (True, False):
            calls[f"ffn {form} {save=}"] = (OPS.ffn, (*args, t(O), *options, save))
            pre = (saved[0], up) if save else none
            all_of_them = (t(T, O), *args, *pre, *options, [True] * 7)
            calls[f"ffn_backward {form} {save=}"] = (OPS.ffn_backward, all_of_them)
    needs = [False, True, False, False, False, False, True]
    calls["ffn_backward of two"] = (OPS.ffn_backward, (*all_of_them[:-1], needs))
    E, K, R = 3, 2, 2 * T
    logits = t(T, E)
    weights, ids = OPS.route_top_k(logits.detach(), None, None, K, 0, "softmax", True, False, 1, 1, 2, 1.0)
    weight, token, offsets, row, slot_offsets = OPS.moe_sort(ids, None, weights, E, T, 3, False)[:5]
    index = (token, offsets, row, slot_offsets)
    weight = weight.requires_grad_()
    route = (token, weight, offsets, row, slot_offsets)
    for gated, interleaved, form in ((False, False, act), (True, False, act), (True, True, limited)):
        rows = 2 * F if gated else F
        experts = (t(E, rows, D), t(E, O, F), t(E, rows), t(E, O))
        if interleaved:  # and transposed, as gpt-oss has them
            turned = [t(E, *shape).detach().transpose(1, 2).requires_grad_() for shape in ((D, rows), (F, O))]
            experts = (*turned, *experts[2:])
        options = (gated, interleaved, *form)
        for save in (True, False):
            calls[f"moe {gated=} {interleaved=} {save=}"] = (OPS.moe, (t(T, D), *route, *experts, *options, save))
            given = (t(R, D), None, None, offsets, None, None)
            calls[f"moe of rows {gated=} {interleaved=} {save=}"] = (OPS.moe, (*given, *experts, *options, save))
            pre = (t(R, F).detach(), t(R, F).detach() if gated else none[1]) if save else none
            all_of_them = (t(T, O), t(T, D), *route, *experts, *pre, *options, [True] * 6)
            calls[f"moe_backward {gated=} {interleaved=} {save=}"] = (OPS.moe_backward, all_of_them)
            of_rows = (t(R, O), *given, *experts, *pre, *options, [True, False, True, False, True, True])
            calls[f"moe_backward of rows {gated=} {interleaved=} {save=}"] = (OPS.moe_backward, of_rows)
        pairs = (t(E, 2, D), t(E, rows, 2), t(E, 1, F), t(E, O, 1))
        if interleaved:  # and with the experts last, as PEFT stores b
            b_in, b_down = (t(n, r, E).detach().permute(2, 0, 1).requires_grad_() for n, r in ((rows, 2), (O, 1)))
            pairs = (pairs[0], b_in, pairs[2], b_down)
        # both, or those of w_in alone
        for at in (slice(0, 4), slice(0, 2)) if DEVICE == "cpu" else ():
            given_pairs = (*pairs[at], *(None,) * (4 - len(pairs[at])))
            whole, scaled = (*route, experts[0], None, *experts[1:], *given_pairs), (*options, 1.5)
            calls[f"moe_lora {interleaved=} {gated=} {at}"] = (OPS.moe_lora, (t(T, D), *whole, *scaled, True))
            needs = [True, True, True, False, True, True, True, *(given is not None for given in given_pairs)]
            all_of_them = (t(T, O), t(T, D), *whole, *none, *scaled, needs)
            calls[f"moe_lora_backward {interleaved=} {gated=} {at}"] = (OPS.moe_lora_backward, all_of_them)
    for w in (None, weight):
        places = (token, w, offsets, row, slot_offsets)
        calls[f"moe_dispatch {w is None}"] = (OPS.moe_dispatch, (t(T, D), *places))
        calls[f"moe_combine {w is None}"] = (OPS.moe_combine, (t(R, D), *places))
    calls["moe_row_dots"] = (OPS.moe_row_dots, (t(T, D), t(R, D), *index))
    calls["moe_linear"] = (OPS.moe_linear, (t(R, D), t(E, F, D), offsets))
    calls["moe_outer"] = (OPS.moe_outer, (t(R, D), t(R, F), offsets))
    for bias in (None, t(E)):
        calls[f"route_linear {bias is None}"] = (OPS.route_linear, (t(T, D), t(E, D), bias))
    for chosen in ([True] * 3, [False, True, False]):
        calls[f"route_linear_backward {chosen}"] = (OPS.route_linear_backward, (t(T, E), t(T, D), t(E, D), chosen))
    flags = ((False, False), (True, False), (False, True))
    for options in (*(("softmax", *f) for f in flags), ("sigmoid", True, False), ("sqrt_softplus", True, True)):
        bias = t(E).detach()
        calls[f"route_top_k {options}"] = (OPS.route_top_k, (logits, bias, None, K, 0, *options, 1, 1, 2, 2.5))
        calls[f"route_top_k of given {options}"] = (OPS.route_top_k, (logits, None, ids, K, 0, *options, 1, 1, 2, 2.5))
        calls[f"route_top_k shared {options}"] = (
            OPS.route_top_k,
            (logits, bias[1:], None, 1, 1, *options, 1, 1, 1, 1.0),
        )
        calls[f"route_top_k_backward {options}"] = (OPS.route_top_k_backward, (t(T, K), logits, ids, *options, 2.5))
    calls["moe_sort"] = (OPS.moe_sort, (ids, None, t(T, K), E, T, 2, True))
    calls["moe_sort of pairs"] = (OPS.moe_sort, (ids.flatten(), token, t(R), E, T, -1, False))
    calls.update(quantized_calls())
    calls["balanced_assignment"] = (OPS.balanced_assignment, (logits.detach(), None))
    calls["round_tokens"] = (OPS.round_tokens, (logits.detach(), ids, 4))
    return calls


def quantized_calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    g = generator(1)

    def t(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).requires_grad_()

    def w(*shape: int) -> list[Tensor]:
        return ffn_ops.quantize(torch.randn(*shape, generator=g), "int8").parts

    T, D, F, O, E = 3, 6, 4, 5, 2
    name, offsets = "int8:1x6", torch.tensor([0, 1, 3])
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "dequantize": (OPS.dequantize, (w(E, F, D), name, "bfloat16")),
        "quantized_linear": (OPS.quantized_linear, (t(T, D), w(E, F, D), name, offsets, False)),
        "quantized_linear transposed": (OPS.quantized_linear, (t(T, F), w(E, F, D), name, offsets, True)),
    }
    options = (True, False, "silu", [0.0, 0.0], 1.5)
    rows = (None, None, offsets, None, None)
    for up in (False, True):
        parts = (w(E, F if up else 2 * F, D), w(E, F, D) if up else [], w(E, O, F))
        names = f"{name},{name},int8:1x4" if up else f"{name},int8:1x4"
        pairs = (t(E, 2, D), t(E, 2 * F, 2), t(E, 1, F), t(E, O, 1)) if up else (None,) * 4
        experts = (*parts, names, t(E, 2 * F), t(E, O), *pairs)
        for save in (True, False):
            calls[f"moe_quantized {up=} {save=}"] = (OPS.moe_quantized, (t(T, D), *rows, *experts, *options, save))
            pre = [torch.randn(T, F, generator=g) if save else torch.empty(0) for _ in range(2)]
            args = (t(T, O), t(T, D), *rows, *experts, *pre, *options, [True, False, True, True, *[up] * 4])
            calls[f"moe_quantized_backward {up=} {save=}"] = (OPS.moe_quantized_backward, args)
    return calls


CALLS = operator_calls()
