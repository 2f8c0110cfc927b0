"""Symmetric matrices with known spectra, and an operator that counts its products."""

import torch


def with_spectrum(values, dtype=torch.float64, seed=0):
    """A matrix with these eigenvalues and random eigenvectors."""
    values = torch.as_tensor(values, dtype=torch.float64)
    draw = torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    Q = torch.linalg.qr(draw).Q
    M = (Q * values) @ Q.T
    return ((M + M.T) / 2).to(dtype)


class Counted:
    """Nothing but `@` and the attributes of an operator; counts the vectors that it is multiplied with."""

    def __init__(self, matrix):
        self.matrix, self.shape, self.dtype, self.device = matrix, tuple(matrix.shape), matrix.dtype, matrix.device
        self.products = 0

    def __matmul__(self, v):
        self.products += 1 if v.dim() == 1 else v.shape[1]
        return self.matrix @ v
