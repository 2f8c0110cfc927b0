"""The solver that a kernel system gets when nobody says: from predicted costs, and a race where these do not tell."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from torch import Tensor

from paraboloid.gp.gram import Gram
from paraboloid.gp.preconditioned import OPERATION, TILE, Preconditioned
from paraboloid.linalg.block_descent import block_solves
from paraboloid.passes.memory import DENSE

SMALL = 1000  # inputs up to which nothing is worth a thought
HARD = 150  # predicted iterations of conjugate gradients from which block solves are tried beside them
SWEEPS = 3  # of block solves in that race; conjugate gradients get as many passes over the tiles
SOLVE = 0.05  # nanoseconds of an entry of a factor times one right-hand side, beside those of `preconditioned`


@dataclass(frozen=True, eq=False)
class Choice:
    """The solver's name, why, and the preconditioner where one was made on the way."""

    solver: str
    reason: str
    preconditioned: Preconditioned | None = None


def choose(gram: Gram, b: Tensor, tol: float, rank: int | None, seed: int) -> Choice:
    """A solver for (K + noise) x = b, columns [N, S].

    A Cholesky factor for up to 1000 inputs, and wherever its predicted time is the least and it fits.  Conjugate
    gradients by the number of iterations that the columns of the preconditioner predict; where these are many, a race
    of a few passes over K, on the first right-hand side, against exact solves on blocks.
    """
    N, S = b.shape
    fits = 2 * N**2 * gram.dtype.itemsize <= DENSE.of()
    if N <= SMALL and fits:
        return Choice("cholesky", f"{N} inputs, at most {SMALL}: a factor is the fastest, and exact")
    if not bool((gram.noise > 0).all()):
        return Choice("cholesky", "without noise only a factor tells whether there is a solution")
    by_factor = N**3 / 3 * OPERATION + N**2 * (TILE / 2 + SOLVE * S)
    system = Preconditioned(gram, rank, seed, tol, S, by_factor if fits else inf)
    iterations, by_cg = system.iterations, system.predicted() + N**2 * TILE / 2
    said = f"{system.rank} columns of K predict {iterations:.0f} iterations of conjugate gradients"
    if fits and by_factor < by_cg:
        return Choice("cholesky", f"{said}; a factor of {N} inputs is faster, and exact")
    if iterations <= HARD:
        return Choice("cg", said, system)
    return _raced(gram, system, b[:, :1], said, seed)


def _raced(gram: Gram, system: Preconditioned, b: Tensor, said: str, seed: int) -> Choice:
    """Residuals after as many entries of K: a product with all of it forms half of them."""
    N = len(b)
    size = block_size(N)
    blocks = block_solves(gram, b, steps=SWEEPS * -(-N // size), block_size=size, seed=seed).residual
    conjugate = system.solve(b, 0.0, 2 * SWEEPS, None).residual
    told = f"{said}; after {SWEEPS} passes over K these left a residual of {conjugate:.2g}, blocks one of {blocks:.2g}"
    return Choice("cg", told, system) if conjugate <= blocks else Choice("block", told)


def block_size(N: int) -> int:
    """Inputs of a block: a tenth of all, 300 to 2000."""
    return max(300, min(2000, N // 10))
