"""Eigenvalues and eigenvectors: of a dense matrix, and the top ones of an operator."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.krylov import normalise_, orthogonalise, random_unit, reorthogonalise_
from paraboloid.linalg.operand import LinAlgError, Operand, check_count
from paraboloid.linalg.probes import Seed, block_size, generator_of
from paraboloid.linalg.threads import one_thread

ONE_THREAD = 1000  # up to this size LAPACK on several threads can be hundreds of times slower than on one, waiting
PROBE_STEPS = 10  # products spent on looking for an eigenvalue that was missed
DENSE_SIZE = 2000  # up to this size a dense matrix, or a stubborn spectrum, is handed to the dense solver


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [.. D], descending, and eigenvectors [.. D, D] of symmetric matrices; float64 where float32 fails."""
    try:
        small = matrix.device.type == "cpu" and matrix.shape[-1] <= ONE_THREAD and torch.get_num_threads() > 1
        with one_thread() if small else nullcontext():
            values, vectors = torch.linalg.eigh(matrix)
        if not torch.isfinite(vectors).all():  # LAPACK may say nothing of it
            raise LinAlgError("the eigenvectors are NaN.")
    except LinAlgError:
        if not torch.isfinite(matrix).all():
            raise LinAlgError(
                f"the matrix of shape {tuple(matrix.shape)} holds NaN or infinity; expected finite entries."
            ) from None
        values, vectors = (t.to(matrix.dtype) for t in torch.linalg.eigh(matrix.double()))
    return values.flip(-1), vectors.flip(-1)


def dense(A: Any) -> Tensor:
    """The matrix of an operator, [D, D], from D products; exactly symmetric."""
    A = Operand(A)
    if A.is_matrix:
        return A.A.to(A.dtype).detach()
    matrix = torch.empty(A.size, A.size, dtype=A.dtype, device=A.device)
    step = block_size(A.size, A.dtype)
    for start in range(0, A.size, step):
        columns = torch.zeros(A.size, min(step, A.size - start), dtype=A.dtype, device=A.device)
        columns[start : start + step].fill_diagonal_(1)
        matrix[:, start : start + step] = A @ columns
    return (matrix + matrix.T).div_(2)


def eigsh(
    A: Any, k: int, tol: float | None = None, max_products: int | None = None, seed: Seed = 0
) -> tuple[Tensor, Tensor]:
    """The k algebraically largest eigenvalues [k], descending, and their eigenvectors [D, k], orthonormal.

    Thick-restart Lanczos with full re-orthogonalisation (for k = 1 against two vectors up to the first restart); the
    dense matrix where k is a large part of D.  Every pair satisfies ||A u - lambda u|| <= tol * (largest |Ritz value|),
    so the eigenvalue is off by much less; tol defaults to eps^(2/3) of the dtype.  One start vector sees one copy of a
    repeated eigenvalue, so for k > 1 a second start in the complement of what was found looks for more.
    More than `max_products` products (default 100 k + 1000) raise `torch.linalg.LinAlgError`.
    Source: Wu and Simon 2000, Thick-restart Lanczos method for large symmetric eigenvalue problems.
    """
    A = Operand(A)
    check_count("k", k, most=A.size)
    tol = relative_tolerance(tol, A)
    budget = 100 * k + 1000 if max_products is None else check_count("max_products", max_products)
    if max_products is None and A.size <= DENSE_SIZE:
        budget = A.size  # the dense matrix costs no more
    width = 3 * k + 20
    if 2 * width >= A.size or (A.is_matrix and A.size <= DENSE_SIZE):
        return dense_top(A, k)
    generator = generator_of(seed, A.device)
    search = _Search(A, width, tol, budget, generator)
    try:
        values, vectors = search.top(k)
        while True:  # vectors are rows from here on
            missed = search.largest_beyond(vectors, above=values[-1].item()) if k > 1 else None  # a copy adds nothing
            if missed is None:
                return values, vectors.T.contiguous()
            order = torch.cat([values, missed[0]]).argsort(descending=True)[:k]
            values, vectors = torch.cat([values, missed[0]])[order], torch.cat([vectors, missed[1]])[order]
    except _NotConverged as failure:
        if A.size <= DENSE_SIZE:
            return dense_top(A, k)
        raise LinAlgError(
            f"{failure.count} of the {k} largest eigenpairs had converged after {budget} products with A; the largest "
            f"relative residual was {failure.residual:.3g}, expected {tol:.3g}. Allow a larger tol, or more products."
        ) from None


def relative_tolerance(tol: float | None, A: Operand) -> float:
    """Of eigenpairs' residuals: eps^(2/3) by default."""
    tol = float(torch.finfo(A.dtype).eps ** (2 / 3)) if tol is None else tol
    if not tol > 0:
        raise ValueError(f"tol is {tol}; expected a positive number.")
    return tol


def dense_top(A: Operand, k: int) -> tuple[Tensor, Tensor]:
    values, vectors = eigh(dense(A))
    return values[:k], vectors[:, :k].contiguous()


class _NotConverged(Exception):
    def __init__(self, count: int, residual: float):
        self.count, self.residual = count, residual


class _Search:
    """Thick-restart Lanczos in the complement of given rows, with one budget of products for all searches."""

    def __init__(self, A: Operand, width: int, tol: float, budget: int, generator: torch.Generator):
        self.A, self.width, self.tol, self.budget, self.generator = A, width, tol, budget, generator
        self.scale = torch.finfo(torch.float64).tiny  # largest |Ritz value| so far

    def top(self, k: int, found: Tensor | None = None, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k largest Ritz pairs in the complement of `found` (rows): values [k] and rows [k, D]."""
        A, width = self.A, min(self.width, self.A.size - (0 if found is None else len(found)))
        Q = torch.empty(width + 1, A.size, dtype=A.dtype, device=A.device)
        T = torch.zeros(width, width, dtype=torch.float64, device="cpu")
        Q[0] = self._random(Q[:0], found) if start is None else start
        j, residual, count = 0, float("inf"), 0
        # Orthogonality is lost along what has converged, and the process goes on as for a larger matrix with copies of
        # those eigenvalues (Paige 1976): for the first pair to converge above, the last two rows are enough.
        full = k > 1 or found is not None
        while True:
            if self.budget <= 0:
                raise _NotConverged(count, residual)
            beta = self._extend(Q, T, j, found, full)
            j += 1
            if j < width and (j <= k or (j - k) % min(5, 1 + k // 2)):
                continue
            values, S = eigh(T[:j, :j])
            self.scale = max(values.abs().max().item(), self.scale)
            residuals = (beta * S[-1, :k]).abs() / self.scale  # of the Ritz pairs, relative
            residual, count = residuals.max().item(), int((residuals <= self.tol).sum())
            if residual <= self.tol and j >= k:
                rows = S[:, :k].to(Q).T @ Q[:j]
                return values[:k].to(Q), rows if full else rows / rows.norm(dim=1, keepdim=True)
            if j == width:
                if full:
                    keep = min(k + (width - k) // 2, width - 1)
                    Q[:keep], Q[keep] = S[:, :keep].to(Q).T @ Q[:width], Q[width].clone()
                else:  # again from the best vector so far
                    keep, best = 0, S[:, 0].to(Q) @ Q[:width]
                    Q[0] = best / best.norm()
                T.zero_()
                T[range(keep), range(keep)] = values[:keep]
                j, full = keep, True

    def largest_beyond(self, found: Tensor, above: float) -> tuple[Tensor, Tensor] | None:
        """The largest Ritz pair in the complement of `found` if its value is `above`, else None."""
        A, steps = self.A, min(PROBE_STEPS, self.A.size - len(found))
        if steps == 0:
            return None
        Q = torch.empty(steps + 1, A.size, dtype=A.dtype, device=A.device)
        T = torch.zeros(steps, steps, dtype=torch.float64, device="cpu")
        Q[0] = self._random(Q[:0], found)
        for j in range(steps):
            self._extend(Q, T, j, found)
        values, S = eigh(T)
        if values[0].item() <= above + 2 * self.tol * self.scale:
            return None
        start = S[:, 0].to(Q) @ Q[:steps]
        return self.top(1, found, start / start.norm())

    def _extend(self, Q: Tensor, T: Tensor, j: int, found: Tensor | None, full: bool = True) -> float:
        """Multiply row j, fill column j of T = Q A Q^T and row j + 1 of Q; the norm of the remainder."""
        w = Q[j + 1].copy_(self.A @ Q[j])
        self.budget -= 1
        if found is not None:
            w.copy_(orthogonalise(w, found)[0])
        start = 0 if full else max(0, j - 1)
        components = reorthogonalise_(w, Q[start : j + 1])
        T[start : j + 1, j] = T[j, start : j + 1] = components.to(T)
        if not torch.isfinite(T[j, j]):
            raise LinAlgError("a product with A holds NaN or infinity; expected finite numbers.")
        if j + 1 == self.A.size - (0 if found is None else len(found)):
            return 0.0
        bases = [Q[: j + 1]] if found is None else [found, Q[: j + 1]]
        return normalise_(w, bases, T[: j + 1, : j + 1].abs().max().item(), self.generator)

    def _random(self, basis: Tensor, found: Tensor | None) -> Tensor:
        return random_unit(basis if found is None else torch.cat([found, basis]), self.generator)
