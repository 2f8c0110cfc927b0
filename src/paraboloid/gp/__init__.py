"""Gaussian processes by solvers of dual systems, far beyond Cholesky; imports from `passes` and `linalg`."""

from paraboloid.gp.conditioning import condition
from paraboloid.gp.kernel import Constant, Kernel, Product, Sum
from paraboloid.gp.process import GaussianProcess
from paraboloid.gp.stationary import RBF, Matern
from paraboloid.gp.tanimoto import Tanimoto

__all__ = ["RBF", "Constant", "GaussianProcess", "Kernel", "Matern", "Product", "Sum", "Tanimoto", "condition"]
