"""Numbers and tensors that know how far off they may be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paraboloid.passes.torch_internals import PLAIN_RESULTS


class Estimate(float):
    """A stochastic estimate: a float, with the standard error of the mean that it is (infinite if unknown)."""

    standard_error: float

    def __new__(cls, value: float, standard_error: float) -> Estimate:
        estimate = super().__new__(cls, value)
        estimate.standard_error = float(standard_error)
        return estimate

    def __repr__(self) -> str:
        return f"{float(self):.6g} ± {self.standard_error:.2g}"

    def __reduce__(self):
        return Estimate, (float(self), self.standard_error)


class TensorEstimate(Tensor):
    """A stochastic estimate: a tensor with `standard_error`, a tensor of its shape.  Arithmetic gives plain tensors."""

    standard_error: Tensor
    __torch_function__ = PLAIN_RESULTS


def mean_estimate(draws: Tensor) -> Estimate:
    """Mean of independent draws [S] with its standard error."""
    return Estimate(draws.mean().item(), _standard_error(draws).item())


def mean_tensor_estimate(draws_sum: Tensor, draws_square_sum: Tensor, draws: int) -> TensorEstimate:
    """Mean of independent draws from their sum and their sum of squares, with its standard error."""
    mean = draws_sum / draws
    if draws > 1:
        variance = (draws_square_sum / draws - mean.square()).clamp(min=0) * draws / (draws - 1)
        error = (variance / draws).sqrt()
    else:
        error = torch.full_like(mean, math.inf)
    estimate = mean.as_subclass(TensorEstimate)
    estimate.standard_error = error
    return estimate


def _standard_error(draws: Tensor) -> Tensor:
    if len(draws) < 2:
        return torch.tensor(math.inf, device="cpu")
    return draws.std() / len(draws) ** 0.5
