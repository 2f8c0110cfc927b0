"""Convolutions whose J v costs two convolutions: torch's double backward computes second derivatives along, unasked.

`OutputGraph.push` differentiates g(u) = J^T u in u alone, at fixed inputs and weights.  torch's derivative of a
convolution's backward pass forms the derivatives in input and weight too, whatever is asked for.  Of ResNet-50 with 8
images of 3x64x64 and one thread, J v takes 1.35 gradients that way and 0.40 with what is below, J^T u 0.67 and 0.40.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from paraboloid.passes.modes import autocast_dtype

CONVOLUTIONS: dict[Any, int] = {
    F.conv1d: 1,
    F.conv2d: 2,
    F.conv3d: 3,
    torch.conv1d: 1,
    torch.conv2d: 2,
    torch.conv3d: 3,
}


LARGE = 100_000  # weights from which products are taken one by one: these convolutions have no vectorised rule


def convolutions_for(parameters: Collection[Tensor]) -> Callable[[], AbstractContextManager[Any]]:
    """`TangentConvolutions` where they pay, on a CPU without autocast for many weights; else nothing."""
    first = next(iter(parameters))
    large = sum(p.numel() for p in parameters) > LARGE and first.device.type == "cpu"
    return TangentConvolutions if large and autocast_dtype(first.device) is None else nullcontext


class TangentConvolutions(TorchFunctionMode):
    """Inside, convolutions are differentiated twice in the order J^T, then J; their Hessian is not to be had."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        axes = CONVOLUTIONS.get(func)
        if axes is not None and (options := _options(axes, *args, **kwargs)) is not None:
            x, weight, bias, settings = options
            if weight.requires_grad or x.requires_grad:
                return _Convolution.apply(x, weight, bias, settings)
        return func(*args, **kwargs)


Settings = tuple[list[int], list[int], list[int], int]  # stride, padding, dilation, groups


def _options(
    axes: int, input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None, Settings] | None:  # fmt: skip
    """A convolution's arguments, or None for those that are left to torch: unbatched, or padded to the same size."""
    if isinstance(padding, str) or input.dim() != axes + 2:
        return None
    every = lambda value: [value] * axes if isinstance(value, int) else list(value)  # noqa: E731
    return input, weight, bias, (every(stride), every(padding), every(dilation), groups)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    stride, padding, dilation, groups = settings
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings, ctx.needed = settings, list(ctx.needs_input_grad[:3])
        return _forward(x, weight, bias, settings)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        return *_Transposed.apply(grads[0], x.detach(), weight.detach(), ctx.settings, ctx.needed), None


class _Transposed(torch.autograd.Function):
    """(g_x, g_W, g_b) of a gradient g at the output, as a function of g alone."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, settings: Settings, needed: list[bool]) -> Any:
        ctx.save_for_backward(x, weight)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        if _is_matrix(weight, settings):
            return _matrix_backward(g, x, weight, settings, needed)
        stride, padding, dilation, groups = settings
        bias = [len(weight)] if needed[2] else None
        return torch.ops.aten.convolution_backward(
            g, x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups, needed
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = grads
        forward = _matrix_forward if _is_matrix(weight, ctx.settings) else _forward
        total = None
        if of_x is not None:
            total = forward(of_x, weight, None, ctx.settings)
        if of_weight is not None:
            part = forward(x, of_weight, None, ctx.settings)
            total = part if total is None else total.add_(part)
        if of_bias is not None:
            part = of_bias.view(-1, *[1] * (x.dim() - 2))
            total = part.expand(len(x), *part.shape) if total is None else total.add_(part)
        return total, None, None, None, None


def _is_matrix(weight: Tensor, settings: Settings) -> bool:
    """Whether it is one matrix at every position; torch's kernels are slow for these, above all with one thread."""
    _, padding, _, groups = settings
    return groups == 1 and weight[0, 0].numel() == 1 and not any(padding)


def _positions(x: Tensor, settings: Settings) -> Tensor:
    """[N, C, ...] as [C, N T], at the positions that the stride hits."""
    at = tuple(slice(None, None, step) for step in settings[0])
    return x[(slice(None), slice(None), *at)].transpose(0, 1).reshape(x.shape[1], -1)


def _matrix_forward(x: Tensor, weight: Tensor, bias: None, settings: Settings) -> Tensor:
    shape = [len(x), *(-(-size // step) for size, step in zip(x.shape[2:], settings[0], strict=True))]
    return (weight.flatten(1) @ _positions(x, settings)).view(len(weight), *shape).transpose(0, 1)


def _matrix_backward(g: Tensor, x: Tensor, weight: Tensor, settings: Settings, needed: list[bool]) -> Any:
    flat = g.transpose(0, 1).reshape(len(weight), -1)
    of_x = of_weight = None
    if needed[0]:
        found = (weight.flatten(1).T @ flat).view(x.shape[1], len(x), *g.shape[2:]).transpose(0, 1)
        if all(step == 1 for step in settings[0]):
            of_x = found
        else:
            of_x = torch.zeros_like(x)
            of_x[(slice(None), slice(None), *(slice(None, None, step) for step in settings[0]))] = found
    if needed[1]:
        of_weight = (flat @ _positions(x, settings).T).view_as(weight)
    return of_x, of_weight, flat.sum(1) if needed[2] else None
