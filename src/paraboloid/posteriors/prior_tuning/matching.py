"""How sure the predictions are, matched to the network: the last step of `Posterior.tune_prior`; see `confidence`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Data
from paraboloid.data.cutting import Cuts
from paraboloid.posteriors.fit import Fitting, curvature
from paraboloid.posteriors.prediction.confidence import RARE, RARE_LEFT_OUT, Confidence, seen
from paraboloid.posteriors.prior_tuning.folds import FOLDS, Fold, Together, held
from paraboloid.posteriors.prior_tuning.unit_information import unit_information
from paraboloid.posteriors.structures.eigenbasis import Kronecker
from paraboloid.posteriors.weights import only
from paraboloid.reductions.kronecker_factors import MAX_FACTOR, merged

if TYPE_CHECKING:
    from paraboloid.posteriors.posterior import Posterior

MATCHES = ("auto", "early", "exponent", None)
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
        posterior.unweighted, confidence = by_variance(posterior, data)
        posterior.confidence = confidence if match == "early" else confidence.later()


def by_variance(posterior: Posterior, data: Data) -> tuple[Posterior, Confidence]:
    """The posterior whose variances tell what the data says little of, and their quantiles on the data.

    It has curvature="jacobian", over the same weights, and a prior that knows as much as one sample; as Kronecker
    factors, whatever the structure, as `spread` has them: they cost a few passes over the data, and see more than a
    diagonal.  Single weights and halves of the data (debias=True) keep their own structure, and so does a posterior
    that has this curvature already, which is the one taken.
    """
    data, same = held(data)
    if posterior.likelihood.curvature == "jacobian":
        return posterior, _quantiles(posterior, data, None)
    base = _unfitted(posterior)
    apart = base.structure == "kron" and not base.options["debias"] and same and _count(data) >= LEAST
    whole, rest = _both(base, data) if apart else (refitted(base, data), None)
    whole.prior_precision = unit_information(whole)
    return whole, _quantiles(whole, data, rest)


def _both(base: Posterior, data: Data) -> tuple[Posterior, Posterior | None]:
    """Fitted to the data and to the data without a fold, each sample in one pass; the whole alone where samples cannot
    be left out."""
    cut = partial(base._cuts.of, base.model, output=base.output)
    fitting = fitting_of(base)
    try:
        with only(base.model, list(base.weights)), torch.no_grad():
            others = fitting.factors_of(Fold(data, cut, 0, False))
            rest = _of(base, Kronecker.of_factors(base.weights, others), fitting)
            own = fitting.factors_of(Fold(data, cut, 0, True))
    except Together:
        return refitted(base, data), None
    both = {k: merged(v, own[k]) for k, v in others.items()}
    return _of(base, Kronecker.of_factors(base.weights, both), fitting), rest


def _count(data: Data) -> int:
    return sum(len(y) for _, y in batch_data.batches(data))


def _quantiles(unweighted: Posterior, data: Data, rest: Posterior | None) -> Confidence:
    """The quantiles on the data, times what the data's own samples hold their variances down by.

    That is measured on one fold: the median variance under a posterior without it, the `rest`, over that under the
    whole one, less what the whole one's larger number of samples accounts for.  Where samples are many it is 1, where
    there are more weights than outputs much more.  The tail of new inputs may be longer yet: the fold's own 95th
    percentile is the least that counts as rare.  Exact structures leave each sample out in closed form; where samples
    cannot be left out, nodes of a graph say, the quantiles are those on the data as they are.
    """
    cut = partial(unweighted._cuts.of, unweighted.model, output=unweighted.output)
    fold, others = (Fold(data, cut, 0, inside) for inside in (True, False))
    count = unweighted.count
    if rest is None:
        found, exact = seen(unweighted, data)
        if exact or count < LEAST:
            return Confidence.of(found, RARE_LEFT_OUT if exact else RARE, exact)
        try:
            rest = refitted(unweighted, others, **PLAIN)
            within, _ = seen(unweighted, fold, count)
        except Together:
            return Confidence.of(found)
    else:
        within, _ = seen(unweighted, fold, count)
        found = torch.cat([within, seen(unweighted, others, count)[0]])
    apart = replace(rest, **PLAIN)
    apart.prior_precision = unweighted.prior_precision
    left = Confidence.of((1 - 1 / FOLDS) * seen(apart, fold, count)[0], RARE_LEFT_OUT)
    usual = Confidence.of(within).usual
    factor = max(1.0, left.usual / usual) if usual > 0 else 1.0
    whole = Confidence.of(found)
    return Confidence(factor * whole.usual, max(factor * whole.rare, left.rare))


def _unfitted(posterior: Posterior) -> Posterior:
    """What `unweighted` is fitted as."""
    options = dict(posterior.options, curvature="jacobian", tol=0.0, left_out=[0.0, 0.0])
    if options["fisher"] == "empirical":  # made of the loss's gradients
        options["fisher"] = "mc"
    if options["fisher"] == "hessian":
        options["fisher"] = "exact"
    keeps = options["at"] is not None or options["debias"]
    likelihood = replace(posterior.likelihood, curvature="jacobian")
    structure = posterior.structure if keeps else "kron"
    return replace(posterior, structure=structure, likelihood=likelihood, options=options, _prior=1.0, **PLAIN)


def refitted(posterior: Posterior, data: Data, **changes: Any) -> Posterior:
    """The same posterior but for `changes`, fitted to `data`."""
    base = replace(posterior, **changes)
    fitting = fitting_of(base)
    with only(base.model, list(base.weights)):
        fitted = curvature(base.structure, fitting, base.weights, data, base.options)
    return _of(base, fitted, fitting)


def fitting_of(base: Posterior) -> Fitting:
    """What it was fitted with, to fit again; nothing is said a second time."""
    options, device = base.options, next(iter(base.weights.values())).device
    return Fitting(
        base.model, base.likelihood, options["fisher"], options["samples"],
        torch.Generator(device).manual_seed(options["seed"]), base.output, base.max_memory,
        options.get("max_factor", MAX_FACTOR), said=[True], tol=options.get("tol", 0.0),
    )  # fmt: skip


def _of(base: Posterior, fitted: Any, fitting: Fitting) -> Posterior:
    return replace(
        base, curvature=fitted, loss=fitting.loss, constant=fitting.constant, count=fitting.count, data=None,
        elements=fitting.elements, _sizes={}, _cuts=Cuts(), _precision=None,
    )  # fmt: skip
