"""What was computed last of a layer used at one position, and what of: its bias has the same gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Recent:
    """Carried from parameter to parameter of one group of vectors."""

    factor: tuple[Tensor, Tensor] | None = None  # left [V N 1 1 p], its Gram matrix [1 p p]
    squares: tuple[Tensor, Tensor] | None = None  # left [V N G 1 p], its squares summed over V [N G 1 p]

    def factor_of(self, left: Tensor) -> Tensor | None:
        kept = self.factor
        return kept[1] if kept is not None and same_memory(kept[0], left) else None

    def squares_of(self, left: Tensor) -> Tensor:
        if (kept := self.squares) is not None and same_memory(kept[0], left):
            return kept[1]
        found = left[0].square()
        for one in left[1:]:
            found.addcmul_(one, one)
        self.squares = left, found
        return found


def same_memory(kept: Tensor, x: Tensor) -> bool:
    """Whether two tensors that live, so that their memory is their own, are the same numbers in the same order."""
    return kept.data_ptr() == x.data_ptr() and kept.shape == x.shape and kept.stride() == x.stride()
