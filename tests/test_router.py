# SPDX-License-Identifier: BSD-3-Clause
"""The router of a mixture: bits that do not depend on the batch, float32 whatever the layer's dtype, any module."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from device import DEVICE, generator, gradcheck, gradgradcheck
from problems import DTYPES, dtype_name
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ffn_ops
from ffn_ops import reference

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
E = 6


def drawn(T: int, D: int, dtype: torch.dtype, weights: torch.dtype | None = None, seed: int = 0) -> list[Tensor]:
    """x, weight, bias and a gradient of the logits."""
    g = generator(seed)
    x, w, b = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((T, D), (E, D), (E,)))
    d = torch.randn(T, E, generator=g, dtype=torch.float64)
    found = [x.to(dtype), (w / D**0.5).to(weights or dtype), b.to(weights or dtype), d.to(wide(dtype))]
    return found


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def run(x: Tensor, w: Tensor, b: Tensor | None, d: Tensor) -> list[Tensor]:
    given = [t.detach().requires_grad_() for t in (x, w, b) if t is not None]
    z = ffn_ops.route_linear(given[0], given[1], given[2] if b is not None else None)
    return [z.detach(), *torch.autograd.grad(z, given, d)]


@every_dtype
@pytest.mark.parametrize("weights", ["same", "wide"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_values_and_gradients(dtype: torch.dtype, weights: str, bias: bool, isa: str) -> None:
    """Against float64 on the same numbers: logits and sums within float32's rounding, then one rounding to storage."""
    for T, D in ((1, 1), (7, 270), (65, 40), (300, 1100), (0, 5), (3, 0)):
        x, w, b, d = drawn(T, D, dtype, wide(dtype) if weights == "wide" else None)
        actual = run(x, w, b if bias else None, d)
        exact = [t.double() for t in (x, w, b, d)]
        z = reference.route_linear(exact[0], exact[1], exact[2] if bias else None)
        expected = [z, exact[3] @ exact[1], exact[3].t() @ exact[0]] + ([exact[3].sum(0)] if bias else [])
        sizes = [D + 1, E, T, T]
        eps = torch.finfo(wide(dtype)).eps
        absolute = [exact[0].abs() @ exact[1].abs().t() + exact[2].abs(), exact[3].abs() @ exact[1].abs(),
                    exact[3].abs().t() @ exact[0].abs(), exact[3].abs().sum(0)]  # fmt: skip
        for like, found, right, n, magnitude in zip((d, x, w, b), actual, expected, sizes, absolute, strict=False):
            assert found.dtype is like.dtype and found.shape == right.shape
            rounding = torch.finfo(like.dtype).eps * right.abs() + torch.finfo(like.dtype).tiny
            assert ((found.double() - right).abs() <= 2 * (n + 1) ** 0.5 * eps * magnitude + rounding).all()


@every_dtype
def test_a_token_alone_and_in_a_batch(dtype: torch.dtype, isa: str) -> None:
    """Logits and gradients of x; torch's own product fails this at some of the sizes."""
    x, w, b, d = drawn(257, 777, dtype)
    whole = run(x, w, b, d)
    for T in (1, 2, 3, 5, 8, 13, 14, 15, 17, 31, 33, 50, 65, 256):
        for rows in (torch.arange(T), torch.randperm(257, generator=generator(T))[:T]):
            part = run(x[rows], w, b, d[rows])
            assert torch.equal(part[0], whole[0][rows]) and torch.equal(part[1], whole[1][rows]), T


def test_every_expert_has_its_own_bias_where_the_weights_are_packed_in_parts(isa: str) -> None:
    bias = torch.arange(8.0)
    logits = ffn_ops.route_linear(torch.zeros(9, 1_500_000), torch.zeros(8, 1_500_000), bias)
    assert torch.equal(logits, bias.expand(9, 8))


@every_dtype
@pytest.mark.parametrize("router", ["linear", "no bias", "wide"])
def test_a_token_alone_and_in_a_batch_of_the_layer(dtype: torch.dtype, router: str, isa: str) -> None:
    """The whole of it: logits, experts, output and the gradient of x."""
    torch.manual_seed(0)
    layer = ffn_ops.MoEFFN(64, 24, 8, gated=True, activation="silu", bias=router != "no bias").to(dtype)
    if router == "wide":
        layer.router.to(wide(dtype))
    x = torch.randn(50, 64).to(dtype).requires_grad_()
    d = torch.randn(50, 64).to(dtype)
    y, _, logits = layer(x, return_routing=True)
    (d_x,) = torch.autograd.grad(y, x, d)
    assert logits.dtype is wide(dtype)
    for t in range(0, 50, 3):
        own = x[t : t + 1].detach().requires_grad_()
        y1, _, logits1 = layer(own, return_routing=True)
        assert torch.equal(logits1, logits[t : t + 1]) and torch.equal(y1, y[t : t + 1]), t
        assert torch.equal(torch.autograd.grad(y1, own, d[t : t + 1])[0], d_x[t : t + 1]), t


@pytest.mark.cpu_only("threads are the CPU's")
@every_dtype
def test_threads(dtype: torch.dtype, threads: None) -> None:
    given = drawn(600, 900, dtype)
    torch.set_num_threads(1)
    expected = run(*given)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert all(torch.equal(a, b) for a, b in zip(run(*given), expected, strict=True))


def test_first_and_second_order() -> None:
    x, w, b, _ = (t.requires_grad_() for t in drawn(4, 5, torch.float64))
    assert gradcheck(ffn_ops.route_linear, (x, w, b)) and gradgradcheck(ffn_ops.route_linear, (x, w, b))
    assert gradgradcheck(lambda x, w: ffn_ops.route_linear(x, w).square(), (x, w))
    low = [t.detach().bfloat16().requires_grad_() for t in (x, w, b)]
    z = ffn_ops.route_linear(*low).square().sum()
    grads = torch.autograd.grad(z, low, create_graph=True)
    second = torch.autograd.grad(sum(g.float().square().sum() for g in grads), low)
    exact = [t.detach().double().requires_grad_() for t in low]
    firsts = torch.autograd.grad((exact[0] @ exact[1].t() + exact[2]).square().sum(), exact, create_graph=True)
    expected = torch.autograd.grad(sum(g.square().sum() for g in firsts), exact)
    for a, e in zip(second, expected, strict=True):
        assert a.dtype is torch.bfloat16
        torch.testing.assert_close(a.double(), e, rtol=0.05, atol=0.05 * e.abs().max().item())


@every_dtype
def test_saves_what_it_was_given(dtype: torch.dtype) -> None:
    """No float32 copy of x waits for backward."""
    x, w, b, _ = (t.requires_grad_() for t in drawn(9, 20, dtype))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        ffn_ops.route_linear(x, w, b)
    assert saved == [x.data_ptr(), w.data_ptr()]


def test_strides_and_leading_dimensions() -> None:
    x, w, b, d = drawn(24, 20, torch.float32)
    expected = run(x, w, b, d)
    for other in (x.t().contiguous().t(), torch.cat([x, x], 1)[:, :20]):
        assert all(torch.equal(p, q) for p, q in zip(run(other, w.t().contiguous().t(), b, d), expected, strict=True))
    z = ffn_ops.route_linear(x.view(2, 3, 4, 20), w, b)
    assert torch.equal(z, expected[0].view(2, 3, 4, E)) and torch.equal(ffn_ops.route_linear(x[0], w, b), z[0, 0, 0])
    summed = run(x, w, b, torch.ones(1, 1).expand(24, E))  # as a sum's backward gives it
    torch.testing.assert_close(summed[3], torch.full((E,), 24.0))


def test_transformations(dynamo: None) -> None:
    """Autocast, compile, torch.func and the counting of FLOPs."""
    x, w, b, d = drawn(9, 12, torch.float32)
    expected = run(x, w, b, d)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert all(torch.equal(p, q) for p, q in zip(run(x, w, b, d), expected, strict=True))
    compiled = torch.compile(ffn_ops.route_linear, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (9, 5):
        given = [t.detach().requires_grad_() for t in (x[:T], w, b)]
        z = compiled(*given)
        assert torch.equal(z, expected[0][:T])
        assert torch.equal(torch.autograd.grad(z, given, d[:T])[0], expected[1][:T])
    grads = torch.func.grad(lambda x, w, b: (ffn_ops.route_linear(x, w, b) * d).sum(), (0, 1, 2))(x, w, b)
    assert all(torch.equal(p, q) for p, q in zip(grads, expected[1:], strict=True))
    z = torch.vmap(ffn_ops.route_linear, (0, None, None))(x.view(3, 3, 12), w, b)
    assert torch.equal(z.view(9, E), expected[0])
    with FlopCounterMode(display=False) as counter:
        run(x, w, b, d)
    assert counter.get_total_flops() == 3 * 2 * 9 * 12 * E
    assert ffn_ops.route_linear(x.to("meta").half(), w.to("meta").half()).dtype is torch.float32


def test_errors() -> None:
    x, w, b, _ = drawn(4, 5, torch.bfloat16)
    for arguments, error, message in (
        (([1.0], w, b), TypeError, "x: expected a torch.Tensor"),
        ((x.int(), w, b), TypeError, "x: expected dtype"),
        ((x[0, 0], w, b), ValueError, r"x: expected shape \[..., D\]"),
        ((x, w[:, :4], b), ValueError, r"weight: expected shape \[E, 5\], got \[6, 4\]"),
        ((x, w.half(), b), TypeError, "weight: expected dtype bfloat16 or float32, got float16"),
        ((x.double(), w, b), TypeError, "weight: expected dtype float64, got bfloat16"),
        ((x, w, b[:3]), ValueError, r"bias: expected shape \[6\]"),
        ((x, w, b.float()), TypeError, "bias: expected dtype bfloat16 as weight has, got float32"),
        ((x, w.to("meta"), b), ValueError, "weight: expected device"),
    ):
        with pytest.raises(error, match=message):
            ffn_ops.route_linear(*arguments)


# ---- routers that are called ----------------------------------------------------------------------------------------


class Subclass(nn.Linear):
    pass


class Own(nn.Module):
    """Two layers, a norm with running means, no attribute of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *_: None)
    return layer


def lora(layer: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"router": layer})
    config = peft.LoraConfig(r=4, target_modules=["router"], init_lora_weights=False)
    return peft.get_peft_model(model, config).base_model.model["router"]


ROUTERS: dict[str, Any] = {
    "hook": lambda: hooked(nn.Linear(64, 8)),
    "subclass": lambda: Subclass(64, 8),
    "no bias, subclass": lambda: Subclass(64, 8, bias=False),
    "own": Own,
    "sequence": lambda: nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 8)),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(64, 8)),
    "LoRA": lambda: lora(nn.Linear(64, 8)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("name", ROUTERS)
def test_called_routers_compute_in_float32(name: str, dtype: torch.dtype) -> None:
    """Logits and gradients of a 16-bit layer's router are those of its float32 copy, also under autocast."""
    torch.manual_seed(0)
    layer = ffn_ops.MoEFFN(64, 10, 8)
    layer.router = ROUTERS[name]()
    layer = layer.to(dtype)
    other = copy.deepcopy(layer.router).float()
    x = torch.randn(40, 64).to(dtype)
    expected = other(x.float())
    trained = [p for p in layer.router.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected.square().sum(), [p for p in other.parameters() if p.requires_grad])
    before = {key: id(t) for key, t in layer.router.state_dict(keep_vars=True).items()}
    for autocast in (False, True):
        with torch.autocast(DEVICE, dtype, enabled=autocast):
            logits = layer.logits(x)
        assert logits.dtype is torch.float32
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        grads = torch.autograd.grad(logits.square().sum(), trained)
        for p, grad, right in zip(trained, grads, wanted, strict=True):
            assert grad.dtype is p.dtype is dtype
            torch.testing.assert_close(grad, right.to(dtype), rtol=0.02, atol=1e-2 * right.abs().max().item())
    assert before == {key: id(t) for key, t in layer.router.state_dict(keep_vars=True).items()}
    if name == "own":  # two calls moved its buffers: in place, and as far as float32 would
        other(x.float())
        torch.testing.assert_close(layer.router.norm.running_var.float(), other.norm.running_var, rtol=0.02, atol=0.02)
        assert layer.router.norm.num_batches_tracked == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_a_hook_changes_no_logits(dtype: torch.dtype) -> None:
    """It sees float32, once a call, with the module that it was put on."""
    torch.manual_seed(0)
    layer = ffn_ops.MoEFFN(256, 10, 8).to(dtype)
    x = torch.randn(64, 256).to(dtype)
    plain = layer.logits(x)
    seen: list[Any] = []
    layer.router.register_forward_pre_hook(lambda m, a: seen.append((m, a[0].dtype)))
    layer.router.register_forward_hook(lambda m, a, z: seen.append((m, z.dtype)))
    eps = torch.finfo(wide(dtype)).eps
    torch.testing.assert_close(layer.logits(x), plain, rtol=8 * eps, atol=8 * eps)
    assert seen == [(layer.router, wide(dtype))] * 2
    layer.router.register_full_backward_hook(lambda m, d_in, d_out: seen.append((m, d_out[0].dtype)))
    layer.logits(x.requires_grad_()).sum().backward()
    assert seen[-1] == (layer.router, wide(dtype)) and len(seen) == 5 and layer.router.weight.grad.dtype is dtype
    layer.router.register_forward_hook(lambda m, a, z: z + 1)
    torch.testing.assert_close(layer.logits(x), plain + 1, rtol=8 * eps, atol=8 * eps)


def test_called_routers_compile(dynamo: None) -> None:
    layer = ffn_ops.MoEFFN(64, 10, 8)
    layer.router = hooked(Subclass(64, 8))
    layer = layer.bfloat16()
    x = torch.randn(9, 64).bfloat16()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    grads = [torch.autograd.grad(f(x).square().sum(), list(layer.parameters())) for f in (compiled, layer)]
    torch.testing.assert_close(grads[0], grads[1])


class Slow(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(1e-3)  # others may come in between
        return super().forward(x)


def test_called_routers_in_threads() -> None:
    """Calls at the same time leave the module its own parameters."""
    layer = ffn_ops.MoEFFN(64, 10, 8)
    layer.router = Slow(64, 8)
    layer = layer.bfloat16()
    x = torch.randn(20, 64).bfloat16()
    before, expected = [id(p) for p in layer.router.parameters()], layer.logits(x)
    with ThreadPoolExecutor(4) as pool:
        for z in pool.map(lambda _: layer.logits(x), range(16)):
            assert torch.equal(z, expected)
    assert [id(p) for p in layer.router.parameters()] == before


def test_routers_that_give_no_logits() -> None:
    layer = ffn_ops.MoEFFN(64, 10, 8)
    for router, error, message in (
        (nn.Linear(64, 7), ValueError, r"router: expected logits \[3, 8\] from Linear, got \[3, 7\]"),
        (
            nn.Sequential(nn.Linear(64, 7)),
            ValueError,
            r"router: expected logits \[3, 8\] from Sequential, got \[3, 7\]",
        ),
        (nn.GRU(64, 8), TypeError, "router: expected logits, a torch.Tensor, from GRU, got tuple"),
    ):
        layer.router = router
        with pytest.raises(error, match=message):
            layer(torch.randn(3, 64))


def test_jitter_is_not_rounded() -> None:
    """It moves the router's input by up to 1e-3, which bfloat16 could not hold."""
    layer = ffn_ops.MoEFFN(64, 10, 8, router_jitter=1e-3).bfloat16()
    x = torch.randn(30, 64).bfloat16()
    moved, still = layer.logits(x), layer.eval().logits(x)
    assert not torch.equal(moved, still)
    torch.testing.assert_close(moved, still, rtol=0, atol=0.02)


@pytest.mark.cpu_only("processes are the host's")
def test_a_forked_child_calls_routers() -> None:
    """Forked while another thread is in a called router: the child does not wait for that thread, which it does not
    have."""
    layer = ffn_ops.MoEFFN(8, 6, 4).bfloat16()
    inside, leave = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        leave.wait(30)

    x = torch.randn(3, 8, dtype=torch.bfloat16)
    expected = layer.logits(x)
    hook = layer.router.register_forward_hook(wait)
    thread = threading.Thread(target=layer.logits, args=(x,))
    thread.start()
    assert inside.wait(30)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that waits
        leave.set()
        os._exit(0 if torch.allclose(layer.logits(x), expected) else 3)
    status = os.waitpid(child, 0)[1]
    leave.set()
    thread.join()
    hook.remove()
    assert status == 0
