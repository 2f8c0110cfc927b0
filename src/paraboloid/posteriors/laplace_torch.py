"""A door shaped like laplace-torch's, for code that comes from there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Data, Inputs
from paraboloid.linalg.operand import check_choice
from paraboloid.posteriors.fit_laplace import laplace
from paraboloid.posteriors.posterior import Posterior

LIKELIHOODS = {"classification": nn.CrossEntropyLoss, "regression": nn.MSELoss}
STRUCTURES = {"full": "full", "kron": "kron", "diag": "diag", "lowrank": "lowrank", "gp": "functional"}
METHODS = {"marglik": "evidence", "gridsearch": "grid", "adapted": "adapted"}


class Laplace:
    """``Laplace(model, "classification").fit(loader)``, then ``la(x)``: laplace-torch's names for `pb.laplace`.

    likelihood           "classification" or "regression"
    subset_of_weights    "last_layer", "all", or names of parameters or modules (a subnetwork)
    hessian_structure    "kron", "full", "diag", "lowrank" or "gp"
    sigma_noise          standard deviation of a regression's noise

    The posterior itself, with everything else, is `.posterior`.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        subset_of_weights: Any = "last_layer",
        hessian_structure: str = "kron",
        sigma_noise: float = 1.0,
        prior_precision: Any = 1.0,
        temperature: float = 1.0,
        **options: Any,
    ):
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood is {likelihood!r}; expected one of {list(LIKELIHOODS)}. Others: pb.laplace.")
        check_choice("hessian_structure", hessian_structure, list(STRUCTURES))
        self.model, self.likelihood, self.weights = model, likelihood, subset_of_weights
        self.structure, self.options = STRUCTURES[hessian_structure], options
        self.options |= {
            "noise_variance": sigma_noise**2, "prior_precision": prior_precision, "temperature": temperature
        }  # fmt: skip
        self._posterior: Posterior | None = None

    @property
    def posterior(self) -> Posterior:
        if self._posterior is None:
            raise RuntimeError("the posterior is not fitted yet; call fit(loader) first.")
        return self._posterior

    def fit(self, train_loader: Data, override: bool = True) -> Laplace:
        """Fit to a loader of (inputs, targets); override=False adds the loader's data to what was fitted before."""
        if self._posterior is not None and not override:
            self._posterior.update(train_loader)
        else:
            loss_fn = LIKELIHOODS[self.likelihood]()
            self._posterior = laplace(self.model, loss_fn, train_loader, self.structure, self.weights, **self.options)
        return self

    def optimize_prior_precision(
        self, method: str = "marglik", val_loader: Data | None = None, pred_type: str = "glm",
        link_approx: str = "probit", **options: Any,
    ) -> None:  # fmt: skip
        """ "marglik" (the evidence at the trained weights), "gridsearch" (needs val_loader), or "adapted"."""
        check_choice("method", method, list(METHODS))
        # As there: the prior alone, and predictions as they are.
        self.posterior.tune_prior(METHODS[method], validation=val_loader, **{"match": None, "noise": False, **options})

    def log_marginal_likelihood(self, prior_precision: Any = None, sigma_noise: Any = None) -> Tensor:
        noise = None if sigma_noise is None else sigma_noise**2
        return self.posterior.log_evidence(prior_precision, noise)

    def __call__(self, x: Inputs, pred_type: str = "glm", link_approx: str = "probit", n_samples: int = 100) -> Any:
        """Probabilities [N, C]; for a regression (mean [N, C], covariance [N, C, C] of f, without the noise).

        pred_type "glm" (the linearised model) or "nn" (networks with sampled weights).
        """
        if pred_type not in ("glm", "nn"):
            raise ValueError(f"pred_type is {pred_type!r}; expected 'glm' or 'nn'.")
        if self.likelihood == "regression" and pred_type == "glm":
            return self.posterior.functional(x)
        if pred_type == "nn":
            found = self.posterior.predict(x, "weights", samples=n_samples)
            return (found.mean, torch.diag_embed(found.model_variance)) if self.likelihood == "regression" else found
        return self.posterior.predict(x, link_approx, samples=n_samples)

    def sample(self, n_samples: int = 100, seed: int = 0) -> Tensor:
        """Weights drawn from the posterior, flat [n_samples, D]."""
        return torch.cat([w.reshape(n_samples, -1) for w in self.posterior.sample(n_samples, seed).values()], 1)

    @property
    def prior_precision(self) -> Any:
        return self.posterior.prior_precision

    @prior_precision.setter
    def prior_precision(self, value: Any) -> None:
        self.posterior.prior_precision = value
