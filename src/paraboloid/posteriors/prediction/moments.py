"""Mean and covariance of the linearised outputs, a chunk of inputs at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Inputs, Output, device_of
from paraboloid.data.cutting import Cut, Cuts, tensors
from paraboloid.engine.tape import Tape
from paraboloid.passes.memory import JACOBIANS
from paraboloid.passes.trees import mapped
from paraboloid.posteriors.prediction.jacobian import Jacobian, pull_outputs, recorded

PROBE = 8  # samples of the first chunk, which tells what one takes
PULLED = 32  # elements of their outputs that are looked at for it, where these are taken apart
TOGETHER = 16  # samples that are pulled at once rather than more of their elements, which takes as many times the pulls
Covariance = Callable[[Jacobian], Tensor]


def moments(
    model: nn.Module, names: list[str], inputs: Inputs, output: Output | None, covariance: Covariance, formed: int,
    max_memory: int | None, known: dict[Any, Any] | None = None, cuts: Cuts | None = None, apart: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(f [N, *shape], what `covariance` makes of each chunk's Jacobian, joined along N).

    `formed` is how many numbers it forms for each of the n K outputs: D for J [n, K, D].  The smallest chunk is one
    sample; with `apart`, for what is made of each output element by itself, [n, k, ...] joined along k too, a few of
    one sample's elements.  `known` remembers, for the caller, what an output of such inputs takes, which else a few
    have to tell, and `cuts` where their samples lie.
    """
    cut = (Cuts() if cuts is None else cuts).of(model, inputs, output)
    N = cut.samples
    if N == 0:  # of one sample of zeros, none
        one = mapped(lambda t: t.new_zeros(1, *t.shape[1:]), inputs)
        mean, made = moments(model, names, one, output, covariance, formed, max_memory, apart=apart)
        return mean[:0], made[:0]
    limit = JACOBIANS.of(max_memory, device_of(inputs))
    known = {} if known is None else known
    like = (formed, apart, tuple((t.shape[1:], t.dtype) for t in tensors(inputs)))
    means, parts, start = [], [], 0
    while start < N:
        planned = like in known
        step, columns = _chunks(known[like], limit, apart, cut) if planned else (_least(cut, PROBE), PULLED)
        piece = cut.take(inputs, slice(start, start + step)) if step < N else inputs
        with recorded(model, names, piece, output) as (tape, f):
            with tape.undisturbed(f):
                alone = tape.plan(f).apart
            if alone:  # nodes of a graph: what is pulled back by itself is cut, not the inputs
                parts.append(_each_alone(tape, f, covariance, formed, limit))
                means.append(f.detach())
                start += len(f)
                continue
            K = f[0].numel()
            columns = min(columns, K) if apart else K
            found, J = [], None
            if not planned:
                J = pull_outputs(tape, f, range(columns))
                known[like] = element_bytes(J, len(f) * columns, formed), K
                if (step, columns) != _chunks(known[like], limit, apart, cut):
                    continue  # from the start: the chunks, and with them the rounding, are those of every later call
            for first in range(0, K, columns):
                if J is None or found:
                    J = pull_outputs(tape, f, range(first, min(K, first + columns)))
                with torch.no_grad():
                    found.append(covariance(J))
        parts.append(torch.cat(found, 1) if len(found) > 1 else found[0])
        means.append(f.detach())
        start += step
    return torch.cat(means), torch.cat(parts)


def _each_alone(tape: Tape, f: Tensor, covariance: Covariance, formed: int, limit: int) -> Tensor:
    """What is made of the Jacobians of samples that see each other, so many at a time as fit."""
    parts, start, step = [], 0, 1
    while start < len(f):
        J = pull_outputs(tape, f, some=slice(start, start + step))
        with torch.no_grad():
            parts.append(covariance(J))
        start += len(J.outputs)
        step = max(1, int(limit / (element_bytes(J, J.outputs.numel(), formed) * f[0].numel())))
    return torch.cat(parts)


def _least(cut: Cut, step: int = 1) -> int:
    """So many samples, or all where they cannot be cut."""
    return min(step, cut.samples) if cut.possible else cut.samples


def _chunks(known: tuple[float, int], limit: int, apart: bool, cut: Cut) -> tuple[int, int]:
    """How many samples, and how many of their K output elements, to take at a time; known are an element's bytes, K."""
    size, K = known
    few = _least(cut, max(1, min(TOGETHER, int(limit / size))))
    if apart and size * K * few > limit:
        return few, max(1, int(limit / (size * few)))
    return _least(cut, max(1, int(limit / (size * K)))), K


def element_bytes(J: Jacobian, outputs: int, formed: int) -> float:
    """What each of so many outputs takes: the gradients at the layers' outputs, what is made of them, what is formed
    of them."""
    left = sum(o.left.untyped_storage().nbytes() for o in J.uses.values())
    return (4 * left + 2 * outputs * formed * J.outputs.element_size() or 1) / outputs
