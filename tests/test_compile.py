# SPDX-License-Identifier: BSD-3-Clause
"""Promise 6, with the compiler: torch.compile in one graph, one graph for every T, torch.export, AOTInductor.

The operators are opaque to the compiler, so compiled results have the bits of eager ones.
"""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from device import DEVICE
from problems import FFN_FORMS, FORMS, Problem, assert_same_bits, assert_same_numbers, results
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import ffn_ops

pytestmark = pytest.mark.usefixtures("dynamo")

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++").split()[0]) is None, reason="inductor needs a C++ compiler"
)


@pytest.mark.parametrize("form", FORMS)
def test_one_graph(form: str) -> None:
    problem = Problem(form, T=9, D=12, F=17, O=8)
    tensors, d_y = problem.draw(dtype=torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(problem.ours, backend=counter, fullgraph=True)
    assert_same_bits(results(compiled, tensors, d_y), results(problem.ours, tensors, d_y))
    assert counter.frame_count == 1


@pytest.mark.parametrize("form", FORMS)
def test_one_graph_for_every_t(form: str) -> None:
    """Forward and backward at six sizes: the graph of the first. (beta is a symbol there: it is checked as such.)"""
    problem = Problem(form, D=12, F=17, O=8, E=7)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(problem.ours, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for T in (5, 2, 9, 64, 300, 17):
        problem = Problem(form, T=T, D=12, F=17, O=8, E=7)
        tensors, d_y = problem.draw(dtype=torch.float32)
        assert_same_bits(results(compiled, tensors, d_y), results(problem.ours, tensors, d_y), f"T={T}")
        counts.append(counter.frame_count)
    assert counts[0] > 0 and counts == counts[:1] * 6


def test_leading_dimensions_and_default_dynamic() -> None:
    """[B, T, D] without a hint: one static graph, then one for every B and T."""
    w, up, down = torch.randn(17, 12), torch.randn(17, 12), torch.randn(8, 17)
    counter = CompileCounterWithBackend("aot_eager")

    def layer(x: Tensor) -> Tensor:
        return ffn_ops.ffn(x, w, down, w_up=up) + ffn_ops.gated_act(ffn_ops.gated_linear(x, w[:8], up[9:]))

    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for shape in ((2, 5, 12), (3, 4, 12), (4, 9, 12), (7, 2, 12)):
        x = torch.randn(shape)
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count <= 2


@needs_compiler
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
def test_inductor_training_step(recompute: bool) -> None:
    """The default backend, with other work around the operator for it to fuse, at several T."""
    torch.manual_seed(0)
    model = ffn_ops.FeedForward(12, 24, 8, 0.0, recompute=recompute)
    norm = nn.LayerNorm(12)
    leaves = [*model.parameters(), *norm.parameters()]

    def step(x: Tensor) -> Tensor:
        return (x + model(norm(x))).square().mean()

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for T in (3, 8, 65):
        x = torch.randn(T, 12)
        loss, expected = compiled(x), step(x)
        grads, wanted = torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)
        torch.testing.assert_close((loss, *grads), (expected, *wanted))


def test_compiled_double_backward() -> None:
    """torch.compile does not differentiate twice; it raises an error and never returns a wrong result."""
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    compiled = torch.compile(lambda x: ffn_ops.gated_linear(x, w, w), backend="aot_eager", fullgraph=True)
    (d_x,) = torch.autograd.grad(compiled(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|create_graph"):
        d_x.sum().backward()


def test_compiled_under_autocast() -> None:
    x, w, down = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True), torch.randn(2, 5)

    def call(x: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return ffn_ops.ffn(x, w, down)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), call(x)) and compiled(x).dtype is torch.bfloat16
    assert torch.equal(*(torch.autograd.grad(f(x).sum(), w)[0] for f in (compiled, call)))


def test_compiled_func_transforms() -> None:
    """vmap and grad inside a graph, with the bits of eager. (A regression: an error for grad.)"""
    w, down = torch.randn(5, 4), torch.randn(2, 5)
    x = torch.randn(3, 6, 4)

    def layer(x: Tensor) -> Tensor:
        return ffn_ops.ffn(x, w, down)

    mapped = torch.compile(torch.vmap(layer), backend="aot_eager")(x)
    assert_same_numbers("plain", {"y": mapped}, {"y": layer(x)})
    grad = torch.func.grad(lambda x: layer(x).sum())
    assert torch.equal(torch.compile(grad, backend="aot_eager", fullgraph=True)(x), grad(x))


def test_errors_in_a_graph() -> None:
    """The message of eager. Where dynamo must not fall back, it wraps the message into its own error."""
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    wrong: list[tuple[str, Any]] = [
        ("w_down: expected shape \\[D_out, 5\\], got \\[5, 4\\]", lambda x: ffn_ops.ffn(x, w, w)),
        ("activation: expected one of relu", lambda x: ffn_ops.gated_linear(x, w, w, activation="sillu")),
        ("up: expected dtype float32 as x has, got float64", lambda x: ffn_ops.gated_act(x, x.double())),
    ]
    for message, call in wrong:
        with pytest.raises((TypeError, ValueError), match=message):
            torch.compile(call, backend="aot_eager")(x)
        with pytest.raises(Exception, match=message):
            torch.compile(call, backend="aot_eager", fullgraph=True)(x)


class Stack(nn.Module):
    """Every operator once."""

    def __init__(self) -> None:
        super().__init__()
        self.glu = ffn_ops.GLU(12, 12)
        for linear in self.glu.children():  # a regression: packages did not take operators' empty lists
            linear.bias = None
        self.gates = ffn_ops.GatedFFN(12, 20, 2, out_proj=True)
        self.plain = ffn_ops.GELUFFN(12, 24)
        self.swiglu = ffn_ops.FeedForward(12, 24, 8, 0.1)
        self.moe = ffn_ops.MoEFFN(12, 10, 4, router=functools.partial(ffn_ops.routing.top_k, k=3, capacity_factor=0.9))
        self.coded = nn.Sequential(ffn_ops.FeedForward(12, d_ff=8), ffn_ops.GELUFFN(12, 8), ffn_ops.MoEFFN(12, 10, 4))
        ffn_ops.quantize_(self.coded, "int8")

    def forward(self, x: Tensor) -> Tensor:
        return self.coded(self.moe(self.swiglu(self.plain(self.gates(self.glu(ffn_ops.gated_act(x, x)))))))


def exported(strict: bool) -> tuple[Stack, torch.export.ExportedProgram]:
    torch.manual_seed(0)
    model = Stack().eval().requires_grad_(False)
    rows = torch.export.Dim("rows", min=1, max=4096)
    return model, torch.export.export(model, (torch.randn(6, 12),), dynamic_shapes={"x": {0: rows}}, strict=strict)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_export(strict: bool, tmp_path: Path) -> None:
    """One program for every T, fused (a regression: fake weights counted as unknown ones), saved and loaded."""
    model, program = exported(strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert [t for t in targets if t.startswith("ffn_ops")] == [
        "ffn_ops.gated_act.default", "ffn_ops.gated_linear.default", "ffn_ops.gated_linear.default",
        "ffn_ops.ffn.default", "ffn_ops.ffn.default",
        "ffn_ops.route_linear.default", "ffn_ops.route_top_k.default", "ffn_ops.moe_sort.default",
        "ffn_ops.moe.default", "ffn_ops.moe_quantized.default", "ffn_ops.moe_quantized.default",
        "ffn_ops.route_linear.default", "ffn_ops.route_top_k.default", "ffn_ops.moe_sort.default",
        "ffn_ops.moe_quantized.default",
    ]  # fmt: skip
    torch.export.save(program, tmp_path / "stack.pt2")
    loaded = torch.export.load(tmp_path / "stack.pt2")
    for T in (1, 6, 77):
        x = torch.randn(T, 12)
        assert torch.equal(program.module()(x), model(x)) and torch.equal(loaded.module()(x), model(x))


@needs_compiler
def test_aot_inductor(tmp_path: Path) -> None:
    """Compiled to a package, loaded, run at several T. The package needs the operator library loaded, nothing else."""
    model, program = exported(strict=False)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "stack.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    for T in (1, 6, 77):
        x = torch.randn(T, 12)
        torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.parametrize("form", FFN_FORMS)
def test_nothing_is_saved_for_inference(form: str) -> None:
    """A graph without gradients asks the operator for no pre-activations."""
    problem = Problem(form)
    tensors, _ = problem.draw(dtype=torch.float32)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.compile(problem.ours, backend=keep, fullgraph=True)(**tensors)
    (call,) = [node for graph in graphs for node in graph.graph.nodes if "ffn" in str(node.target)]
    assert call.args[-1] is False
