"""How much of the gradient-variance study is run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """widths      of the random features; their number over that of the samples is the over-parametrisation
    samples     of the random-feature data
    duplicated  shares of it that are copies
    steps       of its training, with batches of 10
    points      at which the variance is measured, over a training
    draws       of each estimator at each point
    problems    image problems; `data` is the folder of those on MNIST, CIFAR or ImageNet
    variants    of each: see `variants.VARIANTS`
    epochs      of their training
    batch_size  of the estimators on them, and the number of clusters
    seeds       of independent runs of the random features
    """

    widths: tuple[int, ...] = (100, 500, 2000)
    samples: int = 1000
    duplicated: tuple[float, ...] = (0.0, 0.1, 0.5, 0.9)
    steps: int = 3000
    points: int = 6
    draws: int = 25
    problems: tuple[str, ...] = ("digits-mlp", "digits-cnn")
    variants: tuple[str, ...] = ("plain", "duplicates", "corrupted labels", "smoothed labels", "learning-rate drop")
    epochs: int = 30
    batch_size: int = 10
    seeds: int = 1
    data: str | None = None

    @classmethod
    def full(cls) -> Plan:
        """The paper's grid of random features, longer trainings and three seeds."""
        return cls(
            widths=(50, 100, 200, 500, 1000, 2000, 5000), steps=5000, points=10, draws=40, epochs=100, seeds=3
        )  # fmt: skip

    @classmethod
    def tiny(cls) -> Plan:
        """Seconds, for tests."""
        return cls(widths=(200,), samples=300, duplicated=(0.0, 0.9), steps=300, points=4, draws=10,
                   problems=("digits-mlp",), variants=("plain", "learning-rate drop"), epochs=4)  # fmt: skip
