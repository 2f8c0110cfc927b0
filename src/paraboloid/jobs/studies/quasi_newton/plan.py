"""How much of the quasi-Newton study is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from paraboloid.jobs.studies.quasi_newton.methods import METHODS


@dataclass(frozen=True)
class Plan:
    """problems  names of autoencoders, each with options of its factory, the batch size and the number of epochs
    methods   names in `methods.METHODS`
    settings  of each method's grid: the same number for all of them, see `methods`
    seeds     of the winners: initial parameters and batches
    small     parameters up to which the Gauss-Newton steps are taken too: one costs as much as dozens of others
    points    at which the losses are measured, over a training
    keep      file of finished trainings, which are not run again
    """

    problems: tuple[tuple[str, dict[str, Any], int, int], ...] = (
        ("digits-autoencoder", {}, 100, 25), ("curves-autoencoder", {"samples": 1000, "width": 0.5}, 100, 12),
    )  # fmt: skip
    methods: tuple[str, ...] = tuple(METHODS)
    settings: int = 4
    seeds: int = 5
    small: int = 50_000
    points: int = 10
    keep: str | None = None

    @classmethod
    def full(cls) -> Plan:
        """The paper's FACES and CURVES with its batches of 1000 and their own sizes, the whole grids, five seeds."""
        return cls(
            problems=(
                ("digits-autoencoder", {}, 100, 25), ("curves-autoencoder", {}, 1000, 50),
                ("faces-autoencoder", {}, 1000, 50),
            ), settings=9, seeds=5, small=10**8, points=30,
        )  # fmt: skip

    @classmethod
    def tiny(cls) -> Plan:
        """Seconds, for tests."""
        return cls(problems=(("digits-autoencoder", {}, 100, 4),), methods=("SGD-m", "Adam", "K-BFGS", "KFAC"),
                   settings=2, seeds=2, points=4)  # fmt: skip
