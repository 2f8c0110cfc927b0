"""How much of the study is run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """The default takes minutes on two cores; `Plan.full()` a few hours; `Plan.tiny()` is for tests.

    Weight decay is part of every loss here, 1e-3, so that the curvature is positive definite.
    """

    weight_decay: float = 1e-3
    sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    repeats: int = 10
    table_repeats: int = 60  # of the table of digits-tanh, whose quadratics cost next to nothing
    problems: tuple[str, ...] = ("digits-tanh", "digits-mlp", "digits-cnn")
    moments: tuple[float, ...] = (0.0, 0.1, 1.0)  # parts of the training after which the bias is measured
    k: int = 5

    step_problems: tuple[str, ...] = ("digits-tanh", "digits-mlp", "digits-cnn")
    step_moments: tuple[float, ...] = (0.1, 1.0)
    step_sizes: tuple[int, ...] = (32, 128, 512)
    step_repeats: int = 10
    iterations: tuple[int, ...] = (1, 2, 3, 5, 7, 10)  # after which the loss on all data is evaluated
    damping: float = 1e-2

    factor_problems: tuple[str, ...] = ("digits-mlp", "digits-cnn")
    factor_directions: int = 10
    factor_repeats: int = 20

    posterior_problems: tuple[str, ...] = ("digits-tanh", "digits-mlp")
    posterior_sizes: tuple[int, ...] = (32, 64, 128)
    posterior_repeats: int = 10
    priors: tuple[float, ...] = (0.1, 1.0, 10.0)
    draws: int = 200  # of outputs, for predictions

    widths: tuple[float, ...] = (0.0625, 0.125, 0.25)
    depths: tuple[int, ...] = (3, 5)
    grid_samples: int = 1024
    grid_epochs: int = 40
    grid_loss: float = 1.2  # training loss at which every network of the grid is measured
    grid_sizes: tuple[int, ...] = (32, 128)
    grid_repeats: int = 8
    grid_k: int = 1  # one direction takes half the products of several

    @classmethod
    def full(cls) -> Plan:
        """More repeats, moments and problems, and networks up to the whole 3c3d."""
        return cls(
            repeats=60, table_repeats=240, moments=(0.0, 0.01, 0.1, 0.3, 1.0), k=10, step_moments=(0.01, 0.1, 1.0),
            step_sizes=(32, 64, 128, 256, 512), step_repeats=60, iterations=tuple(range(1, 21)),
            factor_problems=("digits-tanh", "digits-mlp", "digits-cnn"), factor_repeats=60,
            posterior_problems=("digits-tanh", "digits-mlp", "digits-cnn"), posterior_repeats=40, draws=1000,
            widths=(0.0625, 0.125, 0.25, 0.5, 1.0), depths=(3, 5), grid_samples=4096, grid_repeats=12,
            grid_sizes=(32, 128, 512),
        )  # fmt: skip

    @classmethod
    def tiny(cls) -> Plan:
        """Seconds: the smallest problem, few repeats."""
        return cls(
            sizes=(32, 256), repeats=3, table_repeats=15, problems=("digits-tanh",), moments=(0.0, 1.0), k=2,
            step_problems=("digits-tanh",), step_moments=(1.0,), step_sizes=(32,), step_repeats=3, iterations=(1, 5),
            factor_problems=("digits-tanh",), factor_directions=3, factor_repeats=3,
            posterior_problems=("digits-tanh",),
            posterior_sizes=(32,), posterior_repeats=2, priors=(0.1,), draws=50, widths=(0.03,), depths=(3,),
            grid_samples=64, grid_epochs=1, grid_sizes=(16,), grid_repeats=2, grid_k=1,
        )  # fmt: skip
