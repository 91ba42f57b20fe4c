# SPDX-License-Identifier: BSD-3-Clause
"""Adapters inside the operators on routed rows, against weights that hold them: values, derivatives, layouts, bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device import generator, gradcheck, gradgradcheck
from problems import assert_same_bits
from tolerance import assert_error_like_eagers
from torch import Tensor
from torch.utils import _pytree as pytree

import ffn_ops
from ffn_ops import Gate, Lora, reference, routing

SCALE = 1.7
FORMS = {"plain": (False, False), "gated": (True, False), "alternating": (True, True)}
every_form = pytest.mark.parametrize("form", FORMS)
WIDE = torch.float64
NAMES = ("a_in", "b_in", "a_down", "b_down")


class Mixture:
    """Tensors by name, those of adapters with ``lora_`` in front, and what is computed with them."""

    def __init__(
        self, form: str = "gated", T: int = 7, D: int = 5, F: int = 6, O: int = 4, rank: tuple[int, int] = (2, 3),
        pairs: tuple[str, ...] = ("in", "down"), seed: int = 0, E: int = 5,
    ) -> None:  # fmt: skip
        gated, interleaved = FORMS[form]
        self.E = E
        self.options: dict[str, Any] = {"gated": gated, "activation": Gate("silu", interleaved=interleaved)}
        rows = 2 * F if gated else F
        shapes: dict[str, tuple[int, ...]] = {
            "x": (T, D), "logits": (T, E), "w_in": (E, rows, D), "w_down": (E, O, F),
            "b_in": (E, rows), "b_down": (E, O),
        }  # fmt: skip
        if "in" in pairs:
            shapes |= {"lora_a_in": (E, rank[0], D), "lora_b_in": (E, rows, rank[0])}
        if "down" in pairs:
            shapes |= {"lora_a_down": (E, rank[1], F), "lora_b_down": (E, O, rank[1])}
        g = generator(seed)
        self.tensors = {n: torch.randn(s, generator=g, dtype=WIDE) * max(s[-1], 1) ** -0.5 for n, s in shapes.items()}
        self.d_y = torch.randn(T, O, generator=g, dtype=WIDE)

    def ours(self, recompute: bool = False, **t: Tensor) -> Tensor:
        lora = Lora(**{n: t.pop(f"lora_{n}", None) for n in NAMES}, scale=SCALE)
        chosen = routing.top_k(t.pop("logits"), 2)
        return ffn_ops.moe(t.pop("x"), chosen, **t, **self.options, lora=lora, recompute=recompute)

    def plain(self, **t: Tensor) -> Tensor:
        """The formula, expert by expert, in the tensors' own dtype."""
        ids, weights = reference.top_k(t["logits"], 2)
        y = t["x"].new_zeros(len(t["x"]), t["w_down"].shape[1])
        form = self.options["activation"].replace(interleaved=False)
        for e in range(self.E):
            tokens, slots = torch.where(ids == e)

            def linear(rows: Tensor, place: str, e: int = e) -> Tensor:
                out = rows @ t[f"w_{place}"][e].T + t[f"b_{place}"][e]
                a, b = t.get(f"lora_a_{place}"), t.get(f"lora_b_{place}")
                return out if a is None or b is None else out + (SCALE * (rows.to(a.dtype) @ a[e].T @ b[e].T)).to(out)

            z, up = linear(t["x"][tokens], "in"), None
            if self.options["gated"]:
                z, up = (z[:, ::2], z[:, 1::2]) if self.options["activation"].interleaved else z.chunk(2, 1)
            out = linear(reference.gated_act(z, up, activation=form), "down")
            y = y.index_add(0, tokens, (out * weights[tokens, slots].unsqueeze(1)).to(y.dtype))
        return y

    def results(self, call: Any, tensors: dict[str, Tensor], needed: Any = None, **options: Any) -> dict[str, Tensor]:
        needed = tensors if needed is None else needed
        leaves = {n: t.detach().requires_grad_(n in needed) for n, t in tensors.items()}
        y = call(**leaves, **options)
        asked = {n: t for n, t in leaves.items() if t.requires_grad}
        grads = torch.autograd.grad(y, list(asked.values()), self.d_y.to(y.dtype))
        return {"y": y.detach(), **dict(zip(asked, grads, strict=True))}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for n, value in expected.items():
        torch.testing.assert_close(actual[n], value, rtol=1e-11, atol=1e-12, msg=lambda m, n=n: f"{n}: {m}")


SIZES = {
    "small": {},
    "one pair": {"pairs": ("in",)},
    "other pair": {"pairs": ("down",)},
    "one row each": {"T": 2},
    "no rows": {"T": 0},
    "no width": {"D": 0},
    "no hidden width": {"F": 0},
    "no output": {"O": 0},
    "rank above the width": {"rank": (9, 70)},
    "tiles": {"T": 90, "D": 70, "F": 45, "O": 66, "rank": (8, 17)},
}


@every_form
@pytest.mark.parametrize("size", SIZES)
def test_values_and_every_gradient(form: str, size: str) -> None:
    m = Mixture(form, **SIZES[size])  # type: ignore[arg-type]
    assert_close(m.results(m.ours, m.tensors), m.results(m.plain, m.tensors))


def test_products_in_parts() -> None:
    """x of an expert, packed, is more than 32 MiB, so its product is cut into rows."""
    m = Mixture(T=900, D=5000, F=1, O=2, E=2)
    assert_close(m.results(m.ours, m.tensors), m.results(m.plain, m.tensors))


@pytest.mark.parametrize("adapters", [torch.float32, None], ids=["float32 adapters", "of one dtype"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_accurate_as_eager(dtype: torch.dtype, adapters: torch.dtype | None) -> None:
    m = Mixture(T=60, D=40, F=48, O=40, rank=(8, 8))
    t = {
        n: v.to(adapters or dtype if "lora" in n else torch.float32 if n == "logits" else dtype)
        for n, v in m.tensors.items()
    }
    exact = m.results(m.plain, {n: v.double() for n, v in t.items()})
    eager, actual = m.results(m.plain, t), m.results(m.ours, t)
    for n, value in exact.items():
        assert actual[n].dtype is eager[n].dtype
        assert_error_like_eagers(actual[n], eager[n], value)


@every_form
def test_second_derivatives(form: str) -> None:
    m = Mixture(form, T=2, D=2, F=1, O=1, rank=(1, 2), E=2)
    names = list(m.tensors)
    leaves = [m.tensors[n].requires_grad_() for n in names]

    def call(*values: Tensor) -> Tensor:
        return m.ours(**dict(zip(names, values, strict=True)))

    assert gradcheck(call, leaves, check_forward_ad=True) and gradgradcheck(call, leaves, check_fwd_over_rev=True)


@every_form
def test_bits_do_not_depend_on_what_is_asked_for(form: str) -> None:
    """Recomputed; each gradient alone, as with a frozen base; with fewer threads; and a row alone or in a batch."""
    m = Mixture(form, T=40, D=20, F=24, O=20, rank=(4, 8))
    t = {n: v.float() for n, v in m.tensors.items()}
    whole = m.results(m.ours, t)
    assert_same_bits(m.results(m.ours, t, recompute=True), whole)
    adapters = [n for n in t if "lora" in n]
    for needed in (*([n] for n in t), adapters, ["x", *adapters]):
        assert_same_bits(m.results(m.ours, t, needed), {n: whole[n] for n in ("y", *needed)})
    first = {n: v[:3] if n in ("x", "logits") else v for n, v in t.items()}
    assert torch.equal(m.ours(**first), whole["y"][:3])


def test_bits_of_bfloat16_rows_do_not_depend_on_the_batch() -> None:
    m = Mixture(T=90, D=70, F=45, rank=(8, 17))
    t = {n: v.float() if "lora" in n or n == "logits" else v.bfloat16() for n, v in m.tensors.items()}
    y = m.ours(**t)
    for count in (1, 5, 40):
        first = {n: v[:count] if n in ("x", "logits") else v for n, v in t.items()}
        assert torch.equal(m.ours(**first), y[:count])


def test_as_peft_stores_them() -> None:
    """Values and gradients of adapters in two dimensions are those of three, in that order."""
    m = Mixture()
    t = m.tensors

    def stored(n: str, v: Tensor) -> Tensor:
        if "lora_a" in n:
            return v.flatten(0, 1)
        return v.permute(1, 2, 0).flatten(1) if "lora_b" in n else v

    expected = {n: stored(n, v) for n, v in m.results(m.ours, t).items()}
    assert_same_bits(m.results(m.ours, {n: stored(n, v).contiguous() for n, v in t.items()}), expected)


def test_gradients_are_stored_as_the_factors_are() -> None:
    """PEFT keeps the experts of b side by side, and so does its gradient, also of experts without rows: the engine
    takes the operator's memory for ``.grad``."""
    m = Mixture(T=2, E=9)
    t = {n: v.detach().requires_grad_("lora_b" in n) for n, v in m.tensors.items()}
    for n in ("lora_b_in", "lora_b_down"):
        t[n] = m.tensors[n].permute(1, 2, 0).contiguous().permute(2, 0, 1).requires_grad_()
    grads = torch.autograd.grad(m.ours(**t), [t["lora_b_in"], t["lora_b_down"]], m.d_y)
    expected = m.results(m.ours, m.tensors)
    for n, grad in zip(("lora_b_in", "lora_b_down"), grads, strict=True):
        assert grad.stride() == t[n].stride() and torch.equal(grad, expected[n])
        assert not grad.any(-1).any(-1).all() and grad.any()


def test_any_strides_and_frozen_base() -> None:
    m = Mixture()
    turned = {n: v.transpose(1, 2).contiguous().transpose(1, 2) if v.dim() == 3 else v for n, v in m.tensors.items()}
    assert_same_bits(m.results(m.ours, turned), m.results(m.ours, m.tensors))


def test_sorted_rows_and_dropped_rows() -> None:
    """moe_experts between dispatch and combine is moe; rows behind the experts' are zero and get no gradient."""
    m = Mixture()
    t = {n: v.clone().requires_grad_() for n, v in m.tensors.items()}
    chosen = routing.top_k(t["logits"], 2)
    lora = Lora(**{n: t[f"lora_{n}"] for n in NAMES}, scale=SCALE)
    experts = {n: t[n] for n in ("w_in", "w_down", "b_in", "b_down")}
    rows = ffn_ops.moe_dispatch(t["x"], chosen)
    y = ffn_ops.moe_combine(ffn_ops.moe_experts(rows, chosen.offsets, **experts, **m.options, lora=lora), chosen)
    assert_close(
        {"y": y, **dict(zip(t, torch.autograd.grad(y, list(t.values()), m.d_y), strict=True))},
        m.results(m.ours, m.tensors),
    )
    fewer = chosen.offsets.clamp(max=6)
    out = ffn_ops.moe_experts(rows, fewer, **experts, **m.options, lora=lora)
    whole = ffn_ops.moe_experts(rows, chosen.offsets, **experts, **m.options, lora=lora)
    assert torch.equal(out[:6], whole[:6]) and not out[6:].any()
    (d,) = torch.autograd.grad(out.sum(), rows)
    assert not d[6:].any() and d[:6].any()


def test_compiled_and_a_pytree() -> None:
    m = Mixture()
    t = {n: v.float() for n, v in m.tensors.items()}
    chosen = routing.top_k(t["logits"], 2)
    lora = Lora(**{n: t[f"lora_{n}"] for n in NAMES}, scale=SCALE)

    def call(x: Tensor, lora: Lora) -> Tensor:
        return ffn_ops.moe(x, chosen, t["w_in"], t["w_down"], **m.options, lora=lora)

    expected = call(t["x"], lora)
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(t["x"], lora), expected)
    leaves, spec = pytree.tree_flatten(lora)
    assert len(leaves) == 4 and torch.equal(call(t["x"], pytree.tree_unflatten(leaves, spec)), expected)
    grads = torch.func.grad(lambda given: call(t["x"], given).sum())(lora)
    first = Lora(lora.a_in, lora.b_in)  # what is None is no leaf, which torch.func would refuse
    assert torch.func.grad(lambda given: call(t["x"], given).sum())(first).a_down is None
    assert isinstance(grads, Lora) and grads.b_down is not None and grads.b_down.shape == t["lora_b_down"].shape


def test_two_adapters_at_once() -> None:
    first, second = Mixture(seed=1), Mixture(seed=2, rank=(1, 4))
    t = first.tensors
    pair = [Lora(**{n: m.tensors[f"lora_{n}"] for n in NAMES}, scale=s) for m, s in ((first, 0.5), (second, 2.0))]
    base = {n: v for n, v in t.items() if "lora" not in n}
    for place in ("in", "down"):
        for lora in pair:
            base[f"w_{place}"] = base[f"w_{place}"] + lora.scale * getattr(lora, f"b_{place}") @ getattr(
                lora, f"a_{place}"
            )
    chosen = routing.top_k(base.pop("logits"), 2)
    expected = ffn_ops.moe(base["x"], chosen, **{n: v for n, v in base.items() if n != "x"}, **first.options)
    weights = {n: t[n] for n in ("w_in", "w_down", "b_in", "b_down")}
    actual = ffn_ops.moe(t["x"], chosen, **weights, **first.options, lora=ffn_ops._lora.together(pair, first.E))
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


WRONG: dict[str, tuple[type[Exception], str, Any]] = {
    "no Lora": (TypeError, "lora: expected an ffn_ops.Lora or None, got dict", lambda a, b: {}),
    "one of a pair": (ValueError, "a_in, b_in: expected both or neither, got one", lambda a, b: Lora(a_in=a)),
    "no tensor": (TypeError, "a_in: expected a torch.Tensor or None, got int", lambda a, b: Lora(1, b)),
    "scale": (ValueError, "scale: expected a finite number, got inf", lambda a, b: Lora(a, b, scale=float("inf"))),
    "ranks": (ValueError, r"lora.b_in: expected shape \[5, 12, 2\], got", lambda a, b: Lora(a, b[:, :, :1])),
    "rank 0": (ValueError, "lora.a_in: expected a rank of at least 1", lambda a, b: Lora(a[:, :0], b[:, :, :0])),
    "width": (ValueError, r"lora.a_in: expected shape \[5, r, 5\], got \[5, 2, 4\]", lambda a, b: Lora(a[:, :, :4], b)),
    "dtype": (TypeError, "lora.a_in: expected dtype float64, got float32", lambda a, b: Lora(a.float(), b.float())),
    "dtypes": (TypeError, "lora.b_in: expected dtype float64, got float32", lambda a, b: Lora(a, b.float())),
    "device": (ValueError, "lora.a_in: expected device", lambda a, b: Lora(a.to("meta"), b)),
}


@pytest.mark.parametrize("lora", [None, Lora(torch.zeros(0, 5), torch.zeros(6, 0))], ids=["plain", "adapters"])
def test_no_experts(lora: Lora | None) -> None:
    empty = torch.zeros(0, 6, 5), torch.zeros(0, 5, 6)
    with pytest.raises(ValueError, match=r"w_in: expected at least one expert, got \[0, 6, 5\]"):
        ffn_ops.moe_experts(torch.zeros(0, 5), torch.zeros(1, dtype=torch.int64), *empty, lora=lora)


def test_autocast_casts_adapters_of_16_bits() -> None:
    """And leaves those of float32 alone: nothing between a and b is rounded."""
    m = Mixture(T=30, D=20)
    t = {n: v.float() for n, v in m.tensors.items()}
    lora = {n: v for n, v in t.items() if "lora" in n}

    def under(adapters: dict[str, Tensor]) -> Tensor:
        with torch.autocast(t["x"].device.type, torch.bfloat16):
            return m.ours(**{**t, **adapters})

    half = {n: v.half() for n, v in lora.items()}
    assert torch.equal(under(half), under({n: v.bfloat16() for n, v in half.items()}))
    base = {n: v.bfloat16() for n, v in t.items() if n not in lora and n != "logits"}
    assert torch.equal(under(lora), m.ours(**{**t, **base}))


@pytest.mark.parametrize("case", WRONG)
def test_wrong_adapters(case: str) -> None:
    error, message, make = WRONG[case]
    m = Mixture()
    t = {n: v for n, v in m.tensors.items() if "lora" not in n}
    chosen = routing.top_k(t.pop("logits"), 2)
    with pytest.raises(error, match=message):
        lora = make(m.tensors["lora_a_in"], m.tensors["lora_b_in"])
        ffn_ops.moe(t.pop("x"), chosen, **t, **m.options, lora=lora)
