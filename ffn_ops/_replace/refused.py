# SPDX-License-Identifier: BSD-3-Clause
"""Decides whether a module that is left alone is a feed-forward layer, and so belongs in the report.

Attention has linear layers of the same shapes. The difference: a feed-forward layer computes each row from that
row alone, and has an activation between its linear layers.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._gate import NAMES
from .alike import Reads
from .probe import Event, enough_rows, events_of, linear_shape, original_class, result_of
from .recognise import Recogniser, bottleneck, linear_children, plausible, widths

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
_LONGEST = 1 << 10  # rows
_MOST_LINEARS = 3  # gate, up and down, if only shapes are known


def is_feed_forward(layer: nn.Module, recognise: Recogniser) -> bool:
    """Judges by what its forward does with its linear children, or by their shapes if it takes several tensors."""
    pair = bottleneck(layer)
    likely = plausible(layer) and not _one_child_has_all(layer)
    if pair is None and not likely:
        return False
    functions = tuple([v for module in layer.modules() for v in vars(module).values() if isinstance(v, _FUNCTIONS)])
    return recognise.once(
        layer, ("is_feed_forward", functions), lambda reads: _look(layer, None if likely else pair, reads)
    )


def _look(layer: nn.Module, pair: tuple[str, str] | None, reads: Reads) -> bool:
    """``pair``: its two linear layers, if it has others too."""
    for width, narrowest in widths(layer):
        seen = _seen(layer, width, narrowest, None if pair is None else pair[1], reads)
        if seen is not None:
            return seen
    if pair is not None:
        return _stand_alone(layer, *pair) and _has_activation(layer, reads, most=1)
    mixes = any(parameter.dim() > 2 for parameter in layer.parameters())  # a convolution
    return not mixes and _fit(layer) and _has_activation(layer, reads)


def _one_child_has_all(layer: nn.Module) -> bool:
    """True if one child holds all linear layers: then that child is the candidate."""
    paths = [path.split(".") for path in linear_children(layer, _MOST_LINEARS)]
    return len({path[0] for path in paths}) == 1 and len(paths[0]) > 1


def _fit(layer: nn.Module) -> bool:
    """D to F, twice or in one layer where there is a gate, and back to D."""
    shapes = list(linear_children(layer, _MOST_LINEARS).values())
    if len(shapes) == 2:
        return any(b == c and (rows == d or rows == 2 * d) for (b, rows), (d, c) in (shapes, shapes[::-1]))
    orders = ((0, 1, 2), (0, 2, 1), (1, 2, 0))
    return len(shapes) == 3 and any(shapes[i] == shapes[j] == shapes[k][::-1] for i, j, k in orders)


def _seen(layer: nn.Module, width: int, narrowest: int, down: str | None, reads: Reads) -> bool | None:
    """Whether a run shows a feed-forward with ``down`` as its last linear layer; None if the run fails."""
    called = len(linear_children(layer, _MOST_LINEARS))
    for lead in (enough_rows(3, narrowest), enough_rows(2, narrowest), *_lengths(layer)):
        (first, whole), (second, _) = (
            events_of(layer, (*lead, width), disturbed=disturbed, reads=reads) for disturbed in (False, True)
        )
        linears = [i for i, event in enumerate(first) if event.kind == "linear"]
        if len(linears) < 2 or len(first) != len(second):
            continue
        rows = first[linears[0]].input.shape[:-1].numel()
        mixing = next((a for a, b in zip(first, second, strict=True) if not _row_by_row(a, b, rows)), None)
        if mixing is not None:
            return False if down in (None, mixing.path) else None  # otherwise other children mix rows
        raw = [first[0].input, *[event.output for event in first]]
        begin, end = first[linears[0]], first[linears[-1]]
        # a head is not a feed-forward
        behind = first[linears[0] + 1 :] if whole and begin.input.shape == end.output.shape else []
        for event in (first[i] for i in linears[1:]):
            if down is None or event.path == down:
                computed = not any(_same(event.input, each) for each in raw)
                by_child = any(e.kind != "linear" and _same(event.input, e.output) for e in behind)
                if computed or by_child:
                    return True
        if whole and down is None and len({first[i].path for i in linears}) == called:
            return False  # all were called, and nothing is between them
    return None


def _lengths(layer: nn.Module) -> Iterator[tuple[int, int]]:
    """Two sequences as long as a square table of the layer's own says, which attention has for its positions."""
    own = [t for t in (*layer._parameters.values(), *layer._buffers.values()) if t is not None and not is_lazy(t)]
    shapes = [tuple(t.shape) for t in own if t.dim() >= 2]
    yield from dict.fromkeys((2, shape[-1]) for shape in shapes if shape[-1] == shape[-2] < _LONGEST)


def _row_by_row(a: Event, b: Event, rows: int) -> bool:
    """The first row of x and of every child's output differs between the runs: no other row may, and none may be gone
    or come, as in a pool."""
    if a.input.shape != b.input.shape or (a.kind == "linear" and a.input.shape[:-1].numel() != rows):
        return False
    return torch.equal(*[t.reshape(-1, t.shape[-1])[1:] for t in (a.input, b.input)])


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _stand_alone(layer: nn.Module, *pair: str) -> bool:
    """True if at most a gate is beside the pair; queries, keys, values and embeddings are more."""
    shapes = {name: linear_shape(module) for name, module in layer._modules.items() if module is not None}
    others = [shape for name, shape in shapes.items() if shape is not None and name not in pair]
    return not others or others == [shapes[pair[0]]]


def _has_activation(layer: nn.Module, reads: Reads, most: int | None = None) -> bool:
    """``most``: how many levels to search below the layer."""
    code: Any = getattr(getattr(original_class(layer), "forward", None), "__code__", None)  # a script has no forward
    if code is not None and not set(NAMES).isdisjoint(code.co_names):
        return True
    functions = _functions(layer)
    return any(_is_activation(f, path, reads) for path, f in functions if most is None or path.count(".") < most)


def _functions(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields modules and functions that may be activations, with the paths of their modules."""
    for path, module in layer.named_modules():
        if not (module._modules or module._parameters or module._buffers or linear_shape(module)):
            yield path, module
        yield from ((path, value) for value in vars(module).values() if isinstance(value, _FUNCTIONS))


def _is_activation(function: Any, path: str, reads: Reads) -> bool:
    """True if it changes values, each independently."""
    x = torch.linspace(-2, 2, 6, device="cpu").reshape(2, 3)
    try:
        y = result_of(function, x, path, reads)
        alone = torch.stack([result_of(function, each.reshape(1, 1), path, reads) for each in x.flatten()])
        return y.shape == x.shape and not torch.equal(y, x) and torch.allclose(y.flatten(), alone.flatten())
    except Exception:
        return False


def has_stacked_experts(layer: nn.Module) -> bool:
    """True if its own parameters have the shapes of a mixture: [E, F, D] or [E, 2F, D], and [E, D, F]."""
    known = [p for p in layer._parameters.values() if p is not None and not is_lazy(p)]
    shapes = [tuple(p.shape) for p in known if p.dim() == 3 and min(p.shape) > 1]
    pairs = [(a, b) for i, a in enumerate(shapes) for j, b in enumerate(shapes) if i != j and _up_and_down(a, b)]
    if any(up[1] != up[2] for up, _ in pairs):
        return True
    direct = ((path, function) for path, function in _functions(layer) if path and "." not in path)
    return bool(pairs) and any(_is_activation(function, path, {}) for path, function in direct)


def _up_and_down(up: tuple[int, ...], down: tuple[int, ...]) -> bool:
    (experts, rows, columns), (same, back, features) = up, down
    plain = back == columns and rows in (features, 2 * features)
    turned = features == rows and columns in (back, 2 * back)
    return experts == same and (plain or turned)
