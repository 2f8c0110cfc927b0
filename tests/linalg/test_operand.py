"""What is an operator: torch tensors, NumPy and SciPy objects, anything with @ and .shape."""

import numpy as np
import pytest
import scipy.sparse
import torch
from linalg.matrices import Counted, with_spectrum
from scipy.sparse.linalg import aslinearoperator

from paraboloid.linalg import cg, eigsh, hutchinson_trace, lanczos
from paraboloid.linalg.operand import Operand

M = with_spectrum(torch.linspace(1, 3, 30))


class Bare:
    """@ and .shape and nothing else."""

    shape = (30, 30)

    def __matmul__(self, v):
        return M.to(v.dtype) @ v


KINDS = {
    "torch": M,
    "torch sparse": M.to_sparse(),
    "counted": Counted(M),
    "numpy": M.numpy(),
    "scipy sparse": scipy.sparse.csr_matrix(M.numpy()),
    "scipy operator": aslinearoperator(M.numpy()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_multiplied(kind):
    A = Operand(KINDS[kind])
    assert (A.size, A.dtype, A.device.type) == (30, torch.float64, "cpu")
    v = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(A @ v, M @ v)
    torch.testing.assert_close(A @ v[:, 0], M @ v[:, 0])
    T, Q = lanczos(KINDS[kind], 5)
    torch.testing.assert_close(Q.T @ M @ Q, T)
    torch.testing.assert_close(M @ cg(KINDS[kind], v, tol=1e-12), v)
    assert abs(hutchinson_trace(KINDS[kind], 200) - 60) < 3
    assert eigsh(KINDS[kind], 1)[0].item() == pytest.approx(3)


def test_an_object_without_a_dtype_takes_the_default_one():
    assert Operand(Bare()).dtype == torch.float32
    assert eigsh(Bare(), 1)[0].item() == pytest.approx(3, rel=1e-5)


def test_numpy_vectors_give_numpy_solutions():
    b = np.ones(30)
    x = cg(M.numpy(), b, tol=1e-12)
    assert isinstance(x, np.ndarray)
    np.testing.assert_allclose(M.numpy() @ x, b, rtol=1e-9)


def test_integer_matrices_are_taken_in_double():
    assert Operand(np.eye(3, dtype=np.int64)).dtype == torch.float64


@pytest.mark.parametrize("A", [3, torch.zeros(3), torch.zeros(3, 4), "matrix", np.zeros((2, 3))])
def test_what_is_no_operator(A):
    with pytest.raises(ValueError, match="expected a square operator"):
        Operand(A)


def test_complex_operators():
    with pytest.raises(ValueError, match=r"A has dtype torch.complex64; expected a real operator"):
        Operand(torch.zeros(2, 2, dtype=torch.complex64))


def test_operators_of_linear_operator():
    operators = pytest.importorskip("linear_operator.operators", reason="install it with: make peers")
    d = torch.linspace(1, 3, 30, dtype=torch.float64)
    U = torch.randn(30, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    A = operators.RootLinearOperator(U).add_diagonal(d)
    dense = U @ U.T + torch.diag(d)
    b = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(Operand(A) @ b, dense @ b)
    torch.testing.assert_close(cg(A, b, tol=1e-12), torch.linalg.solve(dense, b))
    torch.testing.assert_close(
        cg(A, b, tol=1e-12, preconditioner=operators.DiagLinearOperator(1 / d)), cg(dense, b, tol=1e-12)
    )
    torch.testing.assert_close(eigsh(A, 2)[0], torch.linalg.eigvalsh(dense).flip(0)[:2])
    assert abs(hutchinson_trace(A, 300) - dense.trace()) < 5 * hutchinson_trace(A, 300).standard_error
