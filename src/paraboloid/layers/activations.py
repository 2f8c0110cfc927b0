"""Activations with parameters."""

from __future__ import annotations

import torch

from paraboloid.layers.registry import channel, rule, spread


@rule(torch.prelu)
def prelu(x, weight):
    """One slope for everything, or one for each channel (axis 1)."""
    shared = weight.numel() == 1
    yield (spread if shared else channel)(weight, factor=lambda: x.clamp(max=0), affine=True)
