"""Where the samples lie in a model's inputs, so that a batch can be cut: found by running the model, not by convention.

A recurrent layer takes [T, N, D], position ids may be [1, T], an operator net shares one grid of points among all
samples.  The number of samples is that of the output; which axis of which input is theirs is what a cut confirms: the
model on some of the samples must give these rows of its output.  What cannot be cut so is not cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Batch, Data, Inputs, Output
from paraboloid.passes.modes import evaluating
from paraboloid.passes.random_state import isolated
from paraboloid.passes.trees import mapped
from paraboloid.passes.wrappers import unwrapped

MOST = 64  # ways to cut that are tried
FEW = 16  # samples that tell whether axis 0 is theirs
UNFIT = RuntimeError, ValueError, IndexError, TypeError, AssertionError, KeyError  # of shapes that do not fit
Shapes = tuple[tuple[tuple[int, ...], torch.dtype], ...]


@dataclass(frozen=True)
class Cut:
    """The samples' axis of each tensor of the inputs, in order; None: it is shared by all of them.

    All None: the inputs cannot be cut.
    """

    axes: tuple[int | None, ...]
    samples: int

    @property
    def possible(self) -> bool:
        return self.samples > 1 and self.axes.count(None) < len(self.axes)

    def take(self, inputs: Inputs, which: slice | Tensor) -> Inputs:
        """The inputs of some samples, a slice of them or their numbers; all, where they cannot be cut."""
        axes = iter(self.axes)

        def part(t: Tensor) -> Tensor:
            axis = next(axes)
            if axis is None:
                return t
            if isinstance(which, Tensor):
                return t.index_select(axis, which.to(t.device))
            return t[(slice(None),) * axis + (which,)]

        return mapped(part, inputs)


class Cuts:
    """What was found out about a model's inputs, by their shapes without the samples' axis."""

    def __init__(self):
        self.known: dict[Shapes, tuple[int | None, ...]] = {}

    def of(self, model: Any, inputs: Inputs, output: Output | None = None) -> Cut:
        """How to cut the inputs.  Takes two forward passes in evaluation mode for shapes not yet seen: of a few samples
        where axis 0 is theirs, else of all."""
        ts = tensors(inputs)
        for shapes, axes in self.known.items():
            if (found := _recognised(ts, shapes, axes)) is not None:
                return found
        N, axes = _found(model, inputs, ts, output)
        if N > 1:  # one sample tells nothing of others
            self.known[_without(ts, axes)] = axes
        return Cut(axes, N)


def tensors(tree: Any) -> list[Tensor]:
    """In the order in which `trees.mapped` meets them."""
    if isinstance(tree, Tensor):
        return [tree]
    found: list[Tensor] = []
    mapped(lambda t: found.append(t) or t, tree)
    return found


def _without(ts: list[Tensor], axes: tuple[int | None, ...]) -> Shapes:
    pairs = zip(ts, axes, strict=True)
    return tuple([(tuple(t.shape if a is None else t.shape[:a] + t.shape[a + 1 :]), t.dtype) for t, a in pairs])


def _recognised(ts: list[Tensor], shapes: Shapes, axes: tuple[int | None, ...]) -> Cut | None:
    cut = [a for a in axes if a is not None]
    if len(ts) != len(axes) or not cut:
        return None
    sizes = {t.shape[a] if a < t.dim() else -1 for t, a in zip(ts, axes, strict=True) if a is not None}
    if -1 in sizes:
        return None
    return Cut(axes, sizes.pop()) if len(sizes) == 1 and _without(ts, axes) == shapes else None


def _found(model: Any, inputs: Inputs, ts: list[Tensor], output: Output | None) -> tuple[int, tuple[int | None, ...]]:
    length = ts[0].shape[0] if ts and ts[0].dim() else 0
    if length > FEW:  # as nearly always, all of whose outputs may be much to hold
        first = tuple(0 if t.dim() and t.layout == torch.strided and t.shape[0] == length else None for t in ts)
        few = Cut(first, length).take(inputs, slice(0, FEW))
        with suppress(*UNFIT):
            if _confirmed(model, few, _run(model, few, output), FEW, first, output):
                return length, first
    f = _run(model, inputs, output)
    N = len(f) if f.dim() else 1
    nothing: tuple[int | None, ...] = (None,) * len(ts)
    if N < 2:
        return N, nothing
    options = [[*(a for a in range(t.dim()) if t.layout == torch.strided and t.shape[a] == N), None] for t in ts]
    for axes in itertools.islice(itertools.product(*options), MOST):
        if axes == nothing:
            break
        with suppress(*UNFIT):
            if _confirmed(model, inputs, f, N, axes, output):
                return N, axes
    return N, nothing


def _confirmed(
    model: Any, inputs: Inputs, f: Tensor, N: int, axes: tuple[int | None, ...], output: Output | None
) -> bool:
    """Whether the model on the first half of the samples, cut so, gives the first half of f."""
    half = slice(0, N // 2)
    part = _run(model, Cut(axes, N).take(inputs, half), output)
    return len(f) == N and part.shape == f[half].shape and _close(part, f[half])


def _run(model: Any, inputs: Inputs, output: Output | None) -> Tensor:
    device = next((p.device for _, p in model.named_parameters()), torch.device("cpu"))
    with evaluating(model), isolated(model, device, 0):
        return batch_data.evaluate(unwrapped(model), inputs, output).detach()


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = 10 * torch.finfo(a.dtype).eps ** 0.5 if a.is_floating_point() else 0.0
    largest = float(b.abs().max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * largest, equal_nan=True)


@dataclass(frozen=True)
class Chosen:
    """Some samples of the data, by their place in it: can be iterated as often as the data."""

    data: Data
    cut: Callable[[Inputs], Cut]
    chosen: Tensor  # [N], whether each is taken

    def __iter__(self) -> Iterator[Batch]:
        start = 0
        for inputs, y in batch_data.batches(self.data):
            at = self.chosen[start : start + len(y)].nonzero()[:, 0].to(y.device)
            start += len(y)
            if len(at):
                yield self.cut(inputs).take(inputs, at), y[at]


@dataclass(frozen=True)
class Half:
    """Every other sample of each batch, from the first or the second on."""

    data: Data
    cut: Callable[[Inputs], Cut]
    which: int

    def __iter__(self) -> Iterator[Batch]:
        for inputs, y in batch_data.batches(self.data):
            if len(y) > self.which:
                cut = self.cut(inputs)
                piece = cut.take(inputs, slice(self.which, None, 2)) if cut.samples > 1 else inputs
                yield piece, y[self.which :: 2]
