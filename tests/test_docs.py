# SPDX-License-Identifier: BSD-3-Clause
"""The documentation: every public name has an example that runs, every message of the sources is explained."""

from __future__ import annotations

import doctest
import inspect
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import messages
import pytest
import torch

import ffn_ops
from ffn_ops.integrations import onnx, transformers

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))]


def public() -> dict[str, Any]:
    spaces: list[tuple[types.ModuleType, tuple[str, ...]]] = [
        (ffn_ops, tuple(ffn_ops.__all__)),
        (ffn_ops.routing, tuple(ffn_ops.routing.__all__)),
        (ffn_ops.expert_parallel, ("moe", "shard", "experts_of")),
        (transformers, ("register", "report", "ExpertsReport")),
        (onnx, ("translation_table",)),
    ]
    found = {f"{space.__name__}.{name}": getattr(space, name) for space, names in spaces for name in names}
    return {name: value for name, value in found.items() if not inspect.ismodule(value)}


PUBLIC = public()
METHODS: dict[str, Callable[..., Any]] = {
    "Profile.as_dict": ffn_ops.Profile.as_dict,
    "Profile.export_chrome_trace": ffn_ops.Profile.export_chrome_trace,
    "Routing.from_topk": ffn_ops.Routing.from_topk,
    "Routing.statistics": ffn_ops.Routing.statistics,
    "Routing.first": ffn_ops.Routing.first,
    "Routing.weight_of": ffn_ops.Routing.weight_of,
    "Routing.scaled": ffn_ops.Routing.scaled,
    "BiasedTopK.update": ffn_ops.routing.BiasedTopK.update,
    "BiasedTopK.solve": ffn_ops.routing.BiasedTopK.solve,
}


@pytest.mark.cpu_only("a printed tensor of a GPU has its device")
@pytest.mark.parametrize("name", [*PUBLIC, *METHODS])
def test_example_of_docstring(name: str) -> None:
    """Its example runs and prints the stated result. Expert parallelism needs processes, so its own tests run it."""
    value = {**PUBLIC, **METHODS}[name]
    text = inspect.getdoc(value) or ""
    if name in ("ffn_ops.expert_parallel.moe", "ffn_ops.expert_parallel.shard"):
        assert "::\n" in text
        return
    if "onnx" in name:
        pytest.importorskip("onnxscript")
    names = {"torch": torch, "ffn_ops": ffn_ops, "nn": torch.nn}
    example = doctest.DocTestParser().get_doctest(text, names, name, None, None)
    assert example.examples, f"{name}: no example"
    said: list[str] = []
    torch.manual_seed(0)
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(example, out=said.append)
    assert not said, "".join(said)


@pytest.mark.parametrize("field", ["token", "weight", "offsets", "row", "slot_offsets", "counts", "mask"])
def test_help_explains_the_fields_of_a_routing(field: str) -> None:
    assert re.search(rf"^ *{field}: ``\[.*\]``", ffn_ops.Routing.__doc__ or "", re.M)


@pytest.mark.cpu_only("the pages' examples make their tensors without a device")
@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/distributed.md"])
def test_examples_of_page(page: str) -> None:
    """Blocks marked ``python`` run as they stand, in order; those marked ``py`` need a model or another library."""
    names: dict[str, Any] = {"torch": torch, "ffn_ops": ffn_ops, "nn": torch.nn}
    torch.manual_seed(0)
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M):
        exec(block, names)


def test_reference_lists_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    names = set(re.findall(r"^\.\. auto\w+:: (?:.*\.)?(\w+)$", page, re.M))
    for members in re.findall(r"^   :members: (.*(?:\n {6}.*)*)", page, re.M):
        names |= set(re.findall(r"\w+", members))
    assert {name.rpartition(".")[2] for name in [*PUBLIC, *METHODS]} - names == set()


def test_every_activation_is_listed() -> None:
    page = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^Activations: (.*?)\. ", page, re.S | re.M)
    assert set(re.findall(r"`(\w+)`", listed)) - {"up"} == set(ffn_ops.activations())


def test_every_page_is_reachable() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    names = re.findall(r"^([a-z-]+)$", index, re.M)
    assert sorted(names) == sorted(Path(page).stem for page in PAGES[1:] if page != "docs/index.md")


def test_results_that_pages_name_exist() -> None:
    there = {path.name for path in (ROOT / "benchmarks" / "results").iterdir()}
    for page in PAGES:
        named = re.findall(r"[\w*-]+-(?:xeon|nvidia)-[\w-]+\.(?:json|png)", (ROOT / page).read_text(encoding="utf-8"))
        assert set(named) <= there, page


def test_chart_is_that_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import chart

    assert (ROOT / "docs" / "speed.svg").read_text(encoding="utf-8") == chart.svg()


def explained() -> set[str]:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    return {message for row in rows for message in re.findall(r"`([^`]+)`", row)}


def plain(text: str) -> str:
    return " ".join(text.replace("`", "").split())


@pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="the sources are not beside the tests")
def test_every_message_is_explained() -> None:
    known = explained()
    missing, used = [], set()
    for place, text in [*messages.of_python(), *messages.of_cpp(), *messages.of_reports()]:
        text = plain(text)
        forms = {text, re.sub(r"^[\w.]+: ", "…: ", text), re.sub(r"^[\w.]+ ", "… ", text)}
        if text in ("…", "…: …"):  # another library's words: CUDA's, torch's
            continue
        used |= forms & known
        if not forms & known:
            missing.append(f"{place}: {text}")
    assert not missing, "not in docs/troubleshooting.md:\n" + "\n".join(missing)
    assert known == used, f"docs/troubleshooting.md explains what nothing says: {sorted(known - used)}"
