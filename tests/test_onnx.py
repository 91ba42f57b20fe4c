# SPDX-License-Identifier: BSD-3-Clause
"""Models exported to ONNX with our table and run by onnxruntime compute the same as the modules, for every T."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from problems import gate_of
from torch import Tensor, nn

import ffn_ops
from ffn_ops import Gate, reference, routing
from ffn_ops._gate import LEARNED

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.cpu_only("onnxruntime's CPU provider runs the graphs")


class Everything(nn.Module):
    """Every operator that has a translation, every activation, and the routers that need one of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = ffn_ops.GELUFFN(8, 12)
        self.swiglu = ffn_ops.FeedForward(8, 12, 4, 0.1)
        self.gates = ffn_ops.GatedFFN(8, 12, 2, out_proj=True)
        self.own = nn.ParameterDict({name: torch.tensor([*gate_of(name).own.values()]) for name in LEARNED})
        capacity = functools.partial(routing.top_k, k=2, renormalize=True, capacity_factor=0.7)
        self.mixtures = nn.ModuleList(
            [
                ffn_ops.MoEFFN(8, 6, 4, router=capacity, num_shared=1),
                ffn_ops.MoEFFN(8, 6, 4, router=routing.BiasedTopK(4, 2, num_groups=2, top_groups=1), gated=True),
                ffn_ops.MoEFFN(8, 6, 3, router=functools.partial(routing.top_k, k=2, by_logits=True)),
                ffn_ops.MoEFFN(8, 6, 4, router=routing.BiasedTopK(4, 2, score="sqrt_softplus", shared=1, softcap=2.0)),
                ffn_ops.MoEFFN(8, 6, 4, router=functools.partial(routing.sparse_mixer, training=False)),
            ]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        outs = [layer(x) for layer in (self.plain, self.swiglu, self.gates, *self.mixtures)]
        outs += [ffn_ops.gated_act(x, activation=gate_of(name)) for name in ffn_ops.activations()]
        outs += [ffn_ops.learned_act(x, own, activation=name) for name, own in self.own.items()]
        outs.append(ffn_ops.gated_act(x, x.flip(1), activation=Gate("swish", beta=1.7, limit=0.5, up_shift=1.0)))
        m: Any = self.mixtures[1]
        route = routing.top_k(m.logits(x), 2, capacity_factor=0.7)
        rows = ffn_ops.moe_dispatch(x, route)
        outs += [ffn_ops.gated_act(x, x.flip(1), activation=gate_of(name)) for name in reference.UPS]
        gate: dict[str, Any] = {"gated": True, "activation": Gate("gelu", limit=0.3, up_shift=1.0)}
        out = ffn_ops.moe_experts(rows, route.offsets, m.w_in, m.w_down, b_in=m.b_in, b_down=m.b_down, **gate)
        outs.append(ffn_ops.moe_combine(out, route))
        gate["activation"] = gate["activation"].replace(interleaved=True)
        outs.append(ffn_ops.moe(x, route, m.w_in, m.w_down, **gate))
        outs.append(ffn_ops.ffn(x, m.w_in[0], m.w_down[0], **gate))
        return outs


def session(model: nn.Module, x: Tensor) -> Any:
    from ffn_ops.integrations.onnx import translation_table

    program = torch.onnx.export(
        model.eval().requires_grad_(False), (x,), dynamo=True, custom_translation_table=translation_table(),
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), verbose=False, optimize=False,
    )  # fmt: skip
    return onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])


def assert_runs_alike(model: nn.Module, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    run = session(model, torch.randn(6, 8).to(dtype))
    for T in (1, 6, 19):
        x = torch.randn(T, 8).to(dtype)
        expected = model(x)
        actual = run.run(None, {run.get_inputs()[0].name: x.numpy()})
        for y, z in zip(actual, expected, strict=True):
            assert z.abs().max() > 1e-3 or T == 1
            torch.testing.assert_close(torch.from_numpy(y), z, rtol=tolerance, atol=tolerance)


def test_every_translation() -> None:
    torch.manual_seed(1)
    assert_runs_alike(Everything(), torch.float32, 1e-5)


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ffn_ops.FeedForward(8, 12, 4, 0.0), ffn_ops.MoEFFN(8, 6, 4)])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def test_float16() -> None:
    """Arithmetic in float32, rounded once, as ours."""
    torch.manual_seed(1)
    assert_runs_alike(Half().half(), torch.float16, 1e-3)


class InDouble(nn.Module):
    """onnxruntime has no erf in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ffn_ops.FeedForward(8, 12, 4, 0.0), ffn_ops.MoEFFN(8, 6, 4, activation="silu")])

    def forward(self, x: Tensor) -> list[Tensor]:
        names = [name for name in ffn_ops.activations() if name != "gelu"]
        plain = [ffn_ops.gated_act(x, activation=gate_of(name)) for name in names]
        gated = [ffn_ops.gated_act(x, x.flip(1), activation=gate_of(name, limit=0.3, up_shift=0.7)) for name in names]
        return [*plain, *gated, *[layer(x) for layer in self.layers]]


def test_float64() -> None:
    torch.manual_seed(1)
    assert_runs_alike(InDouble().double(), torch.float64, 1e-13)


def test_what_onnx_cannot_express_is_named() -> None:
    router = functools.partial(routing.top_k, k=2, capacity_factor=0.7, drop="weight")
    with pytest.raises(torch.onnx.OnnxExporterError) as caught:
        session(ffn_ops.MoEFFN(8, 6, 4, router=router), torch.randn(6, 8))
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, NotImplementedError):
        error = error.__cause__
    assert 'ffn_ops: moe_sort of drop="weight" has no translation to ONNX' in str(error)
