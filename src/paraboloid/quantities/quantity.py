"""What a quantity is: which output vectors it pulls back and how it reduces them; the class to derive one from."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import Tensor

from paraboloid.engine.tape import Tape
from paraboloid.losses import Loss
from paraboloid.reductions.outer import Outer


class Source(NamedTuple):
    """Which output vectors a quantity pulls back; quantities with equal sources share them."""

    kind: Literal["gradient", "root", "sampled", "nothing"]
    samples: int = 1


GRADIENT, ROOT, NOTHING = Source("gradient"), Source("root"), Source("nothing")


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
    recent: Any = None  # what one parameter's quantities leave for the next one's: `recent.Recent`


class Quantity:
    """One value per parameter, summed over the pulled-back vectors as they come.

    `needs` names the parts of `reductions.reduce` that it is made of; what several quantities need is computed once.
    `add(value, group)` returns the running value with one more group of vectors (value is None at first) and
    `finish(value, scale)` scales it; both may change it in place, for it is the quantity's own.  A new quantity is a
    subclass of a few lines; `pb.statistics` takes objects of it.
    """

    name: str
    source: Source
    needs: frozenset[str] = frozenset()
    least_samples = 1
    twice = False  # whether the forward pass is differentiated twice
    per_sample = True  # False: also defined where batch norm in training mode mixes the samples
    # What becomes of it where the batch is spread over several processes (`all_reduce`): its running values are sums
    # over samples ("running"), its finished ones are, times a ("finished"), or it is this process's alone ("local").
    over_ranks: Literal["running", "finished", "local"] | None = None

    def add(self, value: Any, group: Group) -> Any:
        raise NotImplementedError

    def finish(self, value: Any, scale: Scale) -> Any:
        return value

    # What most quantities leave as it is:

    def bound(self, tape: Tape, loss: Loss, f: Tensor, y: Tensor, memory: int | None) -> Quantity:
        """The quantity for one recorded batch; it may choose its source by what was recorded."""
        return self

    def complete(self, values: dict[str, Any], scale: Scale) -> dict[str, Any]:
        """The finished values of all parameters, with what takes more than pulled-back vectors."""
        return values
