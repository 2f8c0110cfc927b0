"""Choosing the prior's precision: by evidence at the linearised model's optimum or at the weights, or by validation."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Data, Inputs
from paraboloid.data.joined import joined
from paraboloid.linalg.operand import check_choice, check_count
from paraboloid.losses import BCE
from paraboloid.passes import trees
from paraboloid.posteriors import prior as priors
from paraboloid.posteriors.prediction.predictive import Prediction
from paraboloid.posteriors.prior_tuning.evidence import groups_of, mackay
from paraboloid.posteriors.prior_tuning.folds import FOLDS, Fold
from paraboloid.posteriors.prior_tuning.linearised import LinearisedModel, Restricted, optimum
from paraboloid.posteriors.prior_tuning.matching import MATCHES, PLAIN, fitting_of, matched, refitted
from paraboloid.posteriors.prior_tuning.progress import Line
from paraboloid.posteriors.prior_tuning.spread import spread
from paraboloid.posteriors.prior_tuning.unit_information import unit_information
from paraboloid.posteriors.structures.leading_rows import LeadingRows
from paraboloid.posteriors.structures.subnetwork import Subnetwork
from paraboloid.posteriors.weights import only

if TYPE_CHECKING:
    from paraboloid.posteriors.posterior import Posterior

METHODS = ("adapted", "evidence", "grid", "cross_validation", "unit")
MANY = 1000  # weights, with fewer of which an exact curvature is quickly solved for
MISSING = 0.15  # of the trace that the longest rows may leave out
ABOUT, PRODUCTS, PASSES = 0.05, 6, 16  # of the quick form: change that ends it, products a step, passes over the data


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
        elif method == "cross_validation":
            by_cross_validation(posterior, data, grid)
        elif method == "unit":
            by_unit_information(posterior, per, noise)
        else:
            with only(posterior.model, list(posterior.weights)):
                by_evidence(posterior, data if method == "adapted" else None, per or "all", noise, steps)
                if (
                    noise
                    and match in ("auto", "early")
                    and data is not None
                    and posterior.likelihood.kind == "gaussian"
                ):
                    alike = partial(by_evidence, data=data if method == "adapted" else None, per=per or "all",
                                    noise=True, steps=steps)  # fmt: skip
                    posterior.spread = spread(posterior, data, alike)
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
    """MacKay's updates at the optimum of the linearised model on `data`, or at the trained weights without data.

    In float64, and for squared errors, to a fixed point.  In float32 the optimum of another loss is followed by one
    Newton step of few products for each update, from the fixed point at the trained weights on, until the updates
    change little: within some percent of the fixed point, for the price of a few epochs.  An exact curvature of many
    weights is then known by its longest rows.
    """
    linear = None if data is None else LinearisedModel.of(
        posterior.model, posterior.likelihood.loss, data, posterior.output, posterior.max_memory
    )  # fmt: skip
    if linear is not None and isinstance(posterior.curvature, Subnetwork):
        linear = Restricted(linear, posterior.curvature.at)
    exact = next(iter(posterior.weights.values())).dtype == torch.float64
    updates = _Updates(posterior, per, noise, linear, 1e-6 if exact else 1e-3)
    if data is None or linear is None or exact or linear.is_quadratic:
        updates.run(steps)
        return
    quick = replace(updates, posterior=by_leading_rows(posterior, data, per), roughly=True)
    replace(quick, linear=None).run(steps)
    replace(quick, tolerance=ABOUT, most=(1, PRODUCTS)).run(steps)
    posterior.prior_precision = quick.posterior.prior_precision


def by_leading_rows(posterior: Posterior, data: Data, per: str) -> Posterior:
    """The same with an exact curvature of many weights by its longest rows, where these have most of the trace; other
    posteriors as they are."""
    structure, options = posterior.structure, posterior.options
    many = structure in ("full", "functional") and posterior.curvature.shape[0] > MANY
    if not many or per != "all" or options["at"] is not None or options["fisher"] == "hessian":
        return posterior
    if structure == "functional":
        pieces = iter([posterior.curvature.A])
    else:
        fitting = fitting_of(posterior)
        pieces = fitting.rows(joined(data, posterior.model, posterior.max_memory, posterior.output, fitting.cuts))
    with torch.no_grad():
        leading = LeadingRows.of(posterior.curvature.parameters, pieces)
    return posterior if leading.missing > MISSING else replace(posterior, curvature=leading, _precision=None)


@dataclass
class _Updates:
    """Updates of a posterior's precisions (one for each group of `per`) and of its noise variance, in place.

    tolerance  relative change of every precision that ends them
    most       Newton steps of each optimum, and products of each of those; None: as many as it takes
    roughly    whether effective dimensions may be off by some percent
    """

    posterior: Posterior
    per: str
    noise: bool
    linear: LinearisedModel | Restricted | None
    tolerance: float
    most: tuple[int, int] | None = None
    roughly: bool = False

    def run(self, steps: int) -> None:
        posterior, theta, linear = self.posterior, self.posterior.weights, self.linear
        groups = groups_of(theta, self.per)
        weights, loss, prior, delta = posterior.counted(), posterior.loss, posterior.prior(), None
        # Times gamma / noise_variance the slope of -log_det: twice as steep where the curvature is made of gradients.
        slope = posterior.temperature * (2 if posterior.options.get("fisher") == "empirical" else 1)
        moved, line = [math.inf], Line("tuning the prior")
        for step in range(steps):
            precision = posterior.precision(prior)
            if linear is not None:
                # No more exact than the precisions are by now, which move on.
                rough = max(self.tolerance / 100, min(1e-2, 0.1 * max(moved)))
                strength = posterior.likelihood.strength(posterior.noise_variance) / posterior.temperature
                delta = _optimum(linear, precision, priors.flat(prior, theta), strength, delta, rough, self.most)
                full = linear.full(linear.theta + delta) if isinstance(linear, Restricted) else linear.theta + delta
                weights = trees.unflatten(full, theta)
                loss = linear.value(delta).item() if self.noise else loss
            updated, gamma = mackay(precision, groups, weights, self.roughly)
            moved = [abs(math.log(float(updated[names[0]] / prior[names[0]].mean()))) for names in groups]
            if self.noise:
                variance = 2 * loss / max(posterior.elements - slope * gamma.item(), 1e-3 * posterior.elements)
                if not variance > torch.finfo(torch.float32).tiny:
                    raise ValueError(
                        f"the residuals of {posterior.elements} targets vanish (summed squares {2 * loss:.3g} with "
                        f"{gamma.item():.4g} weights determined), so that no noise variance fits them; expected some "
                        "noise. Pass noise=False and choose noise_variance, or stop the training earlier."
                    )
                moved.append(abs(math.log(variance / posterior.noise_variance)))
                posterior.noise_variance = variance
            prior = updated
            line.show(f"step {step + 1} of at most {steps}, {gamma.item():.4g} weights determined")
            spent = self.most is not None and linear is not None and linear.passes >= PASSES
            if max(moved) < self.tolerance or spent:
                break
        line.clear()
        single = len(groups) == 1
        posterior.prior_precision = prior[groups[0][0]].item() if single else {k: t.item() for k, t in prior.items()}


def _optimum(
    linear: LinearisedModel | Restricted, precision: Any, prior: Tensor, strength: Any, start: Tensor | None,
    tol: float, most: tuple[int, int] | None,
) -> Tensor:  # fmt: skip
    if not isinstance(linear, Restricted):
        return optimum(linear, prior, strength, start, precision.apply, tol, most)
    at = linear.at

    def among(rows: Tensor) -> Tensor:
        return precision.apply(linear.full(rows.T).T)[:, at]

    return optimum(linear, prior[at], strength, start, among, tol, most)


def by_grid(posterior: Posterior, validation: Data | None, grid: Any) -> None:
    """The precision with the lowest negative log-likelihood of the predictions on validation data."""
    if validation is None:
        raise ValueError("method='grid' needs validation=, a batch or an iterable of batches that was not trained on.")
    candidates, batches = _candidates(grid), list(batch_data.batches(validation))
    line = Line("tuning the prior")
    scores = _scores(posterior, candidates, batches, line)
    line.clear()
    posterior.prior_precision = _best(candidates, scores)


def by_cross_validation(posterior: Posterior, data: Data | None, grid: Any) -> None:
    """The precision with the lowest negative log-likelihood of each fold under the curvature of the others.

    The curvature and the prior are what is left out; the network has seen all folds, so that its own errors count too
    little: the precision that comes out is rather too large.
    """
    if data is None:
        raise ValueError("method='cross_validation' needs the training data, and this posterior has it no longer (it "
                         "was loaded or updated); pass data=.")  # fmt: skip
    candidates, totals, line = _candidates(grid), [0.0] * len(_candidates(grid)), Line("tuning the prior")
    cut = partial(posterior._cuts.of, posterior.model, output=posterior.output)
    for fold in range(FOLDS):
        rest = refitted(posterior, Fold(data, cut, fold, False), **PLAIN)
        scores = _scores(rest, candidates, list(Fold(data, cut, fold, True)), line)
        totals = [a + b for a, b in zip(totals, scores, strict=True)]
    line.clear()
    posterior.prior_precision = _best(candidates, totals)


def _candidates(grid: Any) -> list[float]:
    powers = 10.0 ** torch.linspace(-3, 5, 25, device="cpu") if grid is None else grid
    return torch.as_tensor(powers, dtype=torch.float64, device="cpu").tolist()


def _scores(posterior: Posterior, candidates: list[float], batches: list[Any], line: Line) -> list[float]:
    before, scores = posterior.prior_precision, []
    for value in candidates:
        posterior.prior_precision = value
        scores.append(sum(negative_log_predictive(posterior, x, y) for x, y in batches))
        line.show(f"precision {value:.4g}")
    posterior.prior_precision = before
    return scores


def _best(candidates: list[float], scores: list[float]) -> float:
    """The one of the lowest score; a warning says where it lies at the edge, beyond which a better one may be."""
    best = candidates[min(range(len(scores)), key=scores.__getitem__)]
    if len(candidates) > 1 and best in (min(candidates), max(candidates)):
        side = "lowest" if best == min(candidates) else "highest"
        warnings.warn(
            f"the best prior precision, {best:.4g}, is the {side} of the grid from {min(candidates):.4g} to "
            f"{max(candidates):.4g}: a better one may lie beyond. Pass a grid= that goes further.", stacklevel=4,
        )  # fmt: skip
    return best


def negative_log_predictive(posterior: Posterior, x: Inputs, y: Tensor) -> float:
    """-sum log p(y | x) under the posterior's default prediction, without constants."""
    found, kind = posterior.predict(x), posterior.likelihood.kind
    if isinstance(found, Prediction):
        return (found.variance.log() + (y - found.mean).square() / found.variance).sum().item() / 2
    if kind == "bernoulli":
        return torch.nn.functional.binary_cross_entropy(found, y.to(found), reduction="sum").item()
    loss = posterior.likelihood.given
    if isinstance(loss, BCE):
        return loss.sample_losses(found, y).sum().item()
    if y.is_floating_point():  # probabilities of classes
        return -(y * found.clamp(min=torch.finfo(found.dtype).tiny).log()).sum().item()
    return torch.nn.functional.nll_loss(
        found.clamp(min=torch.finfo(found.dtype).tiny).log(), y, ignore_index=loss.ignore_index, reduction="sum"
    ).item()
