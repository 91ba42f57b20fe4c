# SPDX-License-Identifier: BSD-3-Clause
"""profile: the rows add up to the time of the block, and their work is what a count of its own gives."""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from device import generator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

import ffn_ops
from benchmarks.workloads import Row, Shape
from ffn_ops import _peak
from ffn_ops._profile.counts import COUNTS_ATTENTION
from ffn_ops.integrations.transformers import register

pytestmark = pytest.mark.cpu_only("transformers builds its models on the CPU")
register()
T, D, F, E, K = 12, 16, 24, 4, 2
TEXT = {
    "vocab_size": 61, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring them takes a large buffer; tests of benchmarks do it."""
    monkeypatch.setattr(_peak, "limits", lambda isa, threads: {"fma_gflops": 100.0, "read_gbs": 10.0})


def llama() -> nn.Module:
    torch.manual_seed(0)
    return ffn_ops.replace(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)))


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**TEXT, num_local_experts=E, num_experts_per_tok=K)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="ffn_ops")
    return model


MODELS = {"Llama": (llama, "mlp"), "Mixtral": (mixtral, "mlp.experts")}
IDS = torch.arange(T).reshape(2, T // 2)


def step(model: nn.Module) -> Tensor:
    loss: Tensor = model(IDS, labels=IDS).loss
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


def rows(prof: ffn_ops.Profile) -> dict[str, dict[str, Any]]:
    """By path; the root by the name of its class."""
    return {row["path"] or row["module"] or row["kind"]: row for row in prof.as_dict()["rows"]}


def total(prof: ffn_ops.Profile) -> float:
    return sum(float(row["forward_seconds"] + row["backward_seconds"]) for row in prof.as_dict()["rows"])


def clean(model: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found = ffn_ops._library.observer is not None or not all(
        "_compiled_call_impl" not in vars(m) and not any(getattr(m, name) for name in hooks) for m in model.modules()
    )
    return not found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("operators", [False, True])
def test_rows_of_a_model_add_up_and_their_work_is_that_of_the_model(name: str, operators: bool) -> None:
    make, layer = MODELS[name]
    model, untouched = make(), make()
    expected = step(untouched)
    with FlopCounterMode(display=False) as counter:
        step(make())
    with ffn_ops.profile(model, operators=operators) as prof:
        loss = step(model)
    assert torch.equal(loss, expected)
    for p, q in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
    found = prof.as_dict()
    assert json.loads(json.dumps(found)) == found
    assert total(prof) == pytest.approx(found["total_seconds"], rel=1e-9)
    layers = [row for path, row in rows(prof).items() if path.endswith(f".{layer}")]
    products = 6 * T * D * F * (K if name == "Mixtral" else 1)
    for row in layers:
        assert row["calls"] == 1 and row["counted"] == "all"
        assert row["flops"] == {"forward": products, "backward": 2 * products}
        assert row["of_fma_peak"] == pytest.approx(
            3 * products / (row["forward_seconds"] + row["backward_seconds"]) / 100e9
        )
    assert len(layers) == 2
    assert {"model.layers.0.self_attn", "model.layers.1", "lm_head", "outside"} <= rows(prof).keys()
    assert bool(found["notes"]) == (operators and not COUNTS_ATTENTION)
    if operators:
        assert sum(sum(row["flops"].values()) for row in found["rows"]) == counter.get_total_flops()
    if operators and COUNTS_ATTENTION:
        scores = 2 * 2 * T * (T // 2) * D  # of queries with keys, and of these with values; q, k, v and o
        forward = 4 * 2 * T * D * D + scores
        attention = {"forward": forward, "backward": 2 * forward + scores // 2}  # which computes the scores again
        assert rows(prof)["model.layers.1.self_attn"]["flops"] == attention
    if not operators:
        assert rows(prof)["lm_head"]["flops"] is None
    assert clean(model)


def test_table_says_what_is_fused_and_why() -> None:
    model = mixtral()
    with ffn_ops.profile(model) as prof:
        step(model)
    text = str(prof)
    assert "2 x model.layers.*.mlp.experts (MixtralExperts), experts" in text and ", router" in text
    assert "operators: moe_sort 2" in text and "moe_backward 2" in text and "ffn_ops: silu" in text
    model = llama()
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: None)  # type: ignore[union-attr, operator, index]
    with ffn_ops.profile(model) as prof:
        step(model)
    whole, part = (rows(prof)[f"model.layers.{i}.mlp"] for i in (0, 1))
    assert (whole["counted"], part["counted"]) == ("all", "ffn_ops")
    assert part["layer"]["status"] == "partly" and "down_proj is called (hooks" in part["layer"]["why"]
    assert part["flops"]["forward"] == 4 * T * D * F and "operators=True counts too" in str(prof)
    with ffn_ops.profile(model, operators=True) as prof:
        step(model)
    assert rows(prof)["model.layers.1.mlp"]["flops"] == {"forward": 6 * T * D * F, "backward": 12 * T * D * F}


def test_attention_of_a_layer_that_holds_both_has_a_row() -> None:
    """As in BERT, where the feed-forward layer is a method of the block."""
    block = nn.TransformerEncoderLayer(D, 2, F, activation=nn.functional.silu, dropout=0.0, batch_first=True)
    with ffn_ops.profile(ffn_ops.replace(block), operators=True) as prof:
        block(torch.randn(1, T, D, generator=generator(5)))
    found = rows(prof)
    assert found["TransformerEncoderLayer"]["flops"]["forward"] == 4 * T * D * F
    scores = 4 * T * T * D if COUNTS_ATTENTION else 0
    assert found["self_attn"]["flops"]["forward"] == 8 * T * D * D + scores and found["norm1"]["calls"] == 1
    assert "linear1" not in found and found["TransformerEncoderLayer"]["layer"]["status"] == "replaced"


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_bytes_are_those_of_the_tensors(mode: str) -> None:
    layer, x = ffn_ops.FeedForward(D, d_ff=F, bias=False), torch.randn(T, D, generator=generator(1), requires_grad=True)
    with ffn_ops.profile(layer) as prof:
        if mode == "training":
            layer(x).sum().backward()
        else:
            with torch.no_grad():
                layer(x)
    row, expected = rows(prof)["FeedForward"], Row(Shape(T, D, F), "float32", mode)  # type: ignore[arg-type]
    assert row["bytes"]["forward"] == expected.forward_bytes
    assert sum(row["bytes"].values()) == expected.least_bytes
    assert row["saved_bytes"] == (4 * (T * D + 2 * T * F) if mode == "training" else None)


def test_mixture_moves_the_experts_that_have_rows_and_counts_their_tokens() -> None:
    layer = ffn_ops.MoEFFN(D, F, E, 1, gated=True, bias=False)
    logits = torch.zeros(T, E)
    logits[:3, 1] = logits[3:, 3] = 9.0
    routing, x = ffn_ops.routing.top_k(logits, k=1), torch.randn(T, D, generator=generator(2))
    with ffn_ops.profile(layer) as prof, torch.no_grad():
        layer(x, routing=routing)
        layer(x, routing=routing)
    row = rows(prof)["MoEFFN"]
    assert row["tokens"] == [0, 6, 0, 2 * (T - 3)]
    expert = 4 * 3 * D * F
    tables = sum(t.nbytes for t in (routing.token, routing.weight, routing.offsets, routing.row, routing.slot_offsets))
    assert row["bytes"]["forward"] == 2 * (2 * expert + 2 * x.nbytes + tables)
    assert row["flops"] == {"forward": 2 * 6 * T * D * F, "backward": 0}


@pytest.mark.parametrize("how", ["meta", "functional", "float64 inside", "quantised"])
def test_weights_are_not_kept_for_backward(how: str) -> None:
    layer, x = ffn_ops.FeedForward(D, d_ff=F, bias=False), torch.randn(T, D, generator=generator(8), requires_grad=True)
    others = {name: p.detach().clone() for name, p in layer.named_parameters()}
    if how == "meta":
        layer, x = layer.to("meta"), x.detach().to("meta").requires_grad_()
    if how == "quantised":
        ffn_ops.quantize_(layer, "int8")
    with ffn_ops.profile(layer) as prof:
        if how == "float64 inside":
            layer, x = layer.double(), x.detach().double().requires_grad_()
        if how == "functional":
            torch.func.functional_call(layer, others, (x,))
        else:
            layer(x)
    assert rows(prof)["FeedForward"]["saved_bytes"] == x.itemsize * (T * D + 2 * T * F)


def test_transformed_calls_count_once() -> None:
    model, x = (
        nn.Sequential(ffn_ops.FeedForward(D, d_ff=F, bias=False), ffn_ops.MoEFFN(D, F, E, K)),
        torch.ones(3, T, D),
    )

    def loss(parameters: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).sum()  # type: ignore[no-any-return]

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    with ffn_ops.profile(model) as prof:
        torch.func.grad(loss)(parameters, x[0])
        torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    dense, mixture = (rows(prof)[path] for path in ("0", "1"))
    assert dense["flops"]["forward"] == 4 * 6 * T * D * F
    assert dense["operators"]["ffn"]["calls"] == 4 and sum(mixture["tokens"]) == 4 * T * K
    assert dense["saved_bytes"] is None  # torch.func lets nobody look


def test_quantised_experts_and_layers_in_a_row_have_rows() -> None:
    model = mixtral()
    ffn_ops.quantize_(model, "int8")
    with ffn_ops.profile(model) as prof, torch.no_grad():
        model(IDS)
    for i in range(2):
        row = rows(prof)[f"model.layers.{i}.mlp.experts"]
        assert row["kind"] == "experts" and sum(row["tokens"]) == T * K
        assert row["flops"]["forward"] == 6 * T * K * D * F and row["layer"]["status"] == "ffn_ops"
    assert rows(prof)["model.layers.1.self_attn"]["calls"] == 1
    model = nn.Sequential(nn.Linear(D, D), ffn_ops.FeedForward(D, d_ff=F), nn.Linear(D, D))
    model.append(torch.jit.script(nn.LayerNorm(D)))
    with ffn_ops.profile(model) as prof:
        model(torch.ones(T, D)).sum().backward()
    found = {path: (row["kind"], row["calls"]) for path, row in rows(prof).items() if path != "outside"}
    assert found == {
        "Sequential": ("own code", 1), "0": ("other", 1), "1": ("feed-forward", 1), "2": ("other", 1),
        "3": ("other", 1),
    }  # fmt: skip
    assert clean(model)


def test_operators_of_torch_in_other_threads_are_said_not_to_be_counted() -> None:
    model = nn.Sequential(nn.Linear(D, D), ffn_ops.FeedForward(D, d_ff=F))
    with ffn_ops.profile(model, operators=True) as prof:
        thread = threading.Thread(target=lambda: model(torch.ones(T, D)))
        thread.start()
        thread.join()
    assert rows(prof)["0"]["flops"] is None and rows(prof)["0"]["counted"] is None
    assert rows(prof)["1"]["flops"]["forward"] == 6 * T * D * F and rows(prof)["1"]["counted"] == "all"


@pytest.mark.parametrize("again", [False, True])
def test_mixture_in_a_checkpoint_keeps_nothing_and_counts_its_tokens_once(again: bool) -> None:
    layer, x = ffn_ops.MoEFFN(D, F, E, K), torch.randn(T, D, generator=generator(6), requires_grad=True)
    with ffn_ops.profile(layer) as prof:
        checkpoint(layer, x, use_reentrant=again).sum().backward()
    row = rows(prof)["MoEFFN"]
    assert sum(row["tokens"]) == T * K and not row["saved_bytes"]
    assert (row["calls"], row["recomputed"], row["operators"]["moe"]["calls"]) == (1, 1, 2)
    assert row["flops"]["backward"] == 3 * row["flops"]["forward"]


def test_compiler_runs_as_without_a_profile_and_its_tracing_is_not_counted() -> None:
    ran: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        return lambda *args: (ran.append(graph), graph(*args))[1]  # type: ignore[func-returns-value]

    for operators in (False, True):
        layer, x = ffn_ops.FeedForward(D, d_ff=F), torch.randn(T, D, generator=generator(7))
        layer.compile(backend=backend)
        ran.clear()
        with ffn_ops.profile(layer, operators=operators) as prof:
            layer(x).sum().backward()
        assert len(ran) == 1
        layer.compile(backend="aot_eager")
        with ffn_ops.profile(layer, operators=operators) as prof:
            layer(x).sum().backward()
        operators_seen = rows(prof)["FeedForward"]["operators"]
        assert {name: each["calls"] for name, each in operators_seen.items()} == {"ffn": 1, "ffn_backward": 1}


@pytest.mark.parametrize("how", ["whole", "in place", "around"])
def test_compiled_modules_are_one_row(how: str) -> None:
    model = nn.Sequential(nn.LayerNorm(D), ffn_ops.FeedForward(D, d_ff=F))
    x = torch.randn(T, D, generator=generator(4), requires_grad=True)
    seen: nn.Module = model
    if how == "in place":
        model[1].compile(backend="aot_eager")
        call: Callable[..., Any] = model
    else:
        call = torch.compile(model, backend="aot_eager")
        seen = call if how == "whole" else model  # type: ignore[assignment]
    call(x).sum().backward()
    graphs = Counter(torch._dynamo.utils.counters["stats"])["unique_graphs"]
    with ffn_ops.profile(seen) as prof:
        call(x).sum().backward()
    if how == "around":
        assert any("no call of the model was seen" in note for note in prof.as_dict()["notes"])
    else:
        row = rows(prof)["OptimizedModule" if how == "whole" else "1"]
        assert row["kind"] == "compiled" and row["calls"] == 1 and row["backward_seconds"] > 0
        assert row["counted"] == "ffn_ops" and row["flops"] == {"forward": 6 * T * D * F, "backward": 12 * T * D * F}
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    after = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    call(x).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == after


def test_model_without_layers_has_its_children() -> None:
    model = nn.Sequential(nn.Linear(D, 4), nn.ReLU())
    with ffn_ops.profile(model, operators=True) as prof, torch.inference_mode():
        model(torch.randn(T, D))
    assert rows(prof)["0"]["flops"] == {"forward": 2 * T * D * 4, "backward": 0}
    assert "no feed-forward layer was found in the model" in prof.as_dict()["notes"]


def test_wrong_uses_are_told() -> None:
    with pytest.raises(TypeError, match="model: expected an nn"):
        ffn_ops.profile(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="operators: expected"):
        ffn_ops.profile(nn.Linear(2, 2), operators=1)  # type: ignore[arg-type]
    with ffn_ops.profile(nn.Linear(2, 2)) as prof:
        with pytest.raises(RuntimeError, match="expected the end"):
            str(prof)
        with pytest.raises(RuntimeError, match="one `with` at a time"):
            prof.__enter__()
