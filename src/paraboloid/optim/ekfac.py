"""KFAC with exact eigenvalues."""

from __future__ import annotations

from paraboloid.optim.kfac import KFAC


class EKFAC(KFAC):
    """`KFAC` with exact eigenvalues along the eigenvectors of its factors:

        theta <- theta - lr U (S + damping)^-1 U^T g

    S are running averages of a sum_{v,n} (u . (J_n^T v) w)^2, measured in every step that measures factors; when the
    eigenvectors are renewed, S is carried over: the diagonal of the old matrix in the new basis.  Damping is exact, so
    `split` has no effect.  With several passes in a step that renews eigenvectors (gradient accumulation), all their
    layer inputs and gradients are kept until then.  Everything else is as in `KFAC`.

    Source: George et al. 2018, arXiv:1806.03884.
    """

    exact_values = True
