"""The Nystrom approximation against its definition, and what its preconditioner saves."""

import pytest
import torch
from linalg.matrices import Counted, with_spectrum

from paraboloid.linalg import cg, nystrom

DECAYING = with_spectrum(torch.exp(-torch.arange(120.0) / 5))


@pytest.mark.parametrize("rank", [1, 15, 120])
def test_its_definition(rank):
    """A W (W^T A W)^-1 W^T A for the Gaussian W that it drew: for orthonormal W the same."""
    A = Counted(with_spectrum(torch.linspace(1, 3, 120)))
    found = nystrom(A, rank, seed=2)
    assert A.products == rank
    W = torch.randn(120, rank, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    Y = A.matrix @ W
    expected = Y @ torch.linalg.solve(W.T @ Y, Y.T)
    torch.testing.assert_close(found @ torch.eye(120, dtype=torch.float64), expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found @ W[:, 0], expected @ W[:, 0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(rank, dtype=torch.float64))
    assert (found.values.diff() <= 1e-12).all()


def test_it_is_exact_for_its_rank_and_near_where_the_spectrum_decays():
    low = with_spectrum([5.0, 3, 1] + [0.0] * 57)
    torch.testing.assert_close(nystrom(low, 5) @ torch.eye(60, dtype=torch.float64), low, rtol=0, atol=1e-7)
    off = torch.linalg.eigvalsh(DECAYING - nystrom(DECAYING, 40) @ torch.eye(120, dtype=torch.float64))
    assert off[0] > -1e-7  # at most A
    assert off[-1] < 0.02
    assert not nystrom(torch.zeros(5, 5), 2).values.any()


def test_its_preconditioner():
    damping = 1e-6
    P = nystrom(DECAYING, 40).preconditioner(damping)
    U, values = nystrom(DECAYING, 40).vectors, nystrom(DECAYING, 40).values
    inverse = (U * ((values[-1] + damping) / (values + damping))) @ U.T + torch.eye(120) - U @ U.T
    torch.testing.assert_close(P @ torch.eye(120, dtype=torch.float64), inverse)
    b = torch.randn(120, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = DECAYING + damping * torch.eye(120, dtype=torch.float64)
    plain, helped = Counted(A), Counted(A)
    cg(plain, b, tol=1e-8)
    x = cg(helped, b, tol=1e-8, preconditioner=nystrom(DECAYING, 60).preconditioner(damping))
    assert (A @ x - b).norm() <= 1e-7 * b.norm()
    assert helped.products < plain.products / 3


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"rank is 121; expected an integer in 1\.\.120"):
        nystrom(DECAYING, 121)
    with pytest.raises(
        torch.linalg.LinAlgError, match=r"W\^T A W has the eigenvalue -.*; expected a positive semi-def"
    ):
        nystrom(-DECAYING, 3)
    with pytest.raises(torch.linalg.LinAlgError, match="a product with A holds NaN or infinity"):
        nystrom(torch.full((3, 3), float("nan")), 1)
    with pytest.raises(ValueError, match="damping is 0; expected a positive number"):
        nystrom(DECAYING, 3).preconditioner(0)
