"""How wide a regression's intervals are: the variance that Kronecker factors give, whatever the structure.

Calibration, as matched confidence is, of `predict` alone.  The evidence of the exact curvature takes the features for
given, which the network has learned from the same targets: on trained networks its noise variance comes out too small.
A diagonal misses how the weights make up for each other and comes out too wide.  Kronecker factors err on both sides,
and are the closest of the three to the error on new data, measured on regressions of scikit-learn's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from paraboloid.data.batches import Data
from paraboloid.posteriors.prediction.confidence import seen
from paraboloid.posteriors.prior_tuning.matching import PLAIN, refitted

if TYPE_CHECKING:
    from paraboloid.posteriors.posterior import Posterior

SAME = 1e-3  # relative difference from 1 that is none: Kronecker factors that are exact


def spread(posterior: Posterior, data: Data, tune: Callable[[Posterior], None]) -> float:
    """Mean predicted variance on the data under Kronecker factors, tuned alike, over the posterior's own."""
    options = posterior.options
    if posterior.structure == "kron" or options["at"] is not None or options["fisher"] not in ("exact", "mc"):
        return 1.0
    like = refitted(posterior, data, structure="kron", options=dict(options, debias=False), noise_variance=1.0,
                    _prior=1.0, **PLAIN)  # fmt: skip
    tune(like)
    ratio = predicted(like, data) / predicted(posterior, data)
    return ratio if abs(ratio - 1) > SAME else 1.0


def predicted(posterior: Posterior, data: Data) -> float:
    """The variance of a target on the mean over the data: the noise's, and the weights' as `seen` has it."""
    return posterior.noise_variance + seen(posterior, data)[0].mean().item()
