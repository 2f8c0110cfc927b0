"""Draw the figures of the page on Gaussian processes: one for each solver, on one axis of inputs.

python docs/figures/gp.py
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

import paraboloid as pb

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "gallery"))
from make import STYLE, save  # noqa: E402 - of the gallery

STEPS = {"cholesky": (None,), "cg": (2, 6), "block": (10, 60), "sdd": (30, 1000), "sgd": (10, 100)}
NOISE, KERNEL = 0.05, pb.gp.Matern(1.5, 0.5)


def picture(solver: str) -> Figure:
    """Data on both sides of a hole, the exact mean, this solver's after a few and more steps, and samples."""
    g = torch.Generator().manual_seed(0)
    x = (0.7 + 2.3 * torch.rand(300, generator=g)) * (1 - 2 * torch.randint(2, (300,), generator=g))
    y = torch.sin(2 * x) + torch.cos(5 * x) + NOISE**0.5 * torch.randn(300, generator=g)
    line = torch.linspace(-5, 5, 400)
    exact = pb.gp.condition(KERNEL, x, y, NOISE, "cholesky", 0).mean(line)
    figure = Figure(figsize=(7.5, 2.7), layout="constrained")
    for i, steps in enumerate(STEPS[solver]):
        ax = figure.add_subplot(1, len(STEPS[solver]), i + 1)
        options = {"rank": 10} if solver == "cg" else {"batch_size": 30} if solver != "cholesky" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gp = pb.gp.condition(KERNEL, x.double(), y.double(), NOISE, solver, 6, steps=steps, **options)
        ax.plot(x, y, ".", color="0.75", markersize=3)
        ax.plot(line, gp.sample(line).T, color="#d55e00", linewidth=0.6, alpha=0.6)
        ax.plot(line, exact, color="0.35", label="exact mean")
        ax.plot(line, gp.mean(line), color="#0072b2", label=solver)
        ax.set(title="exact" if steps is None else f"after {steps} steps", ylim=(-3.5, 3.5))
        if i == 0:
            ax.legend(loc="lower right", fontsize=7)
    return figure


def main() -> None:
    torch.set_num_threads(1)
    with rc_context(STYLE):
        for solver in STEPS:
            save(picture(solver), HERE / f"gp_{solver}.svg")


if __name__ == "__main__":
    main()
