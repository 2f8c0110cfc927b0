"""Choosing the prior's precision: by evidence at the linearised model's optimum or at the weights, or by validation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Data, Inputs
from paraboloid.linalg.operand import check_choice, check_count
from paraboloid.passes import trees
from paraboloid.posteriors import prior as priors
from paraboloid.posteriors.prediction.predictive import Prediction
from paraboloid.posteriors.prior_tuning.evidence import groups_of, mackay
from paraboloid.posteriors.prior_tuning.linearised import LinearisedModel, optimum
from paraboloid.posteriors.prior_tuning.matching import MATCHES, PLAIN, matched
from paraboloid.posteriors.prior_tuning.unit_information import unit_information
from paraboloid.posteriors.weights import only

if TYPE_CHECKING:
    from paraboloid.posteriors.posterior import Posterior

METHODS = ("adapted", "evidence", "grid", "unit")


def tune(
    posterior: Posterior, method: str | None, data: Data | None, validation: Data | None, match: str | None, *,
    per: str | None, noise: bool | None, steps: int, grid: Any,
) -> None:  # fmt: skip
    """See `Posterior.tune_prior`."""
    if method is None:
        method = "adapted" if posterior.likelihood.curvature == "ggn" else "unit"
    check_choice("method", method, METHODS)
    check_choice("match", match, MATCHES)
    if noise and not posterior.likelihood.takes_noise:
        raise ValueError(f"noise=True with a {posterior.likelihood.kind} likelihood; expected nn.MSELoss, which alone "
                         "has a noise variance.")  # fmt: skip
    check_count("steps", steps)
    if method == "adapted" and data is None:
        raise ValueError("method='adapted' needs the training data, and this posterior has it no longer (it was loaded "
                         "or updated); pass data=, all of it.")  # fmt: skip
    noise = posterior.likelihood.takes_noise if noise is None else noise
    before = {name: getattr(posterior, name) for name in PLAIN}
    posterior.__dict__.update(PLAIN)  # what is tuned is the posterior itself
    try:
        if method == "grid":
            by_grid(posterior, validation, grid)
        elif method == "unit":
            by_unit_information(posterior, per, noise)
        else:
            with only(posterior.model, list(posterior.weights)):
                by_evidence(posterior, data if method == "adapted" else None, per or "all", noise, steps)
        matched(posterior, data, match, method, validation, before)
    except BaseException:
        posterior.__dict__.update(before)
        raise


def by_unit_information(posterior: Posterior, per: str | None, noise: bool) -> None:
    """The prior of `unit_information`, and the noise variance that goes with it: gamma does not depend on that."""
    posterior.prior_precision = unit_information(posterior, per or "parameter")
    if noise:
        gamma = posterior.temperature * posterior.effective_dimension()
        variance = 2 * posterior.loss / max(posterior.elements - gamma, 1e-3 * posterior.elements)
        posterior.noise_variance = max(variance, torch.finfo(torch.float32).tiny)
        posterior.prior_precision = unit_information(posterior, per or "parameter")


def by_evidence(posterior: Posterior, data: Data | None, per: str, noise: bool, steps: int) -> None:
    """MacKay's updates at the optimum of the linearised model on `data`, or at the trained weights without data."""
    weights, loss, groups, prior = (
        posterior.weights,
        posterior.loss,
        groups_of(posterior.weights, per),
        posterior.prior(),
    )
    theta, delta, linear = posterior.weights, None, None
    if data is not None:
        linear = LinearisedModel.of(
            posterior.model, posterior.likelihood.loss, data, posterior.output, posterior.max_memory
        )
    # The relative change of every precision that ends the updates.
    tolerance = 1e-6 if next(iter(theta.values())).dtype == torch.float64 else 1e-3
    strength = lambda: posterior.likelihood.strength(posterior.noise_variance) / posterior.temperature  # noqa: E731
    # Times gamma / noise_variance the slope of -log_det: twice as steep where the curvature is made of gradients.
    slope = posterior.temperature * (2 if posterior.options.get("fisher") == "empirical" else 1)
    moved = [math.inf]
    for _ in range(steps):
        precision = posterior.precision(prior)
        if linear is not None:
            # No more exact than the precisions are by now, which move on.
            rough = max(tolerance / 100, min(1e-2, 0.1 * max(moved)))
            delta = optimum(linear, priors.flat(prior, theta), strength(), delta, precision.apply, rough)
            weights, loss = trees.unflatten(linear.theta + delta, theta), linear.value(delta).item()
        updated, gamma = mackay(precision, groups, weights)
        moved = [abs(math.log(float(updated[names[0]] / prior[names[0]].mean()))) for names in groups]
        if noise:
            variance = 2 * loss / max(posterior.elements - slope * gamma.item(), 1e-3 * posterior.elements)
            moved.append(abs(math.log(variance / posterior.noise_variance)))
            posterior.noise_variance = variance
        prior = updated
        if max(moved) < tolerance:
            break
    single = len(groups) == 1
    posterior.prior_precision = prior[groups[0][0]].item() if single else {k: t.item() for k, t in prior.items()}


def by_grid(posterior: Posterior, validation: Data | None, grid: Any) -> None:
    """The precision with the lowest negative log-likelihood of the predictions on validation data."""
    if validation is None:
        raise ValueError("method='grid' needs validation=, a batch or an iterable of batches that was not trained on.")
    candidates = (
        10.0 ** torch.linspace(-3, 5, 25) if grid is None else torch.as_tensor(grid, dtype=torch.float64)
    ).tolist()
    batches = list(batch_data.batches(validation))
    before, scores = posterior.prior_precision, []
    for value in candidates:
        posterior.prior_precision = value
        scores.append(sum(negative_log_predictive(posterior, x, y) for x, y in batches))
    posterior.prior_precision = before
    posterior.prior_precision = candidates[min(range(len(scores)), key=scores.__getitem__)]


def negative_log_predictive(posterior: Posterior, x: Inputs, y: Tensor) -> float:
    """-sum log p(y | x) under the posterior's default prediction, without constants."""
    found, kind = posterior.predict(x), posterior.likelihood.kind
    if isinstance(found, Prediction):
        return (found.variance.log() + (y - found.mean).square() / found.variance).sum().item() / 2
    if kind == "bernoulli":
        return torch.nn.functional.binary_cross_entropy(found, y.to(found), reduction="sum").item()
    loss = posterior.likelihood.given
    return torch.nn.functional.nll_loss(
        found.clamp(min=torch.finfo(found.dtype).tiny).log(), y, ignore_index=loss.ignore_index, reduction="sum"
    ).item()
