"""A door shaped like laplace-torch's, for code that comes from there: its names, shapes and values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Data, Inputs
from paraboloid.linalg.operand import check_choice
from paraboloid.passes import trees
from paraboloid.posteriors import prior as priors
from paraboloid.posteriors.fit_laplace import laplace
from paraboloid.posteriors.laplace_torch_options import (
    LIKELIHOODS,
    STRUCTURES,
    Keyed,
    curvature_of,
    keyed,
    measured,
    number_of,
    plain,
    refuse_others,
    refuse_tuning_options,
    seed_of,
)
from paraboloid.posteriors.posterior import Posterior
from paraboloid.posteriors.prediction.predictive import gaussian_draws

METHODS = {"marglik": "evidence", "gridsearch": "grid", "adapted": "adapted"}
LINKS = ("probit", "bridge", "bridge_norm", "mc")
PRIOR_STRUCTURES = ("scalar", "layerwise", "diag")


class Laplace:
    """``Laplace(model, "classification").fit(loader)``, then ``la(x)``: laplace-torch's names for `pb.laplace`.

    likelihood           "classification" or "regression"
    subset_of_weights    "last_layer", "all", "subnetwork" (with `subnetwork_indices`), or names
    hessian_structure    "kron", "full", "diag", "lowrank" or "gp"
    sigma_noise          standard deviation of a regression's noise
    prior_precision      a number, [1], [number of parameters] or [D]
    prior_mean           a number or [D], of the evidence's prior
    enable_backprop      predictions are differentiable in the inputs
    backend              a class of laplace-torch's or its name, "...GGN", "...EF" or "...Hessian"; backend_kwargs may
                         hold stochastic=True and num_samples
    last_layer_name      the module to take for the last layer
    subnetwork_indices   int64 places of single weights; n_subset: samples that "gp" uses
    dict_key_y           the key of the targets in a batch that is a dictionary, which is the model's one argument

    `sigma_noise`, `prior_precision`, `prior_mean` and `temperature` may be assigned after the fit.  The posterior
    itself, with everything else, is `.posterior`.  Options of `pb.laplace` are taken too; ValueError for all others.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        subset_of_weights: Any = "last_layer",
        hessian_structure: str = "kron",
        sigma_noise: Any = 1.0,
        prior_precision: Any = 1.0,
        prior_mean: Any = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: Any = None,
        last_layer_name: str | None = None,
        backend_kwargs: Mapping[str, Any] | None = None,
        subnetwork_indices: Tensor | None = None,
        n_subset: int | None = None,
        **options: Any,
    ):
        likelihood, structure = str(getattr(likelihood, "value", likelihood)), getattr(hessian_structure, "value", None)
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood is {likelihood!r}; expected one of {list(LIKELIHOODS)}. Preferences: "
                             "pb.posteriors.Candidates with pb.laplace; others: pb.laplace.")  # fmt: skip
        structure = str(structure or hessian_structure)
        check_choice("hessian_structure", structure, list(STRUCTURES))
        refuse_others(options)
        self.model, self.likelihood, self.dict_key_y = model, likelihood, dict_key_y
        self.weights = self._chosen(getattr(subset_of_weights, "value", subset_of_weights), last_layer_name,
                                    subnetwork_indices)  # fmt: skip
        self.structure, self.enable_backprop = STRUCTURES[structure], enable_backprop
        self.options = {**options, **curvature_of(backend, backend_kwargs)}
        if n_subset is not None:
            self.options["subset"] = n_subset
        if likelihood != "regression" and number_of(sigma_noise) != 1:
            raise ValueError(f"sigma_noise is {sigma_noise} with a classification; expected 1: it is the noise of a "
                             "regression.")  # fmt: skip
        self._posterior: Posterior | None = None
        self._held: dict[str, Any] = {}
        self.sigma_noise, self.prior_precision, self.prior_mean, self.temperature = (
            sigma_noise, prior_precision, prior_mean, temperature,
        )  # fmt: skip

    @staticmethod
    def _chosen(subset: Any, last_layer: str | None, indices: Tensor | None) -> Any:
        if (indices is not None) != (isinstance(subset, str) and subset == "subnetwork"):
            raise ValueError(f"subset_of_weights is {subset!r} and subnetwork_indices {type(indices).__name__}; "
                             "expected 'subnetwork' with int64 indices, or neither.")  # fmt: skip
        if last_layer is not None and subset != "last_layer":
            raise ValueError(f"last_layer_name is {last_layer!r} with subset_of_weights={subset!r}; expected "
                             "'last_layer'.")  # fmt: skip
        return indices if indices is not None else [last_layer] if last_layer is not None else subset

    # --- what may be assigned ---------------------------------------------------------------------------------------

    @property
    def posterior(self) -> Posterior:
        if self._posterior is None:
            raise RuntimeError("the posterior is not fitted yet; call fit(loader) first.")
        return self._posterior

    @property
    def sigma_noise(self) -> Any:
        return self._held["sigma_noise"]

    @sigma_noise.setter
    def sigma_noise(self, value: Any) -> None:
        single = not isinstance(value, Tensor) or value.numel() == 1
        if not single or not number_of(value) > 0:
            raise ValueError(f"sigma_noise is {value}; expected one positive number, of all outputs.")
        self._held["sigma_noise"] = value
        if self._posterior is not None:
            self._posterior.noise_variance = number_of(value) ** 2

    @property
    def temperature(self) -> float:
        return self._held["temperature"]

    @temperature.setter
    def temperature(self, value: Any) -> None:
        if not number_of(value) > 0:
            raise ValueError(f"temperature is {value}; expected a positive number.")
        self._held["temperature"] = float(value)
        if self._posterior is not None:
            self._posterior.temperature = float(value)

    @property
    def prior_precision(self) -> Any:
        return self._held["prior_precision"]

    @prior_precision.setter
    def prior_precision(self, value: Any) -> None:
        self._held["prior_precision"] = value
        if self._posterior is not None:
            self._posterior.prior_precision = plain(value)

    @property
    def prior_mean(self) -> Any:
        return self._held["prior_mean"]

    @prior_mean.setter
    def prior_mean(self, value: Any) -> None:
        self._held["prior_mean"] = value

    # --- fit and evidence -------------------------------------------------------------------------------------------

    def fit(self, train_loader: Data, override: bool = True, progress_bar: bool = False) -> Laplace:
        """Fit to a loader of (inputs, targets); override=False adds the loader's data to what was fitted before.

        progress_bar is accepted for its callers: nothing is drawn.
        """
        data = Keyed(train_loader, self.dict_key_y)
        if self._posterior is not None and not override:
            self._posterior.update(data)
            return self
        self._posterior = laplace(
            self.model, LIKELIHOODS[self.likelihood](), data, self.structure, self.weights,
            plain(self.prior_precision), number_of(self.sigma_noise) ** 2,
            temperature=self.temperature, **self.options,
        )  # fmt: skip
        return self

    def _deviation(self) -> dict[str, Tensor]:
        """The weights less the prior's mean, by name."""
        weights, mean = self.posterior.counted(), torch.as_tensor(self.prior_mean, dtype=torch.float64, device="cpu")
        if mean.numel() == 1:
            return {k: w - (w != 0) * mean.to(w) if w is not self.posterior.weights[k] else w - mean.to(w)
                    for k, w in weights.items()}  # fmt: skip
        size = sum(w.numel() for w in weights.values())
        if mean.shape != (size,):
            raise ValueError(f"prior_mean has shape {tuple(mean.shape)}; expected a number or [{size}].")
        pieces = trees.unflatten(mean, weights)
        return {k: w - pieces[k].to(w) for k, w in weights.items()}

    @property
    def log_likelihood(self) -> Tensor:
        """log p(data | theta), differentiable in a `sigma_noise` that is a tensor, 0-dimensional; of a regression
        -loss / (sigma^2 temperature) - elements log(sigma sqrt(2 pi)), as laplace-torch has it."""
        p = self.posterior
        first = next(iter(p.weights.values()))
        loss = torch.as_tensor(p.loss, dtype=first.dtype, device=first.device)
        if self.likelihood != "regression":
            return -loss / self.temperature
        sigma = torch.as_tensor(self.sigma_noise, dtype=first.dtype, device=first.device).reshape(())
        return -loss / sigma.square() / self.temperature - p.elements * (sigma * math.sqrt(2 * math.pi)).log()

    def log_marginal_likelihood(self, prior_precision: Any = None, sigma_noise: Any = None) -> Tensor:
        """The log evidence, 0-dimensional; differentiable in tensors that are given, which are kept."""
        if sigma_noise is not None:
            if self.likelihood != "regression":
                raise ValueError("sigma_noise can be changed for a regression only; found a classification.")
            self.sigma_noise = sigma_noise
        if prior_precision is not None:
            self.prior_precision = prior_precision
        p = self.posterior
        prior = p.prior(plain(self.prior_precision))
        sigma = self.sigma_noise
        noise = sigma.reshape(()).square() if isinstance(sigma, Tensor) and sigma.requires_grad else None
        volume = p.precision(prior, noise).log_det()
        return self.log_likelihood - (priors.square(prior, self._deviation()) + volume) / 2

    def optimize_prior_precision(
        self, pred_type: str = "glm", method: str = "marglik", n_steps: int = 100, lr: float = 0.1,
        init_prior_prec: Any = 1.0, prior_structure: str | None = None, val_loader: Data | None = None,
        loss: Any = None,
        log_prior_prec_min: float = -4, log_prior_prec_max: float = 4, grid_size: int = 100,
        link_approx: str = "probit", n_samples: int = 100, verbose: bool = False, progress_bar: bool = False,
        log_prior_prec_base: float = 10.0, **options: Any,
    ) -> None:  # fmt: skip
        """ "marglik": `n_steps` of Adam (`lr`) on the log evidence in the logarithm of one precision ("scalar"), one
        for each parameter ("layerwise") or weight ("diag"), from `init_prior_prec` (default: "diag", "layerwise" with
        "kron", "scalar" with "gp"); "gridsearch": the best of `grid_size`
        powers of `log_prior_prec_base` by `loss(predictions, targets)` on `val_loader` (a regression's: of means,
        variances and targets; default: the negative log-likelihood); or "adapted", of `pb.laplace`, with its options.
        """
        if pred_type not in ("glm", "nn"):  # the method given first, as this door had it
            method, pred_type = pred_type, "glm"
        method = str(getattr(method, "value", method))
        check_choice("method", method, list(METHODS))
        if method == "adapted":
            # As there: the prior alone, and predictions as they are.
            self.posterior.tune_prior("adapted", **{"match": None, "noise": False, **options})
            self._held["prior_precision"] = self.posterior.prior_precision
        elif method == "gridsearch":
            refuse_tuning_options(options)
            ends, base = (log_prior_prec_min, log_prior_prec_max), log_prior_prec_base
            interval = torch.logspace(*ends, grid_size, base=base, device="cpu")
            self._grid(interval, val_loader, loss, pred_type, link_approx, n_samples)
        else:
            refuse_tuning_options(options)
            default = {"kron": "layerwise", "functional": "scalar"}.get(self.structure, "diag")
            chosen = default if prior_structure is None else str(getattr(prior_structure, "value", prior_structure))
            self._ascend(n_steps, lr, init_prior_prec, chosen)
        if verbose:
            print(f"Optimized prior precision is {self.prior_precision}.")

    def _ascend(self, steps: int, lr: float, start: Any, structure: str) -> None:
        check_choice("prior_structure", structure, PRIOR_STRUCTURES)
        weights = self.posterior.weights
        first = next(iter(weights.values()))
        start = torch.as_tensor(start, dtype=first.dtype, device=first.device).detach().reshape(-1)
        sizes = {"scalar": 1, "layerwise": len(weights), "diag": sum(w.numel() for w in weights.values())}
        log = (start.expand(sizes[structure]) if len(start) == 1 else start).log().clone().requires_grad_()
        optimizer = torch.optim.Adam([log], lr)
        for _ in range(steps):
            optimizer.zero_grad()
            (-self.log_marginal_likelihood(log.exp())).backward()
            optimizer.step()
        self.prior_precision = log.detach().exp()

    def _grid(
        self, interval: Tensor, validation: Data | None, loss: Any, pred_type: str, link: str, samples: int
    ) -> None:  # fmt: skip
        if validation is None:
            raise ValueError("method='gridsearch' needs val_loader, batches that were not trained on.")
        batches, scores = list(batch_data.batches(Keyed(validation, self.dict_key_y))), []
        for value in interval.tolist():
            self.prior_precision = value
            found = [(self(x, pred_type, link_approx=link, n_samples=samples), y) for x, y in batches]
            scores.append(self._score(found) if loss is None else measured(loss, found))
        self.prior_precision = interval[min(range(len(scores)), key=scores.__getitem__)].item()

    def _score(self, found: list[tuple[Any, Tensor]]) -> float:
        """Negative log-likelihood: a regression's squared error alone would not depend on the precision."""
        total = 0.0
        for outputs, y in found:
            if self.likelihood == "regression":
                mean, spread = outputs
                spread = spread.diagonal(dim1=1, dim2=2) if spread.dim() == 3 else spread
                v = spread + self.posterior.noise_variance
                total += float((v.log() + (y - mean).square() / v).sum() / 2)
            else:
                tiny = torch.finfo(outputs.dtype).tiny
                total += float(nn.functional.nll_loss(outputs.clamp(min=tiny).log(), y, reduction="sum"))
        return total

    # --- predictions ------------------------------------------------------------------------------------------------

    def __call__(
        self, x: Inputs, pred_type: str = "glm", joint: bool = False, link_approx: str = "probit", n_samples: int = 100,
        diagonal_output: bool = False, generator: torch.Generator | None = None,
    ) -> Any:  # fmt: skip
        """Probabilities [N, C]; for a regression (mean [N, C], covariance [N, C, C] of f, without the noise).

        pred_type        "glm" (the linearised model) or "nn" (networks with sampled weights: mean and variance [N, C])
        joint            of a regression: mean [N C] and covariance [N C, N C] over all inputs together
        link_approx      "probit", "bridge", "bridge_norm" or "mc"
        diagonal_output  of a regression: variances [N, C]; of "mc": draws from the outputs' variances alone
        """
        pred_type, link = (str(getattr(v, "value", v)) for v in (pred_type, link_approx))
        check_choice("pred_type", pred_type, ("glm", "nn"))
        x, seed = keyed(x), seed_of(generator)
        if pred_type == "nn":
            found = self.posterior.predict(x, "weights", samples=n_samples, seed=seed)
            return (found.mean, found.model_variance) if self.likelihood == "regression" else found
        if self.likelihood == "regression":
            if joint:
                mean, covariance = self.posterior.functional(x, joint=True)
                return mean.flatten(), covariance.flatten(2).flatten(0, 1)
            return self.posterior.functional(x, diagonal=diagonal_output, differentiable=self.enable_backprop)
        check_choice("link_approx", link, LINKS)
        if link == "mc" and diagonal_output:
            return self.predictive_samples(x, n_samples=n_samples, diagonal_output=True, generator=generator).mean(0)
        return self.posterior.predict(x, link, samples=n_samples, seed=seed, differentiable=self.enable_backprop)

    def functional_samples(
        self, x: Inputs, pred_type: str = "glm", n_samples: int = 100, diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Draws of the outputs f, [n_samples, N, C]: of the linearised model, each input by itself, or of networks."""
        x, seed, p = keyed(x), seed_of(generator), self.posterior
        check_choice("pred_type", pred_type, ("glm", "nn"))
        if pred_type == "nn":
            return torch.stack(list(p.network_outputs(x, n_samples, seed)))
        mean, covariance = p.functional(x, differentiable=self.enable_backprop)
        if diagonal_output:
            covariance = torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))
        return gaussian_draws(mean.flatten(1), covariance, n_samples, seed).view(n_samples, *mean.shape)

    def predictive_samples(
        self, x: Inputs, pred_type: str = "glm", n_samples: int = 100, diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """The same as probabilities of the classes; a regression's f themselves."""
        f = self.functional_samples(x, pred_type, n_samples, diagonal_output, generator)
        return f if self.likelihood == "regression" else f.softmax(2)

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None, seed: int = 0) -> Tensor:
        """Weights drawn from the posterior, flat [n_samples, D]."""
        drawn = self.posterior.sample(n_samples, seed if generator is None else generator)
        if isinstance(self.weights, Tensor):  # a subnetwork's, with the other weights as they are
            fixed = {k: p.detach().expand(n_samples, *p.shape) for k, p in trees.parameters(self.model).items()}
            drawn = fixed | drawn
        return torch.cat([w.reshape(n_samples, -1) for w in drawn.values()], 1)

    @property
    def posterior_precision(self) -> Tensor:
        """strength H + Lambda, [D, D]; its diagonal [D] for "diag"."""
        p = self.posterior
        prior = priors.flat(p.prior(), p.weights)
        if self.structure == "diag":
            return p.strength() * p.curvature.diagonal() + prior
        return p.strength() * p.curvature.to_dense() + torch.diag(prior)

    # --- files ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The fit and what was assigned, as tensors and plain data."""
        return {"posterior": self.posterior.state_dict(), "held": dict(self._held)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state_dict` described, for the same model at the same weights; ValueError for another one."""
        self._posterior = Posterior.of_state(state["posterior"], self.model, LIKELIHOODS[self.likelihood]())
        self._held = dict(state["held"])
