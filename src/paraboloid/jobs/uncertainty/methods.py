"""The posteriors to choose from, by the names of the command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from paraboloid.data.batches import Data
from paraboloid.posteriors import laplace, sampled_laplace
from paraboloid.problems import Problem

MOST_OUTPUTS = 100  # of a sample, that the curvature takes exactly; above, sampled columns
SAMPLED_COLUMNS = 10

Method = Callable[[Problem, Data, int, int], Any]  # problem, data, outputs of a sample, seed -> a tuned posterior


def _laplace(structure: str, weights: str = "all") -> Method:
    def fit(problem: Problem, data: Data, outputs: int, seed: int) -> Any:
        options: dict[str, Any] = {}
        if outputs > MOST_OUTPUTS:
            options = {"fisher": "mc", "samples": SAMPLED_COLUMNS}
        found = laplace(problem.model, problem.loss_fn, data, structure, weights, seed=seed, **options)
        return found.tune_prior("evidence" if outputs > MOST_OUTPUTS else None)

    return fit


def _sampled(problem: Problem, data: Data, outputs: int, seed: int) -> Any:
    noise = None if isinstance(problem.loss_fn, nn.MSELoss) else 1.0
    return sampled_laplace(problem.model, problem.loss_fn, data, seed=seed, noise_variance=noise)


METHODS: dict[str, Method] = {
    "kron": _laplace("kron"),
    "last-layer": _laplace("kron", "last_layer"),
    "functional": _laplace("functional"),
    "sampled": _sampled,
}
TITLES = {
    "kron": "Kronecker-factored Laplace posterior over all weights",
    "last-layer": "Kronecker-factored Laplace posterior over the last layer",
    "functional": "Laplace posterior with the exact curvature, in its dual form",
    "sampled": "Posterior samples of the linearised network",
}
