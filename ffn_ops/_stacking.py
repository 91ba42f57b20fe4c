# SPDX-License-Identifier: BSD-3-Clause
"""The study guide's keys of a mixture, one for each expert, become those of the stacked parameters, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _checks as check

if TYPE_CHECKING:
    from .moe_ffn import MoEFFN


def stack_experts(
    module: MoEFFN, state: dict[str, Tensor], prefix: str, _metadata: Any, _strict: bool, missing: list[str],
    _unexpected: Any, errors: list[str],
) -> None:  # fmt: skip
    """The study guide's keys become the stacked ones; where one of them is missing or does not fit, it alone is named.
    A sharded parameter takes its part of a whole one."""
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
            elif not check.is_dtensor(parameter) and not parameter.is_meta:  # the experts that are there
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
            state[prefix + stacked] = distribute_tensor(whole, mesh, placements, src_data_rank=None)  # its own part


def guide_state(module: MoEFFN) -> dict[str, Tensor]:
    """The state dict in the guide's keys, see :meth:`ffn_ops.MoEFFN.document_state_dict`."""
    more = (module.shared, module.expert_scale, module.latent_down, module.expert_norm)
    plain = not module.gated and all(each is None for each in more) and module.num_choices == module.num_experts
    if not plain or module.b_in is None or module.b_down is None:
        raise ValueError("document_state_dict: expected plain experts with biases and no shared ones")
    state = {f"router.{name}": value for name, value in module.router.state_dict().items()}
    if "router.weight" in state:  # the guides' router has a bias
        state.setdefault("router.bias", state["router.weight"].new_zeros(module.num_experts))
    stacked: list[Any] = [module.w_in, module.b_in, module.w_down, module.b_down]
    stacked = [t.full_tensor() if check.is_dtensor(t) else t for t in stacked]
    for e in range(module.num_experts):
        for place, weight, bias in ((0, *stacked[:2]), (2, *stacked[2:])):
            state[f"experts.{e}.{place}.weight"] = weight[e].detach()
            state[f"experts.{e}.{place}.bias"] = bias[e].detach()
    return state
