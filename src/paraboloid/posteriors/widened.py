"""Models in half precision: a posterior computes with a copy of them in float32, of the same weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.passes import trees
from paraboloid.passes.module_tree import named_parameters_of

HALF = {torch.float16, torch.bfloat16}


def widened(model: Any) -> Any:
    """The model itself; where its parameters are in half precision a copy in float32, which takes inputs of any type.

    Factors, inverses and evidence need more digits than half precision has, and torch no decompositions of it.
    """
    if not isinstance(model, nn.Module) or HALF.isdisjoint([p.dtype for p in named_parameters_of(model).values()]):
        return model
    found = copy.deepcopy(model).float()
    found.register_forward_pre_hook(_cast, with_kwargs=True)
    return found


def _cast(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return trees.mapped(_wide, args), trees.mapped(_wide, kwargs)


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype in HALF else t
