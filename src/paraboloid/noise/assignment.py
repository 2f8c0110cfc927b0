"""Assign samples to clusters by size times squared distance, sizes running sample by sample.

Gradient clustering minimises sum_k N_k sum_{i in k} ||g_i - C_k||^2, so a sample costs its squared distance times the
size of the cluster that it joins.  The sizes must move while samples are assigned.  Held fixed over a pass, or even
over a batch, the small clusters are too cheap for all samples at once, which herds them together.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

COUNTS = ("running", "fixed", "none")


def assign(distances: Tensor, sizes: np.ndarray, counts: str, gain: float = 1.0) -> Tensor:
    """The cluster of each sample, in order, int64 [N]; `sizes` [K] is updated in place where the counts are running.

    distances   ||g_n - C_k||^2, [N, K]
    counts      "running": k minimises (N_k + gain) distance, then N_k increases by gain; "fixed": k minimises
                N_k distance with the sizes as given; "none": the nearest centre
    """
    D = distances.detach().double().cpu().numpy()
    if counts != "running":
        return torch.from_numpy(np.argmin(D if counts == "none" else sizes * D, 1))
    found = np.empty(len(D), np.int64)
    weight, cost = sizes + gain, np.empty_like(sizes)
    multiply, smallest = np.multiply, cost.argmin  # a loop over all samples: looked up once
    for n, row in enumerate(D):
        multiply(weight, row, cost)
        found[n] = k = smallest()
        weight[k] += gain
    sizes[:] = weight - gain
    return torch.from_numpy(found)
