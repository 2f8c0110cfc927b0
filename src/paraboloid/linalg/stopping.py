"""When conjugate gradients are done: by the residual, or by how little the quadratic still moves."""

from __future__ import annotations

from torch import Tensor


class Stop:
    """||r|| <= tol ||b||, column by column; with `progress`, also Martens' rule on the values of the quadratic."""

    def __init__(self, tol: float, progress: float | None = None):
        self.tol, self.progress = tol, progress
        self.values: list[Tensor] = []  # phi(x_i) [K] of every iteration

    def start(self, value: Tensor, r: Tensor, norms: Tensor) -> Tensor:
        """Which columns are done before the first iteration, [K]."""
        self.values, self.target = [value], self.tol * norms
        return r.norm(dim=0) <= self.target

    def after(self, iteration: int, value: Tensor, r: Tensor) -> Tensor:
        """Which columns are done after so many iterations, [K]."""
        done = r.norm(dim=0) <= self.target
        if self.progress is None:
            return done
        self.values.append(value)
        k = max(10, iteration // 10)
        if iteration <= k:
            return done
        return done | (value < 0) & (value - self.values[iteration - k] > k * self.progress * value)


def stopping_rule(stopping: str, tol: float, progress: float) -> Stop:
    """The rule of that name; raises ValueError for an unknown one."""
    if stopping not in ("residual", "martens"):
        raise ValueError(f"stopping is {stopping!r}; expected 'residual' or 'martens'.")
    if not progress > 0:
        raise ValueError(f"progress is {progress}; expected a positive number.")
    return Stop(tol, progress if stopping == "martens" else None)


__all__ = ["Stop", "stopping_rule"]
