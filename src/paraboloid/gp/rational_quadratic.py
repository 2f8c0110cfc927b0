"""The rational quadratic kernel: RBF kernels of all lengthscales, those around one the most."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import special
from torch import Tensor

from paraboloid.gp.buffers import Buffers, Placed
from paraboloid.gp.kernel import Kernel, positive
from paraboloid.gp.stationary import Stationary


class RationalQuadratic(Stationary):
    """outputscale * (1 + r^2 / (2 alpha))^-alpha, r the distance in lengthscales; RBF for alpha to infinity.

    It is the mean of exp(-tau r^2 / 2) over tau ~ Gamma(alpha, alpha).

    alpha   a positive number;  lengthscale, outputscale, dims   as for `RBF`
    """

    def __init__(
        self,
        alpha: float | Tensor = 1.0,
        lengthscale: float | Tensor = 1.0,
        outputscale: float | Tensor = 1.0,
        dims: Sequence[int] | None = None,
    ):
        super().__init__(lengthscale, outputscale, dims)
        self.alpha = positive("alpha", alpha)

    def hyperparameters(self) -> dict[str, Tensor]:
        return {"alpha": self.alpha, **super().hyperparameters()}

    def replaced(self, values: dict[str, Tensor]) -> Kernel:
        return RationalQuadratic(**{**self.hyperparameters(), **values}, dims=self.dims)  # type: ignore[reportArgumentType]

    def __repr__(self) -> str:
        return super().__repr__().replace("RationalQuadratic(", f"RationalQuadratic({float(self.alpha):.4g}, ")

    def _profile(self, r2: Tensor) -> Tensor:
        alpha = self.alpha.to(r2)
        return (-alpha * torch.log1p(r2 / (2 * alpha))).exp()

    def _unit(self) -> float:
        return float(2 * self.alpha) ** -0.5

    def _radii(self, u: np.ndarray, d: int) -> np.ndarray:
        """|omega|^2 = tau times a chi square of d degrees, with levels v of its own (u is in random order)."""
        v = (np.arange(len(u)) + 0.5) / len(u)
        alpha = float(self.alpha)
        return special.gammaincinv(alpha, u) / alpha * 2 * special.gammaincinv(d / 2, v)

    def points(self, x: Tensor, shift: Tensor) -> list[Tensor]:
        u = self._scaled(x - shift) * self._unit()
        square, one = u.square().sum(1, keepdim=True), torch.ones_like(u[:, :1])
        return [torch.cat([-2 * u, square, one], 1), torch.cat([u, one, square], 1)]

    def tile(self, left: Sequence[Tensor], right: Sequence[Tensor], buffers: Buffers | Placed) -> Tensor:
        tile = torch.mm(left[0], right[1].T, out=buffers.take(len(left[0]), len(right[0])))
        tile.clamp_(min=0).log1p_().mul_(-float(self.alpha)).exp_()
        scale = float(self.outputscale)
        return tile.mul_(scale) if scale != 1 else tile
