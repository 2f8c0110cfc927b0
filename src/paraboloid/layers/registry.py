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

Factor = float | Tensor | Callable[[], Tensor] | None


@dataclass(eq=False)
class Use:
    """One weight in one call with output z: how the weight's gradient follows from the gradient g at z.

        sum over rows and positions of  left[row, g, t, p] right[row, g, t, q],      left = factor * arrange(g)

    The builders `matrix`, `spread` and `channel` make most of them.

    weight       the argument of the call
    rows         the axes of z that run over samples and positions, in the order in which `arrange` and `right` flatten
                 them into R rows; None means every axis that the weight is broadcast along
    arrange(g)   the elements of g [V *z] where they belong, [V R G T p]: only views, copies and zeros, so that integers
                 pass unchanged.  For rows=None [V *shape], of which the weight's gradient is the sum over those axes.
                 None: g as it is
    factor       what arrange(g) is multiplied by, broadcast behind V: a number, a tensor, or a function that makes it
                 when it is needed; None: one
    right(rows)  range of rows -> [R G T q], or int64 [R G T] for a lookup into the weight's q rows (EMPTY where left is
                 zero and nothing is looked up); None means one; with `q_axes`, [R G *q-axes *T-axes], which may be a
                 strided view (an unfolded image).  It does not depend on the weight
    flip         the weight is stored as q x p
    shape        of arrange(g) without V for rows=None, where it is not that of z
    groups       G, for a grouped convolution
    affine       whether z is affine in the weight.  None: yes where the factor is no tensor; else autograd is asked
    input        the argument that `right` only re-indexes (each element at most once in a row, zeros elsewhere), if z
                 depends on it as W right and in no other way: then curvature passes the layer (KFRA, diag_hessian)
    left(g)      instead of factor and arrange: factor * arrange(g) in one function, from which they are found by
                 dividing; such a layer has no K-BFGS
    """

    weight: Any
    rows: tuple[int, ...] | None
    left: Callable[[Tensor], Tensor] | None = None
    right: Callable[[slice], Tensor] | None = None
    flip: bool = False
    q: int = 1
    lookup: bool = False
    shape: torch.Size | None = None
    q_axes: int | None = None
    groups: int = 1
    arrange: Callable[[Tensor], Tensor] | None = None
    factor: Factor = None
    affine: bool | None = None
    input: Tensor | None = None

    def pull(self, g: Tensor, power: int = 1) -> Tensor:
        """factor^power * arrange(g): `left` itself, and with its factors squared."""
        if self.left is not None:
            return self.left(g) if power == 1 else self.left(g) * self.left(torch.ones_like(g))
        if self.arrange is not None:
            g = self.arrange(g)
        if self.factor is None or self.is_plain:
            return g
        c = value_of(self.factor)
        return g * c if power == 1 else g * c * c

    def arranged(self, g: Tensor) -> Tensor:
        """arrange(g)."""
        return g if self.arrange is None else self.arrange(g)

    def elements(self, shape: torch.Size, like: Tensor) -> tuple[Tensor, Tensor]:
        """The element of z that each entry of `left` is, as a flat position from one (zero: none), and its factor."""
        flat = torch.arange(1, shape.numel() + 1, device=like.device).view(1, *shape)
        if self.left is None:
            at = self.arranged(flat)
            return at, self.pull(like.new_ones(1, *shape)).expand(at.shape)
        scale = self.left(torch.ones_like(flat, dtype=torch.float64))  # in which any position is exact
        at = torch.where(scale == 0, 0, self.left(flat.double()) / scale).round().long()
        return at, scale.to(like.dtype)

    @property
    def is_plain(self) -> bool:
        """Whether `left` is g itself, re-indexed."""
        return self.is_constant and self.factor in (None, 1)

    @property
    def is_constant(self) -> bool:
        """Whether `left` is g itself, re-indexed and multiplied by a number."""
        return self.left is None and not (isinstance(self.factor, Tensor) or callable(self.factor))


def value_of(factor: Factor) -> Any:
    return factor() if callable(factor) else factor


EMPTY = -1  # no row of a lookup: the filling of ragged bags
Rule = Callable[..., Iterable[Use]]
RULES: dict[Callable, Rule] = {}
LOWERINGS: dict[Callable, Callable] = {}


def _registering(table: dict[Callable, Callable], operations: Iterable[Callable]) -> Callable[[Callable], Callable]:
    def register(function: Callable) -> Callable:
        table.update(dict.fromkeys(operations, function))
        return function

    return register


def rule(*operations: Callable) -> Callable[[Rule], Rule]:
    """Register a rule for the given functions, as `torch.overrides` sees them."""
    return _registering(RULES, operations)


def lowering(*operations: Callable) -> Callable[[Callable], Callable]:
    """Register a function that computes the same with operations that have rules; it runs instead while recording.

    It takes the operation's arguments and may return NotImplemented.
    """
    return _registering(LOWERINGS, operations)


def matrix(x: Tensor, weight: Any, flip: bool = False, scale: float = 1) -> Use:
    """z = scale x W^T + (what depends neither on x nor on W), or x W where the weight is stored flipped.

    All but the last axis of x are rows.
    """
    p = weight.shape[1] if flip else weight.shape[0]
    return Use(
        weight, tuple(range(x.dim() - 1)), right=lambda rows: x.reshape(-1, 1, 1, x.shape[-1])[rows], flip=flip,
        q=x.shape[-1], arrange=lambda g: g.reshape(g.shape[0], -1, 1, 1, p), factor=None if scale == 1 else scale,
        input=x,
    )  # fmt: skip


def spread(
    weight: Any, left: Callable[[Tensor], Tensor] | None = None, shape: torch.Size | None = None, *,
    arrange: Callable[[Tensor], Tensor] | None = None, factor: Factor = None, affine: bool | None = None,
) -> Use:  # fmt: skip
    """A weight that is broadcast: its gradient is factor * g, summed over the axes it is broadcast along."""
    return Use(weight, None, left, shape=shape, arrange=arrange, factor=factor, affine=affine)


def channel(
    weight: Any, left: Callable[[Tensor], Tensor] | None = None, *, factor: Factor = None, affine: bool | None = None
) -> Use:
    """A weight [C] that lives on axis 1 of the output [R C ...]: factor * g is summed over the axes behind."""

    def arrange(g: Tensor) -> Tensor:
        return g.unsqueeze(-1).flatten(3).mT.unsqueeze(2)  # [V R 1 T C]

    def arranged() -> Tensor:
        c = value_of(factor)
        return arrange(c.unsqueeze(0))[0] if isinstance(c, Tensor) else c

    if left is not None:
        return Use(weight, (0,), lambda g: arrange(left(g)), affine=affine)
    return Use(weight, (0,), arrange=arrange, factor=None if factor is None else arranged, affine=affine)
