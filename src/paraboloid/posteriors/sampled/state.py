"""Where a run of sampling is: what is saved of it, and what is told."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from paraboloid.posteriors.sampled.solvers import Position


@dataclass(frozen=True)
class EMStep:
    """What is known after the samples under one prior were found.

    precision            one for each group of weights (in the g-prior's units, where there is one)
    effective_dimension  gamma of each group, the mean over the samples
    residual             ||b - A w|| / ||b|| of the worst sample
    optimum              the norm of the gradient at the w* that gave this precision, over that of its larger part, the
                         data's or the prior's; None at first
    noise_variance       where EM finds it, else None
    """

    step: int
    precision: tuple[float, ...]
    effective_dimension: tuple[float, ...]
    residual: float
    optimum: float | None = None
    noise_variance: float | None = None


@dataclass(frozen=True)
class Progress:
    """Where a run is: what a callback sees.

    doing                "samples" (under `precision`), "optimum" (of the linearised model), "precision" (was updated)
    em_step              updates of the precision so far
    epoch, epochs        of the descent that is going on; 0, 0 where there is none
    effective_dimension  the last one that is known, of all groups together; None at first
    residual             of the last samples that were finished; None at first
    """

    doing: str
    em_step: int
    epoch: int
    epochs: int
    precision: tuple[float, ...]
    effective_dimension: float | None
    residual: float | None


@dataclass(eq=False)
class State:
    """All that a run consists of: what is saved, and gone on from."""

    precision: list[float]  # of each group
    diagonal: Tensor | None = None  # [D], of strength G
    b: Tensor | None = None  # [K, D], right-hand sides under `precision`
    w: Tensor | None = None  # [K, D], the samples in units of the g-prior
    delta: Tensor | None = None  # [D], the linearised model's optimum less the weights, in the same units
    gammas: list[float] = field(default_factory=list)
    slope: float | None = None  # what is left of the gradient at w*
    steps: int = 0  # updates of the precision that were made
    sampled: bool = False  # whether `w` and `gammas` are those of `precision`
    settled: bool = False
    noise: float | None = None  # the noise variance, where EM finds it
    chosen: str | None = None  # "sgd" or "cg", where that was probed
    sketched: list[float] | None = None  # the precision that the curvature was sketched at; None: it was not
    position: Position | None = None  # of the descent that is going on
    history: list[EMStep] = field(default_factory=list)
    saves: int = 0
