"""A preconditioner from a random sketch of the curvature, for samples that conjugate gradients find slowly."""

from __future__ import annotations

from torch import Tensor

from paraboloid.distributed import collectives
from paraboloid.distributed.collectives import Group
from paraboloid.linalg.nystrom_approximation import Nystrom, nystrom
from paraboloid.posteriors.sampled.tangent_system import TangentSystem

RANK, LEAST = 100, 16  # products of a sketch at most, and below which it is not worth having
COPIES = 4  # of the sketch that making it takes


class Sketch:
    """The inverse of Lambda^1/2 (U diag(v) U^T + I) Lambda^1/2, with

        U diag(v) U^T ~ Lambda^-1/2 S (strength G) S Lambda^-1/2

    the Nystrom approximation from `rank` products.  It serves all multiples of the Lambda that it was made at, and
    others about as well as they are like one.  Source: Frangella, Tropp and Udell 2023, arXiv:2110.02820.
    """

    def __init__(self, system: TangentSystem, precision: Tensor, rank: int):
        self.precision, self.found = precision, nystrom(_Scaled(system, precision), rank, seed=system.seed)

    def at(self, precision: Tensor) -> Preconditioner:
        ratio = float((precision / self.precision).log().mean().exp())
        return Preconditioner(Nystrom(self.found.U, self.found.values / ratio), precision)


class Preconditioner:
    """That of a sketch under one Lambda = diag(precision), for columns [D] or [D, K]."""

    def __init__(self, found: Nystrom, precision: Tensor):
        self.inner, self.root = found.preconditioner(1.0), precision.rsqrt().unsqueeze(1)
        self.shape, self.dtype, self.device = found.shape, found.dtype, found.device

    def __matmul__(self, v: Tensor) -> Tensor:
        columns = v if v.dim() == 2 else v.unsqueeze(1)
        return (self.inner @ (columns * self.root)).mul_(self.root).view(v.shape)


class _Scaled:
    """Lambda^-1/2 S (strength G) S Lambda^-1/2."""

    def __init__(self, system: TangentSystem, precision: Tensor):
        self.system, self.root = system, precision.rsqrt()
        self.shape, self.dtype, self.device = (system.size, system.size), precision.dtype, precision.device

    def __matmul__(self, v: Tensor) -> Tensor:
        rows = v.T if v.dim() == 2 else v.unsqueeze(0)
        return self.system.product((rows * self.root).contiguous()).mul_(self.root).T.reshape(v.shape)


def rank_of(system: TangentSystem, group: Group) -> int:
    """How many products a sketch takes; 0 where it would not fit beside the graphs, here or on another process."""
    room = (system.replay.max_memory - system.replay.size) // (COPIES * system.size * system.like.element_size())
    if group is not None:
        room = min(collectives.gathered(room, group))
    rank = min(RANK, system.size // 2, max(0, room))
    return rank if rank >= LEAST else 0
