"""All vectors in one backward pass, where that is faster than one after another: on devices, which the single passes of
small networks leave idle, and on a CPU for few samples.  An operation without a vectorised rule, or with a wrong one,
sends its model to the loop.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paraboloid.passes.memory import gives_back
from paraboloid.passes.modes import rounding

FEW, SEVERAL, LARGE = 64, 4, 2**17  # on a CPU: samples at most, vectors and weights at least
# What became of it, by model: the sequences of calls for which it was found right, or None after a failure.
_found_right: weakref.WeakKeyDictionary[nn.Module, set[tuple[str, ...]] | None] = weakref.WeakKeyDictionary()
gives_back(_found_right.clear)


@contextmanager
def if_vectorised() -> Iterator[None]:
    """Go on behind the block where an operation in it has no vectorised rule, or warns of it: the loop is faster."""
    with warnings.catch_warnings(), suppress(RuntimeError, NotImplementedError, Warning):
        warnings.simplefilter("error")
        yield


def gradients(outputs: Any, inputs: Any, vs: Tensor, batched: bool = True) -> list[Tensor | None]:
    """Gradients [V *input] of vectors [V *output]: in one pass where all operations allow it, else one by one."""
    if batched and len(vs) > 1:
        with if_vectorised():
            return list(
                torch.autograd.grad(outputs, inputs, vs, retain_graph=True, allow_unused=True, is_grads_batched=True)
            )
    each = [torch.autograd.grad(outputs, inputs, v, retain_graph=True, allow_unused=True) for v in vs]
    return [None if gs[0] is None else torch.stack(gs) for gs in zip(*each, strict=True)]


def wanted(f: Tensor, calls: Sequence[Any], vectors: int) -> bool:
    """Whether one pass is likely to be faster: on a CPU for few samples of large dense layers, whose weights each
    single pass reads anew."""
    if f.device.type != "cpu":
        return True
    if len(f) > FEW or vectors < SEVERAL:
        return False
    size = 0
    for call in calls:
        if call.op is not F.linear or len(call.shape) != 2:
            return False
        size += call.weights[0].numel()
    return size >= LARGE


def pull(model: nn.Module, f: Tensor, calls: Sequence[Any], v: Tensor) -> list[Tensor | None] | None:
    """Gradients [V *z] of v [V *f.shape] at the recorded calls' outputs; None where a loop is to be taken.

    The first result of each sequence of calls is compared with that of a single vector.
    """
    if not wanted(f, calls, len(v)):
        return None
    edges = [call.edge for call in calls]
    known = _found_right.setdefault(model, set())
    if known is None:
        return None
    names = tuple([edge.node.name() for edge in edges])
    with if_vectorised():
        found = torch.autograd.grad(f, edges, v, retain_graph=True, allow_unused=True, is_grads_batched=True)
        if names not in known:
            single = torch.autograd.grad(f, edges, v[-1], retain_graph=True, allow_unused=True)
            if not all(_agree(a, b) for a, b in zip(found, single, strict=True)):
                raise RuntimeError("a vectorised rule is wrong")
            known.add(names)
        return list(found)
    _found_right[model] = None
    return None


def _agree(together: Tensor | None, single: Tensor | None) -> bool:
    if together is None or single is None:
        return together is single
    tolerance = 10 * rounding(single.dtype, single.device) if single.dtype != torch.float64 else 1e-8
    return bool((together[-1] - single).norm() <= tolerance * single.norm())
