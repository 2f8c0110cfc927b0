"""A small picture of strokes, and what a scanner sees of it."""

import torch

import paraboloid as pb


def picture(size=12, dtype=torch.float64):
    i, j = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    ring = ((i - size / 2).square() + (j - size / 2.2).square()).sqrt() - size / 4
    stroke = (i - j * 0.5 - size / 5).abs() / 1.2
    return torch.maximum(torch.sigmoid(3 - 4 * ring.abs()), torch.sigmoid(3 - 4 * stroke)).to(dtype)


def observed(A, image, level=0.05, seed=0):
    """The sinogram with white noise of `level` times its mean absolute value, and the noise's variance."""
    clean = A @ image
    sigma = level * float(clean.abs().mean())
    generator = torch.Generator().manual_seed(seed)
    return clean + sigma * torch.randn(clean.shape, dtype=clean.dtype, generator=generator), sigma**2


def scanned(angles=6, size=12, level=0.05, dtype=torch.float64):
    A, x = pb.tomography.ParallelBeam(size, angles), picture(size, dtype)
    return A, x, *observed(A, x, level)
