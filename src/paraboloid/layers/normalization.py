"""Scale and shift of normalisation layers: z = weight * xhat + bias, so left is g * xhat and g."""

from __future__ import annotations

import torch.nn.functional as F

from paraboloid.layers import channel, rule, spread


@rule(F.layer_norm)
def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    if weight is not None:
        yield spread(weight, lambda g: g * F.layer_norm(x, normalized_shape, eps=eps))
    if bias is not None:
        yield spread(bias, lambda g: g)


@rule(F.group_norm)
def group_norm(x, num_groups, weight=None, bias=None, eps=1e-5):
    if weight is not None:
        yield channel(weight, lambda g: g * F.group_norm(x, num_groups, eps=eps))
    if bias is not None:
        yield channel(bias, lambda g: g)


@rule(F.batch_norm)
def batch_norm(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if training:
        raise ValueError(
            f"batch_norm ran in training mode on an input {tuple(x.shape)}: its batch statistics mix the samples, so "
            "there are no per-sample gradients. Call model.eval() first, or replace it by GroupNorm."
        )
    if weight is not None:
        yield channel(weight, lambda g: g * F.batch_norm(x, running_mean, running_var, eps=eps))
    if bias is not None:
        yield channel(bias, lambda g: g)
