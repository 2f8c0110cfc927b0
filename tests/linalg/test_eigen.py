"""Top eigenpairs against the dense solver: outliers, repeated eigenvalues, indefinite and low-rank matrices."""

import pytest
import torch
from linalg.matrices import Counted, with_spectrum

from paraboloid.linalg import eigh, eigsh, lobpcg
from paraboloid.linalg.eigen import dense

SPECTRA = {
    "outliers": torch.cat([torch.tensor([50.0, 30, 20, 10, 8, 7, 6, 5, 4, 3]), torch.linspace(1, 0, 290)]),
    "repeated": torch.cat([torch.tensor([50.0] * 3 + [20.0] * 2 + [5.0] * 6), torch.linspace(1, 0, 289)]),
    "low rank": torch.cat([torch.arange(1.0, 6), torch.zeros(295)]),
    "indefinite": torch.linspace(-2, 1, 300),
    "negative": torch.linspace(-1, 0, 300) ** 3 - 0.1,
    "decaying": torch.exp(-torch.arange(300.0) / 8),
    "identity": torch.ones(300),
    "zero": torch.zeros(300),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("k", [1, 4, 10, 200, 300])
@pytest.mark.parametrize("name", SPECTRA)
def test_top_pairs(name, k, dtype):
    spectrum = SPECTRA[name].double()
    M = with_spectrum(spectrum, dtype)
    values, vectors = eigsh(Counted(M), k)
    eps, scale = torch.finfo(dtype).eps, max(spectrum.abs().max().item(), 1e-300)
    assert values.shape == (k,)
    assert vectors.shape == (300, k)
    assert values.dtype == vectors.dtype == dtype
    expected = spectrum.sort(descending=True).values[:k].to(dtype)
    torch.testing.assert_close(values, expected, rtol=0, atol=50 * eps ** (2 / 3) * scale)
    assert (M @ vectors - vectors * values).norm(dim=0).max() <= 2 * eps ** (2 / 3) * scale
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(k, dtype=dtype), rtol=0, atol=300 * eps)
    assert (values.diff() <= 10 * eps * scale).all()


def test_few_products_for_a_spectrum_with_outliers():
    A = Counted(with_spectrum(SPECTRA["outliers"]))
    eigsh(A, 3)
    assert A.products < 60


def test_a_large_matrix_without_its_dense_form():
    A = Counted(torch.diag(torch.cat([torch.arange(6.0, 0, -1), torch.linspace(0.9, 0, 4994)]).double()))
    values, _ = eigsh(A, 5)
    assert A.products < 150
    torch.testing.assert_close(values, torch.arange(6.0, 1, -1, dtype=torch.float64))


def test_the_seed_decides_the_start():
    A = with_spectrum(SPECTRA["decaying"])
    one, two, other = (eigsh(Counted(A), 2, seed=seed)[1] for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_a_stubborn_spectrum_falls_back_to_the_dense_matrix_when_small_and_raises_when_not():
    def stubborn(size):
        return torch.diag(1 - torch.logspace(-12, -2, size, dtype=torch.float64))

    values, _ = eigsh(Counted(stubborn(300)), 3)
    torch.testing.assert_close(values, stubborn(300).diagonal()[:3], rtol=1e-14, atol=0)
    with pytest.raises(
        torch.linalg.LinAlgError, match=r"\d of the 3 largest eigenpairs had converged after 40 products"
    ):
        eigsh(Counted(stubborn(2500)), 3, tol=1e-12, max_products=40)


def test_what_is_not_finite_raises():
    with pytest.raises(torch.linalg.LinAlgError, match="a product with A holds NaN or infinity"):
        eigsh(Counted(torch.full((300, 300), float("nan"))), 2)
    with pytest.raises(torch.linalg.LinAlgError, match="NaN or infinity; expected finite entries"):
        eigh(torch.full((3, 3), float("nan")))


def test_bad_arguments():
    A = torch.eye(5)
    for k in (0, 6, 1.5, True):
        with pytest.raises(ValueError, match=r"k is .*; expected an integer in 1..5"):
            eigsh(A, k)
    with pytest.raises(ValueError, match="tol is 0; expected a positive number"):
        eigsh(A, 1, tol=0)


def test_a_failure_is_retried_in_double(monkeypatch):
    original, tried = torch.linalg.eigh, []

    def failing(matrix):
        tried.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    values, vectors = eigh(torch.diag(torch.tensor([1.0, 3.0])))
    assert tried == [torch.float32, torch.float64]
    assert values.tolist() == [3.0, 1.0]
    assert values.dtype == vectors.dtype == torch.float32


def test_the_dense_form_is_exactly_symmetric():
    M = with_spectrum(SPECTRA["decaying"])
    A = Counted(M + 1e-13 * torch.randn(300, 300, generator=torch.Generator().manual_seed(0)))
    found = dense(A)
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found, M)
    assert A.products == 300


@pytest.mark.parametrize("k", [1, 4, 10, 300])
@pytest.mark.parametrize("name", ["outliers", "repeated", "low rank", "decaying", "zero", "identity"])
def test_blocks_find_the_same_pairs(name, k):
    spectrum = SPECTRA[name].double()
    M = with_spectrum(spectrum)
    values, vectors = lobpcg(Counted(M), k)
    eps, scale = torch.finfo(M.dtype).eps, max(spectrum.abs().max().item(), 1e-300)
    expected = spectrum.sort(descending=True).values[:k]
    torch.testing.assert_close(values, expected, rtol=0, atol=50 * eps ** (2 / 3) * scale)
    assert (M @ vectors - vectors * values).norm(dim=0).max() <= 2 * eps ** (2 / 3) * scale
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(k, dtype=M.dtype), rtol=0, atol=1e-10)


def test_a_preconditioner_helps_the_blocks():
    M = torch.diag(torch.linspace(0, 1, 400, dtype=torch.float64) ** 8) + 1e-4 * with_spectrum(
        torch.linspace(0, 1, 400)
    )
    plain, helped = Counted(M), Counted(M)
    expected, _ = lobpcg(plain, 2)
    values, _ = lobpcg(helped, 2, preconditioner=torch.diag(1 / (1.02 - M.diagonal())))
    torch.testing.assert_close(values, expected)
    assert helped.products < plain.products


def test_errors_of_the_blocks():
    M = with_spectrum(torch.linspace(0, 1, 100))
    with pytest.raises(torch.linalg.LinAlgError, match=r"not converged after 2 steps with blocks of 5; the largest"):
        lobpcg(M, 3, max_iterations=2)
    with pytest.raises(ValueError, match=r"k is 0; expected an integer in 1\.\.100"):
        lobpcg(M, 0)
    with pytest.raises(ValueError, match="tol is 0; expected a positive number"):
        lobpcg(M, 1, tol=0)
    with pytest.raises(ValueError, match=r"the preconditioner has shape \(2, 2\); expected \(100, 100\)"):
        lobpcg(M, 1, preconditioner=torch.eye(2))
    with pytest.raises(torch.linalg.LinAlgError, match="a product with A, or with the preconditioner, holds NaN"):
        lobpcg(torch.full((100, 100), float("nan")), 1)
