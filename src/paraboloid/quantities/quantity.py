"""What a quantity is: which output vectors it pulls back and how it reduces them; the class to derive one from."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from paraboloid.engine.tape import Tape
from paraboloid.linalg.operand import check_count
from paraboloid.losses import Loss
from paraboloid.reductions.outer import Outer


class Source(NamedTuple):
    """Which output vectors a quantity pulls back; quantities with equal sources share them."""

    kind: Literal["gradient", "root", "sampled", "nothing"]
    samples: int = 1
    tol: float = 0.0  # of a root: the relative trace that may be left out


GRADIENT, ROOT, NOTHING = Source("gradient"), Source("root"), Source("nothing")


def sampled(samples: int | None, tol: float = 0.0) -> Source:
    """The root for None, exact or but for a relative trace `tol`; or so many drawn labels."""
    if samples is None:
        return Source("root", tol=check_tolerance(tol))
    if tol:
        raise ValueError(f"tol is {tol} with samples={samples}; expected 0, for what drawn labels leave out is not "
                         "known. Give samples=None for the root of the loss's Hessian.")  # fmt: skip
    return Source("sampled", check_count("samples", samples))


def check_tolerance(tol: float) -> float:
    if isinstance(tol, bool) or not isinstance(tol, Real) or not 0 <= tol < 1:
        raise ValueError(f"tol is {tol!r}; expected a number from 0 (exact) to below 1, the part of the trace of the "
                         "loss's Hessians that may be left out.")  # fmt: skip
    return float(tol)


class Scale(NamedTuple):
    """What a finished value may need: the samples N and the reduction's factor a."""

    N: int
    a: float


class Group(NamedTuple):
    """One parameter's share of one group of pulled-back vectors: the needed parts, and the vectors themselves."""

    parts: dict[str, Tensor]
    outer: Outer
    memory: int | None
    name: str = ""
    recent: Any = None  # what one parameter's quantities leave for the next one's: `sums.Recent`


class Quantity:
    """One value per parameter, summed over the pulled-back vectors as they come.

    `needs` names the parts of `reductions.reduce` that it is made of; what several quantities need is computed once.
    `add(value, group)` returns the running value with one more group of vectors (value is None at first),
    `merge(a, b)` the running value of two batches as one, and `finish(value, scale)` scales it; all may change it in
    place, for it is the quantity's own.  A new quantity is a subclass of a few lines; `pb.statistics` takes objects of
    it.
    """

    name: str
    """The key in `Statistics`."""
    source: Source
    """The vectors that are pulled back: GRADIENT, ROOT, NOTHING, or ``Source("sampled", samples)``."""
    needs: frozenset[str] = frozenset()
    """Of "total", "squares", "norms", "gram" and "samples", what `group.parts` must have."""
    least_samples = 1
    """The smallest batch that it is defined for."""
    twice = False
    """Whether the forward pass is differentiated twice."""
    per_sample = True
    """False: also defined where batch norm in training mode mixes the samples."""
    by_rows = False
    """Whether, where samples see each other as nodes of a graph do, it is made of the rows of the layers' outputs as if
    these were samples (one pull), not of each sample pulled back by itself."""
    over_ranks: Literal["running", "local"] | None = None
    """What its running values are: sums over samples, which add up over batches and processes ("running"), or one for
    each sample, which stay those of a process under `all_reduce` ("local").  None: unknown, one batch only."""

    takes_copies = False
    """Whether, with a `tol`, the running value of a batch may grow by vectors of copies of its samples too: after the
    first group of vectors it is a sum over vectors and samples, however these belong together."""

    def add(self, value: Any, group: Group) -> Any:
        """The running value of one parameter with one more group of vectors; value is None at first."""
        raise NotImplementedError

    def merge(self, a: Any, b: Any) -> Any:
        """The running value of one big batch from those of its parts, the samples of `a` first."""
        if self.over_ranks != "running":
            raise ValueError(f"{self.name!r} does not say how the values of several batches make up one; expected a "
                             "quantity whose class has over_ranks = 'running' (they add up) or a method merge(a, b). "
                             "Ask for it batch by batch.")  # fmt: skip
        return added(a, b)

    def finish(self, value: Any, scale: Scale) -> Any:
        """The value from the running one, scaled."""
        return value

    # What most quantities leave as it is:

    def bound(self, tape: Tape, loss: Loss, f: Tensor, y: Tensor, memory: int | None) -> Quantity:
        """The quantity for one recorded batch; it may choose its source by what was recorded."""
        return self

    def complete(self, values: dict[str, Any]) -> dict[str, Any]:
        """The running values of one batch, with what takes more than pulled-back vectors."""
        return values

    def announce(self, values: Mapping[str, Any]) -> None:
        """Warn, once a call, of what a reader of the values should know; `values` are the running ones of all data."""

    def over_batches(self) -> Quantity:
        """The quantity to take where several batches are to be merged."""
        return self


class PerSample(Quantity):
    """A quantity with a value for each sample, along `axis`; those of several batches are joined in order."""

    over_ranks = "local"
    axis = 0

    def merge(self, a, b):
        return [t for part in (a, b) for t in (part if isinstance(part, list) else [part])]

    def finish(self, value, scale):
        return torch.cat(value, self.axis) if isinstance(value, list) else value


def plus(value: Tensor | None, part: Tensor) -> Tensor:
    """The running sum with one more part."""
    return part if value is None else value.add_(part)


def added(a: Any, b: Any) -> Any:
    """The sum of two running values, trees of tensors of one structure; where one is None, the other."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, Tensor):
        return a.add_(b)
    if isinstance(a, Mapping):
        return {k: added(t, b[k]) for k, t in a.items()}
    return type(a)(added(s, t) for s, t in zip(a, b, strict=True))
