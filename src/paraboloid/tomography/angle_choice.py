"""Which angle to measure next: the one that the posterior would learn most from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.operand import check_count
from paraboloid.tomography.beams import FanBeam, ParallelBeam
from paraboloid.tomography.image_posterior import ImagePosterior
from paraboloid.tomography.sinograms import as_numbers


def best_angles(posterior: ImagePosterior, candidates: Any, count: int = 1) -> tuple[list[int], Tensor]:
    """The `count` candidates (angles in radians) to measure, in order, and the gain of each when it is chosen.

    The gain of an angle a is what its measurements tell about the image, in nats: log det(I + A_a P A_a^T / s2) / 2,
    with P the image's covariance given the data and the angles chosen before; a Gaussian's covariance does not depend
    on what will be measured.  From samples P has at most their number as its rank, and gains are too small alike.

    Raises ValueError for an operator that has no other angles, and more angles than candidates.  Source: Barbano et al.
    2022, arXiv:2207.05714.
    """
    if not isinstance(posterior, ImagePosterior):
        raise ValueError(f"posterior is a {type(posterior).__name__}; expected what linearised returns.")
    A = posterior.fit.A
    if not isinstance(A, ParallelBeam | FanBeam):
        raise ValueError(f"the reconstruction's A is a {type(A).__name__}; expected a ParallelBeam or a FanBeam, which "
                         "can look from other angles.")  # fmt: skip
    angles = as_numbers("candidates", candidates, "[angles], in radians").cpu().double().reshape(-1)
    check_count("count", count, most=len(angles))
    root = posterior.root().double().view(-1, *posterior.mean.shape)
    views = [A.at(angle.view(1)) for angle in angles]
    chosen: list[int] = []
    gains = []
    for _ in range(count):
        seen = {i: (view @ root).flatten(1) for i, view in enumerate(views) if i not in chosen}
        gain = {i: _gain(B, posterior.noise_variance) for i, B in seen.items()}
        best = max(gain, key=lambda i: gain[i])
        root = _given(root, seen[best], posterior.noise_variance)
        chosen.append(best)
        gains.append(gain[best])
    return chosen, torch.tensor(gains)


def _gain(B: Tensor, s2: float) -> float:
    """log det(I + B^T B / s2) / 2 for B [R, m]."""
    return float(torch.linalg.svdvals(B).square().div(s2).log1p().sum() / 2)


def _given(root: Tensor, B: Tensor, s2: float) -> Tensor:
    """The root F of P = F^T F after B = F A^T was measured: (I + B B^T / s2)^-1/2 F."""
    U, S, _ = torch.linalg.svd(B, full_matrices=False)
    shrink = 1 - (1 + S.square() / s2).rsqrt()
    flat = root.flatten(1)
    return (flat - U @ (shrink.unsqueeze(1) * (U.T @ flat))).view_as(root)
