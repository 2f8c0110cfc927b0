"""Rows that see each other because indices or a matrix that the model was given say so: nodes of a graph.

The rows are followed down the autograd graph as samples are (`sample_axes`), and may be exchanged on the way by what is
done along them with indices that were handed in (index_select, gather, scatter, index_add), or by a product with a
matrix that was, sparse or square.  Whatever else mixes them (a mean, a softmax, an attention, a transposed layer, batch
statistics) ends the search: nobody said that it was meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from paraboloid.engine.handed_in import HandedIn
from paraboloid.engine.per_sample import Part, fallback_parts, rule_parts
from paraboloid.engine.recorder import Call
from paraboloid.engine.reindexed_weights import Alias
from paraboloid.engine.sample_axes import Shape, kind_of, sample_axes
from paraboloid.engine.sample_independence import Layout, Layouts, Owned
from paraboloid.passes.torch_internals import factor_of, index_of, indexed_dims, named_dims

BY_INDEX = {"Gather", "IndexAdd", "IndexCopy", "IndexReduce", "IndexSelect", "ScatterAdd", "ScatterReduce"}
PRODUCTS = {"Mm": 0, "Mv": 0, "Bmm": 0, "Addmm": 1, "Addmv": 1, "SparseAddmm": 1, "SparseMmReduceImpl": 0}


def row_layouts(f: Tensor, edges: Sequence[Any], handed_in: HandedIn, batch_statistics: bool = False) -> Layouts | None:
    """Where the rows lie at every edge, as if each were a sample; None where they are mixed by something else too."""
    return sample_axes(f, edges, batch_statistics, partial(_exchanged, handed_in))


def _exchanged(handed_in: HandedIn, node: Any, out: Shape, at: Layout, i: int, below: Shape) -> Layout | None:
    kind, axis = kind_of(node), at.axis
    if at.sizes[0] != 1 or at.sizes[2] != 1:
        return None
    if kind in PRODUCTS:
        return _by_matrix(handed_in, node, at, i - PRODUCTS[kind], below, rank=len(out))
    if kind in BY_INDEX:
        if named_dims(node, len(out)) != {axis}:
            return None
    elif kind in ("Index", "IndexPut"):
        if indexed_dims(node) != [axis]:
            return None
    elif kind != "Embedding" or axis != 0 or len(out) != len(below):
        return None
    index = index_of(node)
    if index is None or not handed_in.index(index) or len(below) != len(out):
        return None
    return _rows(axis, below)


def _by_matrix(handed_in: HandedIn, node: Any, at: Layout, i: int, below: Shape, rank: int) -> Layout | None:
    """Rows of A h, from h on the right; columns of h A from h on the left."""
    rows = max(0, rank - 2)
    if i not in (0, 1) or at.axis != (rows if i else rows + 1):
        return None
    A = factor_of(node, i)
    return _rows(at.axis, below) if A is not None and handed_in.matrix(A) else None


def _rows(axis: int, below: Shape) -> Layout | None:
    return Layout(axis, (1, below[axis], 1)) if axis < len(below) and below[axis] else None


def whole_parts(calls: Sequence[Call], aliases: Mapping[int, Alias]) -> list[list[Part] | None]:
    """The parts of every call for one sample that has all of its rows."""
    return [_whole(call, aliases) for call in calls]


def _whole(call: Call, aliases: Mapping[int, Alias]) -> list[Part]:
    each = [Layout(axis, (1, 1, size)) for axis, size in enumerate(call.shape)]
    for layout in each:
        if (found := rule_parts(call, layout, aliases)) is not None:
            return found
    return fallback_parts(call, each[0] if each else Layout(0, (1, 1, 1)))


def by_rows_parts(
    calls: Sequence[Call], layouts: Layouts, aliases: Mapping[int, Alias]
) -> list[list[Part] | None] | None:
    """The parts of every call whose rows count as samples; None where uses of one weight have different numbers of
    rows, or a call has no rule."""
    found: list[list[Part] | None] = []
    rows: dict[int, int] = {}
    for call, layout in zip(calls, layouts, strict=True):
        if layout is None:
            found.append(None)
            continue
        if isinstance(layout, Owned) or (parts := rule_parts(call, layout, aliases)) is None:
            return None
        if any(rows.setdefault(id(part.root), layout.sizes[1]) != layout.sizes[1] for part in parts):
            return None
        found.append(parts)
    return found


def has_axis(calls: Sequence[Call], N: int) -> bool:
    """Whether an axis, other than that of the features, has N elements at any call."""
    return any(N in (call.shape[:-1] or call.shape) for call in calls)
