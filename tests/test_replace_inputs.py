# SPDX-License-Identifier: BSD-3-Clause
"""The replaced layer takes every input that the untouched one takes, and computes the same: other widths and ranks, one
row, merged rows, other layouts, also in vision models of transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from replacing import D, LlamaLike, Plain
from same_function import operators, results, seeded
from seen import Seen
from torch import Tensor, nn

import ffn_ops

W = 4 * D


class DeepEmbed(LlamaLike):
    """As in x-transformers: a second argument, which is None as a rule."""

    def forward(self, x: Tensor, deep_embed: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if deep_embed is None else y * deep_embed


class Wrapper(nn.Module):
    """Does not name what it hands on."""

    def __init__(self, inner: nn.Module, norm: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D) if norm else None
        self.inner = nn.ModuleList([inner])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.norm is None:
            return self.inner[0](x, *args, **kwargs)
        return x + self.inner[0](self.norm(x), *args, **kwargs)


@pytest.mark.parametrize(
    "make", [lambda: Wrapper(DeepEmbed()), lambda: Wrapper(Wrapper(DeepEmbed()), norm=False)], ids=["one", "two"]
)
def test_wrappers(make: Callable[[], nn.Module]) -> None:
    """The layer below is fused where the further argument does nothing, however it is given."""
    layer, plain = seeded(make), seeded(make)
    ffn_ops.replace(layer)
    assert [(e.status, e.layer) for e in ffn_ops.replace_report(layer).entries] == [("replaced", "DeepEmbed")]
    x = torch.randn(2, 3, D)
    for args, kwargs in (((), {}), ((None,), {}), ((), {"deep_embed": None})):
        with Seen() as seen:
            y = layer(x, *args, **kwargs)
        assert seen.names == ["ffn"]
        torch.testing.assert_close(y, plain(x, *args, **kwargs))
    torch.testing.assert_close(layer(x, x), plain(x, x))
    torch.testing.assert_close(layer(x, deep_embed=x), plain(x, deep_embed=x))


class Merger(nn.Module):
    """Lays patches side by side, as vision towers do before their language model."""

    def __init__(self, norm: int, lay: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(norm)
        self.fc1, self.act, self.fc2 = nn.Linear(W, W), nn.GELU(), nn.Linear(W, 20)
        self.lay = lay

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(self.lay(self, x))))


class Squeezing(LlamaLike):
    """One row is treated in another way than several."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.squeeze())


class Padding(LlamaLike):
    """Takes narrower inputs too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (0, D - x.shape[-1])))


# A shape for which the layer must be fused, so that nothing is compared with itself alone.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "norm, then side by side": (lambda: Merger(D, lambda m, x: m.norm(x).view(-1, W)), (8, D)),
    "side by side, then norm": (lambda: Merger(W, lambda m, x: m.norm(x.view(-1, W))), (8, D)),
    "in groups of four": (lambda: Merger(D, lambda m, x: m.norm(x.reshape(-1, 4, D)).view(-1, W)), (8, D)),
    "squeezing": (Squeezing, ()),
    "padding": (Padding, (8, D)),
    "plain": (LlamaLike, (8, D)),
}
SHAPES = [
    (*lead, width)
    for width, lead in product((W, 2 * D, D, D // 2), ((), (1,), (8,), (1, 1), (2, 4), (1, 4), (4, 1), (2, 1, 4), (0,)))
]


@pytest.mark.filterwarnings("ignore:ffn_ops.replace")
@pytest.mark.parametrize("name", LAYERS)
def test_shapes(name: str) -> None:
    make, fused = LAYERS[name]
    layer, plain = (seeded(make) for _ in range(2))
    ffn_ops.replace(layer)
    taken = 0
    for shape in SHAPES:
        x = torch.randn(shape)
        try:
            expected = results(plain, lambda model, x=x: model(x))
        except RuntimeError:
            continue
        torch.testing.assert_close(results(layer, lambda model, x=x: model(x)), expected, equal_nan=True)
        taken += 1
    assert taken >= 6
    if fused:
        assert operators(layer, torch.randn(fused)) == ["ffn"]


@pytest.mark.cpu_only("torch has products of these layouts there")
@pytest.mark.filterwarnings("ignore:.*prototype|.*beta state")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "nested"])
def test_layouts(layout: str) -> None:
    """Sparse and nested inputs run the layer's own forward."""
    layer, plain = (seeded(LlamaLike) for _ in range(2))
    ffn_ops.replace(layer)
    x = torch.randn(5, D)
    given: Any = torch.nested.nested_tensor([x, x[:3]]) if layout == "nested" else getattr(x, layout)()
    actual, expected = layer(given), plain(given)
    if layout == "nested":
        actual, expected = actual.to_padded_tensor(0.0), expected.to_padded_tensor(0.0)
    assert torch.equal(actual, expected)


@pytest.mark.cpu_only("torch has products of this layout there")
def test_sparse_weights() -> None:
    layer = seeded(lambda: Plain(nn.GELU()))
    layer.fc2.weight = nn.Parameter(layer.fc2.weight.detach().to_sparse_csr(), requires_grad=False)
    x = torch.randn(5, D)
    expected = layer(x)
    torch.testing.assert_close(ffn_ops.replace(layer)(x), expected)
    assert "fc2 is called (its weight is torch.sparse_csr)" in str(ffn_ops.replace_report(layer))


# ---- vision towers of transformers ----------------------------------------------------------------------------------

VISION = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "patch_size": 4, "in_channels": 3}
TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl.Qwen2VLVisionConfig": (
        "Qwen2VisionTransformerPretrainedModel", {**VISION, "embed_dim": 32, "hidden_size": 24}
    ),
    "qwen2_5_vl.Qwen2_5_VLVisionConfig": (
        "Qwen2_5_VisionTransformerPretrainedModel",
        {**VISION, "out_hidden_size": 24, "window_size": 16, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl.Qwen3VLVisionConfig": (
        "Qwen3VLVisionModel",
        {**VISION, "out_hidden_size": 24, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOWERS)
def test_vision_tower(name: str) -> None:
    """Their mergers norm, lay four patches side by side and multiply: taken as one operator, the same values."""
    transformers = pytest.importorskip("transformers")
    module, config = name.split(".")
    cls, options = TOWERS[name]
    models = getattr(transformers.models, module)
    torch.manual_seed(0)
    plain = getattr(getattr(models, f"modeling_{module}"), cls)(getattr(models, config)(**options))
    model = ffn_ops.replace(copy.deepcopy(plain))
    mergers = [path for path in ffn_ops.replace_report(model).paths("replaced") if "merger" in path]
    assert mergers and all("_ffn_ops_plan" in vars(model.get_submodule(path)) for path in mergers)

    def call(tower: nn.Module) -> Tensor:
        pixels = torch.linspace(-3, 3, 16 * 96).sin().reshape(16, 96)
        output = tower(pixels, grid_thw=torch.tensor([[1, 4, 4]]))
        merged = output.pooler_output
        return torch.cat([merged, *getattr(output, "deepstack_features", [])]).square()

    torch.testing.assert_close(results(model, call), results(plain, call), rtol=1e-4, atol=1e-6)
