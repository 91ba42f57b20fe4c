# SPDX-License-Identifier: BSD-3-Clause
"""Mixtures of transformers that do not use ``experts_implementation``: for each class a forward with this package's
operators, and a tiny instance that shows whether it is the same function. ``_exchange.py`` gives it to instances."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._gate import Gate
from .._replace.children import is_plain
from ..modules import PLAIN_TENSORS, is_unhooked
from ..ops import ffn, gated_act, moe, moe_combine, moe_dispatch, moe_experts
from ..ops._rows import linear_op
from ..ops._shared import autocast
from ..routing import Routing
from ._gates import act_gate, gate_of


class Exchange(NamedTuple):
    """What stands in the place of a class's forward."""

    forward: Callable[..., Any]  # returns None where the class's own must run
    gate: Callable[[Any], Gate | None]  # None: no gate, its experts are linear
    why: Callable[[Any], str | None]  # why its own forward runs at present
    tiny: tuple[Any, ...]  # arguments that make a tiny instance
    call: Callable[[], tuple[Any, ...]]  # what that instance is called with
    called: tuple[str, ...] = ()  # children that the forward calls; it bypasses the others
    held: tuple[str, ...] = ()  # children of which it reads stacked weights
    members: dict[str, Any] = {}  # attributes of the class that computes it  # noqa: RUF012


# ---- what a forward may bypass --------------------------------------------------------------------------------------


def _holds(module: nn.Module, *names: str) -> str | None:
    """Whether children that only hold parameters, or have none, must be called: they have hooks."""
    for name in names:
        child = module.get_submodule(name)
        cls = parametrize.type_before_parametrizations(child)
        if cls.__module__.partition(".")[0] not in ("torch", "transformers"):
            return f"{name} is called ({cls.__module__.partition('.')[0]}'s {cls.__name__})"
        if not is_unhooked(child):
            return f"{name} is called (hooks, or a forward set on the instance)"
    return None


def _is_table(child: Any) -> bool:
    return (
        type(child) is nn.Embedding
        and is_unhooked(child)
        and type(child._parameters["weight"]) in PLAIN_TENSORS
        and child.max_norm is None
        and not (child.sparse or child.scale_grad_by_freq)
    )


def _all_plain(module: nn.Module, layers: Iterable[Any]) -> str | None:
    """For experts that are modules of linear layers, or linear layers."""
    for layer in layers:
        for child in layer.modules():
            plain = is_plain(child) if next(child.parameters(recurse=False), None) is not None else is_unhooked(child)
            if not plain:
                return f"{type(child).__name__} of an expert is called (hooks, adapters or quantised weights)"
    return None


# ---- forwards -------------------------------------------------------------------------------------------------------


def _linear(rows: Tensor, w: Tensor, offsets: Tensor, b: Tensor | None = None) -> Tensor:
    """``rows[r] w[e]^T + b[e]``, e the expert of r."""
    rows, w, b = autocast(rows, w, b)  # type: ignore[assignment]
    y: Tensor = linear_op(rows, w, offsets)
    return y if b is None else y + linear_op(rows.new_ones(rows.shape[0], 1), b.unsqueeze(2), offsets)


def _step3p7(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
    routing = Routing.from_topk(top_k_index, top_k_weights, self.num_experts)
    return moe(hidden_states, routing, self.gate_up_proj, self.down_proj, gated=True, activation=gate_of(self))


def _longcat(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
    """Ids from ``num_routed_experts`` on pass ``weight * x`` through."""
    if self.gate_up_proj is None or _holds(self, "identity_expert"):
        return None
    routing = Routing.from_topk(top_k_index, top_k_weights, self.num_routed_experts)
    w_in = self.gate_up_proj[: self.num_routed_experts]  # it has unused slices for the others
    y = moe(hidden_states, routing, w_in, self.down_proj, gated=True, activation=gate_of(self))
    through = torch.where(top_k_index >= self.num_routed_experts, top_k_weights, 0).sum(-1, keepdim=True)
    return y + (hidden_states * through).to(y.dtype)


def _dbrx(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
    """Gate and up are two tensors: product by product, which copies no weights."""
    if _holds(self, "mlp", "mlp.activation_fn"):
        return None
    x = hidden_states.reshape(-1, self.hidden_size)
    shape = (self.num_experts, self.ffn_hidden_size, self.hidden_size)
    w_gate, w_up, w_down = (w.view(shape) for w in (self.mlp.w1, self.mlp.v1, self.mlp.w2))
    routing = Routing.from_topk(top_k_index, top_k_weights, self.num_experts)
    rows = moe_dispatch(x, routing)
    gate, up = (_linear(rows, w, routing.offsets) for w in (w_gate, w_up))
    h = gated_act(gate, up, activation=act_gate(self.mlp.activation_fn, gated=True))
    y = moe_combine(_linear(h, w_down.transpose(1, 2), routing.offsets), routing)
    return y.view(hidden_states.shape[0], -1, self.hidden_size)


def _llama4(self: Any, hidden_states: Tensor) -> Any:
    """The scores multiply the input of the experts, whose outputs are summed with weight 1."""
    experts = self.experts
    if _holds(self, "experts", "experts.act_fn"):
        return None
    x = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(x)  # zero for all but the chosen
    weights, ids = scores.topk(self.top_k, dim=1)
    routing = Routing.from_topk(ids, weights, self.num_experts)
    rows = moe_dispatch(x, routing) * routing.weight.to(scores.dtype).unsqueeze(1)
    w_in, w_down = (w.transpose(1, 2) for w in (experts.gate_up_proj, experts.down_proj))
    gate = act_gate(experts.act_fn, gated=True)
    rows = moe_experts(rows, routing.offsets, w_in, w_down, gated=True, activation=gate)
    y = moe_combine(rows, routing._replace(weight=torch.ones_like(routing.weight)))
    return self.shared_expert(x) + y, logits


def _jetmoe(self: Any, layer_input: Tensor) -> Any:
    if _holds(self, "input_linear", "output_linear", "activation"):
        return None
    x = layer_input.reshape(-1, layer_input.shape[-1])
    order, _, gates, sizes, _ = self.router(x)  # rows in the order of their experts
    w_in, w_down = self.input_linear.weight, self.output_linear.weight
    chosen = torch.arange(len(sizes), device=x.device).repeat_interleave(torch.tensor(sizes, device=x.device))
    ids = torch.empty_like(chosen).scatter(0, order, chosen)
    weights = torch.empty_like(gates).scatter(0, order, gates)
    k = self.router.top_k
    routing = Routing.from_topk(ids.view(-1, k), weights.view(-1, k), len(sizes))
    y = moe(x, routing, w_in, w_down, gated=True, activation=act_gate(self.activation, gated=True))
    return y.view(layer_input.shape) + self.bias


def _jetmoe_linear(self: Any, inputs: Tensor, expert_size: list[int]) -> Any:
    """The linear layers of its attention heads, one pair for each expert."""
    offsets = torch.tensor([0, *expert_size], device=inputs.device).cumsum(0)
    return _linear(inputs, self.weight, offsets)


def _switch(self: Any, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Any:
    """``selected_experts`` is one-hot, and all zeros for a token beyond the capacity."""
    chosen = selected_experts.reshape(-1, self.num_experts)
    ids = torch.where(chosen.any(-1), chosen.argmax(-1), self.num_experts)
    return _dense_experts(self, hidden_states, ids.unsqueeze(1), routing_weights, ("wi", "wo"), None)


def _nllb(self: Any, hidden_states: Tensor, router_mask: Tensor, router_probs: Tensor) -> Any:
    """``router_mask`` holds ids as this class reads them: entry j of token t sends it to expert ``router_mask[t, j]``
    with weight ``router_probs[t, j]``. Weights of the same expert are added."""
    experts = self.num_experts
    weights = router_probs.new_zeros(router_mask.shape[0], experts).scatter_add(1, router_mask, router_probs)
    hit = torch.zeros_like(weights, dtype=torch.bool).scatter(1, router_mask, True)
    ids = torch.where(hit, torch.arange(experts, device=hit.device), experts)
    most = min(experts, router_mask.shape[1])
    if not (torch.compiler.is_compiling() or ids.is_meta):
        most = int(hit.sum(1).max()) if ids.numel() else 0
    ids, order = ids.topk(most, dim=1, largest=False)
    weights = weights.gather(1, order)
    if self.moe_token_dropout > 0 and not self.training:
        weights = weights * (1 - self.moe_token_dropout)
    dropout = self.token_dropout if self.moe_token_dropout > 0 and self.training else None
    return _dense_experts(self, hidden_states, ids, weights, ("fc1", "fc2"), dropout)


def _dense_experts(
    self: Any, x: Tensor, ids: Tensor, weights: Tensor, names: tuple[str, str], row_dropout: nn.Module | None
) -> Any:
    """Experts that are modules of two linear layers. Only the weights of those with a token are stacked."""
    experts = self.num_experts
    hit = list(range(experts))
    if not (torch.compiler.is_compiling() or ids.is_meta):
        hit = ids[ids < experts].unique().tolist()
        if not hit:
            return torch.zeros_like(x)
        place = ids.new_full((experts + 1,), len(hit))
        place[hit] = torch.arange(len(hit), device=ids.device)
        ids = place[ids]
    layers = [self[f"expert_{e}"] for e in hit]
    if _all_plain(self, layers):
        return None
    (w_in, b_in), (w_down, b_down) = (_stacked([getattr(layer, name) for layer in layers]) for name in names)
    routing = Routing.from_topk(ids, weights, len(hit))
    gate = act_gate(layers[0].act, gated=False)
    dropout = layers[0].dropout if self.training and layers[0].dropout.p > 0 else None
    if dropout is None and row_dropout is None and w_in.dtype is w_down.dtype:
        return moe(x, routing, w_in, w_down, b_in=b_in, b_down=b_down, activation=gate).to(x.dtype)
    h = gated_act(_linear(moe_dispatch(x, routing), w_in, routing.offsets, b_in), activation=gate)
    h = h if dropout is None else dropout(h)
    rows = _linear(h.to(w_down.dtype), w_down, routing.offsets, b_down)  # transformers keeps wo in float32
    return moe_combine(rows if row_dropout is None else row_dropout(rows), routing).to(x.dtype)


def _stacked(linears: list[Any]) -> tuple[Tensor, Tensor | None]:
    biases = [linear.bias for linear in linears]
    return torch.stack([linear.weight for linear in linears]), None if biases[0] is None else torch.stack(biases)


def _doge(self: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
    """Each expert has one neuron: rows of two tables, the first of which the product keys choose."""
    if not (_is_table(self.down_embed) and _is_table(self.up_embed)) or _holds(self, "act_fn"):
        return None
    tokens, keys = hidden_states.shape[:2].numel(), self.num_keys
    logits = self.router_gate(hidden_states).view(2, tokens, -1)
    (score_a, score_b), (key_a, key_b) = logits.topk(keys, dim=-1)
    pair_scores = (score_a.unsqueeze(-1) + score_b.unsqueeze(-2)).flatten(1)
    pair_ids = (key_a.unsqueeze(-1) * keys + key_b.unsqueeze(-2)).flatten(1)
    scores, place = pair_scores.topk(self.top_k, dim=-1)
    weights = scores.softmax(-1)
    if self.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    routing = Routing.from_topk(pair_ids.gather(-1, place), weights, self.num_experts)
    w_in, w_down = self.down_embed.weight.unsqueeze(1), self.up_embed.weight.unsqueeze(2)
    y = moe(hidden_states, routing, w_in, w_down, activation=act_gate(self.act_fn, gated=False))
    return _shared(self, hidden_states) + y, logits


def _shared(self: Any, x: Tensor) -> Tensor:
    gate, up, down = self.gate_proj, self.up_proj, self.down_proj
    if not all(is_plain(each) for each in (gate, up, down)):
        return down(self.act_fn(gate(x)) * up(x))
    return ffn(x, gate.weight, down.weight, w_up=up.weight, b_in=gate.bias, b_up=up.bias, b_down=down.bias,
               activation=act_gate(self.act_fn, gated=True))  # fmt: skip


def _vitpose(self: Any, hidden_state: Tensor, indices: Tensor) -> Any:
    """One linear layer for each data set, chosen by the data set of an image: rows of the others are not computed."""
    if _all_plain(self, self):
        return None
    x = hidden_state.flatten(0, -2)
    w, b = _stacked(list(self))
    ids = indices.long().expand(*hidden_state.shape[:-1], 1).reshape(-1, 1)
    routing = Routing.from_topk(ids, torch.ones_like(ids, dtype=torch.float32), len(self))
    y = moe_combine(_linear(moe_dispatch(x, routing), w, routing.offsets, b), routing)
    return y.unflatten(0, hidden_state.shape[:-1])


# ---- the list -------------------------------------------------------------------------------------------------------

_GATED = {"has_gate": True, "is_concatenated": True}


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _routed(experts: int, shape: tuple[int, ...] = (9, 6)) -> Callable[[], tuple[Any, ...]]:
    """x, ids and weights of two experts for each token."""
    return lambda: (_x(*shape), _x(9, experts).topk(2)[1], _x(9, 2).abs())


def _one_hot() -> tuple[Any, ...]:
    chosen = nn.functional.one_hot(_x(9, 1, 4).argmax(-1), 4)
    chosen[4] = 0
    return _x(9, 6), chosen, _x(9, 1)


def _apply_gate(self: Any, gate_up: Tensor) -> Any:
    gate, up = gate_up.chunk(2, -1)
    return self.act_fn(gate) * up


_MODELS = "transformers.models"
_Config = SimpleNamespace
EXCHANGES = {
    f"{_MODELS}.step3p7.modeling_step3p7.Step3p7Experts": Exchange(
        _step3p7, gate_of, lambda m: None,
        (_Config(num_local_experts=4, hidden_size=6, moe_intermediate_size=5, hidden_act="silu"), 0.7),
        _routed(4), members=_GATED,
    ),
    f"{_MODELS}.longcat_flash.modeling_longcat_flash.LongcatFlashExperts": Exchange(
        _longcat, gate_of,
        lambda m: "it has no experts that compute" if m.gate_up_proj is None else _holds(m, "identity_expert"),
        (_Config(expert_ffn_hidden_size=5, hidden_size=6, n_routed_experts=3, zero_expert_num=2,
         hidden_act="silu"),),
        _routed(5), members={**_GATED, "_apply_gate": _apply_gate},
    ),
    f"{_MODELS}.dbrx.modeling_dbrx.DbrxExperts": Exchange(
        _dbrx, lambda m: act_gate(m.mlp.activation_fn, gated=True), lambda m: _holds(m, "mlp", "mlp.activation_fn"),
        (_Config(hidden_size=6, ffn_hidden_size=5, moe_num_experts=4, ffn_act_fn={"name": "silu"}),),
        _routed(4, (3, 3, 6)), held=("mlp",),
    ),
    f"{_MODELS}.llama4.modeling_llama4.Llama4TextMoe": Exchange(
        _llama4, lambda m: act_gate(m.experts.act_fn, gated=True), lambda m: _holds(m, "experts", "experts.act_fn"),
        (_Config(num_experts_per_tok=2, hidden_size=6, num_local_experts=4, intermediate_size=5,
         hidden_act="silu"),),
        lambda: (_x(3, 3, 6),), ("router", "shared_expert"), ("experts",),
    ),
    f"{_MODELS}.jetmoe.modeling_jetmoe.JetMoeMoE": Exchange(
        _jetmoe, lambda m: act_gate(m.activation, gated=True),
        lambda m: _holds(m, "input_linear", "output_linear", "activation"),
        (_Config(hidden_size=6, intermediate_size=5, activation_function="silu", num_local_experts=4,
         num_experts_per_tok=2),),
        lambda: (_x(3, 3, 6),), ("router",), ("input_linear", "output_linear"),
    ),
    f"{_MODELS}.jetmoe.modeling_jetmoe.JetMoeParallelExperts": Exchange(
        _jetmoe_linear, lambda m: None, lambda m: None, (4, 6, 5), lambda: (_x(9, 6), [3, 0, 2, 4]),
    ),
    f"{_MODELS}.switch_transformers.modeling_switch_transformers.SwitchTransformersExperts": Exchange(
        _switch, lambda m: act_gate(m["expert_0"].act, gated=False), lambda m: _all_plain(m, m.values()),
        (_Config(num_experts=4, d_model=6, d_ff=5, dropout_rate=0.1, dense_act_fn="relu"),), _one_hot,
    ),
    f"{_MODELS}.nllb_moe.modeling_nllb_moe.NllbMoeExperts": Exchange(
        _nllb, lambda m: act_gate(m["expert_0"].act, gated=False), lambda m: _all_plain(m, m.values()),
        (_Config(num_experts=4, d_model=6, activation_dropout=0.1, activation_function="relu",
         moe_token_dropout=0.2), 5),
        lambda: (_x(9, 6), _x(9, 4).topk(3)[1], _x(9, 3)),
    ),
    f"{_MODELS}.doge.modeling_doge.DogeCDMoE": Exchange(
        _doge, lambda m: act_gate(m.act_fn, gated=False),
        lambda m: _holds(m, "act_fn") or (
            None if _is_table(m.down_embed) and _is_table(m.up_embed) else "its tables are called"
        ),
        (_Config(hidden_size=6, intermediate_size=5, hidden_act="silu", num_experts=9, num_experts_per_tok=4,
         norm_topk_prob=False, mlp_bias=True),),
        lambda: (_x(3, 4, 6),), ("router_gate", "gate_proj", "up_proj", "down_proj"),
    ),
    f"{_MODELS}.vitpose_backbone.modeling_vitpose_backbone.VitPoseNaiveMoe": Exchange(
        _vitpose, lambda m: None, lambda m: _all_plain(m, m),
        (_Config(num_experts=4, part_features=5, hidden_size=3, mlp_ratio=2),),
        lambda: (_x(3, 4, 6), torch.tensor([2, 0, 2]).view(-1, 1, 1)),
    ),
}  # fmt: skip
