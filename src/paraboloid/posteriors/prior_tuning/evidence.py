"""Fixed points of the evidence in the prior's precisions (and a Gaussian's noise variance)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from paraboloid.passes.parameter_layers import layers_of
from paraboloid.posteriors.precision import Precision
from paraboloid.posteriors.prior import Prior

LOWEST, HIGHEST = 1e-8, 1e12  # limits of a tuned precision


def groups_of(parameters: Mapping[str, Tensor], per: str) -> list[list[str]]:
    """The parameters that share one precision: "all", one "layer" (module), or each "parameter"."""
    if per == "all":
        return [list(parameters)]
    if per == "parameter":
        return [[name] for name in parameters]
    if per == "layer":
        return list(layers_of(parameters).values())
    raise ValueError(f"per is {per!r}; expected 'all', 'layer' or 'parameter'.")


def mackay(
    precision: Precision, groups: Sequence[Sequence[str]], weights: Mapping[str, Tensor], roughly: bool = False
) -> tuple[Prior, Tensor]:
    """One update lambda_g <- gamma_g / |w_g|^2 of each group's precision, and the total of gamma (`roughly`: within
    some percent).

    A fixed point is a stationary point of the evidence in lambda at these weights.  Source: MacKay 1992, "Bayesian
    interpolation".
    """
    gammas = precision.roughly_determined(groups) if roughly else precision.effective_dimension(groups)
    updated = dict(precision.prior)
    for names, gamma in zip(groups, gammas, strict=True):
        square = torch.stack([weights[k].square().sum() for k in names]).sum()
        value = (gamma / square.clamp(min=torch.finfo(square.dtype).tiny)).clamp(LOWEST, HIGHEST)
        updated |= dict.fromkeys(names, value)
    return updated, torch.stack(gammas).sum()
