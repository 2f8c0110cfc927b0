"""One small rule per layer: what its `left` and `right` are.  Rules know nothing of samples; the tape regroups rows.

A rule takes the arguments of the call it is registered for and yields a `Use` for each argument that may be a weight.
To teach the library a new operation, decorate a function with ``@rule(operation)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Use:
    """One weight in one call with output z.

    `rows` are the axes of z that run over samples and positions, in the order in which `left` and `right` flatten them
    into R rows; None means every axis that the weight is broadcast along.

    left(g)      gradients at the output, [V *z] -> [V R G T p]; for rows=None any tensor that the weight's gradient is
                 the sum of, over those axes
    right(rows)  range of rows -> [R G T q], or int64 [R G T] for a lookup into the weight's q rows (EMPTY where left is
                 zero and nothing is looked up); None means one; with `q_axes`, [R G *q-axes *T-axes], which may be a
                 strided view (an unfolded image)
    flip         the weight is stored as q x p
    shape        of left(g) without V, where it is not that of z
    groups       G, for a grouped convolution
    """

    weight: Any
    rows: tuple[int, ...] | None
    left: Callable[[Tensor], Tensor]
    right: Callable[[slice], Tensor] | None = None
    flip: bool = False
    q: int = 1
    lookup: bool = False
    shape: torch.Size | None = None
    q_axes: int | None = None
    groups: int = 1


EMPTY = -1  # no row of a lookup: the filling of ragged bags
Rule = Callable[..., Iterable[Use]]
RULES: dict[Callable, Rule] = {}
LOWERINGS: dict[Callable, Callable] = {}


def rule(*operations: Callable) -> Callable[[Rule], Rule]:
    """Register a rule for the given functions, as `torch.overrides` sees them."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operations, function))
        return function

    return register


def lowering(*operations: Callable) -> Callable[[Callable], Callable]:
    """Register a function that computes the same with operations that have rules; it runs instead while recording.

    It takes the operation's arguments and may return NotImplemented.
    """

    def register(function: Callable) -> Callable:
        LOWERINGS.update(dict.fromkeys(operations, function))
        return function

    return register


def spread(weight: Any, left: Callable[[Tensor], Tensor], shape: torch.Size | None = None) -> Use:
    """A weight that is broadcast: its gradient is left(g) summed over the axes it is broadcast along."""
    return Use(weight, None, left, shape=shape)


def channel(weight: Any, left: Callable[[Tensor], Tensor]) -> Use:
    """A weight [C] that lives on axis 1 of the output [R C ...]: left(g) is summed over the axes behind."""
    return Use(weight, (0,), lambda g: left(g).unsqueeze(-1).flatten(3).sum(3)[:, :, None, None])
