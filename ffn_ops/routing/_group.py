# SPDX-License-Identifier: BSD-3-Clause
"""Sums of counts over all ranks that train one model. It imports ``torch.distributed`` only when it needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    Group = ProcessGroup | DeviceMesh


def sum_over(counts: Tensor, group: Any, reduction: str = "sum") -> Tensor:
    """The sum of ``counts`` over the ranks of a group or of a whole mesh. A collective, unless ``group`` is None."""
    if group is None:
        return counts
    from torch.distributed import ProcessGroup
    from torch.distributed import _functional_collectives as collectives
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(group, (ProcessGroup, DeviceMesh)):
        raise TypeError(f"group: expected a ProcessGroup or a DeviceMesh, got {type(group).__name__}")
    for each in group.get_all_groups() if isinstance(group, DeviceMesh) else [group]:
        counts = collectives.all_reduce(counts, reduction, each)
    return counts
