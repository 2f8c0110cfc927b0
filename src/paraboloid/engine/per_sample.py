"""From a call's rule to its weights' outer products per sample: rows regrouped, broadcast axes summed, fallbacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paraboloid.engine.many_vectors import gradients
from paraboloid.engine.reindexed_weights import Alias, Piece, itself
from paraboloid.engine.sample_independence import Layout, Owned
from paraboloid.layers import Use
from paraboloid.layers.registry import value_of
from paraboloid.passes.modes import autocast
from paraboloid.reductions.outer import EVERYTHING, Outer, known
from paraboloid.reductions.products import Lookup, Vector, product
from paraboloid.reductions.right import Right


@dataclass(eq=False)
class Part:
    """One weight of one call, ready for gradients g [V *z]; `root` is a parameter or derived from some.

    outer(g, power=1) has left, or with power=2 the squares of all factors and of right, for diagonal matrices.
    `use` is what the call's rule says of the weight; None for a fallback.  elements() -> (at, scale), both [N G T p]:
    the element of z (a flat position, or -1) and the factor of each entry of left; None where rows lie in a table.
    """

    root: Tensor
    outer: Callable[..., Outer]
    use: Use | None = None
    elements: Callable[[], tuple[Tensor, Tensor]] | None = None


def rule_parts(call: Any, layout: Layout | Owned, aliases: Mapping[int, Alias]) -> list[Part] | None:
    """The parts of every weight of the call by its rule, or None where no rule applies to these arguments."""
    wanted, had = set(map(id, call.weights)), set[int]()
    parts: list[Part] = []
    make = _complex_parts if call.is_complex else _parts
    for use in call.uses():
        if (at := id(use.weight)) not in wanted:
            continue
        had.add(at)
        found = make(call.shape, layout, use, aliases.get(at))
        if found is None:
            return None
        parts += found
    return parts if had == wanted else None


def _complex_parts(
    shape: torch.Size, layout: Layout | Owned, use: Use, alias: Alias | None
) -> list[Part] | None:  # fmt: skip
    """A real weight in a complex call: its gradient Re(conj(c) g) is that of two real uses, Re c Re g + Im c Im g.

    None for complex weights, which rules do not know.
    """
    roots = [use.weight] if alias is None else [piece.root for piece in alias.pieces]
    if use.left is not None or use.lookup or any(root.is_complex() for root in roots):
        return None
    found: list[Part] = []
    for part_of in (_real, _imaginary):
        if part_of is _imaginary and use.is_constant and use.right is None:
            continue  # the weight is added
        factor, right = use.factor, use.right
        if not use.is_constant:
            factor = partial(_part_of_factor, part_of, factor)
        if right is not None:
            right = partial(_part_of_rows, part_of, right)
        parts = _parts(shape, layout, replace(use, factor=factor, right=right), alias)
        if parts is None:
            return None
        found += [Part(p.root, partial(_of_part, part_of, p.outer)) for p in parts]
    return found


def _real(t: Tensor) -> Tensor:
    return t.real if t.is_complex() else t


def _imaginary(t: Tensor) -> Tensor:
    return t.imag if t.is_complex() else torch.zeros_like(t)


def _part_of_factor(part_of: Callable[[Tensor], Tensor], factor: Any) -> Tensor:
    return part_of(value_of(factor))


def _part_of_rows(part_of: Callable[[Tensor], Tensor], right: Callable[[slice], Tensor], n: slice) -> Tensor:
    return part_of(right(n))


def _of_part(part_of: Callable[[Tensor], Tensor], outer: Callable[..., Outer], g: Tensor, power: int = 1) -> Outer:
    return outer(part_of(g), power)


def blocked(call: Any, layout: Layout | Owned, aliases: Mapping[int, Alias]) -> list[Tensor]:
    """The weights of the call that no rule can treat: none is known, or the samples lie along their own axes."""
    uses = {id(u.weight): u for u in call.uses()}
    return [
        w for w in call.weights
        if id(w) not in uses or _parts(call.shape, layout, uses[id(w)], aliases.get(id(w))) is None
    ]  # fmt: skip


def _parts(shape: torch.Size, layout: Layout | Owned, use: Use, alias: Alias | None) -> list[Part] | None:
    """One part for each root of the weight; None where the samples lie along an axis of the weight itself."""
    places = None if alias is None else _places(use, alias)
    if alias is None or places is None:  # a parameter itself, or not rows of the roots: differentiated through instead
        alias = itself(use.weight)
        places = [Place(alias.pieces[0], EVERYTHING, 0, 0, False)]
    shape_of_z = shape
    if use.shape is not None:
        if isinstance(layout, Owned) or use.shape[layout.axis] != shape[layout.axis]:
            return None  # joined to the data along the samples' own axis
        shape = use.shape
    rows = broadcast_axes(shape, alias.shape) if use.rows is None else use.rows
    sorted_rows: SortedRows | None = None
    if isinstance(layout, Owned):
        if (sorted_rows := SortedRows.of(layout, rows)) is None:
            return None
        split = (1, sorted_rows.index.shape[0], sorted_rows.index.shape[1])
    else:
        axis, (a, N, b) = layout
        if axis not in rows:
            return None
        for i in rows:
            if i < axis:
                a *= shape[i]
            elif i > axis:
                b *= shape[i]
        split = (a, N, b)
    made: dict[int, Right] = {}  # by place: every pull has the same input side, which may be kept unfolded
    ordered, single = rows == tuple(range(len(rows))), split[0] == split[2] == 1
    plain = single and sorted_rows is None and (use.rows is not None or ordered)

    def rowed(left: Tensor) -> Tensor:
        """[V N G a b T p], the sample's rows a and b apart; [V N G T p] where both are one."""
        if use.rows is None:
            if not ordered:
                left = left.movedim([i + 1 for i in rows], list(range(1, len(rows) + 1)))
            left = left.reshape(left.shape[0], -1, 1, 1, alias.shape.numel())
        if sorted_rows is not None:
            left = sorted_rows.of_left(left)
        return left if single else left.unflatten(1, split).permute(0, 2, 4, 1, 3, 5, 6)

    def outer(place: Place, g: Tensor, power: int = 1) -> Outer:
        root, flip = place.piece.root, use.flip ^ alias.turned
        precision = root.dtype  # under autocast g is shorter than the weight
        precision = precision if precision == torch.float32 else accumulation(precision)
        left = use.pull(g if g.dtype == precision else g.to(precision), power)
        if not plain:
            left = rowed(left)
        elif use.rows is None:
            left = left.reshape(left.shape[0], -1, 1, 1, alias.shape.numel())
        left = left if left.dtype == precision else left.to(precision)
        moves = place.moves
        if use.right is None:
            if left.shape[3:-1].numel() > 1:
                left = left.sum(3 if single else (3, 4, 5)).unsqueeze(3)
            left = left if single else left.flatten(3, -2)
            left = place.put(left, -1) if moves else left
            if place.piece.table is not None:
                return _table_rows(left, *place.piece.table)
            return Vector(left, root.shape)
        left, q = left if single else left.flatten(3, 5), use.q
        if flip and moves:
            q = root.numel() // left.shape[-1]
        elif moves:
            left = place.put(left, -1)
        if id(place) not in made:
            dtype = None if use.lookup else precision
            side = _rows(use, place, flip)
            filled = None
            if sorted_rows is not None:
                side = partial(sorted_rows.of_right, side, use.lookup)
                filled = (sorted_rows.index >= 0).sum(1) * (left.shape[3] // split[2])
            made[id(place)] = Right(side, split, dtype, use.q_axes, filled)
        right = made[id(place)] if power == 1 else made[id(place)].squared()
        return (Lookup if use.lookup else product)(left, right, root.shape, q, flip)

    def elements(place: Place) -> tuple[Tensor, Tensor]:
        root = place.piece.root
        stays = use.right is not None and use.flip ^ alias.turned  # the root's other rows are on the right
        like = root.detach().new_empty(0, dtype=accumulation(root.dtype))
        at, scale = (rowed(t).flatten(3, -2)[0] for t in use.elements(shape_of_z, like))
        at, scale = (t if stays else place.put(t, -1) for t in (at, scale))
        return at - 1, torch.where(at > 0, scale, 0)

    return [
        Part(p.piece.table[0], partial(outer, p), use)
        if p.piece.table and use.right is None else Part(p.piece.root, partial(outer, p), use, partial(elements, p))
        for p in places if p.piece.root.requires_grad
    ]  # fmt: skip


@dataclass(frozen=True)
class SortedRows:
    """A rule's rows sorted to the samples that own them: `index` [N T] of rows; -1 where a sample has fewer than T."""

    index: Tensor

    @staticmethod
    def of(layout: Owned, rows: tuple[int, ...]) -> SortedRows | None:
        """None where a row holds elements of several samples."""
        owner = layout.owner.movedim(rows, tuple(range(len(rows))))
        owner = owner.reshape(math.prod(owner.shape[: len(rows)]), -1)
        row = owner.max(1).values
        if ((owner != row.unsqueeze(1)) & (owner >= 0)).any():
            return None
        row = torch.where(row < 0, layout.samples, row)  # those that no gradient reaches come last
        order = row.argsort(stable=True)
        counts = row.bincount(minlength=layout.samples + 1)[:-1]
        T = max(1, int(counts.max()))
        starts = counts.cumsum(0) - counts
        place = torch.arange(T, device=row.device)
        inside = place < counts.unsqueeze(1)
        index = order[(starts.unsqueeze(1) + place).clamp(max=len(order) - 1)]
        return SortedRows(torch.where(inside, index, -1))

    def of_left(self, left: Tensor) -> Tensor:
        """[V R ..] -> [V N*T ..], zero where there is no row."""
        index = self.index.flatten()
        left = left.index_select(1, index.clamp(min=0))
        return left.masked_fill((index < 0).view(1, -1, *[1] * (left.dim() - 2)), 0)

    def of_right(self, right: Callable[[slice], Tensor], lookup: bool, n: slice) -> Tensor:
        index = self.index.flatten()[n]
        rows = right(slice(None))[index.clamp(min=0)]
        return rows.masked_fill((index < 0).view(-1, *[1] * (rows.dim() - 1)), -1 if lookup else 0)


@dataclass(eq=False)
class Place:
    """Where rows of a weight lie in a root: `rows` of the weight, behind `before` rows of the root, `after` follow."""

    piece: Piece
    rows: slice
    before: int
    after: int
    moves: bool  # whether that is not all of it

    def put(self, t: Tensor, axis: int) -> Tensor:
        """The weight's rows along an axis of t, among zeros for the root's other rows."""
        if not self.moves:
            return t
        t = t.movedim(axis, -1)[..., self.rows]
        return F.pad(t, (self.before, self.after)).movedim(-1, axis)


def _rows(use: Use, place: Place, flip: bool) -> Callable[[slice], Tensor]:
    """The input side's rows, among those of a root that the weight is a part of; of a table, counted in the root."""
    rows = use.right
    assert rows is not None
    if not (flip and place.moves):
        return rows
    if use.lookup:
        return lambda n: (index := rows(n)) + place.before * (index >= 0)
    return lambda n: place.put(rows(n), 2 if use.q_axes else -1)


def _places(use: Use, alias: Alias) -> list[Place] | None:
    """Where the alias's pieces go in their roots; None where its rows are no rows of a root."""
    if use.rows is None:
        if alias.turned:
            return None
    elif use.weight.shape != (alias.shape[::-1] if alias.turned else alias.shape):
        return None  # stretched, which only a broadcast use undoes
    if alias.is_whole:
        return [Place(alias.pieces[0], EVERYTHING, 0, 0, False)]
    length = 1  # of a row: q elements, or p where the parameter is stored flipped
    if use.right is not None:
        flip = use.flip ^ alias.turned
        length = alias.shape.numel() // use.q if flip else use.q
        shifts = not use.lookup or len(alias.pieces) == 1
        if use.groups > 1 or (flip and not (shifts and use.q_axes in (None, 1))) or (use.lookup and not flip):
            return None
    places, at = [], 0
    for piece in alias.pieces:
        size = piece.stop - piece.start
        heads = (piece.root.shape[k:].numel() for k in range(piece.root.dim() + 1))
        if any(i % length for i in (at, size, piece.start)) or length not in heads:
            return None
        rows = slice(at // length, (at + size) // length)
        before = piece.start // length
        places.append(Place(piece, rows, before, piece.root.numel() // length - before - size // length, True))
        at += size
    return places


def _table_rows(left: Tensor, table: Tensor, positions: Tensor) -> Outer:
    """Added rows of an embedding table at positions that all samples share: each row of the sum is one lookup."""
    V, N = left.shape[:2]
    index = positions.reshape(1, 1, -1).expand(N, 1, -1)
    right = Right(lambda rows: index[rows], (1, N, 1))
    return Lookup(left.reshape(V, N, 1, -1, table.shape[1]), right, table.shape, len(table), flip=True)


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The type that a weight's outer products and their sums are kept in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def broadcast_axes(shape: torch.Size, weight: torch.Size) -> tuple[int, ...]:
    """Axes of the output along which a weight of the given shape is broadcast (aligned from the right)."""
    lead = len(shape) - len(weight)
    if 1 not in weight:
        return tuple(range(lead))
    return tuple(i for i in range(len(shape)) if i < lead or weight[i - lead] == 1)


def fallback_parts(call: Any, layout: Layout | Owned) -> list[Part]:
    """Any call: the vector-Jacobian product of the operation itself, once per sample."""

    def outer(w: Tensor, g: Tensor) -> Outer:
        if isinstance(layout, Owned):
            N = layout.samples
            mask = (layout.owner == torch.arange(N, device=g.device).view(N, *[1] * layout.owner.dim())).to(g)
        else:
            axis, (a, N, b) = layout
            mask = torch.eye(N, dtype=g.dtype, device=g.device)[:, None, :, None].expand(N, a, N, b).reshape(N, -1)
            mask = mask.view(N, *[1] * axis, a * N * b, *[1] * (len(call.shape) - axis - 1))
        with torch.enable_grad(), autocast(g.device, call.autocast):
            fresh = {id(t): t.detach().requires_grad_() for t in call.weights}
            z = call.op(*swapped(call.args, fresh), **swapped(call.kwargs, fresh))
            J = vjp(z, fresh[id(w)], (g[:, None] * mask).flatten(0, 1))
        return known(J.unflatten(0, (len(g), N)).to(accumulation(w.dtype)))

    weights = {id(w): w for w in call.weights}.values()
    return [Part(w, partial(outer, w)) for w in weights]


def swapped(tree: Any, fresh: dict[int, Tensor]) -> Any:
    """Arguments without their graph, some of them (by id) exchanged for others."""
    if isinstance(tree, Tensor):
        return fresh.get(id(tree), tree.detach())
    if isinstance(tree, dict):
        return {k: swapped(t, fresh) for k, t in tree.items()}
    if isinstance(tree, tuple | list):
        return (tuple if isinstance(tree, tuple) else list)(swapped(t, fresh) for t in tree)
    return tree


def vjp(z: Tensor, p: Tensor, gs: Tensor) -> Tensor:
    """Vector-Jacobian products of z(p): [B *z] -> [B *p]; batched where the operations allow it."""
    with torch.enable_grad():
        (r,) = gradients(z, p, gs.to(z.dtype))
    dtype = gs.dtype if gs.is_complex() == p.is_complex() else accumulation(p.dtype)
    return p.new_zeros(len(gs), *p.shape, dtype=dtype) if r is None else r.to(dtype)
