"""Pulled-back vectors in a Kronecker eigenbasis, and the sums of their squares: the eigenvalues of EKFAC.

    scale[i, j] = sum_{v,n} (u_i . (J_n^T v) w_j)^2,  J_n^T v as a p x q matrix, for each group

which is the diagonal of the parameter's exact block in the basis u_i (x) w_j.  A side is rotated position by position,
or after the positions are summed, whichever takes fewer multiplications.
Source: George et al. 2018, arXiv:1806.03884.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from paraboloid.linalg.eigenform import Basis
from paraboloid.passes.memory import pooled_product
from paraboloid.reductions.outer import Outer, Zero
from paraboloid.reductions.products import Products, merge, product
from paraboloid.reductions.right import Right
from paraboloid.reductions.sums import reduce, same_memory


@dataclass
class Turned:
    """Rotated inputs, by parameter and place of the use, for the groups of vectors that follow on one recording.

    Those that fit into `room` bytes are kept, the first ones first.
    """

    room: int
    kept: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def keep(self, name: str, place: int, right: Right, size: int) -> Right:
        """The same inputs, computed once if they fit."""
        mine = self.kept.setdefault(name, {})
        if place not in mine and size <= self.room:
            mine[place] = right()
            self.room -= mine[place].nbytes
        return replace(right, _kept=mine.get(place))


def eigen_scale(
    o: Outer,
    left: Basis,
    right: Basis,
    memory: int | None = None,
    vectors: int | None = None,
    turned: Turned | None = None,
    name: str = "",
) -> Tensor:
    """The scale above for one parameter, [G, r_left, r_right]; unscaled (times a: of the loss as reduced).

    Where these vectors are a group of more on the same recording, `vectors` is the number of all, and `turned` carries
    the rotated inputs of the parameter `name` from group to group.
    """
    sizes = [basis.size if basis.vectors is None else basis.vectors.shape[2] for basis in (left, right)]
    if isinstance(o, Zero):
        groups = o.shape.numel() // (left.size * right.size)
        return o.left.new_zeros(groups, *sizes)
    if left.vectors is None and right.vectors is None:  # the entries themselves
        return reduce(o, {"squares"}, memory)["squares"].reshape(-1, *sizes)
    if right.size == 1 and not o.products:
        return _of_vectors(o, left, memory)
    if not o.products:
        raise NotImplementedError("has uses without Kronecker factors, so it has no eigenvalues in their eigenbasis.")
    later = _later(o, left, right, len(o.left) if vectors is None else vectors)
    first = [
        basis if after is None else Basis(None, basis.size) for basis, after in zip((left, right), later, strict=True)
    ]
    rotated = merge([rotate(use, first[0], first[1], (name, i), turned) for i, use in enumerate(o.products)])
    groups = o.left.shape[2]
    if later == [None, None]:
        return reduce(rotated, {"squares"}, memory)["squares"].view(groups, *sizes)
    scale = o.left.new_zeros(groups, *sizes)
    for _, J in rotated.pieces(memory):
        J = J.reshape(-1, groups, rotated.shape[0] // groups, rotated.shape[1])
        J = J if later[0] is None else later[0].rotated(J)
        J = J if later[1] is None else later[1].rotated(J.mT).mT
        scale += J.square().sum(0)
    return scale


def _of_vectors(o: Outer, left: Basis, memory: int | None) -> Tensor:
    """A bias-like parameter: the whole vector J_n^T v is the left side, [1, r, 1]."""
    assert left.vectors is not None
    U = left.vectors[0]
    scale = o.left.new_zeros(U.shape[1])
    for _, J in o.pieces(memory):
        scale += (J.reshape(-1, len(U)) @ U).square_().sum(0)
    return scale.view(1, -1, 1)


def _later(o: Outer, left: Basis, right: Basis, V: int) -> list[Basis | None]:
    """Which sides (left, right) to rotate after the positions are summed."""
    if len(o.products) > 1 or not o.together({"squares"}):  # they are not to be formed
        return [None, None]
    T, p = o.left.shape[3:]
    gradient, rows = (right, left) if o.flip else (left, right)
    later = [gradient if rows.size < T else None, rows if V * p < T else None]
    later = [None if basis is not None and basis.vectors is None else basis for basis in later]
    return later[::-1] if o.flip else later


@dataclass
class Gradients:
    """The gradients that were rotated last, and into which basis: a layer's bias has those of its weight."""

    last: tuple[Tensor, Basis, Tensor] | None = None

    def rotated(self, left: Tensor, basis: Basis) -> Tensor:
        """left [V N G T p] in the basis."""
        if basis.vectors is None:
            return left
        if self.last is not None and same_memory(self.last[0], left) and self.last[1].equals(basis):
            return self.last[2]
        if len(basis.vectors) == 1 and left.is_contiguous() and not torch.is_grad_enabled():
            U = basis.vectors[0]
            found = pooled_product(left.view(-1, len(U)), U).view(*left.shape[:-1], U.shape[1])
        else:
            found = left @ (basis.vectors[0] if len(basis.vectors) == 1 else basis.vectors)
        self.last = left, basis, found
        return found


def rotate(
    o: Products,
    left: Basis,
    right: Basis,
    place: tuple[str, int] = ("", 0),
    turned: Turned | None = None,
    gradients: Gradients | None = None,
) -> Products:
    """One use with its sides in the bases, U_left^T (sum_t left right^T) U_right, position by position.

    `turned` and `gradients` remember rotated inputs and gradients for what comes after.
    """
    basis, rows = (right, left) if o.flip else (left, right)
    rotated = (gradients or Gradients()).rotated(o.left, basis)
    if rows.vectors is None:
        columns, inner = o.q, o.right
    else:
        U = rows.vectors[0] if len(rows.vectors) == 1 else rows.vectors
        columns, inner = U.shape[-1], o.turned(U)
        if turned is not None:
            inner = turned.keep(*place, inner, o.left[0, ..., 0].numel() * columns * o.left.element_size())
    groups, height = rotated.shape[2], rotated.shape[4]
    shape = torch.Size((groups * columns, height) if o.flip else (groups * height, columns))
    if rows.vectors is None:
        return replace(o, left=rotated, shape=shape)
    return product(rotated, inner, shape, columns, o.flip)
