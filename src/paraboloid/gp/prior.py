"""Functions drawn from a kernel's prior, as sums of random features: they have a value everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from paraboloid.gp.kernel import Kernel

ROWS = 2048  # inputs whose features are formed at a time
SHARED = 16  # functions that share their features


class PriorFunctions:
    """f_s(x) = phi(x).w_s with standard normal w_s: E[f_s(x) f_s(z)] = k(x, z), S functions.

    Groups of 16 functions have features of their own, so that what is wrong with one set of them averages out over the
    groups; a function's value at an input depends on nothing else.
    """

    def __init__(self, kernel: Kernel, count: int, features: int, x: Tensor, generator: torch.Generator):
        self.count, self.groups, self.weights = count, [], []
        for start in range(0, count, SHARED):
            phi = kernel.features(features, x.shape[1], generator, x)
            columns = phi(x[:1])[0].numel()
            w = torch.randn(
                columns, min(SHARED, count - start), generator=generator, device=generator.device, dtype=x.dtype
            )
            self.groups.append(phi)
            self.weights.append(w.to(x.device))

    def __call__(self, x: Tensor) -> Tensor:
        """[S, M]."""
        out = x.new_empty(self.count, len(x))
        for i in range(0, len(x), ROWS):
            rows, start = x[i : i + ROWS], 0
            for phi, w in zip(self.groups, self.weights, strict=True):
                out[start : start + w.shape[1], i : i + ROWS] = (phi(rows).flatten(1) @ w).T
                start += w.shape[1]
        return out
