"""A prior that knows as much as one sample: no search, and in the units of every parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paraboloid.posteriors.prior_tuning.evidence import groups_of

if TYPE_CHECKING:
    from paraboloid.posteriors.posterior import Posterior

LOWEST, HIGHEST = 1e-30, 1e30


def unit_information(posterior: Posterior, per: str = "parameter") -> dict[str, float]:
    """lambda_g = strength * tr(H_g) / (N D_g): what one sample tells of a weight, on the mean.

    H_g is the curvature's block of a group of D_g weights, N the number of samples.  Rescaling a normalised weight by c
    changes H and lambda of its parameter alike, by 1 / c^2, so that predictions stay.  Weights that the data does not
    reach at all have the mean precision of the other groups.  Source: Kass and Wasserman 1995.
    """
    sizes = [w.numel() for w in posterior.weights.values()]
    diagonal: Tensor = posterior.curvature.diagonal().double().clamp(min=0)
    parts = dict(zip(posterior.weights, diagonal.split(sizes), strict=True))
    groups = groups_of(posterior.weights, per)
    means = [torch.cat([parts[k] for k in names]).mean().item() for names in groups]
    reached = [mean for mean in means if mean > 0]
    instead = sum(reached) / len(reached) if reached else 1.0
    scale = float(posterior.strength()) / max(posterior.count, 1)
    chosen = [min(max(scale * (mean or instead), LOWEST), HIGHEST) for mean in means]
    return {k: chosen[i] for k in posterior.weights for i, names in enumerate(groups) if k in names}
