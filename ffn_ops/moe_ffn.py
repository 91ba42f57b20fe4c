"""MoEFFN: the study guide's mixture of experts as a module, and how a trained dense layer becomes one.

Parameters and one operator call; the router is any callable that gives a Routing.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _checks as check
from . import expert_parallel, ops
from .modules import FeedForward, PlainFFN, is_plain_linear
from .ops._shared import arithmetic
from .routing import Routing, base, expert_choice, jitter
from .routing import top_k as _top_k

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class MoEFFN(nn.Module):
    """``sum over the chosen experts e of weight_e * expert_e(x)``, with Linear-GELU-Linear experts and their biases.

    By default the study guide's layer: softmax over a Linear router, top-k, weights not renormalised.

    Args:
        d_model, d_ff: widths D and F.
        num_experts, top_k: E and K.
        router: what makes a :class:`ffn_ops.Routing` of the logits ``[T, E]``, such as
            ``functools.partial(ffn_ops.routing.top_k, k=8, renormalize=True)``; None for the default. A keyword
            ``training`` is passed where it takes one. An ``nn.Module`` becomes a child, ``choose``.
        gated: experts are ``(act(gate) * up) w_down^T``.
        activation, beta: see :func:`ffn_ops.gated_act`.
        bias: whether experts have biases.
        num_shared: this many experts' width of a dense FFN, ``shared``, that sees every token.
        router_jitter: epsilon of :func:`ffn_ops.routing.jitter` on the router's input, in training.
        recompute: save x and the routing alone for backward, see :func:`ffn_ops.moe`.
        expert_mesh: a one-dimensional ``DeviceMesh`` whose ranks hold the experts together, each those that
            ``Shard(0)`` gives it: the stacked parameters are DTensors, ``router`` and ``shared`` are the first rank's
            on all. Each rank gives its own tokens and routes them among themselves, so a capacity is counted on each
            rank. Making the layer, calling it and its backward are collectives, see
            :func:`ffn_ops.expert_parallel.moe`.

    Shapes: x ``[..., D]`` to ``[..., D]``. State: ``router`` (Linear), ``w_in [E, F, D]`` (gated ``[E, 2F, D]``, gate
    rows first), ``b_in``, ``w_down [E, D, F]``, ``b_down``. The study guide's keys ``experts.{e}.0.*`` and
    ``experts.{e}.2.*`` load with ``strict=True``; :meth:`document_state_dict` gives them.

    The router computes in float32 (float64 for float64), also under autocast.

    Raises: TypeError, ValueError for sizes, names and inputs that do not fit.

    Source: the study guide's MoEFFN; Shazeer et al., Outrageously Large Neural Networks (2017), equation 1.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int = 8,
        top_k: int = 2,
        *,
        router: Callable[..., Routing] | None = None,
        gated: bool = False,
        activation: str = "gelu",
        beta: float = 1.0,
        bias: bool = True,
        num_shared: int = 0,
        router_jitter: float = 0.0,
        recompute: bool = False,
        expert_mesh: DeviceMesh | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_ff", d_ff), ("num_experts", num_experts), ("top_k", top_k)):
            check.positive(name, value)
        if router is None and top_k > num_experts:
            raise ValueError(f"top_k: expected at most num_experts = {num_experts}, got {top_k}")
        if router is not None and not callable(router):
            raise TypeError(f"router: expected a callable that gives a Routing, got {type(router).__name__}")
        for name, flag in (("gated", gated), ("bias", bias), ("recompute", recompute)):
            check.flag(name, flag)
        check.activation(activation, ops.activations())
        check.number("beta", beta)
        check.number("router_jitter", router_jitter)
        check.at_least("num_shared", num_shared, 0)
        self.d_model, self.d_ff, self.num_experts, self.top_k = d_model, d_ff, num_experts, top_k
        self.gated, self.activation, self.beta = gated, activation, beta
        self.router_jitter, self.recompute = router_jitter, recompute
        self.expert_mesh = expert_mesh
        begin, end = 0, num_experts
        if expert_mesh is not None:
            expert_parallel.check_mesh(expert_mesh, "expert_mesh")
            _check_local(router)
            facts: dict[str, Any] = {"d_model": d_model, "d_ff": d_ff, "num_experts": num_experts, "gated": gated}
            facts |= {"bias": bias, "activation": activation, "beta": beta, "num_shared": num_shared}
            expert_parallel.check_alike(expert_mesh, facts)
            begin, end = expert_parallel.experts_of(num_experts, expert_mesh.size(), expert_mesh.get_local_rank())
        self.router = nn.Linear(d_model, num_experts)
        self.choose = router
        self._takes_training = router is not None and _takes(router, "training")
        # Drawn layer by layer in the order in which the study guide's module draws them: a seed gives its parameters.
        parts: dict[str, list[Tensor]] = {"w_in": [], "b_in": [], "w_down": [], "b_down": []}
        for e in range(num_experts):
            for name, sizes in (("in", (d_model, 2 * d_ff if gated else d_ff)), ("down", (d_ff, d_model))):
                layer = nn.Linear(*sizes, bias=bias)
                for kind, t in (("w", layer.weight), ("b", layer.bias)):
                    if t is not None:  # another rank's experts leave their shape alone
                        parts[f"{kind}_{name}"].append(t.detach()[None] if begin <= e < end else t.detach()[None][:0])
        stacked = {name: torch.cat(each) for name, each in parts.items() if each}
        if expert_mesh is not None:
            stacked = {name: expert_parallel.shard(t, num_experts, expert_mesh) for name, t in stacked.items()}
        self.w_in, self.w_down = nn.Parameter(stacked["w_in"]), nn.Parameter(stacked["w_down"])
        self.b_in = nn.Parameter(stacked["b_in"]) if bias else None
        self.b_down = nn.Parameter(stacked["b_down"]) if bias else None
        self.shared: nn.Module | None = None
        if num_shared and gated:
            width = num_shared * d_ff  # two thirds of (3 width + 1) / 2, rounded down, are the width
            self.shared = FeedForward(
                d_model, (3 * width + 1) // 2, 1, 0.0, activation=activation, beta=beta, bias=bias, recompute=recompute
            )
        elif num_shared:
            self.shared = PlainFFN(d_model, num_shared * d_ff, activation=activation, beta=beta, recompute=recompute)
        self.register_load_state_dict_pre_hook(_stack_experts)
        if expert_mesh is not None:
            whole = [t for t in (*self.parameters(), *self.buffers()) if not check.is_dtensor(t)]
            expert_parallel.equalize(expert_mesh, whole)

    __prepare_scriptable__ = check.refuse_script

    def logits(self, x: Tensor) -> Tensor:
        """``[..., E]`` in float32 (float64 for float64): what the router chooses by, and what losses take."""
        check.tensor("x", x)
        if x.dim() < 1 or x.shape[-1] != self.d_model:
            raise ValueError(f"x: expected shape [..., {self.d_model}], got {list(x.shape)}")
        if self.training and self.router_jitter:
            x = jitter(x, self.router_jitter)
        if not is_plain_linear(self.router):
            z: Tensor = self.router(x)
            return z.to(arithmetic(z))
        wide = arithmetic(x)
        meta = x.device.type == "meta"  # which has no autocast to leave
        with nullcontext() if meta else torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.router.weight.to(wide), self.router.bias.to(wide))

    def route(self, logits: Tensor, **options: Any) -> Routing:
        """The routing of logits; ``options`` (``mask``, ``token_ids``, ...) go to the router."""
        logits = logits.reshape(-1, self.num_experts)
        if self.choose is None:
            return _top_k(logits, self.top_k, **options)
        if self._takes_training:
            options = {"training": self.training, **options}
        return self.choose(logits, **options)

    def forward(
        self, x: Tensor, *, routing: Routing | None = None, return_routing: bool = False, **options: Any
    ) -> Any:
        """y, or with ``return_routing=True`` ``(y, routing, logits)`` for losses and statistics.

        ``routing`` replaces the router's choice (logits are then None); other keywords go to the router.
        """
        if isinstance(x, check.Proxy):
            return check.leaf(self, x)(x, routing=routing, return_routing=return_routing, **options)
        logits = None
        if routing is None:
            logits = self.logits(x)
            routing = self.route(logits, **options)
        experts: dict[str, Any] = {
            "gated": self.gated, "b_in": self.b_in, "b_down": self.b_down, "activation": self.activation,
            "beta": self.beta, "recompute": self.recompute,
        }  # fmt: skip
        if self.expert_mesh is None:
            y = ops.moe(x, routing, self.w_in, self.w_down, **experts)
        else:
            y = expert_parallel.moe(x, routing, self.w_in, self.w_down, mesh=self.expert_mesh, **experts)
        if self.shared is not None:
            y = y + self.shared(x)
        return (y, routing, logits) if return_routing else y

    def document_state_dict(self) -> dict[str, Tensor]:
        """``router.*``, ``experts.{e}.0.*``, ``experts.{e}.2.*``: what the study guide's module loads.

        With sharded parameters a collective: every rank gets all.
        """
        if self.gated or self.shared is not None or self.b_in is None or self.b_down is None:
            raise ValueError("document_state_dict: expected plain experts with biases and no shared ones")
        state = {f"router.{name}": value for name, value in self.router.state_dict().items()}
        stacked: list[Any] = [self.w_in, self.b_in, self.w_down, self.b_down]
        stacked = [t.full_tensor() if check.is_dtensor(t) else t for t in stacked]
        for e in range(self.num_experts):
            for place, weight, bias in ((0, *stacked[:2]), (2, *stacked[2:])):
                state[f"experts.{e}.{place}.weight"] = weight[e].detach()
                state[f"experts.{e}.{place}.bias"] = bias[e].detach()
        return state

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, d_ff={self.d_ff}, num_experts={self.num_experts}, top_k={self.top_k},"
            f" gated={self.gated}, activation={self.activation!r}"
            + (f", expert_mesh={self.expert_mesh}" if self.expert_mesh is not None else "")
        )


def _takes(router: Callable[..., Any], name: str) -> bool:
    function = router.forward if isinstance(router, nn.Module) else router
    return name in inspect.signature(function).parameters


def _check_local(router: Callable[..., Any] | None) -> None:
    while isinstance(router, functools.partial):
        router = router.func
    if router in (base, expert_choice):
        raise ValueError(
            f"router: expected one that chooses for each token, got {router.__name__}, which weighs all tokens of the"
            " batch against each other: with expert_mesh a rank has only its own"
        )


def _stack_experts(module: MoEFFN, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """The study guide's keys become the stacked ones, where all of a kind are there; a sharded parameter takes its
    part of a whole one."""
    for stacked, name in (("w_in", "0.weight"), ("b_in", "0.bias"), ("w_down", "2.weight"), ("b_down", "2.bias")):
        keys = [f"{prefix}experts.{e}.{name}" for e in range(module.num_experts)]
        parts = [state[key] for key in keys if key in state]
        if len(parts) == len(keys) and len({part.shape for part in parts}) == 1:
            for key in keys:
                del state[key]
            state[prefix + stacked] = torch.stack(parts)
        whole, parameter = state.get(prefix + stacked), getattr(module, stacked)
        if (
            check.is_dtensor(parameter)
            and whole is not None
            and not check.is_dtensor(whole)
            and whole.shape == parameter.shape
        ):
            from torch.distributed.tensor import distribute_tensor

            whole = whole.detach().to(parameter.device_mesh.device_type)
            mesh, placements = parameter.device_mesh, parameter.placements
            state[prefix + stacked] = distribute_tensor(whole, mesh, placements, src_data_rank=None)  # its own part


def upcycle(
    ffn: nn.Module, num_experts: int, *, top_k: int = 2, router: Callable[..., Routing] | None = None
) -> MoEFFN:
    """A mixture whose experts are copies of a trained dense FFN.

    With the default router (top-k, renormalised) the weights of a token sum to 1, so that the mixture computes the same
    function as ``ffn`` at the start, up to rounding. Weights that do not sum to 1 (the study guide's own, Switch's,
    BASE's) or dropped rows scale the output: a ``router`` of one's own gives a warning.

    Args:
        ffn: a :class:`PlainFFN` (ReLUFFN, GELUFFN, SwishFFN) or :class:`FeedForward` with plain linear children.
        num_experts, top_k: E and K.
        router: None for renormalised top-k.

    Raises:
        TypeError: for a layer of another kind, whose function experts cannot compute.
        ValueError: for adapters, hooks or dropout in the layer, which experts do not have.

    Source: Komatsuzaki et al., Sparse Upcycling (2022).
    """
    check.positive("num_experts", num_experts)
    check.positive("top_k", top_k)
    if not isinstance(ffn, (PlainFFN, FeedForward)):
        raise TypeError(f"ffn: expected a PlainFFN or a FeedForward, got {type(ffn).__name__}")
    gated = isinstance(ffn, FeedForward)
    layers: list[Any] = [ffn.w1, ffn.w3, ffn.w2] if isinstance(ffn, FeedForward) else [ffn.linear1, ffn.linear2]
    if not all(is_plain_linear(layer) for layer in layers):
        raise ValueError("ffn: expected plain nn.Linear children without adapters and hooks")
    if isinstance(ffn, FeedForward) and ffn.dropout.p > 0:
        raise ValueError(f"ffn: expected dropout 0, which experts do not have, got {ffn.dropout.p}")
    if router is None:
        router = functools.partial(_top_k, k=top_k, renormalize=True)
    else:
        warnings.warn(
            "upcycle: the mixture computes the dense layer's function only where the router's weights sum to 1",
            UserWarning,
            stacklevel=2,
        )
    down = layers[-1]
    moe = MoEFFN(
        down.out_features, down.in_features, num_experts, top_k, router=router, gated=gated,
        activation=ffn.activation, beta=ffn.beta, bias=down.bias is not None, recompute=ffn.recompute,
    ).to(down.weight)  # fmt: skip
    moe.train(ffn.training)
    with torch.no_grad():
        moe.w_in.copy_(torch.cat([layer.weight for layer in layers[:-1]]))
        moe.w_down.copy_(down.weight)
        if moe.b_in is not None and moe.b_down is not None:
            moe.b_in.copy_(torch.cat([layer.bias for layer in layers[:-1]]))
            moe.b_down.copy_(down.bias)
    return moe
