# SPDX-License-Identifier: BSD-3-Clause
"""The call of a router that is more than a plain linear layer, in the arithmetic's dtype."""

from __future__ import annotations

import os
import threading
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .modules import PLAIN_TENSORS
from .ops._shared import arithmetic

_SWAPPING = threading.RLock()  # guards the parameters of a module that other threads may be calling


def _free_in_child() -> None:
    """Makes a new lock: the thread that held it does not exist in a forked child."""
    global _SWAPPING
    _SWAPPING = threading.RLock()


os.register_at_fork(after_in_child=_free_in_child)


def called_wide(router: nn.Module, x: Tensor) -> Any:
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
