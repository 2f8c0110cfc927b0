"""The quasi-Newton parts of K-BFGS: double damping, and BFGS updates of an inverse with their gate.

Source: Goldfarb, Ren & Bahamou 2020, arXiv:2006.08877 (K-BFGS); Ren, Bahamou & Goldfarb 2021, arXiv:2102.06737.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST = 0.2  # mu_1 of the first damping
GATE = 1e-4


def damped_step(s: Tensor, y: Tensor, Hy: Tensor, mu: float = FIRST) -> Tensor:
    """First damping (Powell's, on the inverse): s, moved towards H y until s . y >= mu y . H y.

    Where s . y <= mu y . H y: theta s + (1 - theta) H y with theta = (1 - mu) y . H y / (y . H y - s . y), after which
    s . y = mu y . H y.
    """
    sy, yHy = s @ y, y @ Hy
    theta = ((1 - mu) * yHy / (yHy - sy)).where((sy <= mu * yHy) & (yHy > 0), 1.0)
    return torch.lerp(Hy, s, theta)


def damped_change(s: Tensor, y: Tensor, mu: float) -> Tensor:
    """Second damping (Levenberg-Marquardt's): y, moved towards s until s . y >= mu s . s.

    Where s . y <= mu s . s: theta y + (1 - theta) s with theta = (1 - mu) s . s / (s . s - s . y), after which
    s . y = mu s . s.  With mu > 1 that theta would leave [0, 1], and is clipped: y becomes s.
    """
    sy, ss = s @ y, s @ s
    theta = ((1 - mu) * ss / (ss - sy)).clamp(0, 1).nan_to_num(0.0)
    return torch.lerp(s, y, theta.where((sy <= mu * ss) & (ss > 0), 1.0))


def is_safe(s: Tensor, y: Tensor, size: Tensor) -> bool:
    """The gate of an update: s . y > 0, s . y > 1e-4 s . s size, and all of it finite.

    size: the norm of the mean gradient at the layer's outputs, or of the layer's mean input.
    """
    sy, ss = s @ y, s @ s
    return bool((sy > 0) & (sy > GATE * ss * size) & torch.isfinite(sy) & torch.isfinite(1 / sy) & torch.isfinite(size))


def update_inverse(H: Tensor, s: Tensor, y: Tensor, Hy: Tensor | None = None) -> None:
    """BFGS, in place: H + (rho^2 y . H y + rho) s s^T - rho (s (H y)^T + (H y) s^T), rho = 1 / s . y."""
    Hy = H @ y if Hy is None else Hy
    rho = 1 / (s @ y)
    # s (c s - rho Hy)^T + (-rho Hy) s^T as one product of two columns
    left = torch.stack([s, -rho * Hy], 1)
    right = torch.stack([(rho.square() * (y @ Hy) + rho) * s - rho * Hy, s])
    H.addmm_(left, right)


class DenseInverse:
    """H of the gradient's side, [p, p]; starts as the identity."""

    def __init__(self, size: int, like: Tensor):
        self.H = torch.eye(size, dtype=like.dtype, device=like.device)

    def times(self, v: Tensor) -> Tensor:
        """H v, for v [p] or [p, k]."""
        return self.H @ v

    def update(self, s: Tensor, y: Tensor, Hy: Tensor | None = None) -> None:
        """BFGS with the pair; Hy = H y if it is known."""
        update_inverse(self.H, s, y, Hy)

    @property
    def state(self) -> dict[str, Tensor]:
        return {"H": self.H}

    def load(self, state: dict[str, Tensor]) -> None:
        self.H = state["H"]


class LimitedMemoryInverse:
    """H by its last `memory` pairs (s, y) in compact form: BFGS from gamma I with gamma = 1; never a matrix [p, p].

    H = I + S (R^-T (D + Y^T Y) R^-1 S^T - R^-T Y^T) - Y R^-1 S^T with S, Y [p, k] the pairs, R the upper triangle of
    S^T Y and D its diagonal (Byrd, Nocedal & Schnabel 1994, theorem 2.2).
    """

    def __init__(self, size: int, memory: int, like: Tensor):
        self.memory = memory
        self.S, self.Y = like.new_zeros(size, 0), like.new_zeros(size, 0)
        self._prepare()

    def _prepare(self) -> None:
        SY = self.S.T @ self.Y
        self.R, self.middle = SY.triu(), SY.diagonal().diag_embed() + self.Y.T @ self.Y

    def times(self, v: Tensor) -> Tensor:
        """H v, for v [p] or [p, k]."""
        if self.S.shape[1] == 0:
            return v.clone()
        V = v if v.dim() == 2 else v.unsqueeze(1)
        a = torch.linalg.solve_triangular(self.R, self.S.T @ V, upper=True)  # R^-1 S^T v
        b = torch.linalg.solve_triangular(self.R.T, self.middle @ a - self.Y.T @ V, upper=False)
        return (V + self.S @ b - self.Y @ a).view(v.shape)

    def update(self, s: Tensor, y: Tensor, Hy: Tensor | None = None) -> None:
        """One more pair; the oldest goes when the memory is full."""
        keep = slice(max(0, self.S.shape[1] + 1 - self.memory), None)
        self.S = torch.cat([self.S[:, keep], s.unsqueeze(1)], 1)
        self.Y = torch.cat([self.Y[:, keep], y.unsqueeze(1)], 1)
        self._prepare()

    @property
    def state(self) -> dict[str, Tensor]:
        return {"S": self.S, "Y": self.Y}

    def load(self, state: dict[str, Tensor]) -> None:
        self.S, self.Y = state["S"], state["Y"]
        self._prepare()
