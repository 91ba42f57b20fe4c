# SPDX-License-Identifier: BSD-3-Clause
"""Promise 7 for torch.ops: an operator checks its arguments itself, with data in C++, without in Python."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import ffn_ops  # noqa: F401  (loads the operators)

OPS = torch.ops.ffn_ops
# Fakes have no saved tensors to look at, and sparse tensors and instruction sets are no matter of theirs.
KERNELS_ALONE = (
    "sparse", "saved gate", "saved up", "saved up missing", "saved gate with strides", "gated_act dd_up without up",
    "instruction set", "needs too short", "needs too long",
)  # fmt: skip


def raw_calls() -> dict[str, Callable[[], Any]]:
    """Arguments that reach C++ only through torch.ops."""
    x, w, down, h = torch.ones(3, 4), torch.ones(6, 4), torch.ones(5, 6), torch.ones(3, 6)
    none, act = torch.empty(0), ("silu", [0.0, 0.0])
    seven = [True] * 7

    def ffn(*args: Any, gated: bool = False) -> Callable[[], Any]:
        return lambda: OPS.ffn(*args, gated, False, *act, True)

    def backward(d_y: Tensor, gate: Tensor, up: Tensor, needs: list[bool], gated: bool = True) -> Callable[[], Any]:
        return lambda: OPS.ffn_backward(d_y, x, w, w, down, None, None, gate, up, gated, False, *act, needs)

    def moe(**changes: Any) -> Callable[[], Any]:
        given = {"w_in": experts, "w_down": torch.ones(2, 5, 6), "b_in": None, "b_down": None, "gated": False}
        given |= {"interleaved": False, **changes}
        return lambda: OPS.moe(x, None, None, torch.tensor([0, 1, 3]), None, None, *given.values(), *act, True)

    def lora(**changes: Any) -> Callable[[], Any]:
        given = {"a_in": torch.ones(2, 3, 4), "b_in": torch.ones(2, 6, 3), "a_down": None, "b_down": None, **changes}
        weights = (experts, None, torch.ones(2, 5, 6), None, None)
        offsets = torch.tensor([0, 1, 3])
        form = (False, False, *act, 1.0, True)
        return lambda: OPS.moe_lora(x, None, None, offsets, None, None, *weights, *given.values(), *form)

    def top_k(k: int, **changes: Any) -> Callable[[], Any]:
        given = {"bias": None, "ids": None, "k": k, "shared": 0, "score": "softmax", "renormalize": False}
        given |= {"by_logits": False, "num_groups": 1, "top_groups": 1, "group_best": 2, "scale": 1.0, **changes}
        return lambda: OPS.route_top_k(x, *given.values())

    d_y, experts = torch.ones(3, 5), torch.ones(2, 6, 4)
    rows = [torch.tensor(each) for each in ([0, 1, 3], [0, 1, 2], [0, 1, 2, 3])]
    return {
        "rank of x": ffn(x[0], w, None, down, None, None, None),
        "rank of w_in": ffn(x, w[0], None, down, None, None, None),
        "width of w_in": ffn(x, w[:, :3], None, down, None, None, None),
        "width of w_up": ffn(x, w, w[:5], down, None, None, None),
        "width of w_down": ffn(x, w, None, down[:, :5], None, None, None),
        "odd fused": ffn(x, w[:5], None, down, None, None, None, gated=True),
        "length of b_in": ffn(x, w, None, down, torch.ones(5), None, None),
        "b_up alone": ffn(x, w, None, down, None, torch.ones(6), None),
        "length of b_down": ffn(x, w, None, down, None, None, torch.ones(6)),
        "dtype": ffn(x, w.double(), None, down, None, None, None),
        "integers": ffn(x.int(), w.int(), None, down.int(), None, None, None),
        "sparse": ffn(x, w.to_sparse(), None, down, None, None, None),
        "d_y": backward(d_y[:, :4], h, h, seven),
        "saved gate": backward(d_y, h[:2], h, seven),
        "saved up": backward(d_y, h, h[:, :5], seven),
        "saved up missing": backward(d_y, h, none, seven),
        "saved gate with strides": backward(d_y, torch.ones(6, 3).t(), h, seven),
        "activation": lambda: OPS.ffn(x, w, None, down, None, None, None, False, False, "sillu", [0.0, 0.0], True),
        "gated_act rank": lambda: OPS.gated_act(x[None], None, *act),
        "gated_act up": lambda: OPS.gated_act(x, x[:2], *act),
        "gated_act d_out": lambda: OPS.gated_act_backward(x[:2], x, None, *act, [True, True]),
        "gated_act dd_up without up": lambda: OPS.gated_act_double_backward(None, x, x, x, None, *act),
        "no branches": lambda: OPS.gated_linear(x, [], [], [], [], *act, True),
        "branches differ": lambda: OPS.gated_linear(x, [w, w[:5]], [w, w], [], [], *act, True),
        "fewer ups": lambda: OPS.gated_linear(x, [w, w], [w], [], [], *act, True),
        "fewer biases": lambda: OPS.gated_linear(x, [w, w], [w, w], [torch.ones(6)], [], *act, True),
        "bias length": lambda: OPS.gated_linear(x, [w], [w], [torch.ones(5)], [], *act, True),
        "limit": lambda: OPS.gated_act(x, x, "silu", [-1.0, 0.0]),
        "limit without up": lambda: OPS.gated_act(x, None, "silu", [1.0, 0.0]),
        "shift without up": lambda: OPS.ffn(x, w, None, down, None, None, None, False, False, "silu", [0.0, 1.0], True),
        "too few parameters": lambda: OPS.gated_act(x, x, "swish", [0.0, 0.0]),
        "too many parameters": lambda: OPS.gated_act(x, x, "silu", [0.0, 0.0, 1.0]),
        "a parameter that is not positive": lambda: OPS.gated_act(x, x, "situ", [0.0, 0.0, 4.0, -1.0]),
        "a limit beside a side of up": lambda: OPS.gated_act(x, x, "situ", [1.0, 0.0, 4.0, 25.0]),
        "interleaved beside w_up": lambda: OPS.ffn(x, w, w, down, None, None, None, True, True, *act, True),
        "instruction set": lambda: OPS._use_isa("avx1024"),
        "moe: experts": moe(w_in=experts[:1]),
        "moe: rank of w_in": moe(w_in=experts[0]),
        "moe: width of w_in": moe(w_in=experts[..., :3]),
        "moe: odd": moe(w_in=experts[:, :5], gated=True),
        "moe: width of w_down": moe(w_down=experts),
        "moe: b_in": moe(b_in=torch.ones(2, 5)),
        "moe: b_down": moe(b_down=torch.ones(2, 6)),
        "moe: dtype": moe(w_down=torch.ones(2, 5, 6).double()),
        "moe: interleaved": moe(interleaved=True),
        "lora: one of a pair": lora(b_in=None),
        "lora: rank": lora(b_in=torch.ones(2, 6, 2)),
        "lora: no rank": lora(a_in=torch.ones(2, 0, 4), b_in=torch.ones(2, 6, 0)),
        "lora: width": lora(a_in=torch.ones(2, 3, 5)),
        "lora: dimensions": lora(a_in=torch.ones(3, 4)),
        "lora: rows": lora(a_down=torch.ones(2, 1, 6), b_down=torch.ones(2, 6, 1)),
        "lora: integers": lora(a_in=torch.ones(2, 3, 4).int()),
        "lora: dtype": lora(a_in=torch.ones(2, 3, 4).bfloat16()),
        "lora: dtype of b": lora(b_in=torch.ones(2, 6, 3).double()),
        "dispatch: token": lambda: OPS.moe_dispatch(x, rows[1].int(), None, rows[0], rows[1], rows[2]),
        "dispatch: row": lambda: OPS.moe_dispatch(x, rows[1], None, rows[0], rows[1][1:], rows[2]),
        "dispatch: tokens": lambda: OPS.moe_dispatch(x[1:], rows[1], None, rows[0], rows[1], rows[2]),
        "combine: weight": lambda: OPS.moe_combine(x, rows[1], torch.ones(3).double(), rows[0], rows[1], rows[2]),
        "route_linear: weight": lambda: OPS.route_linear(x, w.int(), None),
        "route_linear: float64": lambda: OPS.route_linear(x.bfloat16(), w.double(), None),
        "route_linear: width": lambda: OPS.route_linear(x, w[:, 1:], None),
        "route_linear: bias": lambda: OPS.route_linear(x, w, torch.ones(6).double()),
        "route_linear: length of bias": lambda: OPS.route_linear(x, w, torch.ones(5)),
        "top_k: k": top_k(5),
        "top_k: score": top_k(2, score="tanh"),
        "top_k: groups": top_k(2, num_groups=3),
        "top_k: too many groups": top_k(2, num_groups=5),
        "top_k: top_groups": top_k(2, num_groups=2, top_groups=3),
        "top_k: small groups": top_k(3, num_groups=2),
        "top_k: shared": top_k(2, shared=4),
        "top_k: k beside shared": top_k(3, shared=2),
        "top_k: group_best": top_k(2, group_best=3),
        "top_k: ids": top_k(2, ids=torch.zeros(3, 1, dtype=torch.int64)),
        "top_k: ids of int32": top_k(2, ids=torch.zeros(3, 2, dtype=torch.int32)),
        "top_k: ids and shared": top_k(2, ids=torch.zeros(3, 2, dtype=torch.int64), shared=1),
        "needs too short": backward(d_y, h, h, [True]),
        "needs too long": lambda: OPS.gated_act_backward(x, x, None, *act, [True] * 3),
    }


@pytest.mark.parametrize("kind", raw_calls())
def test_raw_operators(kind: str) -> None:
    """torch.ops checks for itself: RuntimeError (NotImplementedError is one), never a crash or a wrong read."""
    with pytest.raises(RuntimeError):
        raw_calls()[kind]()


def words(error: BaseException) -> str:
    """Without the place in the sources that C++ gives first, and without the .0 that Python adds to numbers."""
    return re.sub(r"\.0\b", "", re.sub(r"^.*?, \S+:\d+, ", "", str(error).splitlines()[0]))


@pytest.mark.cpu_only("a fake tensor of a GPU has no operator to compare with here")
@pytest.mark.parametrize("kind", [kind for kind in raw_calls() if kind not in KERNELS_ALONE])
def test_kernel_and_fake_refuse_in_the_same_words(kind: str) -> None:
    """Tensors without data reach the fakes, whose checks are in Python: one rule, said in one way."""
    with pytest.raises(RuntimeError) as of_kernel:
        raw_calls()[kind]()
    with FakeTensorMode(), pytest.raises((TypeError, ValueError)) as of_fake:
        raw_calls()[kind]()
    assert words(of_kernel.value) == words(of_fake.value)


@pytest.mark.cpu_only("the text names the CPU")
def test_raw_operators_name_dtypes() -> None:
    """As Python does, not by torch's numbers."""
    for dtype in (torch.int32, torch.bool, torch.complex64, torch.uint16):
        name = str(dtype).removeprefix("torch.")
        with pytest.raises(RuntimeError, match=f"expected dtype float64, float32, float16 or bfloat16, got {name}"):
            OPS.gated_act(torch.ones(2, 3).to(dtype), None, "silu", [0.0, 0.0])
        ids, scores = torch.zeros(2, 1).to(dtype), torch.ones(2, 3)
        with pytest.raises(RuntimeError, match=f"ids: expected dtype int64, got {name}"):
            OPS.round_tokens(scores, ids, 4)
    with pytest.raises(RuntimeError, match="mask: expected dtype bool, got int32"):
        OPS.balanced_assignment(scores, torch.ones(2, dtype=torch.int32))
