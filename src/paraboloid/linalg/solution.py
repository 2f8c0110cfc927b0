"""What an iterative solver of a linear system gives back."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Solution:
    """x           [D] or [D, K]: the approximate solution of A x = b
    residual    the largest ||b - A x|| / ||b|| over the columns, measured with A; above 200,000 rows on 10,000 of them
    iterations  how many were made
    passes      how often the entries of A were gone through, measuring included
    step        the step size it ended with; None for methods without one
    history     (passes, relative residual) on the way; stochastic solvers estimate them from the rows that they take
    notes       sentences: what was changed on the way
    """

    x: Tensor
    residual: float
    iterations: int
    passes: float
    step: float | None = None
    history: list[tuple[float, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
