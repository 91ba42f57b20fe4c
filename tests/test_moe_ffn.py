# SPDX-License-Identifier: BSD-3-Clause
"""MoEFFN and upcycle: the guides' layer, its checkpoints, options, and settings that must not be silently ignored."""

from __future__ import annotations

import copy
import functools
import io
from typing import Any

import pytest
import torch
from device import DEVICE
from routes import ROUTERS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ffn_ops
from ffn_ops import Routing, reference, routing


def pair(d_model: int = 12, d_ff: int = 20, num_experts: int = 6, top_k: int = 2) -> tuple[Any, Any]:
    """Our layer and the guides', from one seed."""
    made = []
    for kind in (ffn_ops.MoEFFN, reference.MoEFFN):
        torch.manual_seed(3)
        made.append(kind(d_model, d_ff, num_experts, top_k))
    return made[0], made[1]


@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (0, 12), (12,)], ids=str)
def test_computes_the_documents_layer(shape: tuple[int, ...]) -> None:
    """Same seed, same parameters; same output and gradients."""
    ours, plain = pair()
    x = torch.randn(shape, requires_grad=True)
    y, expected = ours(x), plain(x)
    torch.testing.assert_close(y, expected)
    if x.numel() == 0:  # the loop then skips every expert, and its output has no history
        assert not any(g.any() for g in torch.autograd.grad(y.sum(), [x, *ours.parameters()]))
        return
    d = torch.randn(shape)
    torch.testing.assert_close(torch.autograd.grad(y, x, d), torch.autograd.grad(expected, x, d))
    y, expected = ours(x), plain(x)
    y.backward(d)
    expected.backward(d)
    found = {n: p.grad for n, p in ours.named_parameters()}
    for name, p in plain.named_parameters():
        kind, e, place, tensor = ([*name.split("."), "", "", ""])[:4]
        if kind == "router":
            actual = found[name]
        else:
            stacked = {"0weight": "w_in", "0bias": "b_in", "2weight": "w_down", "2bias": "b_down"}[place + tensor]
            actual = found[stacked][int(e)]
        torch.testing.assert_close(actual, torch.zeros_like(p) if p.grad is None else p.grad)


def test_state_dict() -> None:
    """The guides' keys load strictly, alone and inside a model, and come back out; ours are the stacked ones."""
    ours, plain = pair()
    assert set(ours.state_dict()) == {"router.weight", "router.bias", "w_in", "b_in", "w_down", "b_down"}
    other = ffn_ops.MoEFFN(12, 20, 6)
    other.load_state_dict(plain.state_dict(), strict=True)
    for name, value in plain.state_dict().items():
        assert torch.equal(other.document_state_dict()[name], value), name
    plain.load_state_dict(other.document_state_dict(), strict=True)
    model = nn.Sequential(nn.Linear(3, 12), ffn_ops.MoEFFN(12, 20, 6))
    state = {f"1.{n}": t for n, t in plain.state_dict().items()}
    state |= {f"0.{n}": t for n, t in model[0].state_dict().items()}
    model.load_state_dict(state, strict=True)
    assert torch.equal(model[1].w_down, other.w_down)
    assert f"1.{next(iter(plain.state_dict()))}" in state  # the caller's dict is whole
    other.load_state_dict(ours.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(reference.MoEFFN(12, 21, 6).state_dict())
    with pytest.raises(ValueError, match="document_state_dict"):
        ffn_ops.MoEFFN(4, 6, gated=True).document_state_dict()


@pytest.mark.parametrize("key", ["experts.3.0.weight", "experts.0.0.bias", "experts.5.2.weight", "experts.2.2.bias"])
def test_checkpoint_with_one_faulty_expert(key: str) -> None:
    """The error names that expert's key and its shape, and nothing else; without ``strict`` all others load."""
    ours, plain = pair()
    model = nn.Sequential(ours)
    good = {f"0.{n}": t + 1 for n, t in plain.state_dict().items()}
    stacked = {"0weight": "w_in", "0bias": "b_in", "2weight": "w_down", "2bias": "b_down"}[key[10:].replace(".", "")]
    e, before = int(key[8]), getattr(ours, stacked).detach().clone()

    def names(error: pytest.ExceptionInfo[RuntimeError]) -> set[str]:
        return {word.strip('".,:') for word in str(error.value).split() if word.startswith(("0.", '"0.'))}

    absent = {n: t for n, t in good.items() if n != f"0.{key}"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0\.experts') as error:
        model.load_state_dict(absent)
    assert names(error) == {f"0.{key}"}
    ours.load_state_dict(plain.state_dict())
    found = model.load_state_dict(absent, strict=False)
    assert found.missing_keys == [f"0.{key}"] and not found.unexpected_keys
    expected = before + 1
    expected[e] = before[e]
    assert torch.equal(getattr(ours, stacked), expected)

    shape = [s + 1 for s in good[f"0.{key}"].shape]
    wrong = {**good, f"0.{key}": torch.zeros(shape)}
    for strict in (True, False):
        message = f"size mismatch for 0.{key}: .* shape torch.Size.*{shape}.*{list(before.shape[1:])}"
        with pytest.raises(RuntimeError, match=message.replace("[", r"\[").replace("]", r"\]")) as error:
            model.load_state_dict(wrong, strict=strict)
        assert names(error) == {f"0.{key}"}
    with pytest.raises(RuntimeError, match="Unexpected") as error:
        model.load_state_dict({**good, "0.experts.6.0.weight": good["0.experts.5.0.weight"]})
    assert names(error) == {"0.experts.6.0.weight"}
    unbiased = nn.Sequential(ffn_ops.MoEFFN(12, 20, 6, bias=False))
    assert all(".bias" in name for name in unbiased.load_state_dict(good, strict=False).unexpected_keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("num_shared", [0, 2])
def test_options(gated: bool, num_shared: int, dtype: torch.dtype) -> None:
    """Gated and shared experts against the formula."""
    layer = ffn_ops.MoEFFN(12, 7, 4, 2, gated=gated, num_shared=num_shared, activation="silu").to(dtype)
    x = torch.randn(9, 12).to(dtype)
    wide = copy.deepcopy(layer).double()
    ids, weights = reference.top_k(layer.logits(x).double(), 2)
    w = {n: getattr(wide, n) for n in ("w_in", "w_down", "b_in", "b_down")}
    expected = reference.moe(x.double(), ids, weights, **w, gated=gated, activation="silu")
    if num_shared:
        s = wide.shared
        names = ("w1", "w2") if gated else ("linear1", "linear2")
        first, last = (getattr(s, n) for n in names)
        assert last.in_features == 14
        up = {"w_up": s.w3.weight, "b_up": s.w3.bias} if gated else {}
        expected = expected + reference.ffn(
            x.double(), first.weight, last.weight, b_in=first.bias, b_down=last.bias, activation="silu", **up
        )
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x).double(), expected, rtol=20 * eps, atol=20 * eps)


def test_return_routing() -> None:
    """What losses and statistics need, with gradients."""
    layer = ffn_ops.MoEFFN(12, 20, 6)
    x = torch.randn(3, 5, 12)
    y, r, logits = layer(x, return_routing=True)
    assert torch.equal(y, layer(x)) and isinstance(r, Routing) and logits.shape == (3, 5, 6)
    loss = routing.load_balancing_loss(logits, r) + routing.z_loss(logits)
    loss.backward()
    assert layer.router.weight.grad.any() and layer.w_in.grad is None
    again, same, none = layer(x, routing=r, return_routing=True)
    assert torch.equal(again, y) and same is r and none is None


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router(name: str) -> None:
    layer = ffn_ops.MoEFFN(12, 20, 6, router=ROUTERS[name])
    x = torch.randn(17, 12)
    mask = torch.arange(17) % 3 > 0
    for options in ({}, {"mask": mask}):
        r = ROUTERS[name](layer.logits(x), **options)
        expected = ffn_ops.moe(x, r, layer.w_in, layer.w_down, b_in=layer.b_in, b_down=layer.b_down)
        assert torch.equal(layer(x, **options), expected)
    assert not layer(x, mask=mask)[~mask].any()
    assert layer(x[:0]).shape == (0, 12) and layer(x[:0], mask=mask[:0]).shape == (0, 12)


def test_routers_that_follow_training() -> None:
    """BASE balances in training and takes the best in eval; jitter moves the router's input in training alone."""
    layer = ffn_ops.MoEFFN(12, 20, 4, router=routing.base)
    x = torch.randn(40, 12)
    assert layer(x, return_routing=True)[1].offsets.diff().tolist() == [10] * 4
    layer.eval()
    _, r, logits = layer(x, return_routing=True)
    assert torch.equal(r.offsets.diff(), torch.bincount(logits.argmax(1), minlength=4))
    layer = ffn_ops.MoEFFN(12, 20, 4, router_jitter=0.1)
    assert not torch.equal(layer.logits(x), layer.logits(x))
    layer.eval()
    assert torch.equal(layer.logits(x), layer.logits(x))


def test_hash_router_takes_token_ids() -> None:
    table = routing.hash_table(50, 4)
    layer = ffn_ops.MoEFFN(12, 20, 4, router=lambda logits, token_ids: routing.hash(token_ids, table, 4, logits=logits))
    tokens = torch.randint(0, 50, (3, 5))
    _, r, _ = layer(torch.randn(3, 5, 12), token_ids=tokens, return_routing=True)
    assert torch.equal(r.offsets.diff(), torch.bincount(table[tokens].flatten(), minlength=4))


def test_router_module_with_state() -> None:
    """A router that is a module is a child: its bias is saved, moved, and updated."""
    layer = ffn_ops.MoEFFN(12, 20, 4, router=routing.BiasedTopK(4, 2))
    assert "choose.bias" in layer.state_dict()
    _, r, _ = layer(torch.randn(40, 12), return_routing=True)
    layer.choose.update(r)
    assert layer.choose.bias.abs().sum() > 0


def test_router_stays_in_float32() -> None:
    """Under autocast and in a bfloat16 model: logits of float32, the choice of float32 products."""
    layer = ffn_ops.MoEFFN(64, 20, 4)
    x = torch.randn(50, 64)
    expected = layer.logits(x)
    with torch.autocast(DEVICE, torch.bfloat16):
        y, _, logits = layer(x, return_routing=True)
    assert torch.equal(logits, expected) and y.dtype is torch.bfloat16
    low = copy.deepcopy(layer).bfloat16()
    y, r, logits = low(x.bfloat16(), return_routing=True)
    wide = nn.functional.linear(x.bfloat16().double(), low.router.weight.double(), low.router.bias.double())
    torch.testing.assert_close(logits, wide.float(), rtol=1e-6, atol=1e-6)  # a product in bfloat16 is off by 1e-2
    assert y.dtype is torch.bfloat16 and r.weight.dtype is torch.float32


def test_meta_and_fake_tensors_give_shapes() -> None:
    layer = ffn_ops.MoEFFN(12, 20, 4, gated=True)
    assert copy.deepcopy(layer).to("meta")(torch.empty(2, 5, 12, device="meta")).shape == (2, 5, 12)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.empty(2, 5, 12)).shape == (2, 5, 12)


def test_hooked_or_replaced_router_is_called() -> None:
    class Shifted(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + torch.tensor([9.0, 8.0, 0.0, 0.0])

    layer = ffn_ops.MoEFFN(12, 20, 4)
    layer.router = Shifted(layer.router)
    assert layer(torch.randn(30, 12), return_routing=True)[1].offsets.diff().tolist() == [30, 30, 0, 0]


def test_compile_export_and_copies(dynamo: None) -> None:
    layer = ffn_ops.MoEFFN(12, 20, 6, router=functools.partial(routing.top_k, k=3, renormalize=True))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((5, 12), (2, 7, 12)):
        x = torch.randn(shape)
        assert torch.equal(compiled(x), layer(x))
        expected = torch.autograd.grad(layer(x).sum(), list(layer.parameters()))
        actual = torch.autograd.grad(compiled(x).sum(), list(layer.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    tokens = torch.export.Dim("T", min=2, max=1000)
    program = torch.export.export(layer, (torch.randn(5, 12),), dynamic_shapes=({0: tokens},))
    x = torch.randn(33, 12)
    assert torch.equal(program.module()(x), layer(x))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (torch.load(buffer, weights_only=False), copy.deepcopy(layer)):
        assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("kind", ["ReLU", "Swish", "SwiGLU", "no bias"])
def test_upcycle(kind: str) -> None:
    """The dense layer's function at the start, in its dtype."""
    dense = {
        "ReLU": lambda: ffn_ops.ReLUFFN(12, 20),
        "Swish": lambda: ffn_ops.SwishFFN(12, 20, 1.7),
        "SwiGLU": lambda: ffn_ops.FeedForward(12, 30, 4, 0.0, recompute=True),
        "no bias": lambda: ffn_ops.FeedForward(12, 30, 4, 0.0, bias=False, activation="gelu"),
    }[kind]().double()
    moe = ffn_ops.upcycle(dense, 5, top_k=3)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(moe(x), dense(x))
    assert moe.num_experts == 5 and (moe.b_in is None) == (kind == "no bias") and moe.recompute == (kind == "SwiGLU")
    with pytest.warns(UserWarning, match="sum to 1"):
        other = ffn_ops.upcycle(dense, 5, router=routing.switch)
    assert not torch.allclose(other(x), dense(x))


def test_upcycle_says_where_not() -> None:
    hooked = ffn_ops.ReLUFFN(4, 6)
    hooked.linear1.register_forward_hook(lambda *_: None)
    for layer, error, message in (
        (ffn_ops.GLU(4, 6), TypeError, "ffn: expected a PlainFFN or a FeedForward, got GLU"),
        (hooked, ValueError, "ffn: expected plain nn.Linear children"),
        (ffn_ops.FeedForward(4, 6, 2, 0.1), ValueError, "ffn: expected dropout 0"),
    ):
        with pytest.raises(error, match=message):
            ffn_ops.upcycle(layer, 4)


def test_errors() -> None:
    for arguments, error, message in (
        ({"num_experts": 0}, ValueError, "num_experts: expected at least 1"),
        ({"num_experts": 2, "top_k": 3}, ValueError, "top_k: expected at most num_experts = 2, got 3"),
        ({"top_k": 1.0}, TypeError, "top_k: expected an integer"),
        ({"router": "switch"}, TypeError, "router: expected a callable"),
        ({"gated": 1}, TypeError, "gated: expected True or False"),
        ({"num_shared": -1}, ValueError, "num_shared: expected at least 0"),
        ({"router_jitter": 2.0}, ValueError, "router_jitter: expected 0 to 1, got 2.0"),
        ({"activation": "softplus"}, ValueError, "activation: expected one of"),
    ):
        with pytest.raises(error, match=message):
            ffn_ops.MoEFFN(4, 6, **arguments)
    layer = ffn_ops.MoEFFN(4, 6)
    for x, error, message in (
        (torch.randn(3, 5), ValueError, r"x: expected shape \[..., 4\]"),
        ([1.0], TypeError, "x: expected a torch.Tensor"),
        (torch.ones(3, 4).int(), TypeError, "x: expected dtype"),
    ):
        with pytest.raises(error, match=message):
            layer(x)
    x, layer = torch.randn(3, 4), ffn_ops.MoEFFN(4, 6, 2, 4, num_identity=1, num_null=1)
    assert layer(x, return_routing=True)[1].counts.tolist() == [3] * 4  # the choice has more than num_experts
    for experts in (2, 5):
        with pytest.raises(ValueError, match=rf"routing.offsets: expected shape \[5\], got \[{experts + 1}\]"):
            layer(x, routing=ffn_ops.routing.top_k(torch.randn(3, experts), 1))
