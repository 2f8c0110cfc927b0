"""Copies of samples, as many as each has columns of a root to pull back: some need hundreds, most of them a few.

A pull takes one vector for each sample of a recording, so K_n columns of sample n take max_n K_n pulls, most of whose
rows are empty.  Instead the model runs once more, on ceil(K_n / P) copies of sample n, and P pulls take all columns.
Sums over samples and vectors do not tell a copy from a sample.  That the copies are the samples is seen at their
outputs: a model that draws (dropout) or whose samples see each other has other ones, and is pulled as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paraboloid.data.batches import Inputs
from paraboloid.losses.leading_root import Of
from paraboloid.passes.trees import mapped

Again = Callable[[Tensor], AbstractContextManager[tuple[Any, Tensor]]]  # samples [B] -> (recording, outputs) of these
FORWARD = 2  # pulls that a forward pass takes the time of, with what is made ready for the first of them
GAIN = 0.8  # part of the rows below which copies pay
STEPS = 8  # sizes of a recording up to twice as large: each new one has its samples' independence certified


class Copies(NamedTuple):
    """samples [B]: which one a copy is of; ranks [P, B]: the column of it that each pull takes; the first `shared`
    columns of all samples are taken without copies."""

    samples: Tensor
    ranks: Tensor
    shared: int


def planned(counts: Tensor, uniform: int, most: int) -> Copies | None:
    """The copies that take the fewest rows, at most `most` at a time, for K_n columns of each sample (`counts` [N]);
    None where `uniform` columns of all samples are about as few."""
    N, shared = len(counts), max(1, int(counts.min()))
    rest = (counts - shared).clamp(min=0)
    best: tuple[float, int] | None = None
    P, largest = 1, int(rest.max())
    while 2 * largest > P:
        B = _size(int((-(-rest // P)).sum()))
        cost = shared * N + (FORWARD + P) * B
        if most >= B and (best is None or cost < best[0]):
            best = cost, P
        P = max(P + 1, P * 5 // 4)
    if best is None or best[0] > GAIN * uniform * N:
        return None
    P = best[1]
    each = -(-rest // P)
    samples = torch.repeat_interleave(torch.arange(N, device="cpu"), each)
    which = torch.arange(len(samples), device="cpu") - torch.repeat_interleave(each.cumsum(0) - each, each)
    ranks = shared + which * P + torch.arange(P, device="cpu").unsqueeze(1)
    padding = _size(len(samples)) - len(samples)  # of no column
    samples = torch.cat([samples, samples.new_zeros(padding)])
    return Copies(samples, torch.cat([ranks, ranks.new_full((P, padding), int(counts.max()))], 1), shared)


def _size(B: int) -> int:
    """At least B, among few sizes."""
    step = 1 << max(0, B.bit_length() - STEPS.bit_length())
    return -(-B // step) * step


def taken(inputs: Inputs, samples: Tensor, N: int) -> Inputs:
    """The inputs of some of N samples, along axis 0 of the tensors that are so long; the others are shared."""
    return mapped(lambda t: t[samples.to(t.device)] if t.dim() and t.shape[0] == N else t, inputs)


def same(outputs: Tensor, f: Tensor, samples: Tensor) -> bool:
    """Whether these are the samples' outputs, up to rounding."""
    if outputs.shape != (len(samples), *f.shape[1:]):
        return False
    expected = f.detach()[samples.to(f.device)]
    tolerance = torch.finfo(f.dtype).eps ** 0.5
    return torch.allclose(outputs, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def vectors(copies: Copies, of: Of, device: torch.device) -> Iterator[Tensor]:
    """What each pull of the copies takes, [B, ...]."""
    columns, ranks = of(copies.samples.to(device)), copies.ranks.to(device)
    return map(columns, ranks)


def shared_vectors(copies: Copies, of: Of, N: int, device: torch.device) -> Iterator[Tensor]:
    """What each pull before them takes, [N, ...]."""
    n = torch.arange(N, device=device)
    columns = of(n)
    return (columns(torch.full_like(n, k)) for k in range(copies.shared))
