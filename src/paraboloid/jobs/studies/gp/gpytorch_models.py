"""GPyTorch's exact and sparse variational regression as its documentation trains them, where it is installed."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

FEW, STEPS, RATE = 500, 50, 0.1  # samples, steps and rate of Adam of the exact model's hyperparameters
INDUCING, SPARSE_STEPS, SPARSE_RATE, BATCH = 100, 400, 0.02, 256

MISSING = "GPyTorch is not installed: its exact and its sparse variational regression were not run."


def installed() -> bool:
    return find_spec("gpytorch") is not None


def exact(x: np.ndarray, y: np.ndarray, new: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Hyperparameters by Adam on 500 samples, then all data by its own choice of solver."""
    gpytorch: Any = import_module("gpytorch")

    class Model(gpytorch.models.ExactGP):
        def __init__(self, x: Tensor, y: Tensor, likelihood: Any):
            super().__init__(x, y, likelihood)
            self.mean_module = gpytorch.means.ConstantMean()
            matern = gpytorch.kernels.MaternKernel(nu=1.5, ard_num_dims=x.shape[1])
            matern.lengthscale = x.shape[1] ** 0.5
            self.covar_module = gpytorch.kernels.ScaleKernel(matern)

        def forward(self, x: Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    few = np.random.default_rng(seed).permutation(len(x))[:FEW]
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    data = torch.from_numpy(x), torch.from_numpy(y)
    model = Model(data[0][few], data[1][few], likelihood).double()
    evidence = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    with torch.enable_grad():
        for _ in range(STEPS):
            optimizer.zero_grad()
            (-evidence(model(data[0][few]), data[1][few])).backward()
            optimizer.step()
    model.set_train_data(*data, strict=False)
    return _predicted(model, likelihood, new)


def sparse(x: np.ndarray, y: np.ndarray, new: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Hensman's variational regression: inducing inputs, their distribution and hyperparameters by Adam on batches."""
    gpytorch: Any = import_module("gpytorch")

    class Model(gpytorch.models.ApproximateGP):
        def __init__(self, Z: Tensor):
            posterior = gpytorch.variational.CholeskyVariationalDistribution(len(Z))
            super().__init__(gpytorch.variational.VariationalStrategy(self, Z, posterior))
            self.mean_module = gpytorch.means.ConstantMean()
            matern = gpytorch.kernels.MaternKernel(nu=1.5, ard_num_dims=Z.shape[1])
            matern.lengthscale = Z.shape[1] ** 0.5
            self.covar_module = gpytorch.kernels.ScaleKernel(matern)

        def forward(self, x: Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    order = np.random.default_rng(seed)
    data = torch.from_numpy(x), torch.from_numpy(y)
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    model = Model(data[0][order.permutation(len(x))[:INDUCING]].clone()).double()
    bound = gpytorch.mlls.VariationalELBO(likelihood, model, len(x))
    optimizer = torch.optim.Adam([*model.parameters(), *likelihood.parameters()], SPARSE_RATE)
    with torch.enable_grad():
        for _ in range(SPARSE_STEPS):
            at = order.permutation(len(x))[:BATCH]
            optimizer.zero_grad()
            (-bound(model(data[0][at]), data[1][at])).backward()
            optimizer.step()
    return _predicted(model, likelihood, new)


def _predicted(model: Any, likelihood: Any, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the targets."""
    model.eval()
    likelihood.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = likelihood(model(torch.from_numpy(new)))
        return found.mean.numpy(), found.variance.sqrt().numpy()
