"""Local quadratic models of deep-learning losses from mini-batches: statistics, curvature, debiasing."""

from paraboloid import gp, linalg, logging, losses, noise, operators, optim, posteriors, quantities, testing, tomography
from paraboloid.linalg.kronecker import Kron
from paraboloid.losses import Loss
from paraboloid.operators import EKFAC, GGN, KFAC, KFLR, PCH, DiagonalGGN, EmpiricalFisher, Fisher, Hessian, LowRank
from paraboloid.passes.memory import free_memory
from paraboloid.posteriors import Posterior, SampledPosterior, laplace, load_posterior, sampled_laplace
from paraboloid.problems import Problem
from paraboloid.quadratics.bias_prediction import predicted_bias
from paraboloid.quadratics.bias_result import Bias
from paraboloid.quadratics.cross_fitting import CrossFit, cross_fit
from paraboloid.quadratics.local_model import Quadratic, quadratic
from paraboloid.quadratics.measure_bias import bias
from paraboloid.quadratics.shrinkage import shrunk_curvature
from paraboloid.quantities.door import statistics
from paraboloid.quantities.recording import record
from paraboloid.quantities.result import Statistics

__version__ = "0.1.0.dev0"
__all__ = [
    "EKFAC", "GGN", "KFAC", "KFLR", "PCH", "Bias", "CrossFit", "DiagonalGGN", "EmpiricalFisher", "Fisher", "Hessian",
    "Kron", "Loss", "LowRank", "Posterior", "Problem", "Quadratic", "SampledPosterior", "Statistics", "bias",
    "cross_fit", "free_memory", "gp", "laplace", "linalg", "load_posterior", "logging", "losses", "noise", "operators",
    "optim", "posteriors", "predicted_bias", "quadratic", "quantities", "record", "sampled_laplace",
    "shrunk_curvature", "statistics", "testing", "tomography",
]  # fmt: skip
