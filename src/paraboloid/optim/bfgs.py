"""The quasi-Newton parts of K-BFGS: double damping, and BFGS updates of an inverse with their gate.

Source: Goldfarb, Ren & Bahamou 2020, arXiv:2006.08877 (K-BFGS); Ren, Bahamou & Goldfarb 2021, arXiv:2102.06737.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FIRST = 0.2  # mu_1 of the first damping
GATE = 1e-4
LEAST = torch.finfo(torch.float32).tiny  # of s . y: below it the numbers of an update leave the range of float32


def damped_step(s: Tensor, y: Tensor, Hy: Tensor, mu: float = FIRST) -> Tensor:
    """First damping (Powell's, on the inverse): s, moved towards H y until s . y >= mu y . H y.

    Where s . y <= mu y . H y: theta s + (1 - theta) H y with theta = (1 - mu) y . H y / (y . H y - s . y), after which
    s . y = mu y . H y.
    """
    sy, yHy = _numbers(s @ y, y @ Hy)
    return s if sy > mu * yHy or not yHy > 0 else torch.lerp(Hy, s, (1 - mu) * yHy / (yHy - sy))


def damped_change(s: Tensor, y: Tensor, mu: float) -> Tensor:
    """Second damping (Levenberg-Marquardt's): y, moved towards s until s . y >= mu s . s.

    Where s . y <= mu s . s: theta y + (1 - theta) s with theta = (1 - mu) s . s / (s . s - s . y), after which
    s . y = mu s . s.  With mu > 1 that theta would leave [0, 1], and is clipped: y becomes s.
    """
    sy, ss = _numbers(s @ y, s @ s)
    if sy > mu * ss or not ss > 0:
        return y
    theta = (1 - mu) * ss / (ss - sy) if ss != sy else 0.0
    return torch.lerp(s, y, min(1.0, max(0.0, theta)))


def is_safe(s: Tensor, y: Tensor, mean: Tensor) -> bool:
    """The gate of an update: s . y > 0, s . y > 1e-4 s . s ||mean||, and all of it finite.

    mean: the mean gradient at the layer's outputs, or the layer's mean input.
    """
    sy, ss, yy, squares = _numbers(s @ y, s @ s, y @ y, mean @ mean)
    finite = math.isfinite(sy) and math.isfinite(ss) and math.isfinite(yy) and math.isfinite(squares)
    return finite and sy > LEAST and sy > GATE * ss * squares**0.5


def _numbers(*scalars: Tensor) -> list[float]:
    """As Python floats, with one wait for the device."""
    return torch.stack(scalars).tolist()


def update_inverse(H: Tensor, s: Tensor, y: Tensor, Hy: Tensor | None = None) -> None:
    """BFGS, in place: H + (rho^2 y . H y + rho) s s^T - rho (s (H y)^T + (H y) s^T), rho = 1 / s . y."""
    Hy = H @ y if Hy is None else Hy
    sy = s @ y
    root = sy.sqrt()  # both vectors are scaled by it: rho^2 of small steps would leave the range of float32
    s, v = s / root, Hy / root
    # s (c s - v)^T - v s^T with c = 1 + y . H y / s . y, as one product of two columns
    H.addmm_(torch.stack([s, -v], 1), torch.stack([torch.lerp(-v, s - v, 1 + (y @ Hy) / sy), s]))


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
    S^T Y and D its diagonal (Byrd, Nocedal & Schnabel 1994, theorem 2.2).  Pairs are scaled to s . y = 1, which changes
    nothing but the range of the numbers.
    """

    def __init__(self, size: int, memory: int, like: Tensor):
        self.memory = memory
        self.S, self.Y = like.new_zeros(size, 0), like.new_zeros(size, 0)
        self.inverse, self.middle = like.new_zeros(0, 0), like.new_zeros(0, 0)  # R^-1, and D + Y^T Y

    def times(self, v: Tensor) -> Tensor:
        """H v, for v [p] or [p, k]."""
        if self.S.shape[1] == 0:
            return v.clone()
        a = self.inverse @ (self.S.T @ v)
        b = self.inverse.T @ (self.middle @ a - self.Y.T @ v)
        return v + self.S @ b - self.Y @ a

    def update(self, s: Tensor, y: Tensor, Hy: Tensor | None = None) -> None:
        """One more pair; the oldest goes when the memory is full.

        R^-1 grows by a column, -R^-1 S^T y / s . y above 1 / s . y; without the oldest pair it is its own lower part.
        """
        first = max(0, self.S.shape[1] + 1 - self.memory)
        root = (s @ y).sqrt()
        s, y = s / root, y / root
        sy, k = s @ y, self.S.shape[1] - first
        S, Y = self.S[:, first:], self.Y[:, first:]
        inverse, middle = s.new_zeros(k + 1, k + 1), s.new_empty(k + 1, k + 1)
        inverse[:k, :k] = self.inverse[first:, first:]
        inverse[:k, k] = self.inverse[first:, first:] @ (S.T @ y) / -sy
        inverse[k, k] = 1 / sy
        middle[:k, :k] = self.middle[first:, first:]
        middle[k, :k] = middle[:k, k] = Y.T @ y
        middle[k, k] = y @ y + sy
        self.S, self.Y = torch.cat([S, s.unsqueeze(1)], 1), torch.cat([Y, y.unsqueeze(1)], 1)
        self.inverse, self.middle = inverse, middle

    @property
    def state(self) -> dict[str, Tensor]:
        return {"S": self.S, "Y": self.Y, "inverse": self.inverse, "middle": self.middle}

    def load(self, state: dict[str, Tensor]) -> None:
        self.S, self.Y, self.inverse, self.middle = (state[key] for key in ("S", "Y", "inverse", "middle"))
