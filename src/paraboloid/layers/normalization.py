"""Scale and shift of normalisation layers: z = weight * xhat + bias, so the factors are xhat and one."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from paraboloid.layers.registry import channel, rule, spread


@rule(F.layer_norm)
def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    yield spread(weight, factor=lambda: F.layer_norm(x, normalized_shape, eps=eps), affine=True)
    yield spread(bias)


@rule(F.rms_norm)
def rms_norm(x, normalized_shape, weight=None, eps=None):
    yield spread(weight, factor=lambda: F.rms_norm(x, normalized_shape, eps=eps), affine=True)


@rule(F.group_norm)
def group_norm(x, num_groups, weight=None, bias=None, eps=1e-5):
    yield channel(weight, factor=lambda: F.group_norm(x, num_groups, eps=eps), affine=True)
    yield channel(bias)


@rule(F.instance_norm)
def instance_norm(
    x, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    def xhat() -> Tensor:
        return F.instance_norm(x, eps=eps) if use_input_stats else F.batch_norm(x, running_mean, running_var, eps=eps)

    yield channel(weight, factor=xhat, affine=True)
    yield channel(bias)


@rule(F.batch_norm)
def batch_norm(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    """In training mode with the statistics of this batch: the rows of left add up to the gradient, but they are not the
    samples' own (see `uses_batch_statistics`)."""
    fixed = (None, None) if training else (running_mean, running_var)
    yield channel(weight, factor=lambda: F.batch_norm(x, *fixed, training=training, eps=eps), affine=True)
    yield channel(bias)


def uses_batch_statistics(args: tuple, kwargs: dict) -> bool:
    """Whether a call of `F.batch_norm` is in training mode, which mixes the samples."""
    return _arguments(*args, **kwargs)[2]


def _arguments(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    return x, weight, training, eps


Hook = Callable[[tuple[Tensor | None, ...], tuple[Tensor, ...]], tuple[Tensor | None, ...] | None]


def constant_statistics(args: tuple, kwargs: dict) -> Hook:
    """A hook for the node of a batch norm in training mode, with which gradients pass as if the batch's mean and
    variance were constants: then the samples are apart, and where they lie can be found."""
    x, weight, _, eps = _arguments(*args, **kwargs)
    axes = [0, *range(2, x.dim())]

    def hook(inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...] | None:
        if inputs[0] is None:
            return None
        scale = (x.detach().var(axes, correction=0) + eps).rsqrt()
        scale = scale if weight is None else scale * weight.detach()
        return (outputs[0] * scale.view(-1, *[1] * (x.dim() - 2)).to(outputs[0].dtype), *inputs[1:])

    return hook
