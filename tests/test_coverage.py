# SPDX-License-Identifier: BSD-3-Clause
"""docs/coverage.md lists every class of experts of the installed transformers; a few are compared here, the others by
``make coverage-transformers``."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from ffn_ops.integrations import _exchange, _forwards
from ffn_ops.integrations.transformers import register

pytestmark = pytest.mark.cpu_only("transformers builds its models on the CPU")
DOCS = Path(__file__).parents[1] / "docs"
register()


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


coverage = script("coverage")
VERSION = re.search(r"transformers (\d+)\.(\d+)", (DOCS / "coverage.md").read_text(encoding="utf-8"))


def test_every_class_of_experts_is_on_the_page() -> None:
    """A new release shows here what it adds: run make coverage-transformers, and serve it or say why not."""
    assert VERSION is not None
    if tuple(map(int, transformers.__version__.split(".")[:2])) < tuple(map(int, VERSION.groups())):
        pytest.skip("a transformers older than the page's")
    listed = coverage.rows_of_page()
    found = list(coverage.classes())
    names = {
        (each.module.split(".")[2], name)
        for each in found
        for name in ([each.name] if each.declared else coverage.EXCHANGED_IN.get(each.name, [each.name]))
    }
    assert names == listed.keys()
    assert sum(each.declared for each in found) == 68
    assert set(listed.values()) == {"works", "not a mixture"}
    assert [layer for (_, layer), state in listed.items() if state == "not a mixture"] == [*coverage.NO_MIXTURE]
    exchanged = {name.rpartition(".")[2] for name in _forwards.EXCHANGES}
    assert exchanged == {layer for _, layer in names} & exchanged


@pytest.mark.parametrize("name", ["Inkling2Experts", "MuseSparkExperts", "LongcatFlashExperts", "Llama4TextExperts"])
def test_a_few_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Soft caps, a norm on each expert's rows, experts that pass x through, scaled inputs."""
    monkeypatch.setattr(coverage, "DRAWS", 6)
    (found,) = [each for each in KNOWN if each.name == name]
    (row,) = coverage.rows(found)
    assert row.state == "works", row.note


KNOWN = [
    coverage.Experts(f"transformers.models.{place}.modeling_{place}", name, declared)
    for place, name, declared in [
        ("inkling2", "Inkling2Experts", True),
        ("muse_spark", "MuseSparkExperts", True),
        ("longcat_flash", "LongcatFlashExperts", False),
        ("llama4", "Llama4TextExperts", False),
    ]
]


def test_the_comparison_tells_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """One part in ten thousand too much; another precision; its own code in place of ours."""
    name = "transformers.models.dbrx.modeling_dbrx.DbrxExperts"
    module, call = _exchange.tiny(name)
    monkeypatch.setattr(coverage, "DRAWS", 2)

    def scaled(by: float, dtype: torch.dtype) -> Any:
        def change(fused: nn.Module) -> None:
            register(fused)
            fused.register_forward_hook(lambda m, a, y: by * y if y.dtype is dtype else y)

        return change

    with pytest.raises(ValueError, match=r"float64: output 0 differs"):
        coverage.compare(module, call, scaled(1.0001, torch.float64))
    with pytest.raises(ValueError, match=r"output 0: (rms|largest) error"):
        coverage.compare(module, call, scaled(1.05, torch.bfloat16))
    with pytest.raises(ValueError, match="no operator of this package runs"):
        coverage.compare(module, call, lambda fused: None)
    coverage.compare(module, call, register)


def test_what_a_source_holds() -> None:
    """Weights of experts, not of a router, in each form that transformers has."""
    holds = {
        "nn.Parameter(torch.empty(self.num_experts, 2 * self.dim, self.hidden))": True,
        "nn.Parameter(torch.empty(self.num_experts * self.dim, self.hidden))": True,
        "nn.Embedding(self.num_experts, self.hidden)": True,
        "nn.ModuleList([MLP(config) for _ in range(config.num_experts)])": True,
        "nn.Parameter(torch.empty(self.num_experts, self.hidden))": False,
        "nn.Linear(self.hidden, self.num_experts)": False,
        "nn.Buffer(torch.zeros(config.num_experts))": False,
        "MoEExperts(config)": False,
    }
    for text, expected in holds.items():
        (node,) = coverage.ast.parse(f"class A:\n def __init__(self, config):\n  self.w = {text}").body
        assert coverage._holds_experts(node) is expected, text


def test_dense_layers_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Equal blocks count once, each reason has its layers, and models that cannot be built are counted apart."""
    dense = script("coverage_dense")

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act, self.second = nn.Linear(8, 16), nn.PReLU(16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.act(self.first(x)))  # type: ignore[no-any-return]

    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def broken() -> nn.Module:
        raise OSError("no file")

    models = {
        "plain": lambda: nn.Sequential(mlp(), mlp()), "learned": lambda: nn.Sequential(mlp(), Learned()),
        "none": lambda: nn.Linear(2, 2), "broken": broken,
    }  # fmt: skip
    monkeypatch.setitem(dense.LIBRARIES, "torch", lambda: iter(models.items()))
    found = dense.walk("torch")
    assert found["counts"] == {"models": 3, "with feed-forward layers": 2, "replaced": 2, "left": 1}
    assert list(found["left"].values()) == [{"Learned": 1}] and list(found["unbuilt"]) == ["broken"]
    monkeypatch.setattr(dense, "PAGE", tmp_path / "page.md")
    dense.PAGE.write_text("before\n<!-- torch -->\nold\n<!-- end of torch -->\nafter\n")
    dense.main(["torch"])
    text = dense.PAGE.read_text()
    assert "3 models, 2 of them with feed-forward layers: 2 layers replaced, 1 left." in text
    assert "old" not in text and text.startswith("before\n") and text.endswith("\nafter\n") and "`Learned`" in text


def test_every_library_has_its_rows() -> None:
    dense = script("coverage_dense")
    text = dense.PAGE.read_text(encoding="utf-8")
    for library in dense.LIBRARIES:
        assert re.search(rf"## {library} \d[\d.a-z]*\n\d+ models, \d+ of them with feed-forward layers", text), library
