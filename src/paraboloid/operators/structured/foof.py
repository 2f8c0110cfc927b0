"""Kronecker factors from forward passes alone: the layers' inputs, with the identity in the place of gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Data, Output
from paraboloid.linalg.kronecker import Side
from paraboloid.losses import LossFunction
from paraboloid.operators.outputs_alone import OutputsAlone
from paraboloid.operators.structured.kfac import factors_of
from paraboloid.operators.structured.kronecker_factored import KroneckerFactored
from paraboloid.quantities.over_data import OverData
from paraboloid.reductions.kronecker_factors import MAX_FACTOR, Factors, scale_factors


def FOOF(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Data,
    *,
    sharing: str = "expand",
    max_factor: int = MAX_FACTOR,
    seed: int = 0,
    output: Output | None = None,
    max_memory: int | None = None,
) -> KroneckerFactored:
    """I (x) 1/(N T) sum_{n,t} r r^T for each weight, the identity for biases: KFAC without its gradient factors.

    Its inverse is gradient descent on the layers' outputs.  The arguments are those of `pb.KFAC`; the loss (any
    callable) and the targets have no influence.  Source: Benzing 2022, arXiv:2201.12250.
    """
    del loss_fn
    passes = OverData(model, OutputsAlone(), data, seed=seed, output=output, max_memory=max_memory)
    quantity = factors_of("empirical", 1, sharing, False, 0.0, max_factor)
    sums = passes.sums([quantity]).values[quantity.name]
    return KroneckerFactored(passes.values, {k: scale_factors(_forward(v), 1.0) for k, v in sums.items()})


def _forward(value: Factors) -> Factors:
    """The sums with identities for those of gradients."""
    if value.exact is not None:
        return replace(value, exact=_identity(value.exact))
    rows, columns = (
        {key: _identity(part) if key == "gradient" else part for key, part in sums.items()}
        for sums in (value.rows, value.columns)
    )
    return replace(value, rows=rows, columns=columns)


def _identity(part: Any) -> Tensor:
    """Of the size of a factor, a matrix [G p p] or its diagonal [G p]."""
    data = part.data if isinstance(part, Side) else part
    if data.dim() == 2:
        return torch.ones_like(data)
    return torch.eye(data.shape[-1], dtype=data.dtype, device=data.device).repeat(len(data), 1, 1)
