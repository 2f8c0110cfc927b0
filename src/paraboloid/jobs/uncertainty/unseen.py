"""Inputs that the training data is unlike, made from the test inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paraboloid.data.batches import Inputs

Change = Callable[[Tensor, torch.Generator], Tensor]


def unseen(x: Inputs, seed: int) -> dict[str, Any]:
    """name -> inputs of the same shape; none for inputs that are not one tensor.

    Numbers: uniform noise over the range of the inputs, their own noise of one standard deviation added, the features
    shuffled; images besides turned by a quarter and shifted by a quarter.  Token ids: others at random, and shuffled.
    """
    if not isinstance(x, Tensor) or x.dim() < 2:
        return {}
    generator = torch.Generator().manual_seed(seed)
    changes = _of_numbers(x) if x.is_floating_point() else {"random tokens": _random_ids, "shuffled": _shuffled}
    return {name: change(x.cpu(), generator).to(x.device) for name, change in changes.items()}


def _of_numbers(x: Tensor) -> dict[str, Change]:
    changes: dict[str, Change] = {"uniform noise": _uniform, "noise added": _added}
    if x[0].numel() > 1:
        changes["shuffled"] = _shuffled
    if x.dim() == 4 and x.shape[2] == x.shape[3]:
        changes["turned by 90°"] = lambda t, g: t.rot90(1, (2, 3)).contiguous()
        changes["shifted by a quarter"] = lambda t, g: t.roll(t.shape[3] // 4, 3)
    return changes


def _uniform(x: Tensor, generator: torch.Generator) -> Tensor:
    low, high = x.min(), x.max()
    return low + (high - low) * torch.rand(x.shape, generator=generator, dtype=x.dtype)


def _added(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + x.std() * torch.randn(x.shape, generator=generator, dtype=x.dtype)


def _shuffled(x: Tensor, generator: torch.Generator) -> Tensor:
    flat = x.flatten(1)
    order = torch.rand(flat.shape, generator=generator).argsort(1)
    return flat.gather(1, order).view_as(x)


def _random_ids(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(int(x.min()), int(x.max()) + 1, x.shape, generator=generator, dtype=x.dtype)
