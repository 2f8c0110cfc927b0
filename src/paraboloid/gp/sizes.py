"""What conditioning will take in memory: said before it is tried."""

from __future__ import annotations

from torch import Tensor

from paraboloid.passes.memory import GIB, available

COLUMNS = 6  # of N numbers for each right-hand side: values, noise, their sum, the solution, two of a solver
SHARED, ROWS = 16, 2048  # functions that share random features, and inputs whose features are formed at a time


def check_fits(x: Tensor, functions: int, outputs: int, features: int, rank: int, inducing: int | None) -> None:
    """ValueError where that much more than is free would be taken by `functions` draws and `outputs` targets at x
    [N, d], functions of so many random `features`, a preconditioner of `rank` columns, or `inducing` inputs."""
    N, d = x.shape
    numbers = {
        f"{functions + outputs} right-hand sides of {N} inputs": COLUMNS * N * (functions + outputs),
        f"{features} random features of {functions} functions": bool(functions)
        * features * (ROWS + functions + d * -(-functions // SHARED)),
        f"a preconditioner of {rank} columns": 2 * N * min(rank, N),
        f"{inducing} inducing inputs": 0 if inducing is None else 2 * inducing * (4 * inducing + 4 * ROWS),
    }  # fmt: skip
    free = available(x.device)
    what = max(numbers, key=lambda name: numbers[name])
    size = sum(numbers.values()) * x.dtype.itemsize
    if free is not None and size > free:
        raise ValueError(f"conditioning would take {size / GIB:.1f} GiB, most of it for {what}; expected at most the "
                         f"{free / GIB:.1f} GiB that are free: take fewer of them.")  # fmt: skip
