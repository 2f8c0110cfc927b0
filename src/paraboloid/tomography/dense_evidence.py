"""The evidence of the linearised reconstruction with every matrix formed: exact, for small images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paraboloid.linalg.operand import LinAlgError
from paraboloid.tomography.image_jacobian import ImageJacobian
from paraboloid.tomography.kernel_prior import KernelPrior
from paraboloid.tomography.projector import Projector

SHARES = (0.0, 1e-10, 1e-8, 1e-6, 1e-4)  # of the mean diagonal that are added where rounding made a matrix indefinite


class DenseEvidence:
    """log N(r; 0, A K A^T + s2 I) for K = J Sigma J^T = sum_br c_br G_br, G_br formed once, in float64.

    r = y - A x + A J w are the measurements of the linear model whose weights w have the prior N(0, Sigma): with w_0
    their posterior mean, -2 log N = ||y - A x(w_0)||^2 / s2 + w_0 . Sigma^-1 w_0 + log det(A K A^T + s2 I) and
    constants.
    """

    def __init__(self, J: ImageJacobian, prior: KernelPrior, A: Projector, residual: Tensor):
        self.A, self.residual = A, residual.flatten().double()
        self.image = (*residual.shape[: residual.dim() - len(A.gives)], *A.takes)
        self.grams = J.grams(prior.blocks).double()
        small = len(self.residual) < len(self.grams[0])
        self.measured = torch.stack([self.seen(G) for G in self.grams]) if small else None

    def measured_images(self, K: Tensor) -> Tensor:
        """A K, [m, n], for K [n, n]."""
        return (self.A @ K.T.reshape(-1, *self.image)).reshape(len(K), -1).T

    def seen(self, K: Tensor) -> Tensor:
        """A K A^T for K [n, n]."""
        half = self.measured_images(K)
        return (self.A @ half.reshape(-1, *self.image)).reshape(len(half), -1).T

    def images(self, prior: KernelPrior) -> Tensor:
        """K, the prior covariance of the image, [n, n]."""
        return torch.tensordot(prior.coefficients(), self.grams, 1)

    def measurements(self, prior: KernelPrior, noise_variance: Tensor) -> Tensor:
        """A K A^T + s2 I, [m, m]."""
        if self.measured is None:
            K = self.seen(self.images(prior))
        else:
            K = torch.tensordot(prior.coefficients(), self.measured, 1)
        return (K + K.T) / 2 + noise_variance * torch.eye(len(K), dtype=K.dtype, device=K.device)

    def value(self, prior: KernelPrior, noise_variance: Tensor) -> Tensor:
        """The log evidence, 0-dimensional; differentiable in the prior's tensors and the noise variance."""
        L = self.factor(prior, noise_variance)
        half = torch.linalg.solve_triangular(L, self.residual.unsqueeze(1), upper=False)
        m = len(self.residual)
        return -(half.square().sum() + 2 * L.diagonal().log().sum() + m * math.log(2 * math.pi)) / 2

    def factor(self, prior: KernelPrior, noise_variance: Tensor) -> Tensor:
        """The Cholesky factor of A K A^T + s2 I, with as little more on the diagonal as rounding asks for."""
        S = self.measurements(prior, noise_variance)
        scale, eye = S.detach().diagonal().mean(), torch.eye(len(S), dtype=S.dtype, device=S.device)
        for share in SHARES:
            L, info = torch.linalg.cholesky_ex(S + share * scale * eye if share else S)
            if not info.item():
                return L
        raise LinAlgError(f"A K A^T + s2 I has no Cholesky factor at s2 = {noise_variance.item():.4g}, where its mean "
                          f"diagonal is {scale.item():.4g}; expected a positive definite matrix. Give a larger "
                          "noise_variance, or sinograms in float64.")  # fmt: skip
