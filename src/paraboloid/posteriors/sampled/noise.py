"""The random numbers of sample-then-optimise, each a function of the seed and of what it belongs to.

So they do not depend on batches, on which process draws them, or on how often they are asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

PRIOR, DATA, ORDER = 1, 2, 3
MASK = 2**64 - 1


def stream(seed: int, kind: int, index: int) -> int:
    """A seed for torch from three numbers, by two rounds of SplitMix64's finaliser."""
    z = seed & MASK
    for part in (kind, index):
        z = (z + 0x9E3779B97F4A7C15 * (part + 1)) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        z ^= z >> 31
    return z >> 1


def of_prior(seed: int, sample: int, size: int, like: Tensor) -> Tensor:
    """theta_0 of one posterior sample, standard normal [D]."""
    generator = torch.Generator(like.device).manual_seed(stream(seed, PRIOR, sample))
    return torch.randn(size, generator=generator, dtype=like.dtype, device=like.device)


def of_data(seed: int, start: int, count: int, samples: range, columns: int, like: Tensor) -> Tensor:
    """eps of data points start, ..., start + count - 1, standard normal [len(samples), count, columns].

    The same for a data point in whatever batch it comes, and for a posterior sample whatever others are drawn.
    """
    found, generator = like.new_empty(len(samples), count, columns), torch.Generator(like.device)
    for n in range(count):
        generator.manual_seed(stream(seed, DATA, start + n))
        drawn = torch.randn(samples.stop, columns, generator=generator, dtype=like.dtype, device=like.device)
        found[:, n] = drawn[samples.start :: samples.step]
    return found
