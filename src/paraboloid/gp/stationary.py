"""Kernels of the scaled distance between inputs: RBF (squared exponential) and Matern, with their spectral features."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from paraboloid.gp.buffers import Buffers, Placed
from paraboloid.gp.kernel import Features, Kernel, positive

LOG2E = math.log2(math.e)
FEW = 8  # dimensions up to which differences are formed one by one where rounding matters


class Stationary(Kernel):
    """outputscale * profile(r), r^2 = sum_i ((x_i - z_i) / lengthscale_i)^2 over the input dimensions `dims` (all)."""

    def __init__(
        self,
        lengthscale: float | Tensor = 1.0,
        outputscale: float | Tensor = 1.0,
        dims: Sequence[int] | None = None,
    ):
        self.lengthscale = positive("lengthscale", lengthscale, 1)
        self.outputscale = positive("outputscale", outputscale)
        self.dims = None if dims is None else list(dims)
        if self.dims is not None and not (self.dims and all(isinstance(i, int) for i in self.dims)):
            raise ValueError(f"dims is {dims!r}; expected the numbers of one or more input dimensions, or None.")

    @abstractmethod
    def _profile(self, r2: Tensor) -> Tensor:
        """k / outputscale of squared distances."""

    @abstractmethod
    def _unit(self) -> float:
        """What scaled inputs are multiplied with before their distances go into the tile."""

    @abstractmethod
    def _radii(self, u: np.ndarray, d: int) -> np.ndarray:
        """|omega|^2 at the levels u of its distribution, for d dimensions of unit lengthscale."""

    def _scaled(self, x: Tensor) -> Tensor:
        if self.dims is not None:
            if not all(-x.shape[1] <= i < x.shape[1] for i in self.dims):
                raise ValueError(f"dims is {self.dims} and the inputs have {x.shape[1]} dimensions; expected numbers "
                                 f"in 0..{x.shape[1] - 1}.")  # fmt: skip
            x = x[:, self.dims]
        if self.lengthscale.numel() not in (1, x.shape[1]):
            raise ValueError(f"lengthscale has {self.lengthscale.numel()} entries and the inputs have {x.shape[1]} "
                             "dimensions; expected one entry, or one for each.")  # fmt: skip
        return x / self.lengthscale.to(x)

    def __call__(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        a = self._scaled(x)
        b = a if z is None else self._scaled(z)
        r2 = (a.unsqueeze(1) - b.unsqueeze(0)).square().sum(2) if a.shape[1] <= FEW else _squares(a, b)
        return self.outputscale.to(x) * self._profile(r2)

    def diagonal(self, x: Tensor) -> Tensor:
        return self.outputscale.to(x).expand(len(x))

    def hyperparameters(self) -> dict[str, Tensor]:
        return {"lengthscale": self.lengthscale, "outputscale": self.outputscale}

    def replaced(self, values: dict[str, Tensor]) -> Kernel:
        return type(self)(**{**self.hyperparameters(), **values}, dims=self.dims)  # type: ignore[reportArgumentType]

    def __repr__(self) -> str:
        lengths = ", ".join(f"{v:.4g}" for v in self.lengthscale.reshape(-1).tolist())
        return f"{type(self).__name__}([{lengths}], {float(self.outputscale):.4g})"

    def features(self, count: int, d: int, generator: torch.Generator, like: Tensor) -> Features:
        """[cos(x omega), sin(x omega)] (outputscale / F)^1/2 for F = count / 2 frequencies from the spectral density:
        orthogonal directions, and lengths at random places of F equally probable intervals.

        Sources: Rahimi and Recht 2007; Yu et al. 2016, arXiv:1610.09072 (orthogonal directions).
        """
        active = d if self.dims is None else len(self.dims)
        F = max(1, count // 2)
        omega = self._frequencies(F, active, generator).to(like.device, torch.float64)
        omega = (omega / self.lengthscale.to(omega)).to(like)
        scale = (self.outputscale.to(like) / F).sqrt()
        return partial(_waves, omega, scale, self.dims)

    def _frequencies(self, F: int, d: int, generator: torch.Generator) -> Tensor:
        def draw(kind: object, *shape: int) -> Tensor:
            return kind(*shape, generator=generator, device=generator.device, dtype=torch.float64).cpu()  # type: ignore

        levels = (torch.arange(F, device="cpu") + draw(torch.rand, F)) / F
        levels = levels[torch.randperm(F, generator=generator, device=generator.device).cpu()]
        lengths = torch.from_numpy(np.sqrt(self._radii(levels.clamp(1e-15, 1 - 1e-15).numpy(), d)))
        gaussian = draw(torch.randn, -(-F // d), d, d)
        directions = torch.linalg.qr(gaussian).Q if d > 1 else gaussian.sign()
        return lengths.unsqueeze(1) * directions.reshape(-1, d)[:F]


class RBF(Stationary):
    """outputscale * exp(-r^2 / 2), r the distance in lengthscales; `outputscale` is a variance.

    lengthscale  a number, or a tensor [d] (automatic relevance determination)
    dims         the input dimensions that it looks at; all by default
    """

    def _profile(self, r2: Tensor) -> Tensor:
        return torch.exp(-0.5 * r2)

    def _unit(self) -> float:
        return LOG2E**0.5

    def _radii(self, u: np.ndarray, d: int) -> np.ndarray:
        return stats.chi2.ppf(u, d)

    def points(self, x: Tensor, shift: Tensor) -> list[Tensor]:
        u = self._scaled(x - shift) * self._unit()
        half, one = -0.5 * u.square().sum(1, keepdim=True), torch.ones_like(u[:, :1])
        return [torch.cat([u, half, one], 1), torch.cat([u, one, half], 1)]

    def tile(self, left: Sequence[Tensor], right: Sequence[Tensor], buffers: Buffers | Placed) -> Tensor:
        """2^(u.v - |u|^2 / 2 - |v|^2 / 2 + log2 outputscale): exp2 is several times faster than exp."""
        tile = torch.mm(left[0], right[1].T, out=buffers.take(len(left[0]), len(right[0])))
        scale = float(self.outputscale.log2())
        if scale:
            tile.add_(scale)
        return tile.clamp_(max=scale).exp2_()


class Matern(Stationary):
    """outputscale * p(s) exp(-s), s = (2 nu)^1/2 r: p = 1, 1 + s, 1 + s + s^2 / 3 for nu = 1/2, 3/2, 5/2.

    lengthscale, outputscale, dims   as for `RBF`.  Raises ValueError for another nu.
    """

    def __init__(
        self,
        nu: float = 2.5,
        lengthscale: float | Tensor = 1.0,
        outputscale: float | Tensor = 1.0,
        dims: Sequence[int] | None = None,
    ):
        if nu not in (0.5, 1.5, 2.5):
            raise ValueError(f"nu is {nu!r}; expected 0.5, 1.5 or 2.5.")
        super().__init__(lengthscale, outputscale, dims)
        self.nu = float(nu)

    def replaced(self, values: dict[str, Tensor]) -> Kernel:
        return Matern(self.nu, **{**self.hyperparameters(), **values}, dims=self.dims)

    def __repr__(self) -> str:
        return super().__repr__().replace("Matern(", f"Matern({self.nu:g}, ")

    def _profile(self, r2: Tensor) -> Tensor:
        # At r = 0 the root's derivative is infinite, and that of the kernel with respect to a lengthscale is 0.
        s = math.sqrt(2 * self.nu) * r2.clamp(min=1e-30 if r2.dtype == torch.float64 else 1e-20).sqrt()
        if self.nu == 0.5:
            return torch.exp(-s)
        return (1 + s if self.nu == 1.5 else 1 + s + s.square() / 3) * torch.exp(-s)

    def _unit(self) -> float:
        return math.sqrt(2 * self.nu) * LOG2E

    def _radii(self, u: np.ndarray, d: int) -> np.ndarray:
        return d * stats.f.ppf(u, d, 2 * self.nu)

    def points(self, x: Tensor, shift: Tensor) -> list[Tensor]:
        u = self._scaled(x - shift) * self._unit()
        if self._by_difference(u):
            return [u]
        square, one = u.square().sum(1, keepdim=True), torch.ones_like(u[:, :1])
        return [torch.cat([-2 * u, square, one], 1), torch.cat([u, one, square], 1)]

    def _by_difference(self, u: Tensor) -> bool:
        """exp(-r) has a corner at 0, where the rounding of |u|^2 + |v|^2 - 2 u.v would show as its root."""
        return self.nu == 0.5 and u.shape[1] <= FEW

    def tile(self, left: Sequence[Tensor], right: Sequence[Tensor], buffers: Buffers | Placed) -> Tensor:
        shape = len(left[0]), len(right[0])
        k, q = buffers.take(*shape), buffers.take(*shape)
        if len(left) == 1:
            _differences(left[0], right[0], q, k)
        else:
            torch.mm(left[0], right[1].T, out=q)
        q.clamp_(min=1e-30 if q.dtype == torch.float64 else 1e-20).sqrt_()  # the root of an exact 0 is slow
        torch.sub(float(self.outputscale.log2()), q, out=k).exp2_()
        if self.nu == 1.5:
            k.addcmul_(q, k, value=1 / LOG2E)
        elif self.nu == 2.5:  # 1 + s + s^2 / 3 = 1 + s (1 + s / 3)
            p = buffers.take(*shape)
            torch.mul(q, 1 / (3 * LOG2E), out=p).add_(1).mul_(q)
            k.addcmul_(p, k, value=1 / LOG2E)
            buffers.give(p)
        buffers.give(q)
        return k


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances [N, M] by one product, of differences from the mean."""
    mean = a.detach().mean(0)
    a, b = a - mean, b - mean
    return (a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def _differences(a: Tensor, b: Tensor, out: Tensor, spare: Tensor) -> None:
    """Squared distances into `out`, a dimension at a time."""
    out.zero_()
    for i in range(a.shape[1]):
        torch.sub(a[:, i : i + 1], b[:, i], out=spare)
        out.addcmul_(spare, spare)


def _waves(omega: Tensor, scale: Tensor, dims: list[int] | None, x: Tensor) -> Tensor:
    """[N, F, 2]."""
    angles = (x if dims is None else x[:, dims]) @ omega.T
    return torch.stack([_cos(angles), _sin(angles)], 2).mul_(scale)


def _cos(angles: Tensor) -> Tensor:
    return torch.from_numpy(np.cos(angles.numpy())) if _by_numpy(angles) else angles.cos()


def _sin(angles: Tensor) -> Tensor:
    return torch.from_numpy(np.sin(angles.numpy())) if _by_numpy(angles) else angles.sin()


def _by_numpy(angles: Tensor) -> bool:
    """In float32 NumPy's are several times faster than torch's on one core, in float64 several times slower."""
    return angles.device.type == "cpu" and angles.dtype == torch.float32 and not angles.requires_grad
