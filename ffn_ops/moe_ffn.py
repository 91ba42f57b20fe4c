# SPDX-License-Identifier: BSD-3-Clause
"""MoEFFN: a mixture of experts as a module.

It holds parameters and calls one operator. The router is any callable that returns a Routing.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _checks as check
from . import expert_parallel, ops
from ._gate import Gate, as_gate
from .modules import PLAIN_TENSORS, FeedForward, PlainFFN, is_plain_linear, reset
from .ops._rows import check_routing
from .ops._shared import arithmetic, fold
from .routing import Routing, base, expert_choice, jitter
from .routing import top_k as _top_k
from .routing._routing import check_mask, mask_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class MoEFFN(nn.Module):
    """``sum over the chosen experts e of weight_e * expert_e(x)``, with Linear-GELU-Linear experts and their biases.

    The default is the layer of the two guides (see the documentation, Getting started): softmax over a Linear router,
    top-k, weights not renormalised.

    Args:
        d_model, d_ff: widths D and F.
        num_experts, top_k: E and K.
        router: a callable from logits ``[T, E]`` to a :class:`ffn_ops.Routing`, such as
            ``functools.partial(ffn_ops.routing.top_k, k=8, renormalize=True)``; None for the default. It gets the
            keyword ``training`` if it has such a parameter. An ``nn.Module`` becomes a child, ``choose``.
        gated: experts are ``(act(gate) * up) w_down^T``.
        activation: a name or a :class:`ffn_ops.Gate`, of the experts and of the shared ones.
        bias: whether the router, the experts and the shared experts have biases.
        num_shared: the width of the dense FFN ``shared``, in experts; every token passes through it.
        router_jitter: epsilon of :func:`ffn_ops.routing.jitter` on the router's input, in training.
        recompute: save x and the routing alone for backward, see :func:`ffn_ops.moe`.
        expert_mesh: a one-dimensional ``DeviceMesh`` over whose ranks the experts are spread by ``Shard(0)``. The
            stacked parameters are DTensors; ``router`` and ``shared`` start with the first rank's values on all ranks.
            Each rank routes its own tokens, so a capacity counts the tokens of one rank. The constructor, calls and
            their backward are collectives, see
            :func:`ffn_ops.expert_parallel.moe`.

    Shapes: x ``[..., D]`` to ``[..., D]``. State: ``router`` (Linear), ``w_in [E, F, D]`` (gated ``[E, 2F, D]``, gate
    rows first, or alternating with those of up where the gate is ``interleaved``), ``b_in``, ``w_down [E, D, F]``,
    ``b_down``. The study guide's keys ``experts.{e}.0.*`` and ``experts.{e}.2.*`` load with ``strict=True``;
    :meth:`document_state_dict` gives them.

    The router computes in float32 (float64 for float64), even under autocast and in a 16-bit layer. A plain
    ``nn.Linear`` runs as :func:`ffn_ops.route_linear`, whose bits do not depend on the batch. Any other module from x
    ``[..., D]`` to logits ``[..., E]`` is called, with its hooks and adapters, with x and its 16-bit parameters in
    float32.

    Raises: TypeError, ValueError for sizes, names and inputs that do not fit.

    Source: the guides' MoEFFN; Shazeer et al., Outrageously Large Neural Networks (2017), equation 1.

    Example:
        >>> layer = ffn_ops.MoEFFN(d_model=8, d_ff=16, num_experts=4, top_k=2)
        >>> y, routing, logits = layer(torch.randn(5, 8), return_routing=True)
        >>> routing.counts.sum()  # 5 tokens, 2 experts each
        tensor(10)
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
        activation: str | Gate = "gelu",
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
        gate = as_gate(activation, gated=gated, one_weight=gated)
        check.number("router_jitter", router_jitter)
        check.at_least("num_shared", num_shared, 0)
        self.d_model, self.d_ff, self.num_experts, self.top_k = d_model, d_ff, num_experts, top_k
        self.gated, self.activation = gated, activation
        self.router_jitter, self.recompute = router_jitter, recompute
        self.expert_mesh = expert_mesh
        begin, end = 0, num_experts
        if expert_mesh is not None:
            expert_parallel.check_mesh(expert_mesh, "expert_mesh")
            _check_local(router)
            facts: dict[str, Any] = {"d_model": d_model, "d_ff": d_ff, "num_experts": num_experts, "gated": gated}
            facts |= {"bias": bias, "activation": gate, "num_shared": num_shared}
            expert_parallel.check_alike(expert_mesh, facts)
            begin, end = expert_parallel.experts_of(num_experts, expert_mesh.size(), expert_mesh.get_local_rank())
        self.router = nn.Linear(d_model, num_experts, bias=bias)
        self.choose = router
        self._takes_training = router is not None and _takes(router, "training")

        def stacked(*shape: int) -> nn.Parameter:
            local = torch.empty(end - begin, *shape)
            return nn.Parameter(
                local if expert_mesh is None else expert_parallel.shard(local, num_experts, expert_mesh)
            )

        width = 2 * d_ff if gated else d_ff
        self.w_in, self.w_down = stacked(width, d_model), stacked(d_model, d_ff)
        self.b_in = stacked(width) if bias else None
        self.b_down = stacked(d_model) if bias else None
        self._draw_experts()
        self.shared: nn.Module | None = None
        if num_shared and gated:
            self.shared = FeedForward(
                d_model,
                d_ff=num_shared * d_ff,
                activation=gate.replace(interleaved=False),
                bias=bias,
                recompute=recompute,
            )
        elif num_shared:
            self.shared = PlainFFN(d_model, num_shared * d_ff, activation=activation, bias=bias, recompute=recompute)
        self.register_load_state_dict_pre_hook(_stack_experts)
        self._equalize()

    def reset_parameters(self) -> None:
        """Initialises the router, the experts and the shared experts in the constructor's order; for use after
        ``to_empty``. With ``expert_mesh`` it is a collective."""
        reset(self.router)
        self._draw_experts()
        for child in (self.shared, self.choose):
            if isinstance(child, nn.Module):
                reset(child)
        self._equalize()

    @torch.no_grad()
    def _draw_experts(self) -> None:
        """Draws layer by layer in the order of the guides' module, so that a seed gives the same parameters."""
        pairs: list[list[Any]] = [[self.w_in, self.b_in], [self.w_down, self.b_down]]
        first = 0
        if check.is_dtensor(self.w_in):
            mesh: Any = self.expert_mesh
            if mesh is None or pairs[0][0].device_mesh != mesh:  # sharded by another library: torch draws for all ranks
                for w, b in pairs:
                    for t in (w, b):
                        if t is not None:
                            nn.init.uniform_(t, -(w.shape[2] ** -0.5), w.shape[2] ** -0.5)
                return
            first = expert_parallel.experts_of(self.num_experts, mesh.size(), mesh.get_local_rank())[0]
            pairs = [[None if t is None else t.to_local() for t in pair] for pair in pairs]
        for e in range(self.num_experts):
            for w, b in pairs:
                fresh = nn.Linear(w.shape[2], w.shape[1], b is not None, device=w.device, dtype=w.dtype)
                # drawn and thrown away, so that later experts get the same random numbers
                if first <= e < first + w.shape[0]:
                    w[e - first] = fresh.weight
                    if b is not None:
                        b[e - first] = fresh.bias

    def _equalize(self) -> None:
        """Copies the first rank's router and shared experts to all ranks."""
        if self.expert_mesh is not None:
            whole = [t for t in (*self.parameters(), *self.buffers()) if not check.is_dtensor(t)]
            expert_parallel.equalize(self.expert_mesh, whole)

    __prepare_scriptable__ = check.refuse_script

    def logits(self, x: Tensor) -> Tensor:
        """Logits ``[..., E]`` in float32 (float64 for float64), for the router's choice and for losses."""
        self._check(x)
        if self.training and self.router_jitter:
            x = jitter(x.to(arithmetic(x)), self.router_jitter)
        if is_plain_linear(self.router):
            w: Any = self.router.weight
            b: Any = self.router.bias
            if w.dtype not in (x.dtype, arithmetic(x)) or (b is not None and b.dtype is not w.dtype):
                w, b = (t if t is None else t.to(arithmetic(x)) for t in (w, b))
            z = ops.route_linear(x, w, b)
        else:
            z = _called(self.router, x)
        shape, kind = (*x.shape[:-1], self.num_experts), type(self.router).__name__
        if not isinstance(z, Tensor):
            raise TypeError(f"router: expected logits, a torch.Tensor, from {kind}, got {type(z).__name__}")
        if z.shape != shape:
            raise ValueError(f"router: expected logits {list(shape)} from {kind}, got {list(z.shape)}")
        return z

    def _check(self, x: Tensor) -> None:
        check.tensor("x", x)
        if x.dim() < 1 or x.shape[-1] != self.d_model:
            raise ValueError(f"x: expected shape [..., {self.d_model}], got {list(x.shape)}")

    def route(self, logits: Tensor, **options: Any) -> Routing:
        """The routing of logits; ``options`` (``mask``, ``token_ids``, ...) go to the router."""
        logits = logits.reshape(-1, self.num_experts)
        if self.choose is None:
            return _top_k(logits, self.top_k, **options)
        if self._takes_training:
            options = {"training": self.training, **options}
        return self.choose(logits, **options)

    def _real_tokens(self, x: Tensor, routing: Routing | None, mask: Tensor | None) -> Tensor | None:
        """The mask as ``[..., 1]``, or None without a mask."""
        if routing is None and mask is None:
            return None
        self._check(x)
        tokens = fold(x)
        if routing is not None:
            check_routing(x, routing)
            mask = mask_of(routing, mask, tokens)
        elif mask is not None:
            mask = check_mask(mask, tokens)
        return None if mask is None else mask.reshape(x.shape[:-1]).unsqueeze(-1)

    def forward(
        self, x: Tensor, *, routing: Routing | None = None, return_routing: bool = False, **options: Any
    ) -> Any:
        """Returns y, or ``(y, routing, logits)`` with ``return_routing=True``, for losses and statistics.

        ``routing`` replaces the router's choice; logits are then None. Other keywords go to the router. ``mask`` (bool,
        one for each token, False for padding; with ``routing`` it must be the routing's own) leaves padding out of the
        shared experts too: its y and every gradient from it are exactly 0, whatever x holds there.
        """
        if isinstance(x, check.Proxy):
            return check.leaf(self, x)(x, routing=routing, return_routing=return_routing, **options)
        logits = None
        real = self._real_tokens(x, routing, options.get("mask"))
        if real is not None:
            x = torch.where(real, x, 0)
        if routing is None:
            logits = self.logits(x)
            routing = self.route(logits, **options)
        experts: dict[str, Any] = {
            "gated": self.gated, "b_in": self.b_in, "b_down": self.b_down, "activation": self.activation,
            "recompute": self.recompute,
        }  # fmt: skip
        if self.expert_mesh is None:
            y = ops.moe(x, routing, self.w_in, self.w_down, **experts)
        else:
            y = expert_parallel.moe(x, routing, self.w_in, self.w_down, mesh=self.expert_mesh, **experts)
        if self.shared is not None:
            shared = self.shared(x)
            y = y + (shared if real is None else torch.where(real, shared, 0))
        return (y, routing, logits) if return_routing else y

    def document_state_dict(self) -> dict[str, Tensor]:
        """The state dict of the guides' module: ``router.*``, ``experts.{e}.0.*``, ``experts.{e}.2.*``.

        With sharded parameters it is a collective, and every rank gets all experts.
        """
        if self.gated or self.shared is not None or self.b_in is None or self.b_down is None:
            raise ValueError("document_state_dict: expected plain experts with biases and no shared ones")
        state = {f"router.{name}": value for name, value in self.router.state_dict().items()}
        if "router.weight" in state:  # the guides' router has a bias
            state.setdefault("router.bias", state["router.weight"].new_zeros(self.num_experts))
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


_SWAPPING = threading.RLock()  # guards the parameters of a module that other threads may be calling


def _free_in_child() -> None:
    """Makes a new lock: the thread that held it does not exist in a forked child."""
    global _SWAPPING
    _SWAPPING = threading.RLock()


os.register_at_fork(after_in_child=_free_in_child)


def _called(router: nn.Module, x: Tensor) -> Any:
    """Logits of a router that is more than a plain linear layer, hooks included, in float32 even if its parameters are
    16-bit. With parameters that are not plain tensors (sharded, quantised) x is passed in its own dtype."""
    wide = x.to(arithmetic(x))
    meta = x.device.type == "meta"  # meta has no autocast to turn off
    with nullcontext() if meta else torch.autocast(x.device.type, enabled=False):
        with nullcontext() if torch.compiler.is_compiling() else _SWAPPING:
            buffers = dict(router.named_buffers())
            named = {**dict(router.named_parameters()), **buffers}
            low = {name: t for name, t in named.items() if t.dtype in (torch.float16, torch.bfloat16)}
            alone = isinstance(router, torch.jit.ScriptModule) or any(
                type(t) not in PLAIN_TENSORS for t in low.values()
            )
            if low and not alone:
                state = {name: t.to(wide.dtype) for name, t in low.items()}
                z = torch.func.functional_call(router, state, (wide,))
                with torch.no_grad():
                    for name in low.keys() & buffers.keys():  # such as running means, which the call may have updated
                        buffers[name].copy_(state[name])
        if not low or alone:
            z = router(x if low else wide)
    return z.to(arithmetic(z)) if isinstance(z, Tensor) else z


def _takes(router: Callable[..., Any], name: str) -> bool:
    function = router.forward if isinstance(router, nn.Module) else router
    return name in inspect.signature(function).parameters


def _check_local(router: Callable[..., Any] | None) -> None:
    while isinstance(router, functools.partial):
        router = router.func
    if router in (base, expert_choice):
        raise ValueError(
            f"router: expected one that chooses for each token, got {router.__name__}, which compares all tokens of the"
            " batch: with expert_mesh a rank has only its own tokens"
        )


def _stack_experts(
    module: MoEFFN, state: dict[str, Tensor], prefix: str, _metadata: Any, _strict: bool, missing: list[str],
    _unexpected: Any, errors: list[str],
) -> None:  # fmt: skip
    """Converts the guides' keys to the stacked ones. A key that is missing or does not fit is named by its own name. A
    sharded parameter takes its part of the whole."""
    for stacked, name in (("w_in", "0.weight"), ("b_in", "0.bias"), ("w_down", "2.weight"), ("b_down", "2.bias")):
        parameter = getattr(module, stacked)
        keys = [f"{prefix}experts.{e}.{name}" for e in range(module.num_experts)]
        found = {key: state[key] for key in keys if key in state}
        if found and parameter is not None:
            for key in found:
                del state[key]
            absent = [key for key in keys if key not in found]
            shapes = {part.shape for part in found.values()}
            missing += absent
            if len(shapes) > 1:
                errors += [
                    f"size mismatch for {key}: copying a param with shape {part.shape} from checkpoint, the shape of an"
                    f" expert in current model is {parameter.shape[1:]}."
                    for key, part in found.items()
                    if part.shape != parameter.shape[1:]
                ]
                state[prefix + stacked] = parameter.detach()
                continue
            if not absent:
                state[prefix + stacked] = torch.stack(list(found.values()))
            elif not check.is_dtensor(parameter) and not parameter.is_meta:  # the experts in the checkpoint
                kept = parameter.detach().to(next(iter(found.values())))
                state[prefix + stacked] = torch.stack([found.get(key, kept[e]) for e, key in enumerate(keys)])
        whole = state.get(prefix + stacked)
        if (
            check.is_dtensor(parameter)
            and whole is not None
            and not check.is_dtensor(whole)
            and whole.shape == parameter.shape
        ):
            from torch.distributed.tensor import distribute_tensor

            whole = whole.detach().to(parameter.device_mesh.device_type)
            mesh, placements = parameter.device_mesh, parameter.placements
            state[prefix + stacked] = distribute_tensor(whole, mesh, placements, src_data_rank=None)  # this rank's part
