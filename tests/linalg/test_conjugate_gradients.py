"""Conjugate gradients against dense solves; what is truncated, what raises."""

import pytest
import torch
from linalg.matrices import Counted, with_spectrum

from paraboloid.linalg import cg

M = with_spectrum(torch.logspace(0, 4, 60))
B = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("b", [B, B[:, 0]], ids=["columns", "vector"])
def test_solutions_meet_the_tolerance(b):
    for tol in (1e-3, 1e-10):
        residual = (M @ cg(M, b, tol=tol) - b).norm(dim=0) / b.norm(dim=0)
        assert (residual <= 1.01 * tol).all()


def test_it_is_exact_after_as_many_iterations_as_distinct_eigenvalues():
    A = with_spectrum([1.0] * 20 + [5.0] * 20 + [9.0] * 20)
    torch.testing.assert_close(cg(A, B, tol=0, max_iterations=3), torch.linalg.solve(A, B), rtol=1e-12, atol=1e-12)


def test_columns_do_not_disturb_each_other():
    """A column that is done early stays where it is while the others go on."""
    easy = torch.linalg.eigh(M).eigenvectors[:, 0]
    together = cg(M, torch.stack([easy, B[:, 0]], 1), tol=1e-8)
    torch.testing.assert_close(together[:, 0], cg(M, easy, tol=1e-8))
    torch.testing.assert_close(together[:, 1], cg(M, B[:, 0], tol=1e-8))


def test_a_preconditioner_saves_products():
    M = torch.diag(torch.logspace(0, 6, 60, dtype=torch.float64)) + 0.1 * with_spectrum(torch.linspace(0, 1, 60))
    plain, helped = Counted(M), Counted(M)
    cg(plain, B[:, 0])
    x = cg(helped, B[:, 0], preconditioner=torch.diag(1 / M.diagonal()))
    assert helped.products < plain.products / 4
    assert (M @ x - B[:, 0]).norm() <= 1e-5 * B[:, 0].norm()


def test_a_number_of_iterations_is_a_truncation():
    A = Counted(M)
    x = cg(A, B[:, 0], max_iterations=2)
    assert A.products == 2
    krylov = torch.linalg.qr(torch.stack([B[:, 0], M @ B[:, 0]], 1)).Q  # the iterate minimises over this space
    expected = krylov @ torch.linalg.solve(krylov.T @ M @ krylov, krylov.T @ B[:, 0])
    torch.testing.assert_close(x, expected)
    assert torch.equal(cg(M, B, max_iterations=0), torch.zeros_like(B))


def test_zero_needs_no_product():
    A = Counted(M)
    assert torch.equal(cg(A, torch.zeros(60, dtype=torch.float64)), torch.zeros(60, dtype=torch.float64))
    assert A.products == 0


def test_single_precision_stays_single():
    x = cg(M.float(), B.float(), tol=1e-4)
    assert x.dtype == torch.float32
    assert ((M @ x.double() - B).norm(dim=0) <= 1e-3 * B.norm(dim=0)).all()


def test_what_does_not_converge_raises():
    hopeless = with_spectrum(torch.logspace(-30, 0, 20))
    with pytest.raises(
        torch.linalg.LinAlgError, match=r"after 300 iterations at a relative residual|met the curvature"
    ):
        cg(hopeless, B[:20, 0], tol=1e-15)


@pytest.mark.parametrize("lowest", [-1.0, 0.0])
def test_what_is_not_positive_definite_raises(lowest):
    A = torch.diag(torch.tensor([lowest, 1.0]))
    with pytest.raises(torch.linalg.LinAlgError, match="iteration 0 of conjugate gradients met the curvature"):
        cg(A, torch.tensor([1.0, 0.0]))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"b has shape \(5,\); expected \[60\] or \[60, K\] for A of shape \(60, 60\)"):
        cg(M, torch.zeros(5))
    with pytest.raises(ValueError, match=r"b has dtype torch.int64"):
        cg(M, torch.zeros(60, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"tol is -1; expected"):
        cg(M, B, tol=-1)
    with pytest.raises(ValueError, match=r"max_iterations is -1; expected an integer of at least 0"):
        cg(M, B, max_iterations=-1)
    with pytest.raises(ValueError, match=r"the preconditioner has shape \(2, 2\); expected \(60, 60\)"):
        cg(M, B, preconditioner=torch.eye(2))
