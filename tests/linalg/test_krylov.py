"""The Lanczos process: A Q = Q T + remainder, orthonormal to rounding, past invariant subspaces too."""

import pytest
import torch
from linalg.matrices import Counted, with_spectrum

from paraboloid.linalg import lanczos


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("k", [1, 10, 60])
def test_decomposition(k, dtype):
    M = with_spectrum(torch.logspace(-6, 3, 60), dtype)
    A = Counted(M)
    T, Q = lanczos(A, k)
    eps = torch.finfo(dtype).eps
    assert A.products == k
    assert T.shape == (k, k)
    assert Q.shape == (60, k)
    torch.testing.assert_close(Q.T @ Q, torch.eye(k, dtype=dtype), rtol=0, atol=100 * eps)
    remainder = M @ Q - Q @ T
    if k > 1:
        assert remainder[:, : k - 1].abs().max() <= 100 * eps * 1e3
    assert torch.equal(T, T.T)
    assert torch.equal(T, torch.triu(torch.tril(T, 1), -1))


def test_all_steps_give_the_spectrum():
    values = torch.linspace(-1, 2, 40, dtype=torch.float64)
    T, _ = lanczos(with_spectrum(values), 40)
    torch.testing.assert_close(torch.linalg.eigvalsh(T), values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_it_goes_on_where_a_subspace_is_exhausted(dtype):
    M = with_spectrum([3.0] * 20 + [1.0] * 20, dtype)
    T, Q = lanczos(M, 10)
    torch.testing.assert_close(Q.T @ Q, torch.eye(10, dtype=dtype), rtol=0, atol=100 * torch.finfo(dtype).eps)
    torch.testing.assert_close(Q.T @ M @ Q, T, rtol=0, atol=1e4 * torch.finfo(dtype).eps)
    assert (torch.linalg.eigvalsh(T) > 0.99).all()
    T, Q = lanczos(torch.zeros(5, 5, dtype=dtype), 5)
    assert torch.equal(T, torch.zeros(5, 5, dtype=dtype))
    torch.testing.assert_close(Q.T @ Q, torch.eye(5, dtype=dtype))


def test_seeds_and_generators():
    M = with_spectrum(torch.linspace(0, 1, 20))
    state = torch.get_rng_state()
    assert torch.equal(lanczos(M, 3, seed=4)[1], lanczos(M, 3, seed=torch.Generator().manual_seed(4))[1])
    assert not torch.equal(lanczos(M, 3, seed=4)[1], lanczos(M, 3, seed=5)[1])
    assert torch.equal(state, torch.get_rng_state())


def test_more_steps_than_dimensions():
    with pytest.raises(ValueError, match=r"k is 6; expected an integer in 1..5"):
        lanczos(torch.eye(5), 6)
