"""Samples that float32 does not carry are computed with a copy of the model in float64, of the same weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Data, Output
from paraboloid.losses import Loss
from paraboloid.passes import trees
from paraboloid.passes.modes import evaluating
from paraboloid.passes.random_state import RandomStream
from paraboloid.passes.wrappers import innermost


class NotCarried(Exception):
    """A sample whose residual in float32 stays what rounding leaves: its weights are differences of larger ones, and
    their own last digits count."""


def in_float64(model: Any, loss: Loss, data: Data, output: Output | None) -> nn.Module | None:
    """A copy of the model in float64, which takes float32 inputs; None where the model or its loss does not run so."""
    model = innermost(model)
    if not isinstance(model, nn.Module):
        return None
    first = next(model.parameters())
    if first.dtype != torch.float32:
        return None
    try:
        found = copy.deepcopy(model).double()
        found.register_forward_pre_hook(_cast, with_kwargs=True)
        inputs, y = next(batch_data.in_order(data, RandomStream(0, first.device)))
        with evaluating(found):
            f = batch_data.evaluate(found, inputs, output)
            right = f.dtype == loss.gradient(f, y).dtype == next(iter(loss.hessian_root(f, y))).dtype
    except (RuntimeError, TypeError):  # a type that is written into its operations, or no float64 on this device
        return None
    return found if right and f.dtype == torch.float64 else None


def _cast(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return trees.mapped(_double, args), trees.mapped(_double, kwargs)


def _double(t: Tensor) -> Tensor:
    return t.double() if t.dtype == torch.float32 else t
