# SPDX-License-Identifier: BSD-3-Clause
"""Other libraries and torch's tools on our modules: offloading, adapters, per-sample gradients, weight norm and
pruning of stacked weights, averages. Each result is that of the layer without them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from device import generator
from replacing import LAYERS
from same_function import seeded
from seen import Seen
from test_replace_models import TOKENS, logits, made
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, parametrize, prune

import ffn_ops
from ffn_ops import reference
from ffn_ops.integrations import _gates
from ffn_ops.integrations.transformers import register, report

D = 12
MODULES: dict[str, Callable[[], nn.Module]] = {
    "FeedForward": lambda: ffn_ops.FeedForward(D, 20, 4, 0.0),
    "GELUFFN": lambda: ffn_ops.GELUFFN(D, 16),
    "GLU": lambda: ffn_ops.GLU(D, 16),
    "GatedFFN": lambda: ffn_ops.GatedFFN(D, 16),
    "MoEFFN": lambda: ffn_ops.MoEFFN(D, 8, 4, 2, gated=True, num_shared=1, router=ffn_ops.routing.BiasedTopK(4, 2)),
    "replaced": lambda: ffn_ops.replace(LAYERS["llama"][0]()),
}
every_module = pytest.mark.parametrize("name", MODULES)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, D, generator=generator(1))


# ---- accelerate -----------------------------------------------------------------------------------------------------


def offloads(folder: Path) -> dict[str, Callable[[nn.Module], Any]]:
    accelerate = pytest.importorskip("accelerate")
    device = torch.get_default_device()
    return {
        "cpu": lambda model: accelerate.cpu_offload(model, device),
        "disk": lambda model: accelerate.disk_offload(model, str(folder), device),
    }


@pytest.mark.parametrize("where", ["cpu", "disk"])
@every_module
def test_offloaded(name: str, where: str, tmp_path: Path) -> None:
    """Between calls the layer holds only meta tensors; the results are those of the layer without offloading."""
    x = rows(2, 5)
    layer = seeded(MODULES[name]).eval()
    with torch.no_grad():
        expected = layer(x)
        offloads(tmp_path)[where](layer)
        assert {p.device.type for p in layer.parameters()} == {"meta"}
        for _ in range(2):
            torch.testing.assert_close(layer(x), expected)
    assert {p.device.type for p in layer.parameters()} == {"meta"}


@every_module
def test_fused_again_after_offloading(name: str) -> None:
    """accelerate leaves each module's own forward on the instance after removing its hooks; it counts as the
    class's."""
    accelerate = pytest.importorskip("accelerate")
    x, layer = rows(2, 5), seeded(MODULES[name]).eval()
    with torch.no_grad():
        with Seen() as before:
            expected = layer(x)
        accelerate.cpu_offload(layer, torch.get_default_device())
        accelerate.hooks.remove_hook_from_submodules(layer)
        with Seen() as after:
            assert torch.equal(layer(x), expected)
    assert after.names == before.names


def dispatched(model: nn.Module, folder: Path) -> nn.Module:
    """With accelerate's forward set on every module, holders of others too."""
    accelerate = pytest.importorskip("accelerate")
    places: dict[str, Any] = {"model": "disk", "lm_head": "cpu"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.cpu_only("transformers builds its models on the CPU")
def test_replace_and_restore_around_offloading(tmp_path: Path) -> None:
    """Replaced before the hooks come or after they went, restored under them or after: always the untouched model's
    logits, and fused where the report says so."""
    accelerate = pytest.importorskip("accelerate")
    plain = made("Llama").eval()
    expected = logits(plain)

    def assert_runs(model: nn.Module, *operators: str) -> None:
        with torch.no_grad(), Seen() as seen:
            torch.testing.assert_close(logits(model), expected)
        assert seen.names == [*operators] * 2

    model = dispatched(ffn_ops.replace(copy.deepcopy(plain)), tmp_path / "first")
    assert_runs(model, "gated_act")
    assert_runs(ffn_ops.restore(model))
    model = dispatched(ffn_ops.replace(copy.deepcopy(plain)), tmp_path / "second")
    accelerate.hooks.remove_hook_from_submodules(model)
    assert_runs(model, "ffn")
    assert_runs(ffn_ops.restore(model))
    assert_runs(ffn_ops.replace(model), "ffn")
    model = dispatched(copy.deepcopy(plain), tmp_path / "third")
    accelerate.hooks.remove_hook_from_submodules(model)
    assert_runs(ffn_ops.replace(model), "ffn")
    assert len(ffn_ops.replace_report(model).paths("replaced")) == 2


@pytest.mark.cpu_only("transformers builds its models on the CPU")
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_models(where: str, tmp_path: Path) -> None:
    """A replaced Llama and a Mixtral with our experts."""
    with torch.no_grad():
        for i, model in enumerate((ffn_ops.replace(made("Llama").eval()), mixtral("ffn_ops", torch.float32))):
            expected = model(input_ids=TOKENS).logits
            offloads(tmp_path / str(i))[where](model)
            torch.testing.assert_close(model(input_ids=TOKENS).logits, expected)


# ---- peft on transformers' experts ----------------------------------------------------------------------------------


def mixtral(implementation: str, dtype: torch.dtype, **options: Any) -> Any:
    register()
    config = transformers.MixtralConfig(**{
        "vocab_size": 61, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_local_experts": 4,
        "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.25, **options,
    })  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
    return model.to(dtype).eval()


def step(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(input_ids=TOKENS, labels=TOKENS)
    out.loss.backward()
    return {"logits": out.logits.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def assert_alike(ours: Any, eager: Any) -> None:
    actual, expected = step(ours), step(eager)
    assert actual.keys() == expected.keys() and len(expected) > 1
    for n, value in expected.items():
        torch.testing.assert_close(actual[n], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.cpu_only("transformers builds its models on the CPU")
@pytest.mark.parametrize("targets", [("gate_up_proj",), ("down_proj",), ("gate_up_proj", "down_proj")], ids=str)
def test_adapters_on_experts(targets: tuple[str, ...]) -> None:
    """LoRA on one and on both stacked weights, one adapter, another, both at once, merged: logits and the adapters'
    gradients of transformers' own loop. What the gate computes is found once, not in each call."""
    peft = pytest.importorskip("peft")
    both = []
    for implementation in ("ffn_ops", "eager"):
        config = peft.LoraConfig(
            r=2, target_modules=[], target_parameters=[f"mlp.experts.{t}" for t in targets], init_lora_weights=False
        )
        model = peft.get_peft_model(mixtral(implementation, torch.float64), config, adapter_name="first")
        model.add_adapter("second", config)
        torch.manual_seed(1)
        for n, p in model.named_parameters():
            if "lora_" in n:
                nn.init.normal_(p, std=0.3)
        both.append(model)
    plain = mixtral("ffn_ops", torch.float64)(input_ids=TOKENS).logits
    known = len(_gates._known)
    for active in ("first", "second", ["first", "second"]):
        for model in both:
            model.base_model.set_adapter(active)
        assert_alike(*both)
        assert not torch.allclose(both[0](input_ids=TOKENS).logits, plain, atol=1e-3)
    assert len(_gates._known) == known
    with Seen() as seen:
        both[0](input_ids=TOKENS)
    assert seen.names.count("moe_lora") == 2
    expected = both[0](input_ids=TOKENS).logits
    torch.testing.assert_close(both[0].merge_and_unload()(input_ids=TOKENS).logits, expected, rtol=1e-9, atol=1e-11)


# ---- sizes and dtypes that transformers' default refuses ------------------------------------------------------------


@pytest.mark.cpu_only("transformers builds its models on the CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_odd_widths_and_float64(dtype: torch.dtype) -> None:
    """A hidden size of 30 and a width of 50: rows that are no multiple of 16 bytes. A step, and generation."""
    odd = {"hidden_size": 30, "intermediate_size": 50, "num_attention_heads": 3, "num_key_value_heads": 3}
    ours, eager = (mixtral(implementation, dtype, **odd) for implementation in ("ffn_ops", "eager"))
    actual, expected = step(ours), step(eager)
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    for n, value in expected.items():
        torch.testing.assert_close(actual[n], value, **tolerance, msg=lambda m, n=n: f"{n}: {m}")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(ours.generate(TOKENS, **options), eager.generate(TOKENS, **options))


# ---- gradients of each sample ---------------------------------------------------------------------------------------


def one_by_one(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    each = []
    for sample in x:
        layer.zero_grad()
        layer(sample[None]).square().sum().backward()
        each.append({n: p.grad.clone() for n, p in layer.named_parameters()})
    layer.zero_grad()
    return {n: torch.stack([gradients[n] for gradients in each]) for n in each[0]}


@every_module
def test_gradients_of_each_sample(name: str) -> None:
    """torch.func's way, vmap over grad: for every sample the gradient of a backward of that sample alone."""
    layer, x = seeded(MODULES[name]).double(), rows(3, 4).double()
    expected = one_by_one(layer, x)
    parameters = {n: p.detach() for n, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(layer, parameters, (sample[None],)).square().sum()

    actual = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for n, value in expected.items():
        torch.testing.assert_close(actual[n], value, msg=lambda m, n=n: f"{n}: {m}")


@every_module
def test_opacus(name: str) -> None:
    """Its hooks on children, and its own way for stacked weights."""
    grad_sample = pytest.importorskip("opacus.grad_sample")
    layer, x = seeded(MODULES[name]).double(), rows(3, 4).double()
    if name == "MoEFFN":
        layer.choose = None  # opacus refuses buffers, as its bias is
    expected = one_by_one(layer, x)
    model = grad_sample.GradSampleModule(layer, loss_reduction="sum", strict=False)
    model(x).square().sum().backward()
    for n, p in layer.named_parameters():
        torch.testing.assert_close(p.grad_sample, expected[n], msg=lambda m, n=n: f"{n}: {m}")


# ---- weight norm and pruning of stacked weights ---------------------------------------------------------------------


def scaled_norm(module: nn.Module, name: str) -> None:
    parametrizations.weight_norm(module, name)
    with torch.no_grad():
        getattr(module.parametrizations, name).original0.mul_(1.5)


def pruned(module: nn.Module, name: str) -> None:
    torch.manual_seed(3)
    prune.random_unstructured(module, name, 0.4)


def old_norm(module: nn.Module, name: str) -> None:
    nn.utils.weight_norm(module, name)
    with torch.no_grad():
        getattr(module, f"{name}_g").mul_(1.5)


REWEIGHTS = {"weight_norm": scaled_norm, "pruned": pruned, "weight_norm's hook": old_norm}
every_reweight = pytest.mark.parametrize("reweight", REWEIGHTS)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@every_reweight
def test_stacked_weights(reweight: str) -> None:
    """MoEFFN's w_in, w_down and router: the naive mixture with the weights as they are in the call, and gradients reach
    the parts."""
    layer, x = seeded(lambda: ffn_ops.MoEFFN(D, 8, 4, 2)).double(), rows(7).double()
    before = layer(x)
    for module, name in ((layer, "w_in"), (layer, "w_down"), (layer.router, "weight")):
        REWEIGHTS[reweight](module, name)
    y = layer(x)
    weights = torch.softmax(nn.functional.linear(x, layer.router.weight, layer.router.bias), -1)
    weights, ids = weights.topk(2)
    expected = reference.moe(x, ids, weights, layer.w_in, layer.w_down, b_in=layer.b_in, b_down=layer.b_down,
                             gated=False, activation="gelu")  # fmt: skip
    assert not torch.allclose(y, before)
    torch.testing.assert_close(y, expected)
    leaves = list(layer.parameters())
    for ours, naive in zip(
        *(torch.autograd.grad(t.square().sum(), leaves, retain_graph=True) for t in (y, expected)), strict=True
    ):
        assert ours.any()
        torch.testing.assert_close(ours, naive)


@pytest.mark.cpu_only("transformers builds its models on the CPU")
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@every_reweight
def test_stacked_weights_of_transformers(reweight: str) -> None:
    """The experts of a Mixtral, against its own loop."""
    ours, eager = (mixtral(implementation, torch.float64) for implementation in ("ffn_ops", "eager"))
    before = ours(input_ids=TOKENS).logits
    for model in (ours, eager):
        for layer in model.model.layers:
            for name in ("gate_up_proj", "down_proj"):
                REWEIGHTS[reweight](layer.mlp.experts, name)
    assert_alike(ours, eager)
    assert not torch.allclose(ours(input_ids=TOKENS).logits, before)


# ---- weights without a shape as yet ---------------------------------------------------------------------------------


def test_lazy_layers() -> None:
    """replace and the reports take a model whose lazy layers have not seen an input; after one it is replaced."""
    model = nn.Sequential(nn.LazyLinear(20), nn.GELU(), nn.LazyLinear(D))
    assert ffn_ops.replace_report(model).entries == report(model).entries == ()
    with pytest.warns(UserWarning, match="no layer was replaced"):
        ffn_ops.replace(model)
    x = rows(5)
    expected = model(x)
    with Seen() as seen:
        torch.testing.assert_close(ffn_ops.replace(model)(x), expected)
    assert seen.names == ["ffn"]


# ---- averaged copies ------------------------------------------------------------------------------------------------


@every_module
def test_averaged_model(name: str) -> None:
    """Exponential moving averages of a layer in training, and a copy of it made between two steps."""
    layer, x = seeded(MODULES[name]), rows(2, 5)
    average = torch.optim.swa_utils.AveragedModel(layer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(layer.parameters(), 0.05)
    expected = None
    for _ in range(3):
        layer(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(layer)
        now = {n: p.detach().clone() for n, p in layer.named_parameters()}
        expected = now if expected is None else {n: 0.5 * (expected[n] + now[n]) for n in now}
    assert expected is not None
    torch.testing.assert_close(dict(average.module.named_parameters()), expected)
    torch.testing.assert_close(average(x), functional_call(layer, expected, (x,)))
    assert not torch.equal(average(x), layer(x))
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x)) and not parametrize.is_parametrized(twin)
