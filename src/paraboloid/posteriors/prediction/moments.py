"""Mean and covariance of the linearised outputs, a chunk of inputs at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Inputs, Output
from paraboloid.passes.memory import JACOBIANS
from paraboloid.passes.trees import mapped
from paraboloid.posteriors.prediction.jacobian import Jacobian, pull_outputs, recorded

PROBE = 8  # samples of the first chunk, which tells what a sample takes
Covariance = Callable[[Jacobian], Tensor]


def moments(
    model: nn.Module, names: list[str], inputs: Inputs, output: Output | None, covariance: Covariance, formed: int,
    max_memory: int | None, known: dict[Any, float] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(f [N, *shape], what `covariance` makes of each chunk's Jacobian, joined along N).

    `formed` is how many numbers it forms for each of the n K outputs: D for J [n, K, D].  The smallest chunk is one
    sample.  `known` remembers, for the caller, what a sample of such inputs takes, which else a few samples have to
    tell.
    """
    N = length(inputs)
    limit = JACOBIANS.of(max_memory, next(_tensors(inputs)).device)
    known = {} if known is None else known
    like = (formed, tuple((t.shape[1:], t.dtype) for t in _tensors(inputs)))
    means, parts, start = [], [], 0
    while start < N:
        step = max(1, int(limit / known[like])) if like in known else min(PROBE, N)
        piece = mapped(lambda t, n=slice(start, start + step): t[n], inputs)
        with recorded(model, names, piece, output) as (tape, f):
            J = pull_outputs(tape, f)
            if like not in known:
                known[like] = _bytes(J, formed) / len(f)
                if min(step, N) != min(int(limit / known[like]), N):
                    continue  # from the start: the chunks, and with them the rounding, are those of every later call
        with torch.no_grad():
            parts.append(covariance(J))
            means.append(J.outputs)
        start += step
    return torch.cat(means), torch.cat(parts)


def _bytes(J: Jacobian, formed: int) -> int:
    """What a chunk takes: the gradients at the layers' outputs, what is made of them, and what `covariance` forms."""
    left = sum(o.left.untyped_storage().nbytes() for o in J.uses.values())
    return 4 * left + 2 * J.outputs.numel() * formed * J.outputs.element_size()


def length(inputs: Inputs) -> int:
    """Samples of the inputs: axis 0 of their first tensor."""
    return next(_tensors(inputs)).shape[0]


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        yield from _tensors(list(tree.values()))
    elif isinstance(tree, tuple | list):
        for t in tree:
            yield from _tensors(t)
