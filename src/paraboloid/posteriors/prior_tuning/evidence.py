"""Fixed points of the evidence in the prior's precisions (and a Gaussian's noise variance)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from paraboloid.passes.parameter_layers import layers_of
from paraboloid.posteriors.prior import Prior
from paraboloid.posteriors.structures.rows import Rows

LOWEST, HIGHEST = 1e-8, 1e12  # limits of a tuned precision


def effective_dimension(structure: Any, prior: Prior, strength: Any, groups: Sequence[Sequence[str]]) -> list[Tensor]:
    """gamma_g = sum over the weights of a group of 1 - Lambda_d Sigma_dd: how many of them the data determines."""
    of_all = [set(names) for names in groups] == [set(structure.parameters)]
    if of_all and isinstance(structure, Rows) and (total := structure.effective_dimension(prior, strength)) is not None:
        return [total.clamp(min=torch.finfo(total.dtype).eps)]
    variances, sizes = structure.variances(prior, strength), [p.numel() for p in structure.parameters.values()]
    by_name = dict(zip(structure.parameters, variances.split(sizes), strict=True))

    def determined(name: str) -> Tensor:
        return (1 - prior[name].expand(structure.parameters[name].shape).reshape(-1) * by_name[name]).sum()

    eps = torch.finfo(variances.dtype).eps
    return [torch.stack([determined(name) for name in names]).sum().clamp(min=eps) for names in groups]


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
    structure: Any, prior: Prior, strength: Any, groups: Sequence[Sequence[str]], weights: Mapping[str, Tensor]
) -> tuple[Prior, Tensor]:
    """One update lambda_g <- gamma_g / |w_g|^2 of each group's precision, and the total of gamma.

    A fixed point is a stationary point of the evidence in lambda at these weights.  Source: MacKay 1992, "Bayesian
    interpolation".
    """
    gammas = effective_dimension(structure, prior, strength, groups)
    updated = dict(prior)
    for names, gamma in zip(groups, gammas, strict=True):
        square = torch.stack([weights[k].square().sum() for k in names]).sum()
        value = (gamma / square.clamp(min=torch.finfo(square.dtype).tiny)).clamp(LOWEST, HIGHEST)
        updated |= dict.fromkeys(names, value)
    return updated, torch.stack(gammas).sum()
