"""Weights that only re-index parameters: transposed, viewed, expanded, cast, their rows sliced or joined.

What is computed for such a weight can be written down for the parameter itself, Kronecker factors included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paraboloid.passes.torch_internals import base_of

STRETCHES = {
    Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to, Tensor.contiguous, Tensor.clone,
    torch.clone, Tensor.to, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16,
}  # fmt: skip
REPEATS = {Tensor.repeat, torch.tile, Tensor.tile}
JOINS = {torch.cat, torch.concat, torch.concatenate, torch.stack}


@dataclass(eq=False)
class Piece:
    """The elements start..stop of `root`, in row-major order; `root` is a parameter, or itself computed from some.

    If `table` is (embedding table, positions), then `root` is a lookup of fixed positions in it.
    """

    root: Tensor
    start: int
    stop: int
    table: tuple[Tensor, Tensor] | None = None


@dataclass(eq=False)
class Alias:
    """A weight that holds the elements of its pieces, one after another, in `shape`; transposed afterwards if `turned`.

    The weight itself may also be expanded from that.
    """

    pieces: tuple[Piece, ...]
    shape: torch.Size
    turned: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether every element of a single root is there, so that only the shape may differ."""
        piece = self.pieces[0]
        return len(self.pieces) == 1 and piece.stop - piece.start == piece.root.numel()


def itself(t: Tensor) -> Alias:
    return Alias((Piece(t, 0, t.numel()),), t.shape)


def alias_of(
    op: Callable, args: Sequence[Any], kwargs: Mapping[str, Any], z: Tensor, known: Mapping[int, Alias]
) -> Alias | None:
    """The `Alias` that the result z of an operation on clean tensors is; None where it computes something new."""
    first = args[0] if args else None
    if isinstance(first, Tensor) and (op in STRETCHES or (op in REPEATS and _only_stretched(first.shape, z.shape))):
        return known.get(id(first), itself(first))
    if op in JOINS:
        return _joined(args, kwargs, z, known)
    if op is F.embedding and len(args) > 1 and args[1].is_leaf and _is_plain(*args, **kwargs):
        return Alias((Piece(z, 0, z.numel(), (args[1], args[0])),), z.shape)
    return _viewed(z, known)


def _only_stretched(before: torch.Size, after: torch.Size) -> bool:
    """Whether a repetition copies along axes of size one only, as expand does."""
    tail = after[len(after) - len(before) :]
    return all(a in (1, b) for a, b in zip(before, tail, strict=True))


def _viewed(z: Tensor, known: Mapping[int, Alias]) -> Alias | None:
    """A view whose elements lie one after another in its base: a slice of rows, another shape, a transposed matrix."""
    base = base_of(z)
    if base is None or not base.requires_grad or z.dtype != base.dtype or z.numel() == 0:
        return None
    source = known.get(id(base), itself(base))
    if source.turned or source.shape.numel() != base.numel() or not base.is_contiguous():
        return None
    turned = z.dim() == 2 and not z.is_contiguous() and z.t().is_contiguous()
    if not (turned or z.is_contiguous()):
        return None
    start = int(z.storage_offset() - base.storage_offset())
    pieces, at = [], 0
    for piece in source.pieces:
        size = piece.stop - piece.start
        low, high = max(start - at, 0), min(start + z.numel() - at, size)
        if low < high:
            pieces.append(replace(piece, start=piece.start + low, stop=piece.start + high))
        at += size
    return Alias(tuple(pieces), z.t().shape if turned else z.shape, turned)


def _joined(args: Sequence[Any], kwargs: Mapping[str, Any], z: Tensor, known: Mapping[int, Alias]) -> Alias | None:
    """Tensors put one behind another along axis 0."""
    parts = args[0] if args else kwargs.get("tensors")
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if not isinstance(parts, tuple | list) or dim % z.dim() != 0:
        return None
    pieces: list[Piece] = []
    for part in parts:
        alias = known.get(id(part), itself(part))
        whole = not alias.turned and alias.shape.numel() == part.numel()
        pieces += (alias if whole else itself(part)).pieces
    return Alias(tuple(p for p in pieces if p.stop > p.start), z.shape)


def _is_plain(idx, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
    """Whether an embedding only looks up rows: nothing masked, renormalised or scaled."""
    return padding_idx is None and max_norm is None and not scale_grad_by_freq
