"""The quasi-Newton parts of K-BFGS: double damping, and BFGS updates of an inverse with their gate.

Source: Goldfarb, Ren & Bahamou 2020, arXiv:2006.08877 (K-BFGS); Ren, Bahamou & Goldfarb 2021, arXiv:2102.06737.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paraboloid.optim.layer_vectors import LayerVectors

FIRST = 0.2  # mu_1 of the first damping
GATE = 1e-4
LINE = 64  # bytes of a cache line, and of the widest register
LEAST = torch.finfo(torch.float32).tiny  # of s . y: below it the numbers of an update leave the range of float32


def first_weight(sy: float, yHy: float, mu: float = FIRST) -> float:
    """theta of the first damping (Powell's, on the inverse): s becomes theta s + (1 - theta) H y.

    Where s . y <= mu y . H y: (1 - mu) y . H y / (y . H y - s . y), after which s . y = mu y . H y; else 1.
    """
    return 1.0 if sy > mu * yHy or not yHy > 0 else (1 - mu) * yHy / (yHy - sy)


def second_weight(sy: float, ss: float, mu: float) -> float:
    """theta of the second damping (Levenberg-Marquardt's): y becomes theta y + (1 - theta) s.

    Where s . y <= mu s . s: (1 - mu) s . s / (s . s - s . y), after which s . y = mu s . s; else 1.  With mu > 1 that
    theta would leave [0, 1], and is clipped: y becomes s.
    """
    if sy > mu * ss or not ss > 0:
        return 1.0
    return min(1.0, max(0.0, (1 - mu) * ss / (ss - sy) if ss != sy else 0.0))


def is_safe(sy: float, ss: float, size: float) -> bool:
    """The gate of an update: s . y > 0, s . y > 1e-4 s . s size, and all of it finite.

    size: of the mean gradient at the layer's outputs, or of the layer's mean input.
    """
    finite = math.isfinite(sy) and math.isfinite(ss) and math.isfinite(size)
    return finite and sy > LEAST and sy > GATE * ss * size


def update_columns(
    layers: LayerVectors, s: Tensor, Hy: Tensor, sy: list[float], yHy: list[float]
) -> list[tuple[Tensor, Tensor]]:
    """U [p, 2] and V [2, p] of every layer, with which H + U V is H + (rho^2 y . H y + rho) s s^T - rho (s (H y)^T +
    (H y) s^T), rho = 1 / s . y; flat vectors, and s . y (not positive: no update) and y . H y by layer."""
    # both vectors are divided by sqrt(s . y): rho^2 of small steps would leave the range of float32
    root = [n**-0.5 if n > 0 else 0.0 for n in sy]
    scale, c = layers.rows([root, [1 + m / n if n > 0 else 0.0 for n, m in zip(sy, yHy, strict=True)]], s)
    U = torch.stack([s, Hy]).mul_(scale)
    s, v = U
    # s (c s - v)^T - v s^T, as one product of two columns
    V = torch.stack([torch.addcmul(v, c, s, value=-1), s]).neg_()
    return list(zip(map(torch.t, layers.parts(U)), layers.parts(V), strict=True))


class DenseInverse:
    """H of the gradient's side, [p, p]; starts as the identity."""

    def __init__(self, size: int, like: Tensor):
        self.H = torch.eye(size, dtype=like.dtype, device=like.device)

    def times(self, v: Tensor) -> Tensor:
        """H v, for v [p] or [p, k]."""
        return self.H @ v

    @property
    def state(self) -> dict[str, Tensor]:
        return {"H": self.H}

    def load(self, state: dict[str, Tensor]) -> None:
        self.H = state["H"]


class LimitedMemoryInverse:
    """H by its last `memory` pairs (s, y) in compact form: BFGS from gamma I with gamma = 1; never a matrix [p, p]
    where p is more than `memory`.

    H = I + Q (M Q^T - Y^T) - Y Q^T with Q = S R^-T and M = D + Y^T Y, for S, Y [p, k] the pairs, R the upper triangle
    of S^T Y and D its diagonal (Byrd, Nocedal & Schnabel 1994, theorem 2.2).  Pairs are scaled to s . y = 1, which
    changes nothing but the range of the numbers.  Q grows with each pair, by -Q^T y times s, and loses its first column
    with the oldest one: neither S nor R is kept.
    """

    def __init__(self, size: int, memory: int, like: Tensor):
        self.memory = memory
        self._keep(*(like.new_zeros(shape) for shape in ((0, size), (0, size), (0, 0))))

    def _keep(self, Q: Tensor, Y: Tensor, middle: Tensor) -> None:
        """Q^T and the pairs' y as rows [k, p], M [k, k] at the head of twice the room that they need.

        The pairs in use are a window, which moves on by one with each, and nothing is copied until it reaches the end.
        A product's last digit depends on where in a line of memory its operands begin, and a resumed run has its window
        elsewhere than the uninterrupted one: so every row begins a line, and [k, k] is copied before it is multiplied.
        """
        self.first, self.end, room = 0, len(Q), 2 * self.memory
        self._formed: Tensor | None = None
        size = Q.shape[1]
        width = -(-size * Q.element_size() // LINE) * LINE // Q.element_size()
        self._Q, self._Y = Q.new_empty(room, width)[:, :size], Y.new_empty(room, width)[:, :size]
        self._middle = middle.new_empty(room, room)
        k = slice(self.end)
        self._Q[k], self._Y[k], self._middle[k, k] = Q, Y, middle

    def _window(self) -> tuple[Tensor, Tensor, Tensor]:
        k = slice(self.first, self.end)
        return self._Q[k], self._Y[k], self._middle[k, k]

    @property
    def pairs(self) -> int:
        """k, those that are kept."""
        return self.end - self.first

    def times(self, v: Tensor) -> Tensor:
        """H v, for v [p] or [p, m]."""
        if self.pairs == 0:
            return v.clone()
        if self._Q.shape[1] <= self.memory:
            return self._matrix() @ v
        Q, Y, middle = self._window()
        x = v.unsqueeze(1) if v.dim() == 1 else v
        a = Q @ x
        b = torch.addmm(Y @ x, middle.clone(), a, beta=-1)
        return torch.addmm(x, Q.T, b).addmm_(Y.T, a, alpha=-1).view_as(v)

    def _matrix(self) -> Tensor:
        """H of few outputs, [p, p], formed once for all products between two updates."""
        if self._formed is None:
            Q, Y, middle = self._window()
            self._formed = Q.T @ torch.addmm(Y, middle.clone(), Q, beta=-1)
            self._formed.addmm_(Y.T, Q, alpha=-1).diagonal().add_(1)
        return self._formed

    def update(self, s: Tensor, y: Tensor) -> None:
        """One more pair, with s . y = 1; the oldest goes when the memory is full."""
        self._formed = None
        if self.end == len(self._Q):
            self._keep(*(t.clone() for t in self._window()))
        self.first = max(self.first, self.end + 1 - self.memory)
        new = self.end
        Q = self._Q[self.first : new]
        if new > self.first:
            Q.addr_(Q @ y, s, alpha=-1)
        self._Q[new], self._Y[new] = s, y
        self.end += 1
        _, Y, middle = self._window()
        middle[-1] = middle[:, -1] = Y @ y
        middle[-1, -1] += 1

    @property
    def state(self) -> dict[str, Tensor]:
        """Q and the pairs' y as columns, [p, k]."""
        Q, Y, middle = (t.clone() for t in self._window())
        return {"Q": Q.T, "Y": Y.T, "middle": middle}

    def load(self, state: dict[str, Tensor]) -> None:
        Q = state["Q"].T if "Q" in state else state["inverse"] @ state["S"].T  # of an earlier version
        self._keep(Q, state["Y"].T, state["middle"])
