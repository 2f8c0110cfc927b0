"""Random vectors for estimators and starts, from a seed or a generator, on the operator's device."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from paraboloid.passes.memory import PROBES

Seed = int | torch.Generator


def generator_of(seed: Seed, device: torch.device) -> torch.Generator:
    """The generator itself, or a new one on `device` that starts from the seed; ValueError for anything else."""
    if isinstance(seed, torch.Generator):
        return seed
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise ValueError(f"seed is {seed!r}; expected an integer, or a torch.Generator.")
    return torch.Generator(device=device).manual_seed(int(seed))


def normal(shape: tuple[int, ...], like, generator: torch.Generator) -> Tensor:
    """Standard normal entries, in the dtype and on the device of `like`."""
    draw = torch.randn(shape, generator=generator, device=generator.device, dtype=like.dtype)
    return draw.to(like.device)


def signs(shape: tuple[int, ...], like, generator: torch.Generator) -> Tensor:
    """Entries +1 and -1 with probability 1/2 (Rademacher), in the dtype and on the device of `like`."""
    draw = torch.randint(0, 2, shape, generator=generator, device=generator.device, dtype=torch.int8)
    return draw.to(like.device, like.dtype).mul_(2).sub_(1)


def drawn(probes: str, shape: tuple[int, ...], like, generator: torch.Generator) -> Tensor:
    """Random entries of mean 0 and variance 1: "signs" or "normal"."""
    if probes not in ("signs", "normal"):
        raise ValueError(f"probes is {probes!r}; expected 'signs' or 'normal'.")
    return (signs if probes == "signs" else normal)(shape, like, generator)


def block_size(size: int, dtype: torch.dtype) -> int:
    """How many vectors of `size` elements make a block of probes."""
    return PROBES.count(size * dtype.itemsize)


def blocks(samples: int, size: int, dtype: torch.dtype) -> list[int]:
    """`samples` split into counts of vectors to multiply together."""
    step = block_size(size, dtype)
    return [min(step, samples - start) for start in range(0, samples, step)]
