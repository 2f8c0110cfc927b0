"""Forward passes that leave no trace: torch's random state and the model's buffers are as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def isolated(model: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """Dropout masks follow `seed`; the global random state and buffers such as running statistics are restored."""
    devices = [device] if device.type == "cuda" else []
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers()] if model.training else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            with torch.no_grad():
                for b, version, value in buffers:
                    if b._version != version:
                        b.copy_(value)
