"""Where the search for hyperparameters starts: variances in units of the targets, lengthscales that say something."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from paraboloid.gp.kernel import Kernel, Product, Sum

FLAT = 1e-6  # mean correlation, or distance from 1, at which lengthscales have no derivative to speak of


def in_units_of(y: Tensor, x: Tensor, kernel: Kernel, noise: float) -> tuple[Kernel, float]:
    """The kernel and the noise times y.(K + noise)^-1 y / N, at which N(y; 0, K + noise) is the largest of all factors.

    As they are where the kernel cannot be multiplied (by an `outputscale`), or K + noise has no factor.
    """
    K = kernel(x).detach()
    _check_informative(K, x, kernel)
    L, failed = torch.linalg.cholesky_ex(K + noise * torch.eye(len(x), dtype=x.dtype, device=x.device))
    if failed:
        return kernel, noise
    factor = float(torch.linalg.solve_triangular(L, y.view(len(y), -1), upper=False).square().mean())
    found = multiplied(kernel, factor)
    return (kernel, noise) if found is None else (found, noise * factor)


def multiplied(kernel: Kernel, factor: float) -> Kernel | None:
    """factor * k with as many hyperparameters as k; None where it has no `outputscale`."""
    if isinstance(kernel, Sum):
        first, second = multiplied(kernel.first, factor), multiplied(kernel.second, factor)
        return None if first is None or second is None else Sum(first, second)
    if isinstance(kernel, Product):
        first = multiplied(kernel.first, factor)
        if first is not None:
            return Product(first, kernel.second)
        second = multiplied(kernel.second, factor)
        return None if second is None else Product(kernel.first, second)
    values = kernel.hyperparameters()
    return (
        kernel.replaced({**values, "outputscale": values["outputscale"] * factor}) if "outputscale" in values else None
    )


def _check_informative(K: Tensor, x: Tensor, kernel: Kernel) -> None:
    """Warn where K is diagonal, or constant."""
    N, roots = len(K), K.diagonal().sqrt()
    if N < 3 or not bool((roots > 0).all()):
        return
    related = float(((K / (roots * roots.unsqueeze(1))).abs().sum() - N) / (N * (N - 1)))
    apart = float((x - x.mean(0)).square().sum(1).mean().sqrt())
    if related < FLAT or (related > 1 - FLAT and apart > 0):
        what, other = ("relates no two", "larger") if related < FLAT else ("tells no two apart", "smaller")
        warnings.warn(f"{kernel} {what} of {N} inputs, which are {apart:.3g} from their mean: lengthscales have no "
                      f"slope there; expected them of that size: start from {other} ones.", stacklevel=4)  # fmt: skip
