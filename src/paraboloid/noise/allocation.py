"""How many draws of a batch go to each stratum."""

from __future__ import annotations

import torch
from torch import Tensor

from paraboloid.linalg.operand import check_choice

ALLOCATIONS = ("one", "proportional", "neyman")


def allocate(allocation: str, sizes: Tensor, batch_size: int | None, deviations: Tensor | None = None) -> Tensor:
    """Draws m_k >= 1 from strata of N_k = `sizes` samples, int64 [K]; they add up to `batch_size` (K for "one").

    "proportional": m_k ~ N_k.  "neyman": m_k ~ N_k S_k with the `deviations` S_k, which minimises the variance
    N^-2 sum_k N_k^2 S_k^2 / m_k.  Rounded down, what is left going where it lowers the sum of (ideal)^2 / m_k most.
    """
    check_choice("allocation", allocation, ALLOCATIONS)
    K = len(sizes)
    if allocation == "one":
        if batch_size is not None and batch_size != K:
            raise ValueError(f"batch_size is {batch_size} with allocation='one', which draws one sample from "
                             f"each of the {K} non-empty clusters; leave it out, or use another one.")  # fmt: skip
        return torch.ones(K, dtype=torch.int64)
    if batch_size is None or batch_size < K:
        raise ValueError(f"batch_size is {batch_size} with allocation={allocation!r} and {K} non-empty clusters; "
                         f"expected at least {K}, one draw from each.")  # fmt: skip
    share = sizes.double()
    if allocation == "neyman":
        if deviations is None:
            raise ValueError("allocation='neyman' needs deviations, the spread of the gradients in each cluster; pass "
                             "clusters.deviations.")  # fmt: skip
        if not (torch.isfinite(deviations).all() and (deviations >= 0).all()):
            raise ValueError("deviations hold negative or infinite numbers; expected finite ones, at least 0.")
        share = share * deviations
    if share.sum() == 0:
        share = torch.ones_like(share)
    ideal = batch_size * share / share.sum()
    draws = ideal.floor().clamp(min=1).long()
    while int(draws.sum()) > batch_size:  # from raising small ones to one
        loss = torch.where(draws > 1, ideal.square() * (1 / (draws - 1).clamp(min=1) - 1 / draws), torch.inf)
        draws[loss.argmin()] -= 1
    while int(draws.sum()) < batch_size:
        draws[(ideal.square() * (1 / draws - 1 / (draws + 1))).argmax()] += 1
    return draws
