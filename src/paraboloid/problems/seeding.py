"""Run code that draws from torch's global generator under a seed, and leave that generator as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Initialisers and dropout have no `generator` argument, so the global state is set, and put back afterwards.

    CUDA's generators take part where CUDA is in use already; it is not started for their sake.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield
