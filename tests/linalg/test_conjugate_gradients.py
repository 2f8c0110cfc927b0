"""Conjugate gradients against dense solves; what is truncated, what raises."""

import pytest
import torch
from linalg.matrices import Counted, with_spectrum

from paraboloid.linalg import cg, cg_iterates

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


@pytest.mark.parametrize("b", [B, B[:, 0]], ids=["columns", "vector"])
def test_a_start_near_the_solution_saves_products(b):
    solution = torch.linalg.solve(M, b)
    plain, helped = Counted(M), Counted(M)
    cg(plain, b, tol=1e-8)
    x = cg(helped, b, tol=1e-8, x0=solution * (1 + 1e-6))
    torch.testing.assert_close(x, solution, rtol=1e-5, atol=1e-7)
    assert helped.products < plain.products
    assert torch.equal(cg(M, b, x0=b, max_iterations=0), b)


def test_a_diagonal_preconditioner_is_a_vector():
    d = 1 / M.diagonal()
    torch.testing.assert_close(
        cg(M, B, preconditioner=d, max_iterations=5), cg(M, B, preconditioner=torch.diag(d), max_iterations=5)
    )


def phi(x, b):
    return x @ M @ x / 2 - b @ x


def test_martens_stops_where_the_quadratic_stands_still():
    """The first i > k = max(10, i // 10) with phi(x_i) < 0 and (phi(x_i) - phi(x_{i-k})) / phi(x_i) < k eps."""
    b, progress = B[:, 0], 1e-2
    values = [phi(cg(M, b, tol=0, max_iterations=i), b).item() for i in range(61)]
    k = 10
    expected = next(i for i in range(k + 1, 61) if (values[i] - values[i - k]) / values[i] < k * progress)
    assert 11 < expected < 60
    A = Counted(M)
    x = cg(A, b, tol=0, stopping="martens", progress=progress)
    assert A.products == expected
    assert phi(x, b).item() == pytest.approx(values[expected])
    both = cg(M, torch.stack([b, 1e3 * B[:, 1]], 1), tol=0, stopping="martens", progress=progress)
    assert phi(both[:, 0], b).item() == pytest.approx(values[expected], rel=progress)


def test_martens_stops_at_the_solution_too():
    b = M @ torch.linalg.eigh(M).eigenvectors[:, 0]
    torch.testing.assert_close(cg(M, b, stopping="martens"), torch.linalg.solve(M, b), rtol=1e-5, atol=1e-5)


def test_iterates_to_go_back_to():
    b = B[:, 0]
    path = cg_iterates(M, b, max_iterations=20, stopping="residual")
    assert path.steps == [1, 2, 3, 4, 6, 8, 11, 15, 20]
    assert (path.iterations, path.flat) == (20, None)
    for step, x, value in zip(path.steps, path.x, path.values, strict=True):
        torch.testing.assert_close(x, cg(M, b, tol=0, max_iterations=step))
        torch.testing.assert_close(value, phi(x, b))
    assert path.residual == pytest.approx(((M @ path.x[-1] - b).norm() / b.norm()).item())
    every = cg_iterates(M, b, max_iterations=5, spacing=1.01)
    assert every.steps == [1, 2, 3, 4, 5]
    start = torch.linalg.solve(M, b)
    at_once = cg_iterates(M, b, x0=start, tol=1e-6)
    assert (at_once.steps, at_once.iterations) == ([0], 0)
    assert torch.equal(at_once.x[0], start)


def test_iterates_end_at_curvature_that_is_not_positive():
    A = torch.diag(torch.tensor([4.0, 1.0, -1.0], dtype=torch.float64))
    path = cg_iterates(A, torch.tensor([1.0, 1.0, 0.1], dtype=torch.float64))
    assert path.flat is not None
    assert path.flat <= 0
    assert path.iterations == path.steps[-1] == len(path.x) - (path.steps[0] == 0)
    assert (path.values < 0).all()
    at_once = cg_iterates(A, torch.tensor([0.0, 0, 1], dtype=torch.float64))
    assert (at_once.steps, at_once.flat) == ([0], -1.0)
    assert not at_once.x.any()


def test_what_is_not_finite_raises():
    with pytest.raises(torch.linalg.LinAlgError, match="a product with A, or with the preconditioner, holds NaN"):
        cg(torch.full((2, 2), float("nan")), torch.ones(2))


def test_bad_arguments_of_the_newer_kind():
    with pytest.raises(ValueError, match="stopping is 'never'; expected 'residual' or 'martens'"):
        cg(M, B, stopping="never")
    with pytest.raises(ValueError, match="progress is 0; expected a positive number"):
        cg(M, B, progress=0)
    with pytest.raises(ValueError, match=r"x0 has shape \(60,\); expected that of b, \(60, 3\)"):
        cg(M, B, x0=B[:, 0])
    with pytest.raises(ValueError, match="the preconditioner's diagonal has 3 entries; expected 60"):
        cg(M, B, preconditioner=torch.ones(3))
    with pytest.raises(ValueError, match=r"b has shape \(60, 3\); expected \[60\]: one right-hand side"):
        cg_iterates(M, B)
    with pytest.raises(ValueError, match="spacing is 1; expected a number above 1"):
        cg_iterates(M, B[:, 0], spacing=1)
