"""Telling of samples that do not solve their systems as they should: never in silence."""

from __future__ import annotations

import warnings

import torch

from paraboloid.linalg.operand import LinAlgError
from paraboloid.posteriors.sampled.solvers import MOST_ITERATIONS
from paraboloid.posteriors.sampled.state import State
from paraboloid.posteriors.sampled.tangent_blocks import PASSES

ROUGH, EXACT = 0.1, 1e-2  # residuals above which descent, and a Cholesky factor, have not solved a system


def tell(state: State, solver: str, tol: float, epochs: int, dtype: torch.dtype) -> None:
    """Warn of samples, or of a linearised optimum, that fall short; LinAlgError for those of a Cholesky factor that are
    no solutions at all.

    solver  that of the run; "passes" for conjugate gradients that made no more than `epochs` of them
    """
    last = state.history[-1]
    if solver == "dual" and not last.residual < 1:
        raise LinAlgError(
            f"the relative residual of a sample by a Cholesky factor in {dtype} is {last.residual:.2g}; expected less "
            "than 1, that of no solution at all. Take a larger prior_precision, or the model in float64."
        )
    larger = "Take a larger prior_precision" + ", or the model in float64" * (dtype != torch.float64)
    cause, instead = {
        "sgd": (f"{epochs} epochs of descent", "Take more epochs, or solver='cg'"),
        "passes": (f"{epochs} passes of conjugate gradients", "Take more epochs, or solver='cg' for all that it takes"),
        "cg": (f"{MOST_ITERATIONS} iterations of conjugate gradients in {dtype}", larger),
        "dual": (f"a Cholesky factor in {dtype}", larger),
        "block": (f"{PASSES} passes of block solves", f"{larger}, or solver='cg'"),
    }[solver]
    least = {"cg": 0.0, "dual": EXACT, "block": 0.0}.get(solver, ROUGH)
    for found, most, what, off in (
        (last.residual, max(2 * tol, least), "residual of a sample", "its variances and the effective dimension are"),
        (last.optimum, ROUGH, "gradient at the linearised optimum", "the prior's precision is"),
    ):
        if found is not None and not found <= most:
            warnings.warn(
                f"the relative {what} is {found:.2g}; expected at most {most:.2g}: {off} off. {cause} did not do. "
                f"{instead}.", RuntimeWarning, stacklevel=5,
            )  # fmt: skip
