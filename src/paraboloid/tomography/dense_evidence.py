"""The evidence of the linearised reconstruction by matrices that are formed: exact."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paraboloid.linalg.operand import LinAlgError
from paraboloid.tomography.image_jacobian import ImageJacobian, linear_residual
from paraboloid.tomography.kernel_grams import packed_grams, unpacked
from paraboloid.tomography.kernel_prior import KernelPrior
from paraboloid.tomography.reconstruction import Reconstruction

SHARES = (0.0, 1e-10, 1e-8, 1e-6, 1e-4)  # of the mean diagonal that are added where rounding made a matrix indefinite


class GramEvidence:
    """log N(r; 0, S) for S = A K A^T + s2 I, K = J Sigma J^T, with A K A^T = sum_br c_br G_br and G_br formed once.

    r = y - A x + A J w are the measurements of the linear model whose weights w have the prior N(0, Sigma): with w_0
    their posterior mean, -2 log N = ||y - A x(w_0)||^2 / s2 + w_0 . Sigma^-1 w_0 + log det S and constants.

    grams    the lower triangles of G_br where S is not s2 alone, [R in all, k (k + 1) / 2] of float64
    inside   r there, [k];  outside: its square elsewhere, in `left` more dimensions
    """

    def __init__(self, grams: Tensor, inside: Tensor, outside: float = 0.0, left: int = 0):
        self.grams, self.inside, self.outside, self.left = grams, inside, outside, left

    def factor(self, prior: KernelPrior, noise_variance: Tensor) -> Tensor:
        """The Cholesky factor of S inside."""
        return factor(unpacked(prior.coefficients().detach() @ self.grams), float(noise_variance))

    def value(self, prior: KernelPrior, noise_variance: Tensor) -> Tensor:
        """The log evidence, 0-dimensional; differentiable once in the prior's tensors and the noise variance."""
        return -(self.terms(prior, noise_variance) + (len(self.inside) + self.left) * math.log(2 * math.pi)) / 2

    def terms(self, prior: KernelPrior, noise_variance: Tensor, fit: bool = True) -> Tensor:
        """r . S^-1 r + log det S, or log det S alone, 0-dimensional; differentiable once.

        d/dc (r . S^-1 r + log det S) = <S^-1 - a a^T, dS/dc> for a = S^-1 r.
        """
        with torch.no_grad():
            s2, left = noise_variance.detach(), self.left
            L = self.factor(prior, s2)
            found = 2 * L.diagonal().log().sum() + left * s2.log()
            a = torch.cholesky_solve(self.inside.unsqueeze(1), L)
            if fit:
                found = found + self.inside @ a[:, 0] + self.outside / s2
            root = torch.linalg.solve_triangular(L, torch.eye(len(L), dtype=L.dtype, device=L.device), upper=False)
            slope = root.T @ root  # LAPACK's inverse from a factor takes twice as long
            if fit:
                slope = slope - a @ a.T
            noise = slope.trace() + left / s2 - (self.outside / s2.square() if fit else 0.0)
            i, j = torch.tril_indices(len(slope), len(slope), device=slope.device)
            by_c = self.grams @ (slope[i, j] * torch.where(i == j, 1.0, 2.0))
        c = prior.coefficients()
        return found + ((c - c.detach()) * by_c).sum() + (noise_variance - s2) * noise


class DenseEvidence(GramEvidence):
    """The same with the image's matrices formed too, for small images.

    Where there are more measurements m than pixels n, A = Q R, and the matrices are those of R [n, n]: S is s2 on what
    Q leaves out.  J and G have the fit's precision, which is enough to find the prior; everything else is of float64:
    S is much less on what A sees least than A K A^T's rounding in float32.
    """

    @torch.no_grad()
    def __init__(self, fit: Reconstruction, J: ImageJacobian, prior: KernelPrior):
        self.rows, self.A, self.image = J.rows(), fit.A, fit.image.shape
        self.residual = linear_residual(fit, self.push([w.unsqueeze(0) for w in J.weights])[0]).flatten()
        eye = torch.eye(J.pixels, dtype=torch.float64, device=self.residual.device)
        seen = (fit.A @ eye.view(-1, *fit.image.shape)).reshape(J.pixels, -1).T
        self.Q, self.R = torch.linalg.qr(seen) if len(seen) > J.pixels else (None, seen)
        measured = [torch.tensordot(self.R.to(rows), rows, 1) for rows in self.rows]
        inside = self.within(self.residual)
        outside = max(0.0, float(self.residual.square().sum() - inside.square().sum()))
        super().__init__(packed_grams(measured, prior.blocks), inside, outside, len(self.residual) - len(self.R))

    def push(self, v: Sequence[Tensor]) -> Tensor:
        """J v for v [K, *shape] of each weight, [K, n] of float64."""
        pairs = zip(v, self.rows, strict=True)
        return torch.stack([t.flatten(1).double() @ rows.flatten(1).double().T for t, rows in pairs]).sum(0)

    def within(self, r: Tensor) -> Tensor:
        """Q^T r for rows [..., m]."""
        return r if self.Q is None else r @ self.Q

    def at(self, prior: KernelPrior, noise_variance: float) -> DenseSolution:
        return DenseSolution(self, prior, noise_variance)


class DenseSolution:
    """The linear model's posterior under one prior and one noise variance, in float64 from J's rows on.

    K [n, n] is the prior covariance of the image, L the Cholesky factor of R K R^T + s2 I.
    """

    @torch.no_grad()
    def __init__(self, evidence: DenseEvidence, prior: KernelPrior, noise_variance: float):
        self.evidence, self.noise_variance = evidence, noise_variance
        roots = [torch.linalg.cholesky(C) for C in prior.covariances()]
        halves = [(rows.double() @ L.to(rows.device)).flatten(1) for rows, L in zip(evidence.rows, roots, strict=True)]
        self.K = torch.stack([half @ half.T for half in halves]).sum(0)
        self.seen = evidence.R @ self.K
        self.L = factor(self.seen @ evidence.R.T, noise_variance)

    def push(self, v: Sequence[Tensor]) -> Tensor:
        """J v, as `DenseEvidence.push`."""
        return self.evidence.push(v)

    def measured(self, v: Sequence[Tensor], images: Tensor) -> Tensor:
        """A J v for images = J v, [K, m]."""
        return (self.evidence.A @ images.view(len(images), *self.evidence.image)).reshape(len(images), -1)

    def gain(self, b: Tensor) -> Tensor:
        """K A^T S^-1 b for rows [K, m]: [K, n]."""
        return torch.cholesky_solve(self.evidence.within(b.double()).T, self.L).T @ self.seen

    def covariance(self) -> Tensor:
        """K - K A^T S^-1 A K, [n, n]."""
        half = torch.linalg.solve_triangular(self.L, self.seen, upper=False)
        found = self.K - half.T @ half
        return (found + found.T) / 2

    def log_evidence(self) -> float:
        m, k, s2 = len(self.evidence.residual), len(self.L), self.noise_variance
        half = torch.linalg.solve_triangular(self.L, self.evidence.inside.unsqueeze(1), upper=False)
        volume = 2 * float(self.L.diagonal().log().sum()) + (m - k) * math.log(s2)
        return -(float(half.square().sum()) + self.evidence.outside / s2 + volume + m * math.log(2 * math.pi)) / 2


def factor(S: Tensor, s2: float) -> Tensor:
    """The Cholesky factor of S + s2 I, with as little more on the diagonal as rounding asks for."""
    scale, eye = S.diagonal().mean() + s2, torch.eye(len(S), dtype=S.dtype, device=S.device)
    S = (S + S.T) / 2 + s2 * eye
    for share in SHARES:
        L, info = torch.linalg.cholesky_ex(S + share * scale * eye if share else S)
        if not info.item():
            return L
    raise LinAlgError(f"A K A^T + s2 I has no Cholesky factor at s2 = {s2:.4g}, where its mean diagonal is "
                      f"{scale.item():.4g}; expected a positive definite matrix. Give a larger noise_variance, or "
                      "sinograms in float64.")  # fmt: skip
