# SPDX-License-Identifier: BSD-3-Clause
"""replace on models of transformers and torch with random weights: logits and gradients of the untouched model,
generation, compilation, checkpointing, and what each report says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from same_function import assert_same_function, results
from seen import Seen
from torch import Tensor, nn

import ffn_ops

transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(24).reshape(2, 12) * 5 % 61
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}
OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def causal(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**options)
        kind = "LMHeadModel" if name == "GPT2" else "ForMaskedLM" if "Bert" in name else "ForCausalLM"
        return getattr(transformers, name + kind)(config)

    return make


def vit() -> nn.Module:
    sizes = {k: v for k, v in SIZES.items() if k not in ("vocab_size", "max_position_embeddings")}
    return transformers.ViTModel(
        transformers.ViTConfig(**sizes, **OFF, image_size=16, patch_size=8), add_pooling_layer=False
    )


def t5(**options: Any) -> nn.Module:
    config = transformers.T5Config(
        d_model=32, d_ff=48, num_layers=2, num_heads=4, vocab_size=61, d_kv=8, dropout_rate=0.0, **options
    )
    return transformers.T5EncoderModel(config)


def bart() -> nn.Module:
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in BART.items()}
    return transformers.BartModel(
        transformers.BartConfig(d_model=32, vocab_size=61, max_position_embeddings=64, dropout=0.0, **sizes)
    )


BART = {"layers": 1, "ffn_dim": 48, "attention_heads": 4}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 64}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
DISTIL = {
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "vocab_size": 61,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
SWIGLU = "down_proj({}(gate_proj(x)) * up_proj(x))"
FUSED = "down_proj(silu(gate) * up of gate_up_proj(x), gate first)"
MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "Llama": (causal("Llama", **GROUPED), SWIGLU.format("silu")),
    "Mistral": (causal("Mistral", **GROUPED), SWIGLU.format("silu")),
    "Qwen3": (causal("Qwen3", **GROUPED, head_dim=8), SWIGLU.format("silu")),
    "Gemma": (causal("Gemma", **GROUPED, head_dim=8), SWIGLU.format("gelu_tanh")),
    "Phi-3": (causal("Phi3", **GROUPED), FUSED),
    "GPT-2": (causal("GPT2", **GPT2, **NO_DROPOUT), "dropout(c_proj(gelu_tanh(c_fc(x))))"),
    "BERT": (
        causal("Bert", **SIZES, **OFF),
        "output.LayerNorm(output.dropout(output.dense(gelu(intermediate.dense(x)))) + x)",
    ),
    "OPT": (causal("OPT", **SIZES, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0), "fc2(relu(fc1(x)))"),
    "BART": (bart, "fc2(gelu(fc1(x)))"),
    "DistilBERT": (causal("DistilBert", **DISTIL), "dropout(lin2(gelu(lin1(x))))"),
    "ViT": (vit, "fc2(gelu(fc1(x)))"),
    "T5": (t5, "dropout(DenseReluDense.wo(DenseReluDense.dropout(relu(DenseReluDense.wi(layer_norm(x)))))) + x"),
    "Flan-T5": (
        lambda: t5(feed_forward_proj="gated-gelu"),
        "dropout(DenseReluDense.wo(DenseReluDense.dropout(gelu_tanh(DenseReluDense.wi_0(layer_norm(x)))"
        " * DenseReluDense.wi_1(layer_norm(x))))) + x",
    ),
    "torch's encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True), 2),
        "dropout2(linear2(dropout(relu(linear1(x)))))",
    ),
}  # fmt: skip
CAUSAL = ("Llama", "Phi-3", "GPT-2", "OPT")


def made(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().to(dtype)


def logits(model: nn.Module) -> Tensor:
    dtype = next(model.parameters()).dtype
    if isinstance(model, nn.TransformerEncoder):
        return model(torch.linspace(-1, 1, 2 * 5 * 32).sin().reshape(2, 5, 32).to(dtype))
    if "ViT" in type(model).__name__:
        return model(torch.linspace(-1, 1, 2 * 3 * 256).sin().reshape(2, 3, 16, 16).to(dtype)).last_hidden_state
    return next(iter(model(input_ids=TOKENS).to_tuple()))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, training: bool) -> None:
    """Both layers replaced, output and every gradient of the untouched model; keys and bits back after restore."""
    plain, model = made(name).train(training), made(name).train(training)
    assert ffn_ops.replace(model) is model
    report = ffn_ops.replace_report(model)
    assert [(e.status, e.computes) for e in report.entries] == [("replaced", MODELS[name][1])] * 2, str(report)
    assert list(model.state_dict()) == list(plain.state_dict())
    with Seen() as seen, torch.no_grad():
        model.train()  # in eval torch's encoder has a path of its own, past its modules
        logits(model)
        model.train(training)
    assert seen.names.count("ffn") == 2
    assert_same_function(model, plain, logits)
    ffn_ops.restore(model)
    restored, untouched = results(model, logits), results(plain, logits)
    assert restored.keys() == untouched.keys()
    assert all(torch.equal(value, untouched[key]) for key, value in restored.items())


@pytest.mark.parametrize("name", ("Llama", "GPT-2", "BERT"))
def test_bfloat16(name: str) -> None:
    plain, model = made(name, torch.bfloat16), made(name, torch.bfloat16)
    assert_same_function(ffn_ops.replace(model), plain, logits)


@pytest.mark.parametrize("name", CAUSAL)
def test_loss_and_optimiser_steps(name: str) -> None:
    """Losses of five steps of AdamW, also with gradient checkpointing."""
    losses: list[list[float]] = []
    for replaced, checkpointing in ((False, False), (True, False), (True, True)):
        model = made(name).train()
        if replaced:
            ffn_ops.replace(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        losses.append([])
        for _ in range(5):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-4, atol=0)
    assert losses[1][-1] < losses[1][0]


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_generation(name: str) -> None:
    """The same tokens with a cache."""
    tokens = []
    for replaced in (False, True):
        model = made(name).eval()
        if replaced:
            ffn_ops.replace(model)
        tokens.append(model.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0))
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", CAUSAL)
def test_compiled_in_one_graph(name: str, dynamo: None) -> None:
    model = ffn_ops.replace(made(name)).eval()
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda ids: model(input_ids=ids, use_cache=False).logits, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(TOKENS), model(input_ids=TOKENS).logits)
    (graph,) = graphs
    assert graph.code.count("ffn_ops.ffn") == 2


@pytest.mark.cpu_only("from_pretrained gives a model on the CPU")
def test_copies_and_checkpoints(tmp_path: Any) -> None:
    """deepcopy, save_pretrained and from_pretrained: transformers sees its own model."""
    model = ffn_ops.replace(made("Llama"))
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(ffn_ops.replace(loaded)), expected)


def test_dropout_as_the_untouched_model_has_it() -> None:
    """GPT-2's behind the layer is called; T5's between is, in training, with the same masks."""
    for make in (causal("GPT2", **GPT2), lambda: t5(feed_forward_proj="gated-gelu").train()):
        outputs = []
        for replaced in (False, True):
            torch.manual_seed(0)
            model = make().train()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.3
            if replaced:
                ffn_ops.replace(model)
            torch.manual_seed(1)
            outputs.append(logits(model))
        torch.testing.assert_close(*outputs)


def test_layers_that_are_left() -> None:
    """A mixture's experts are no children."""
    mixture = causal("Mixtral", **GROUPED, num_local_experts=4)()
    assert [e.layer for e in ffn_ops.replace_report(mixture).entries] == ["MixtralExperts"] * 2
