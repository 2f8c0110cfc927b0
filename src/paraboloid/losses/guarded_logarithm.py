"""log x and 1 / x that stay finite at zero, and whose derivatives do not overflow before they are multiplied.

Torch takes the derivative of 1 / x as (1 / x) / x first, which float32 does not hold from x = 1e-19 down: a
probability behind a sigmoid at -44, whose own derivative would have made it small again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def logarithm(x: Tensor) -> Tensor:
    """log x; -100 at zero, as `torch.nn.BCELoss` has it."""
    return _Logarithm.apply(x)


def inverse(x: Tensor) -> Tensor:
    """1 / x; 0 at zero, the derivative of `logarithm` there."""
    return _Inverse.apply(x)


class _Logarithm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Any) -> Any:
        tiny = torch.finfo(x.dtype).tiny
        return torch.where(x < tiny, -100.0, x.clamp(min=tiny).log())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return g * _Inverse.apply(*ctx.saved_tensors)


class _Inverse(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Any) -> Any:
        tiny = torch.finfo(x.dtype).tiny
        return torch.where(x < tiny, 0.0, x.clamp(min=tiny).reciprocal())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        (r,) = ctx.saved_tensors
        return -(g * r) * r
