"""Local quadratic models of deep-learning losses from mini-batches: statistics, curvature, debiasing."""

from paraboloid import linalg, losses, quantities
from paraboloid.losses import Loss
from paraboloid.operators import GGN, Hessian
from paraboloid.statistics import record, statistics

__version__ = "0.1.0.dev0"
__all__ = ["GGN", "Hessian", "Loss", "linalg", "losses", "quantities", "record", "statistics"]
