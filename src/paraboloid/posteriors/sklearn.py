"""Laplace posteriors as scikit-learn estimators: arrays in, arrays out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from paraboloid.data.batches import Chunks
from paraboloid.passes import trees
from paraboloid.posteriors.fit_laplace import laplace
from paraboloid.posteriors.posterior import Posterior


class _Laplace(BaseEstimator):
    """What both have in common; the posterior itself is `posterior_` after `fit`."""

    posterior_: Posterior

    def __init__(
        self,
        model: nn.Module,
        structure: str = "kron",
        weights: Any = "all",
        prior_precision: Any = "adapted",
        batch_size: int = 256,
        seed: int = 0,
    ):
        self.model, self.structure, self.weights, self.prior_precision = model, structure, weights, prior_precision
        self.batch_size, self.seed = batch_size, seed

    def _fit(self, loss_fn: nn.Module, X: Any, y: Tensor, noise: bool) -> None:
        self.model.eval()
        data = Chunks((self._inputs(X), y), self.batch_size, self._parameter.device)
        tuned = isinstance(self.prior_precision, str)
        self.posterior_ = laplace(
            self.model, loss_fn, data, self.structure, self.weights, 1.0 if tuned else self.prior_precision,
            seed=self.seed,
        )  # fmt: skip
        if tuned:
            self.posterior_.tune_prior(self.prior_precision, noise=noise)
        self.n_features_in_ = int(np.asarray(X).shape[1])

    @property
    def _parameter(self) -> Tensor:
        return next(iter(trees.parameters(self.model).values()))

    def _inputs(self, X: Any) -> Tensor:
        return torch.as_tensor(np.asarray(X)).to(self._parameter)


class LaplaceClassifier(ClassifierMixin, _Laplace):
    """A trained network with outputs [N, classes] as a probabilistic classifier.

    fit(X, y) fits the posterior to the network as it is (it does not train it), with the prior's precision a number or
    a method of `Posterior.tune_prior` that needs no validation data ("adapted", "evidence").  Labels may be anything;
    output c stands for `classes_[c]`, their sorted order.  `link` is that of `Posterior.predict`.
    """

    def fit(self, X: Any, y: Any) -> LaplaceClassifier:
        self.classes_, indices = np.unique(np.asarray(y), return_inverse=True)
        with torch.no_grad():
            outputs = self.model(self._inputs(X)[:1]).shape[1]
        if outputs != len(self.classes_):
            raise ValueError(f"y has {len(self.classes_)} different labels and the model {outputs} outputs; expected "
                             "the same number.")  # fmt: skip
        self._fit(nn.CrossEntropyLoss(), X, torch.as_tensor(indices, device=self._parameter.device), False)
        return self

    def predict_proba(self, X: Any, link: str | None = None) -> np.ndarray:
        """[N, classes]."""
        check_is_fitted(self, "posterior_")
        return self.posterior_.predict(self._inputs(X), link).cpu().numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The most probable labels, [N]."""
        return self.classes_[self.predict_proba(X).argmax(1)]


class LaplaceRegressor(RegressorMixin, _Laplace):
    """A trained network with outputs [N, C] as a regressor with error bars.

    fit(X, y) fits the posterior to the network as it is.  A precision chosen by a method of `Posterior.tune_prior` is
    chosen together with the noise variance; a number leaves the noise variance at 1.
    """

    def fit(self, X: Any, y: Any) -> LaplaceRegressor:
        y = torch.as_tensor(np.asarray(y)).to(self._parameter)
        self._one = y.dim() == 1
        self._fit(nn.MSELoss(), X, y.unsqueeze(1) if self._one else y, True)
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Means, [N] or [N, C]; with return_std=True also the standard deviations of y (model and noise)."""
        check_is_fitted(self, "posterior_")
        found = self.posterior_.predict(self._inputs(X))
        parts = [found.mean, found.stddev]
        mean, std = ((t[:, 0] if self._one else t).cpu().numpy() for t in parts)
        return (mean, std) if return_std else mean
