"""Gaussian-process regression as a scikit-learn estimator: arrays in, arrays out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_array, check_is_fitted, check_X_y

from paraboloid.gp.conditioning import condition
from paraboloid.gp.hyperparameters import fit_hyperparameters
from paraboloid.gp.process import GaussianProcess
from paraboloid.gp.stationary import Matern
from paraboloid.linalg.operand import check_count

FLOATS: Any = [np.float64, np.float32]


class GPRegressor(RegressorMixin, BaseEstimator):
    """Regression with error bars: `fit(X, y)`, `predict(X, return_std=True)`, `sample_y(X, n_samples)`.

    kernel          of pb.gp, GPyTorch or scikit-learn; None: Matern 3/2 with a lengthscale for each feature
    noise_variance  in units of the normalised targets
    optimize        whether hyperparameters and noise are fitted by the evidence of `subset` samples first
    normalize_y     whether targets are centred and scaled to variance 1 first; predictions come back in their own units
    solver, samples, seed   of `pb.gp.condition`; samples for the standard deviation where there is no Cholesky factor

    After `fit`: `process_` (the Gaussian process of the normalised targets), `kernel_`, `noise_variance_`.
    """

    process_: GaussianProcess

    def __init__(
        self,
        kernel: Any = None,
        noise_variance: float = 0.1,
        optimize: bool = True,
        normalize_y: bool = True,
        subset: int = 1000,
        solver: str = "auto",
        samples: int = 64,
        seed: int = 0,
    ):
        self.kernel, self.noise_variance, self.optimize, self.normalize_y = (
            kernel,
            noise_variance,
            optimize,
            normalize_y,
        )
        self.subset, self.solver, self.samples, self.seed = subset, solver, samples, seed

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any) -> GPRegressor:
        """Learn the hyperparameters (where asked) and condition on the data; y [N] or [N, C]."""
        X, y = check_X_y(X, y, dtype=FLOATS, multi_output=True, y_numeric=True)
        y = y.astype(X.dtype)
        self.n_features_in_ = X.shape[1]
        self._mean = y.mean(0) if self.normalize_y else np.zeros_like(y.mean(0))
        scale = y.std(0) if self.normalize_y else np.ones_like(y.mean(0))
        self._scale = np.where(scale > 0, scale, 1.0).astype(y.dtype)
        x, t = torch.tensor(X), torch.from_numpy((y - self._mean) / self._scale)
        kernel, noise = self.kernel, self.noise_variance
        if np.size(noise) != 1:
            raise ValueError(f"noise_variance has {np.size(noise)} entries; expected a number: that of new inputs is "
                             "not known otherwise. Take pb.gp.condition for noise that differs.")  # fmt: skip
        if kernel is None:
            kernel = Matern(1.5, x.std(0, correction=0).clamp(min=1e-6).double() * X.shape[1] ** 0.5)
        if self.optimize and bool(t.any()):
            found = fit_hyperparameters(kernel, x, t, noise, subset=self.subset, seed=self.seed)
            kernel, noise = found.kernel, found.noise_variance
        self.process_ = condition(kernel, x, t, noise, self.solver, self.samples, self.seed)
        self.kernel_, self.noise_variance_ = self.process_.kernel, noise
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Means [M] or [M, C]; with return_std=True also the standard deviations of y (function and noise)."""
        x = self._inputs(X)
        if not return_std:
            return self._mean + self._scale * self.process_.mean(x).numpy()
        mean, variance = self.process_.predict(x)
        std = (variance + self.noise_variance_).sqrt().numpy()
        std = std if mean.dim() == 1 else std[:, None]
        return self._mean + self._scale * mean.numpy(), self._scale * std

    def sample_y(self, X: Any, n_samples: int = 1, random_state: int | None = None) -> np.ndarray:
        """Values of functions drawn from the posterior, [M, n_samples] or [M, C, n_samples], without noise.

        The first `samples` functions are those drawn in `fit`; more, or another random_state, condition again.
        """
        x, gp = self._inputs(X), self.process_
        check_count("n_samples", n_samples, least=0)
        if n_samples > gp.samples or random_state is not None:
            seed = self.seed if random_state is None else random_state
            gp = condition(gp.kernel, gp.x, gp.y, gp.noise_variance, self.solver, n_samples, seed)
        drawn = gp.sample(x)[:n_samples].movedim(0, -1).numpy()
        mean, scale = (np.expand_dims(v, -1) for v in (self._mean, self._scale))
        return mean + scale * drawn

    def _inputs(self, X: Any) -> torch.Tensor:
        check_is_fitted(self, "process_")
        X = check_array(X, dtype=FLOATS)
        if X.shape[1] != self.n_features_in_:
            raise ValueError(f"X has {X.shape[1]} features, but GPRegressor is expecting {self.n_features_in_} "
                             "features as input.")  # fmt: skip
        return torch.tensor(X)  # a copy: torch knows of no arrays that must not be written to
