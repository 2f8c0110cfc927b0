"""How much of the study of Gaussian processes is run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """points      of the one-dimensional problem on which solvers converge
    passes      over its kernel matrix, at each of which the solvers are looked at
    sets        regression problems: see `regression.SETS`; `data` is the folder of UCI sets
    splits      of each
    rounds      of Thompson sampling, `batch` points each, on a function of `dimensions` inputs
    """

    points: int = 800
    passes: tuple[int, ...] = (1, 2, 5, 10, 20, 40)
    sets: tuple[str, ...] = ("diabetes", "friedman", "waves")
    splits: int = 3
    rounds: int = 8
    batch: int = 30
    dimensions: int = 4
    data: str | None = None

    @classmethod
    def full(cls) -> Plan:
        """More points, splits and rounds."""
        return cls(points=3000, passes=(1, 2, 5, 10, 20, 40, 100), splits=10, rounds=20, batch=100)

    @classmethod
    def tiny(cls) -> Plan:
        """Seconds, for tests."""
        return cls(points=200, passes=(1, 5, 20), sets=("waves",), splits=1, rounds=2, batch=5, dimensions=2)
