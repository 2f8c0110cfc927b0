"""Products by one triangle: those of the whole matrix, whatever lies above."""

import pytest
import torch

from paraboloid.linalg import lower_triangle


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("N", [1, 2, 7, 300])
def test_the_product_is_that_of_the_symmetric_matrix(N, dtype):
    g = torch.Generator().manual_seed(0)
    A, v = torch.randn(N, N, generator=g, dtype=dtype), torch.randn(N, 3, generator=g, dtype=dtype)
    expected = (A.tril() + A.tril(-1).T).double() @ v[:, 1].double()
    A[torch.ones(N, N).triu(1).bool()] = float("nan")
    found = lower_triangle.product(A, v[:, 1])
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=1e-4 if dtype == torch.float32 else 1e-12, atol=1e-5)


def test_it_is_for_the_types_that_blas_knows():
    assert lower_triangle.multiplies(torch.float32, torch.device("cpu"))
    assert not lower_triangle.multiplies(torch.bfloat16, torch.device("cpu"))
    assert not lower_triangle.multiplies(torch.float32, torch.device("meta"))
