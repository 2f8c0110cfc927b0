"""How sure the predictions are, matched to the network: the last step of `Posterior.tune_prior`; see `confidence`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from paraboloid.data.batches import Data
from paraboloid.data.cutting import Cuts
from paraboloid.posteriors.fit import Fitting, curvature
from paraboloid.posteriors.prediction.confidence import RARE_LEFT_OUT, Confidence, measured, seen
from paraboloid.posteriors.prior_tuning.folds import FOLDS, Fold, Together
from paraboloid.posteriors.prior_tuning.unit_information import unit_information
from paraboloid.posteriors.weights import only
from paraboloid.reductions.kronecker_factors import MAX_FACTOR

if TYPE_CHECKING:
    from paraboloid.posteriors.posterior import Posterior

MATCHES = ("auto", "exponent", None)
LEAST = 10  # samples, of which a fold is left out
PLAIN: dict[str, Any] = {"confidence": None, "unweighted": None, "sharpness": 1.0, "spread": 1.0}


def matched(
    posterior: Posterior, data: Data | None, match: str | None, method: str, validation: Data | None,
    before: dict[str, Any],
) -> None:  # fmt: skip
    """Choose `confidence`, or `sharpness`.

    Where predictions on validation data chose the prior, they choose the exponent too.  Without data what was chosen
    `before` stays, unless it is of the very prior that was tuned.
    """
    if match is None or posterior.likelihood.kind not in ("categorical", "bernoulli"):
        return
    if method == "grid":
        posterior.match_confidence(validation=validation)
        return
    if data is None:
        stays = before["confidence"] is not None and (before["unweighted"] is not posterior or method == "unit")
        posterior.__dict__.update(before if stays else PLAIN)
    elif match == "exponent":
        posterior.match_confidence(data)
    else:
        own = posterior.likelihood.curvature == "jacobian"
        posterior.unweighted = posterior if own else unweighted(posterior, data)
        posterior.confidence = confidence_of(posterior.unweighted, data)


def confidence_of(unweighted: Posterior, data: Data) -> Confidence:
    """The quantiles on the data, times what the data's own samples hold their variances down by.

    That is measured on one fold: the median variance under a posterior without it over that under the whole one, less
    what the whole one's larger number of samples accounts for.  Where samples are many it is 1, where there are more
    weights than outputs much more.  The tail of new inputs may be longer yet: the fold's own 95th percentile is the
    least that counts as rare.  Exact structures leave each sample out in closed form; where samples cannot be left
    out, nodes of a graph say, the quantiles are those on the data as they are.
    """
    found = measured(unweighted, data)
    if found.left_out or unweighted.count < LEAST:
        return found
    cut = partial(unweighted._cuts.of, unweighted.model, output=unweighted.output)
    fold = Fold(data, cut, 0, True)
    try:
        within = measured(unweighted, fold).usual
    except Together:  # nodes of a graph
        return found
    variances, _ = seen(refitted(unweighted, Fold(data, cut, 0, False), **PLAIN), fold)
    apart = Confidence.of((1 - 1 / FOLDS) * variances, RARE_LEFT_OUT)
    held = max(1.0, apart.usual / within) if within > 0 else 1.0
    return Confidence(held * found.usual, max(held * found.rare, apart.rare))


def unweighted(posterior: Posterior, data: Data) -> Posterior:
    """The posterior with curvature="jacobian" over the same weights, in the same structure, and a prior that knows as
    much as one sample."""
    options = dict(posterior.options, curvature="jacobian", tol=0.0, left_out=[0.0, 0.0])
    if options["fisher"] == "empirical":  # made of the loss's gradients
        options["fisher"] = "mc"
    likelihood = replace(posterior.likelihood, curvature="jacobian")
    found = refitted(posterior, data, likelihood=likelihood, options=options, _prior=1.0, **PLAIN)
    found.prior_precision = unit_information(found)
    return found


def refitted(posterior: Posterior, data: Data, **changes: Any) -> Posterior:
    """The same posterior but for `changes`, fitted to `data`."""
    base = replace(posterior, **changes)
    options, device = base.options, next(iter(base.weights.values())).device
    fitting = Fitting(
        base.model, base.likelihood, options["fisher"], options["samples"],
        torch.Generator(device).manual_seed(options["seed"]), base.output, base.max_memory,
        options.get("max_factor", MAX_FACTOR), tol=options.get("tol", 0.0),
    )  # fmt: skip
    with only(base.model, list(base.weights)):
        fitted = curvature(base.structure, fitting, base.weights, data, options)
    return replace(
        base, curvature=fitted, loss=fitting.loss, constant=fitting.constant, count=fitting.count, data=None,
        elements=fitting.elements, _sizes={}, _cuts=Cuts(), _precision=None,
    )  # fmt: skip
