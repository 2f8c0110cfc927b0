"""Curvatures along a batch's own top eigenvectors, less the bias that its own spectrum predicts."""

from __future__ import annotations

import torch
from torch import Tensor

from paraboloid.linalg.operand import check_count
from paraboloid.linalg.probes import Seed, generator_of
from paraboloid.quadratics.cross_fitting import bare
from paraboloid.quadratics.local_model import Quadratic


def shrunk_curvature(q: Quadratic, directions: Tensor, samples: int = 16, seed: Seed = 0) -> Tensor:
    """What the curvatures of all data are along a batch's top eigenvectors, estimated from that batch alone: [k].

        l_i / (1 + kappa_i / m sum_j l_j / (l_i - l_j))^2

    with the eigenvalues l without weight decay (which is added again), and kappa_i = mean_n f_n^2 / (3 (mean_n f_n)^2)
    of the m samples' own quadratic forms f_n along direction i: 1 for Gaussian samples, more where few carry the
    curvature.  The eigenvalues beyond the directions enter by the trace of the rest over l_i, from `samples` random
    vectors.  Terms of nearly equal eigenvalues, |l_j| > 3 |l_i - l_j|, are left out.

    directions  rows [k, D], the top eigenvectors of q, as `q.eigen_directions(k)` gives them

    An approximation: eigenvalues beyond the directions are taken to be small.  Its error is smaller than that of the
    batch's own curvatures on the problems that were tried; lengths of Newton steps do not gain by it.

    Raises ValueError for a quadratic whose curvature is not known sample by sample (a GGN or a Fisher is).
    Sources: Ledoit and Peche 2011 (the deformation of eigenvectors); the kurtosis is ours.
    """
    check_count("samples", samples)
    C = bare(q)
    rows = C.rows(directions)
    forms = C.sample_quadratic_forms(rows)
    values = forms.mean(1)
    decay = q.along(rows)[1] - values
    kappa = forms.square().mean(1) / (3 * values.square().clamp(min=torch.finfo(values.dtype).tiny))
    generator = generator_of(seed, rows.device)
    signs = torch.randint(2, (samples, rows.shape[1]), generator=generator, device=rows.device).to(rows) * 2 - 1
    rest = C.quadratic_forms(signs - (signs @ rows.T) @ rows).mean().clamp(min=0)
    gaps = values.unsqueeze(1) - values
    near = 3 * gaps.abs() < values.abs()  # of an eigenvalue and itself too
    spread = torch.where(near, 0.0, values / torch.where(near, 1.0, gaps)).sum(1)
    spread = (spread + rest / values.clamp(min=torch.finfo(values.dtype).tiny)).clamp(min=0)
    return values / (1 + kappa * spread / forms.shape[1]).square() + decay
