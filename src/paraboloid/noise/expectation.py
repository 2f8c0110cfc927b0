"""The exact variance of stratified sampling, without drawing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Output, Samples
from paraboloid.losses import LossFunction
from paraboloid.noise.gradients import Gradients
from paraboloid.noise.moments import moments


class Strata:
    """What the variance of any stratified estimate follows from: sizes N_k, and spreads sum_{i in k} ||g_i - C_k||^2.

    `sizes` int64 [K], `spreads` float64 [K] around the exact means C_k of the clusters; `deviations` [K] are the root
    mean squares, for Neyman allocation.
    """

    def __init__(self, sizes: Tensor, spreads: Tensor):
        self.sizes, self.spreads = sizes, spreads

    @property
    def deviations(self) -> Tensor:
        return (self.spreads / self.sizes.clamp(min=1)).sqrt()

    def variance(self, draws: Tensor | None = None) -> float:
        """E ||g^ - g||^2 = N^-2 sum_k N_k spread_k / m_k of g^ = 1/N sum_k N_k (mean of m_k draws from cluster k).

        Draws are with replacement; `draws` [K] are the m_k, default one from each.
        Source: Proposition 3.1 of Faghri et al. 2020, arXiv:2007.04532.
        """
        m = torch.ones_like(self.sizes) if draws is None else draws
        N = int(self.sizes.sum())
        filled = self.sizes > 0
        return float((self.sizes * self.spreads / m)[filled].sum()) / N**2


def strata(
    model: nn.Module, loss_fn: LossFunction, dataset: Samples, assignments: Tensor, *, batch_size: int = 256,
    output: Output | None = None,
) -> Strata:  # fmt: skip
    """Sizes and exact spreads of the clusters, from one pass over the data; memory is a few vectors [D].

    With one cluster for all, spread / N is the trace of the covariance of single-sample gradients.
    """
    data = Gradients(model, loss_fn, dataset, output=output)
    assignments = torch.as_tensor(assignments, device="cpu")
    if assignments.shape != (data.samples,):
        raise ValueError(f"assignments have shape {tuple(assignments.shape)}; expected [{data.samples}], the cluster "
                         "of each sample.")  # fmt: skip
    sizes = torch.bincount(assignments)
    spreads = torch.zeros(len(sizes), dtype=torch.float64, device="cpu")
    for k in torch.nonzero(sizes).flatten().tolist():
        mine = data.batches(torch.nonzero(assignments == k).flatten(), batch_size)
        found = moments(model, data.loss, (batch for _, batch in mine), output)
        spreads[k] = sum(float(v.sum()) for v in found.squares.values())
    return Strata(sizes, spreads)
