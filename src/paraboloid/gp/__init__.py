"""Gaussian processes by solvers of dual systems, far beyond Cholesky; imports from `passes` and `linalg`."""

from paraboloid.gp.classification import Classifier, classify
from paraboloid.gp.conditioning import condition
from paraboloid.gp.hyperparameters import Hyperparameters, fit_hyperparameters
from paraboloid.gp.kernel import Constant, Kernel, Product, Sum
from paraboloid.gp.process import GaussianProcess
from paraboloid.gp.rational_quadratic import RationalQuadratic
from paraboloid.gp.sklearn import GPRegressor
from paraboloid.gp.softmax import SoftmaxClassifier
from paraboloid.gp.stationary import RBF, Matern
from paraboloid.gp.tanimoto import Tanimoto

__all__ = [
    "RBF", "Classifier", "Constant", "GPRegressor", "GaussianProcess", "Hyperparameters", "Kernel", "Matern", "Product",
    "RationalQuadratic",     "SoftmaxClassifier", "Sum", "Tanimoto", "classify", "condition", "fit_hyperparameters",
]  # fmt: skip
