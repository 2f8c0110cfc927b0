"""Solvers that take rows of a matrix: against dense solves, in float64."""

import pytest
import torch

from paraboloid.linalg import block_solves, cg_solution, pivoted_columns, sdd
from paraboloid.linalg.dual_descent import largest_eigenvalue, safe_step
from paraboloid.linalg.row_blocks import DenseRows, row_blocks

G = torch.Generator().manual_seed(0)


def matrix(D=120, least=0.2):
    """Eigenvalues from 10 down to `least`, geometrically."""
    Q = torch.linalg.qr(torch.randn(D, D, generator=G, dtype=torch.float64)).Q
    return (Q * torch.logspace(1, torch.tensor(least).log10().item(), D, dtype=torch.float64)) @ Q.T


A = matrix()
B = torch.randn(120, 3, generator=G, dtype=torch.float64)
X = torch.linalg.solve(A, B)


@pytest.mark.parametrize("solver", [sdd, block_solves, cg_solution])
@pytest.mark.parametrize("b, x", [(B, X), (B[:, 0], X[:, 0])], ids=["matrix", "vector"])
def test_the_solution_and_its_residual(solver, b, x):
    for operator in (A, *((DenseRows(A),) if solver is not cg_solution else ())):
        found = solver(operator, b, tol=1e-6)
        assert found.x.shape == b.shape
        assert (found.x - x).norm() < 1e-4 * x.norm()
        residual = (b - A @ found.x).norm(dim=0) / b.norm(dim=0)
        assert found.residual == pytest.approx(float(residual.max()), rel=1e-3) and found.residual <= 1e-6
        assert found.history[-1][1] < found.history[0][1] and not found.notes


@pytest.mark.parametrize("solver", [sdd, block_solves])
def test_seeds_starts_and_counts_of_steps(solver):
    first, again, other = (solver(A, B, steps=7, seed=s) for s in (0, 0, 1))
    assert torch.equal(first.x, again.x) and not torch.equal(first.x, other.x)
    assert first.iterations == 7
    assert solver(A, B, x0=X, steps=1).residual < 1e-10
    assert solver(A, torch.zeros(120, dtype=A.dtype)).x.abs().max() == 0


def test_a_step_that_is_too_large_is_halved_until_it_converges():
    found = sdd(A, B, tol=1e-3, step_size=5.0)
    assert found.residual <= 1e-3 and found.step < 1 and "started again" in found.notes[0]
    assert found.step == 5.0 / 2 ** len(found.notes)


def test_the_safe_step_is_below_what_all_rows_allow():
    for size in (1, 7, 120, 500):
        step = safe_step(A, size)
        assert 0 < step <= 0.7 / 10.0 * 1.01
    assert 10 < largest_eigenvalue(A) < 10.6


def test_momentum_is_the_papers_recursion():
    """Against the recursion in v and x as it is written, all rows at once."""
    step, rho = 0.01, 0.9
    x = v = torch.zeros_like(B)
    for _ in range(30):
        v = rho * v - step * (A @ (x + rho * v) - B)
        x = x + v
    # The average begins to lag behind the iterate after a hundred steps.
    found = sdd(A, B, steps=30, step_size=step, batch_size=120)
    torch.testing.assert_close(found.x, x)


def test_pivoted_columns_approximate_from_below():
    low = matrix(least=1e-6)
    found = pivoted_columns(low, low.diagonal(), 40)
    left = low - found.F @ found.F.T
    assert found.F.shape == (120, 40) and len(found.pivots.unique()) == 40
    assert torch.linalg.eigvalsh(left)[0] > -1e-10
    assert found.left == pytest.approx(float(left.trace() / low.trace()))
    best = torch.linalg.eigvalsh(low)[:80].sum() / low.trace()
    assert best < found.left < 8 * best  # a matrix without any columns that stand out
    torch.testing.assert_close(left[found.pivots], torch.zeros(40, 120, dtype=A.dtype), atol=1e-9, rtol=0)
    nystrom = found.nystrom()
    torch.testing.assert_close((nystrom.vectors * nystrom.values) @ nystrom.vectors.T, found.F @ found.F.T)
    assert pivoted_columns(low, low.diagonal(), 120, tol=0.1).left <= 0.1


def test_the_preconditioner_saves_iterations():
    low = matrix(least=1e-6)
    system = low + 1e-3 * torch.eye(120, dtype=A.dtype)
    P = pivoted_columns(low, low.diagonal(), 60).nystrom().preconditioner(1e-3)
    plain, helped = cg_solution(system, B), cg_solution(system, B, preconditioner=P)
    assert helped.iterations < 0.6 * plain.iterations
    torch.testing.assert_close(helped.x, torch.linalg.solve(system, B), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("damping", [1e-2, 1e-4, 3e-6, 1e-6, 1e-9])
def test_the_inverse_of_the_columns_is_positive_where_rounding_hides_the_damping(damping):
    low = matrix(least=1e-8).float()
    found = pivoted_columns(low, low.diagonal(), 60)
    P = found.preconditioner(damping)
    dense = (P @ torch.eye(120)).double()
    torch.testing.assert_close(dense, dense.T, rtol=0, atol=1e-5)
    F = found.F.double()
    values, U = torch.linalg.eigh(F @ F.T)
    told = (U * (dense @ U)).sum(0) * (values + damping)  # 1 by 1: the inverse, to a factor
    told = told / told[-60:].median()
    assert float(torch.linalg.eigvalsh((dense + dense.T) / 2)[0]) > 0
    assert float(told[-60:].min()) > 0.2 and float(told[-60:].max()) < 12


def test_repeated_columns_are_taken_once():
    rows = torch.randn(30, 4, generator=G, dtype=torch.float64)
    low = rows @ rows.T  # rank 4
    found = pivoted_columns(low, low.diagonal(), 20)
    assert found.F.shape[1] == 4 and found.left < 1e-12
    with pytest.raises(torch.linalg.LinAlgError, match="the trace of A is 0; expected a positive one"):
        pivoted_columns(torch.zeros(3, 3), torch.zeros(3), 2)


@pytest.mark.parametrize("solver", [sdd, block_solves, cg_solution])
def test_of_many_rows_some_tell_the_residual(solver, monkeypatch):
    monkeypatch.setattr("paraboloid.linalg.row_blocks.LARGE", 100)
    monkeypatch.setattr("paraboloid.linalg.row_blocks.LOOKED_AT", 60)
    found = solver(DenseRows(A), B, 1e-6, 4)
    measured = float(((B - A @ found.x).norm(dim=0) / B.norm(dim=0)).max())
    assert found.residual == pytest.approx(measured, rel=0.3) and found.residual != measured


def test_a_matrix_that_no_step_suits_is_refused():
    with pytest.raises(torch.linalg.LinAlgError, match="far below what is safe; expected a positive definite A"):
        sdd(A - 5 * torch.eye(120, dtype=A.dtype), B)


def test_errors():
    with pytest.raises(ValueError, match=r"A is a Tensor of shape \(3, 4\); expected a square tensor"):
        row_blocks(torch.zeros(3, 4))
    with pytest.raises(torch.linalg.LinAlgError, match="a block of 3 rows of A has the eigenvalue -1"):
        block_solves(-torch.eye(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"momentum is 1.0; expected a number in \[0, 1\)"):
        sdd(A, B, momentum=1.0)
    with pytest.raises(ValueError, match="step_size is -1; expected a positive number"):
        sdd(A, B, step_size=-1)
