"""Gaussian posteriors over weights; imports from `operators` and below.

A posterior is the curvature of the data's negative log-likelihood, an operator, plus a diagonal prior: a `Precision`.
What is done with one depends on how the curvature is kept, a file of `structures` for each: `dense`, `eigenbasis` (a
diagonal, KFAC, EKFAC), `rows` (low rank and functional), all with the methods of `Precision`: `log_det`, `apply`,
`variances`, `deviations`, `covariance`.
"""

from typing import Any

from paraboloid.posteriors.candidates import Candidates
from paraboloid.posteriors.fit_laplace import laplace
from paraboloid.posteriors.fit_sampled import sampled_laplace
from paraboloid.posteriors.laplace_torch import Laplace
from paraboloid.posteriors.online import train_by_evidence
from paraboloid.posteriors.posterior import Posterior, load_posterior
from paraboloid.posteriors.prediction.predictive import Prediction
from paraboloid.posteriors.sampled.sampled_posterior import SampledPosterior
from paraboloid.posteriors.subnetworks import largest_magnitude, largest_variance

__all__ = [
    "Candidates", "Laplace", "Posterior", "Prediction", "SampledPosterior", "laplace", "largest_magnitude",
    "largest_variance", "load_posterior", "sampled_laplace", "train_by_evidence",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("LaplaceClassifier", "LaplaceRegressor"):  # scikit-learn takes a second to import
        from paraboloid.posteriors import sklearn

        return getattr(sklearn, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
