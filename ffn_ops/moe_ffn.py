# SPDX-License-Identifier: BSD-3-Clause
"""MoEFFN: a mixture of experts as a module.

It holds parameters and calls one operator. The router is any callable that returns a Routing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _checks as check
from . import expert_parallel, ops
from ._gate import Gate, as_gate
from ._router_call import called_wide
from ._stacking import guide_state, stack_experts
from .modules import FeedForward, PlainFFN, is_plain_linear, reset
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
        shared_gate: a Linear from D to 1, ``shared_gate``, whose sigmoid multiplies what ``shared`` gives.
        expert_scale: a factor of each expert's output, ``expert_scale`` ``[E]``, at first 1.
        num_identity, num_null: further choices of the router after the E experts: first those that return x, then those
            that return nothing. What ``return_routing`` returns includes them.
        d_latent: the experts' width in the place of D, between two Linear layers, ``latent_down`` and ``latent_up``,
            either of which may be replaced, as by one with a norm. The router sees x.
        expert_norm: a module from rows ``[R, D]`` to ``[R, D]``, such as ``nn.RMSNorm``, on what each expert gives
            for a token, before the weights.
        router_jitter: epsilon of :func:`ffn_ops.routing.jitter` on the router's input, in training.
        recompute: save x and the routing alone for backward, see :func:`ffn_ops.moe`.
        expert_mesh: a one-dimensional ``DeviceMesh`` over whose ranks the experts are spread by ``Shard(0)``. The
            stacked parameters are DTensors; ``router`` and ``shared`` start with the first rank's values on all ranks.
            Each rank routes its own tokens, so a capacity counts the tokens of one rank. The constructor, calls and
            their backward are collectives, see
            :func:`ffn_ops.expert_parallel.moe`.

    Shapes: x ``[..., D]`` to ``[..., D]``. State: ``router`` (Linear), ``w_in [E, F, D]`` (gated ``[E, 2F, D]``, gate
    rows first, or alternating with those of up where the gate is ``interleaved``), ``b_in``, ``w_down [E, D, F]``,
    ``b_down``, with ``d_latent`` in D's place. The study guide's keys ``experts.{e}.0.*`` and
    ``experts.{e}.2.*`` load with ``strict=True``; :meth:`document_state_dict` gives them.

    The router computes in float32 (float64 for float64), even under autocast and in a 16-bit layer. A plain
    ``nn.Linear`` runs as :func:`ffn_ops.route_linear`, whose bits do not depend on the batch. Any other module from x
    ``[..., D]`` to logits ``[..., E]`` is called, with its hooks and adapters, with x and its 16-bit parameters in
    float32.

    Raises: TypeError, ValueError for sizes, names and inputs that do not fit.

    Source: the guides' MoEFFN; Shazeer et al., Outrageously Large Neural Networks (2017), equation 1; a gate on
        the shared experts: Qwen2-MoE (2024); experts without computation: LongCat-Flash (2025), section 2.1; latent
        experts: Nemotron 3 (2025).

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
        shared_gate: bool = False,
        expert_scale: bool = False,
        num_identity: int = 0,
        num_null: int = 0,
        d_latent: int | None = None,
        expert_norm: nn.Module | None = None,
        router_jitter: float = 0.0,
        recompute: bool = False,
        expert_mesh: DeviceMesh | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_ff", d_ff), ("num_experts", num_experts), ("top_k", top_k)):
            check.positive(name, value)
        for name, value in (("num_identity", num_identity), ("num_null", num_null), ("num_shared", num_shared)):
            check.at_least(name, value, 0)
        choices = num_experts + num_identity + num_null
        if router is None and top_k > choices:
            raise ValueError(f"top_k: expected at most num_experts = {choices}, got {top_k}")
        if router is not None and not callable(router):
            raise TypeError(f"router: expected a callable that gives a Routing, got {type(router).__name__}")
        flags = {"gated": gated, "bias": bias, "recompute": recompute, "shared_gate": shared_gate}
        for name, flag in {**flags, "expert_scale": expert_scale}.items():
            check.flag(name, flag)
        gate = as_gate(activation, gated=gated, one_weight=gated)
        if d_latent is not None:
            check.positive("d_latent", d_latent)
        if expert_norm is not None and not isinstance(expert_norm, nn.Module):
            raise TypeError(f"expert_norm: expected an nn.Module, got {type(expert_norm).__name__}")
        if expert_norm is not None and expert_mesh is not None:
            raise ValueError("expert_norm: expected None with expert_mesh, whose ranks weight rows before they return")
        if shared_gate and not num_shared:
            raise ValueError("shared_gate: expected num_shared of 1 or more, got 0")
        check.number("router_jitter", router_jitter)
        if not 0 <= router_jitter <= 1:
            raise ValueError(f"router_jitter: expected 0 to 1, got {router_jitter}")
        self.d_model, self.d_ff, self.num_experts, self.top_k = d_model, d_ff, num_experts, top_k
        self.num_identity, self.num_choices = num_identity, choices
        self.gated, self.activation = gated, activation
        self.router_jitter, self.recompute = router_jitter, recompute
        self.expert_mesh = expert_mesh
        begin, end = 0, num_experts
        if expert_mesh is not None:
            expert_parallel.check_mesh(expert_mesh, "expert_mesh")
            _check_local(router)
            facts: dict[str, Any] = {"d_model": d_model, "d_ff": d_ff, "num_experts": num_experts, "gated": gated}
            facts |= {"bias": bias, "activation": gate, "num_shared": num_shared}
            facts |= {"shared_gate": shared_gate, "expert_scale": expert_scale, "d_latent": d_latent}
            facts |= {"num_identity": num_identity, "num_null": num_null}
            expert_parallel.check_alike(expert_mesh, facts)
            begin, end = expert_parallel.experts_of(num_experts, expert_mesh.size(), expert_mesh.get_local_rank())
        self.router = nn.Linear(d_model, self.num_choices, bias=bias)
        self.choose = router
        self._takes_training = router is not None and _takes(router, "training")

        def stacked(*shape: int) -> nn.Parameter:
            local = torch.empty(end - begin, *shape)
            return nn.Parameter(
                local if expert_mesh is None else expert_parallel.shard(local, num_experts, expert_mesh)
            )

        width, inner = 2 * d_ff if gated else d_ff, d_latent or d_model
        self.w_in, self.w_down = stacked(width, inner), stacked(inner, d_ff)
        self.b_in = stacked(width) if bias else None
        self.b_down = stacked(inner) if bias else None
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
        self.shared_gate = nn.Linear(d_model, 1, bias=False) if shared_gate else None
        self.expert_scale = nn.Parameter(torch.ones(num_experts)) if expert_scale else None
        self.latent_down: nn.Module | None = None
        self.latent_up: nn.Module | None = None
        if d_latent is not None:
            self.latent_down, self.latent_up = (nn.Linear(*d, bias=bias) for d in ((d_model, inner), (inner, d_model)))
        self.expert_norm = expert_norm
        self.register_load_state_dict_pre_hook(stack_experts)
        self._equalize()

    def reset_parameters(self) -> None:
        """Initialises the router, the experts and the shared experts in the constructor's order; for use after
        ``to_empty``. With ``expert_mesh`` it is a collective."""
        if not isinstance(self.w_in, Tensor):
            raise TypeError(f"w_in: expected a parameter to draw again, got {type(self.w_in).__name__}")
        reset(self.router)
        self._draw_experts()
        for child in (self.shared, self.choose, self.shared_gate, self.latent_down, self.latent_up, self.expert_norm):
            if isinstance(child, nn.Module):
                reset(child)
        if self.expert_scale is not None:
            nn.init.ones_(self.expert_scale)
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
        """Logits ``[..., E]`` in float32 (float64 for float64), for the router's choice and for losses. E counts all
        that it chooses among."""
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
            z = called_wide(self.router, x)
        shape, kind = (*x.shape[:-1], self.num_choices), type(self.router).__name__
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
        logits = logits.reshape(-1, self.num_choices)
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
        y = self._experts(x, routing)
        if self.shared is not None:
            shared = self.shared(x)
            y = y + (shared if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * shared)
        if real is not None and (self.shared is not None or self.latent_up is not None):
            y = torch.where(real, y, 0)
        return (y, routing, logits) if return_routing else y

    def _experts(self, x: Tensor, routing: Routing) -> Tensor:
        """The output of the routed experts, without the shared ones."""
        options: dict[str, Any] = {
            "gated": self.gated, "b_in": self.b_in, "b_down": self.b_down, "activation": self.activation,
            "recompute": self.recompute,
        }  # fmt: skip
        chosen = routing
        if self.num_choices != self.num_experts:  # where they are the same, the operator looks
            check.is_routing(routing)
            check.indices("routing.offsets", routing.offsets, (self.num_choices + 1,))
            chosen = routing.first(self.num_experts)
        if self.expert_scale is not None:
            chosen = chosen.scaled(self.expert_scale)
        inner = x if self.latent_down is None else self.latent_down(x)
        if self.expert_norm is not None:
            rows = ops.moe_dispatch(inner, chosen)
            rows = ops.moe_experts(rows, chosen.offsets, self.w_in, self.w_down, **options)
            y = ops.moe_combine(self.expert_norm(rows), chosen)
            y = y.reshape(*x.shape[:-1], y.shape[-1])
        elif self.expert_mesh is None:
            y = ops.moe(inner, chosen, self.w_in, self.w_down, **options)
        else:
            y = expert_parallel.moe(inner, chosen, self.w_in, self.w_down, mesh=self.expert_mesh, **options)
        if self.latent_up is not None:
            y = self.latent_up(y)
        if self.num_identity:
            passed = routing.weight_of(self.num_experts, self.num_experts + self.num_identity)
            y = (y + x * passed.reshape(*x.shape[:-1], 1)).to(y.dtype)
        return y

    def document_state_dict(self) -> dict[str, Tensor]:
        """The state dict of the guides' module: ``router.*``, ``experts.{e}.0.*``, ``experts.{e}.2.*``.

        With sharded parameters it is a collective, and every rank gets all experts.
        """
        return guide_state(self)

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
            f"router: expected one that chooses for each token, got {router.__name__}, which compares all tokens of the"
            " batch: with expert_mesh a rank has only its own tokens"
        )
