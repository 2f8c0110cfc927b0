"""Local quadratic models of deep-learning losses from mini-batches: statistics, curvature, debiasing."""

from paraboloid import linalg, logging, losses, noise, operators, quantities
from paraboloid.bias import Bias, bias
from paraboloid.kron import Kron
from paraboloid.losses import Loss
from paraboloid.operators import EKFAC, GGN, KFAC, KFLR, PCH, DiagonalGGN, EmpiricalFisher, Fisher, Hessian, LowRank
from paraboloid.problems import Problem
from paraboloid.quadratic import Quadratic, quadratic
from paraboloid.statistics import Statistics, record, statistics

__version__ = "0.1.0.dev0"
__all__ = [
    "EKFAC",
    "GGN",
    "KFAC",
    "KFLR",
    "PCH",
    "Bias",
    "DiagonalGGN",
    "EmpiricalFisher",
    "Fisher",
    "Hessian",
    "Kron",
    "Loss",
    "LowRank",
    "Problem",
    "Quadratic",
    "Statistics",
    "bias",
    "linalg",
    "logging",
    "losses",
    "noise",
    "operators",
    "quadratic",
    "quantities",
    "record",
    "statistics",
]
