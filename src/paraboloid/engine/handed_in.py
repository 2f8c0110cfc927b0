"""Which indices and adjacency matrices were handed in, as inputs, buffers or attributes, and which the model made.

An edge list says in so many words which rows see each other; an order that the model sorts by, or a Gram matrix of its
inputs, says nothing of the kind.  What is computed from indices and constants alone counts as handed in (an edge list
with loops added), and so does what is computed from square matrices, indices and constants (a normalised adjacency).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paraboloid.passes.torch_internals import StorageWeakRef, storage_place

RANDOM = {torch.randperm, torch.randint, torch.multinomial}


class HandedIn:
    """Told of every result without a gradient, with what it was computed from."""

    def __init__(self):
        self._made: dict[Any, StorageWeakRef] = {}  # indices and square matrices that were not, by their memory
        self._derived: dict[Any, StorageWeakRef] = {}  # from square matrices

    def note(self, op: Any, inputs: Sequence[Tensor], z: Any) -> None:
        """A result z (tensors in a tuple too) of an operation on these tensors."""
        for t in (z,) if isinstance(z, Tensor) else z if isinstance(z, tuple | list) else ():
            if not isinstance(t, Tensor) or t.requires_grad or t.layout != torch.strided:
                continue
            if not t.is_floating_point():
                if op in RANDOM or (inputs and not self._from_indices(inputs)):
                    self._made[_place(t)] = StorageWeakRef(t.untyped_storage())
            elif inputs and t.dim() <= 2 and any(map(self._is_matrix, inputs)):
                known = all(self._is_matrix(i) or self.index(i) or not i.dim() or _is_vector(i) for i in inputs)
                (self._derived if known else self._made)[_place(t)] = StorageWeakRef(t.untyped_storage())
            elif inputs and _is_square(t):
                self._made[_place(t)] = StorageWeakRef(t.untyped_storage())

    def index(self, t: Tensor) -> bool:
        """Whether t holds integers (or a mask) that were handed in."""
        return not t.is_floating_point() and not _lives(self._made, t)

    def matrix(self, t: Tensor) -> bool:
        """Whether t is a square matrix, or a sparse one, that was handed in."""
        if t.layout != torch.strided:
            return True
        while t.dim() > 2 and len(t) == 1:
            t = t[0]
        return _is_square(t) and self._is_matrix(t)

    def _from_indices(self, inputs: Sequence[Tensor]) -> bool:
        whole = [i for i in inputs if not i.is_floating_point()]
        return bool(whole) and all(map(self.index, whole))

    def _is_matrix(self, t: Tensor) -> bool:
        if t.requires_grad or t.layout != torch.strided or not t.is_floating_point():
            return False
        return _lives(self._derived, t) or (_is_square(t) and not _lives(self._made, t))


def _is_square(t: Tensor) -> bool:
    return t.dim() == 2 and t.shape[0] == t.shape[1] > 1


def _is_vector(t: Tensor) -> bool:
    return t.dim() == 1


def _place(t: Tensor) -> Any:
    return storage_place(t.untyped_storage())


def _lives(noted: dict[Any, StorageWeakRef], t: Tensor) -> bool:
    if not noted or t.layout != torch.strided:
        return False
    found = noted.get(_place(t))
    return found is not None and not found.expired()
