"""Polar factors against singular value decompositions."""

import pytest
import torch

from paraboloid.linalg import polar
from paraboloid.linalg.operand import LinAlgError
from paraboloid.linalg.polar import LEAST, polar_factors

SHAPES = [(3, 5), (5, 3), (3, 5), (4, 4), (1, 6), (90, 200), (200, 90)]


def drawn(shapes=SHAPES, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def wanted(X, least=LEAST):
    U, S, V = torch.linalg.svd(X.double(), full_matrices=False)
    return (U * (S / (S.square() + least * S[0].square()).sqrt())) @ V


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-10), (torch.float32, 2e-4)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_every_singular_value_becomes_one(dtype, tol, scale):
    matrices = drawn(dtype=dtype)
    for X, D in zip(matrices, polar_factors([scale * X for X in matrices]), strict=True):
        assert D.dtype == dtype
        torch.testing.assert_close(D.double(), wanted(X), rtol=0.0, atol=tol)


def test_small_singular_values_grow_less():
    U, V = (torch.linalg.qr(X).Q for X in drawn([(4, 4), (6, 4)]))
    X = (U * torch.tensor([1.0, 1e-1, 1e-3, 1e-6], dtype=torch.float64)) @ V.T
    (D,) = polar_factors([X])
    torch.testing.assert_close(torch.linalg.svdvals(D), torch.linalg.svdvals(wanted(X)), rtol=1e-6, atol=1e-9)
    assert (torch.linalg.svdvals(D)[:3] > 0.7).all()
    (D,) = polar_factors([X], least=1e-2)
    torch.testing.assert_close(D, wanted(X, 1e-2), rtol=0.0, atol=1e-10)


def test_zero_and_low_rank():
    low = drawn([(4, 2)])[0] @ drawn([(2, 7)])[0]
    zero, D = polar_factors([torch.zeros(4, 7, dtype=torch.float64), low])
    assert torch.equal(zero, torch.zeros(4, 7, dtype=torch.float64))
    torch.testing.assert_close(D, wanted(low), rtol=0.0, atol=1e-6)
    assert polar_factors([]) == []


def test_in_double_where_float32_does_not_converge(monkeypatch):
    matrices, eigh = drawn(dtype=torch.float32), torch.linalg.eigh

    def fails(A):
        if A.dtype == torch.float32:
            raise LinAlgError("did not converge")
        return eigh(A)

    monkeypatch.setattr(polar.torch.linalg, "eigh", fails)
    for X, D in zip(matrices, polar_factors(matrices), strict=True):
        assert D.dtype == torch.float32
        torch.testing.assert_close(D.double(), wanted(X), rtol=0.0, atol=2e-4)


def test_low_rank_in_float32():
    """LAPACK's eigenvalues of such a product may be NaN, without an error."""
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        X = torch.randn(200, 3, generator=g) @ torch.randn(3, 101, generator=g)
        (D,) = polar_factors([X])
        torch.testing.assert_close(torch.linalg.svdvals(D.double())[:3], torch.ones(3).double(), rtol=0.0, atol=1e-3)


def test_nan_eigenvalues_are_found_in_double(monkeypatch):
    matrices, eigh = drawn(dtype=torch.float32), torch.linalg.eigh

    def spoils(A):
        values, vectors = eigh(A)
        return (values * torch.nan, vectors) if A.dtype == torch.float32 else (values, vectors)

    monkeypatch.setattr(polar.torch.linalg, "eigh", spoils)
    for X, D in zip(matrices, polar_factors(matrices), strict=True):
        torch.testing.assert_close(D.double(), wanted(X), rtol=0.0, atol=2e-4)
