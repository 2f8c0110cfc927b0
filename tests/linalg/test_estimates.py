"""Stochastic traces, diagonals and densities: within their own standard errors, and counting their products."""

import math
import pickle

import numpy as np
import pytest
import torch
from linalg.matrices import Counted, with_spectrum

import paraboloid as pb
from paraboloid.linalg import (
    Estimate,
    diagonal,
    hutchinson_trace,
    hutchpp_trace,
    lsmr,
    neumann,
    spectral_density,
    squared_frobenius,
    xdiag,
    xtrace,
)

TRACES = [hutchinson_trace, hutchpp_trace, xtrace]
SPECTRA = {
    "decaying": torch.exp(-torch.arange(80.0) / 4),
    "flat": torch.linspace(1, 2, 80),
    "indefinite": torch.linspace(-1, 2, 80),
    "low rank": torch.cat([torch.arange(1.0, 4), torch.zeros(77)]),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("trace", TRACES)
def test_estimates_are_unbiased_within_their_errors(trace, name):
    """Over many seeds the mean is the trace within five standard errors, and the errors are of the right size."""
    A = Counted(with_spectrum(SPECTRA[name]))
    exact = SPECTRA[name].double().sum().item()
    draws = [trace(A, samples=24, seed=seed) for seed in range(150)]
    values, errors = torch.tensor(draws), torch.tensor([d.standard_error for d in draws])
    spread = values.double().std().item()
    assert abs(values.double().mean().item() - exact) <= 5 * spread / 150**0.5 + 1e-9 * abs(exact)
    if spread > 1e-9:
        assert 0.6 < errors.double().square().mean().sqrt().item() / spread < 2.5


@pytest.mark.parametrize("trace", TRACES)
def test_samples_count_products(trace):
    for samples in (6, 30, 31, 32):
        A = Counted(with_spectrum(SPECTRA["decaying"]))
        trace(A, samples=samples)
        assert samples - 1 <= A.products <= samples


def test_sketches_beat_sign_vectors_where_the_spectrum_decays():
    A = with_spectrum(SPECTRA["decaying"])
    plain, sketched, exchanged = (trace(A, samples=40).standard_error for trace in TRACES)
    assert exchanged < sketched < plain / 5


@pytest.mark.parametrize("trace", [hutchpp_trace, xtrace])
def test_enough_samples_are_exact(trace):
    A = with_spectrum(SPECTRA["flat"])
    found = trace(A, samples=240)
    assert found == pytest.approx(120, rel=1e-12)
    assert found.standard_error == 0


def test_xtrace_is_exact_for_a_low_rank():
    found = xtrace(with_spectrum(SPECTRA["low rank"]), samples=20)
    assert found == pytest.approx(6, rel=1e-10)


def test_an_estimate_is_a_float_that_knows_its_error():
    e = Estimate(2.0, 0.5)
    assert e + 1 == 3.0
    assert type(e + 1) is float
    assert isinstance(e, float)
    assert repr(e) == "2 ± 0.5"
    again = pickle.loads(pickle.dumps(e))
    assert (again, again.standard_error) == (2.0, 0.5)
    assert hutchinson_trace(torch.eye(3), samples=1).standard_error == math.inf


def test_diagonal_estimates():
    M = with_spectrum(SPECTRA["decaying"])
    A = Counted(M)
    found = diagonal(A, samples=300)
    assert A.products == 300
    assert found.shape == found.standard_error.shape == (80,)
    off = (torch.as_tensor(found) - M.diagonal()).abs()
    assert (off <= 5 * found.standard_error).all()
    predicted = ((M.square().sum(1) - M.diagonal().square()) / 300).sqrt()
    torch.testing.assert_close(torch.as_tensor(found.standard_error), predicted, rtol=0.3, atol=0)
    assert type(found + 1) is torch.Tensor
    assert diagonal(torch.eye(3), samples=1).standard_error.isinf().all()
    torch.testing.assert_close(diagonal(torch.eye(3), samples=4) + 0, torch.ones(3))


@pytest.mark.parametrize("estimate", [*TRACES, diagonal])
def test_seeds_and_generators(estimate):
    A = with_spectrum(SPECTRA["decaying"])
    state = torch.get_rng_state()
    one, two = estimate(A, samples=9, seed=3), estimate(A, samples=9, seed=torch.Generator().manual_seed(3))
    other = estimate(A, samples=9, seed=4)
    assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))
    assert not torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("name", SPECTRA)
def test_densities_integrate_to_one(name, log):
    grid, density = spectral_density(with_spectrum(SPECTRA[name]), samples=4, log=log)
    axis = grid.log10() if log else grid
    assert torch.trapezoid(density, axis).item() == pytest.approx(1, abs=1e-9)
    assert (density >= 0).all()
    assert (axis.diff() > 0).all()


def test_a_density_has_the_spectrums_moments_and_mass():
    values = torch.cat([torch.full((30,), 5.0), torch.linspace(0, 1, 270)]).double()
    grid, density = spectral_density(with_spectrum(values), samples=20)
    mean = torch.trapezoid(density * grid, grid).item()
    assert mean == pytest.approx(values.mean().item(), rel=0.05)
    assert torch.trapezoid(density[grid > 3], grid[grid > 3]).item() == pytest.approx(0.1, rel=0.15)
    assert density[(grid > 2) & (grid < 4)].max() < 1e-6


def test_a_logarithmic_density_sees_every_decade():
    values = torch.cat([torch.full((100,), 10.0**-e) for e in (0, 2, 4)]).double()
    grid, density = spectral_density(with_spectrum(values), samples=20, log=True)
    axis = grid.log10()
    for decade in (0, -2, -4):
        near = (axis - decade).abs() < 0.5
        assert torch.trapezoid(density[near], axis[near]).item() == pytest.approx(1 / 3, rel=0.2)


@pytest.mark.parametrize("A", [torch.zeros(4, 4), torch.eye(4)])
def test_a_single_eigenvalue_has_a_density(A):
    grid, density = spectral_density(A, samples=2)
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-5)


def test_bad_arguments():
    A = torch.eye(5)
    for call, message in (
        (lambda: hutchinson_trace(A, samples=0), "samples is 0; expected an integer of at least 1"),
        (lambda: hutchpp_trace(A, samples=2), "samples is 2; expected an integer of at least 3"),
        (lambda: xtrace(A, samples=3), "samples is 3; expected an integer of at least 4"),
        (lambda: diagonal(A, samples=0), "samples is 0"),
        (lambda: spectral_density(A, samples=0), "samples is 0"),
        (lambda: spectral_density(A, width=2.0), r"width is 2\.0; expected a fraction"),
        (lambda: spectral_density(A, log=True, floor=0.0), r"floor is 0\.0; expected a fraction"),
        (lambda: spectral_density(-A, log=True), "the largest eigenvalue is -1; expected a positive one for log=True"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("name", SPECTRA)
def test_xdiag_is_unbiased_within_its_errors(name):
    M = with_spectrum(SPECTRA[name])
    draws = torch.stack(
        [torch.as_tensor(xdiag(M, samples=20, seed=seed)).as_subclass(torch.Tensor) for seed in range(60)]
    )
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - M.diagonal()).abs() <= 5 * error + 1e-12 * M.abs().max()).all()


def test_xdiag_leaves_one_vector_out():
    """By definition, with a basis of its own for each column that is left out."""
    M = with_spectrum(SPECTRA["decaying"])
    W = torch.randint(0, 2, (len(M), 6), generator=torch.Generator().manual_seed(3), dtype=torch.int8).double() * 2 - 1
    terms = []
    for i in range(6):
        Q = torch.linalg.qr(torch.cat([(M @ W)[:, :i], (M @ W)[:, i + 1 :]], 1)).Q
        terms.append((Q @ (Q.T @ M)).diagonal() + W[:, i] * (M @ W[:, i] - Q @ (Q.T @ M @ W[:, i])))
    found = xdiag(M, samples=12, seed=3)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), torch.stack(terms).mean(0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.standard_error, torch.stack(terms).std(0) / 6**0.5, rtol=1e-6, atol=1e-10)


def test_xdiag_where_the_spectrum_decays():
    M = with_spectrum(SPECTRA["decaying"])
    sketched, plain = xdiag(M, samples=60), diagonal(M, samples=60)
    off, off_plain = ((t - M.diagonal()).norm() for t in (sketched, plain))
    assert off < off_plain / 20
    exact = xdiag(M, samples=2 * len(M))
    torch.testing.assert_close(exact.as_subclass(torch.Tensor), M.diagonal())
    assert not exact.standard_error.any()
    counted = Counted(M)
    xdiag(counted, samples=11)
    assert counted.products == 10
    with pytest.raises(ValueError, match="samples is 3; expected an integer of at least 4"):
        xdiag(M, samples=3)


@pytest.mark.parametrize("kind", ["tensor", "array", "product"])
def test_matrices_that_are_not_symmetric_have_exchangeable_estimates_without_bias(kind):
    """tr and diag of A B, whose symmetric part alone is not what products with A B show."""
    first, second = with_spectrum(SPECTRA["decaying"]), with_spectrum(SPECTRA["flat"], seed=1)
    M = first @ second
    assert (M - M.T).norm() > 0.1 * M.norm()
    parameters = {"w": torch.zeros(len(M), dtype=M.dtype)}
    symmetric = [pb.operators.BlockDiagonal(parameters, [[0]], [A]) for A in (first, second)]
    A = {"tensor": M, "array": M.numpy(), "product": symmetric[0] @ symmetric[1]}[kind]
    draws = torch.stack([xdiag(A, samples=20, seed=s).as_subclass(torch.Tensor) for s in range(60)])
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - M.diagonal()).abs() <= 5 * error).all()
    for trace in TRACES:
        totals = torch.tensor([trace(A, samples=21, seed=s) for s in range(60)])
        assert abs(totals.mean() - M.trace()) <= 5 * totals.std() / len(totals) ** 0.5


def test_xdiag_refuses_what_has_no_transpose():
    with pytest.raises(ValueError, match=r"A, a Counted, is not symmetric, and xdiag needs .* or one with a transpose"):
        xdiag(Counted(with_spectrum(SPECTRA["decaying"]).triu()), samples=20)


@pytest.mark.parametrize("probes", ["signs", "normal"])
def test_probes_of_both_kinds_and_squared_frobenius_norms(probes):
    M = with_spectrum(SPECTRA["indefinite"])
    found = [hutchinson_trace(M, 40, s, probes=probes) for s in range(60)]
    off = torch.tensor([t - M.trace().item() for t in found])
    assert abs(off.mean()) <= 5 * off.std() / 60**0.5
    assert off.std() == pytest.approx(np.mean([t.standard_error for t in found]), rel=0.3)
    diagonals = torch.stack([diagonal(M, 40, s, probes=probes).as_subclass(torch.Tensor) for s in range(60)])
    assert ((diagonals.mean(0) - M.diagonal()).abs() <= 5 * diagonals.std(0) / 60**0.5).all()
    A = M.triu()  # not symmetric
    squares = torch.tensor([squared_frobenius(A, 40, s, probes=probes) for s in range(60)])
    assert abs(squares.mean() - A.square().sum()) <= 5 * squares.std() / 60**0.5
    with pytest.raises(ValueError, match="probes is 'unit'; expected 'signs' or 'normal'"):
        hutchinson_trace(M, probes="unit")


def test_a_deflated_density_has_its_outliers_where_they_are():
    values = torch.cat([torch.linspace(0, 1, 197), torch.tensor([50.0, 60.0, 100.0])])
    M = with_spectrum(values)
    grid, density = spectral_density(M, samples=3, steps=30, width=0.005, deflate=3, points=4096)
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-6)
    for outlier in (50.0, 60.0, 100.0):
        near = (grid - outlier).abs() < 3
        assert torch.trapezoid(density[near], grid[near]).item() == pytest.approx(1 / 200, rel=0.05)
    bulk = grid < 5
    assert torch.trapezoid(density[bulk], grid[bulk]).item() == pytest.approx(197 / 200, rel=0.01)
    with pytest.raises(ValueError, match=r"deflate is 200; expected an integer in 1\.\.199"):
        spectral_density(M, deflate=200)


def test_inverses_by_iteration():
    positive = with_spectrum(torch.linspace(0.5, 2, 40))
    b = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.linalg.solve(positive, b)
    torch.testing.assert_close(neumann(positive, b, terms=200), x, rtol=1e-8, atol=1e-10)
    few = neumann(positive, b, terms=3, scale=0.4)
    step = torch.eye(40).double() - 0.4 * positive
    torch.testing.assert_close(few, 0.4 * (b + step @ b + step @ (step @ b)))
    with pytest.raises(torch.linalg.LinAlgError, match="the terms of the Neumann series grow"):
        neumann(positive, b, terms=100, scale=2.0)
    for M in (positive, with_spectrum(SPECTRA["indefinite"][:40]), positive.triu()):
        x = lsmr(M, b[:, 0], tol=1e-12, max_iterations=1000)
        torch.testing.assert_close(x, torch.linalg.solve(M, b[:, 0]), rtol=1e-6, atol=1e-6)
        damped = lsmr(M, b[:, 0], damping=0.7, tol=1e-12)
        expected = torch.linalg.solve(M.T @ M + 0.49 * torch.eye(len(M)).double(), M.T @ b[:, 0])
        torch.testing.assert_close(damped, expected, rtol=1e-6, atol=1e-8)
    singular = with_spectrum(torch.cat([torch.linspace(1, 2, 20), torch.zeros(20)]))
    shortest = torch.linalg.pinv(singular, rtol=1e-8) @ b[:, 0]
    torch.testing.assert_close(lsmr(singular, b[:, 0], tol=1e-10), shortest, rtol=1e-6, atol=1e-7)
    assert not lsmr(positive, torch.zeros(40).double()).any()
    sides = lsmr(positive, b)
    torch.testing.assert_close(sides, torch.linalg.solve(positive, b), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(lsmr(positive.float(), b[:, 0].numpy()), sides[:, 0].float(), rtol=1e-3, atol=1e-3)


def test_inverses_by_iteration_say_what_they_cannot():
    A, b = with_spectrum(torch.linspace(0.5, 2, 40)), torch.ones(40, dtype=torch.float64)
    for solve in (lsmr, neumann):
        for wrong, found in [({"w": b}, "dict"), (b[:3], r"of shape \(3,\)"), (b.view(1, 40), r"of shape \(1, 40\)")]:
            with pytest.raises(ValueError, match=rf"b is {found}; expected a tensor \[40\] or \[40, K\]"):
                solve(A, wrong)
        for broken in ((A, b * float("nan")), (A * float("nan"), b)):
            with pytest.raises(torch.linalg.LinAlgError):
                solve(*broken)
    for wrong in ("1e-3", -1.0, float("nan")):
        with pytest.raises(ValueError, match="tol is .*; expected a number of at least 0"):  # noqa: RUF043
            lsmr(A, b, tol=wrong)
    with pytest.raises(ValueError, match="damping is 'little'; expected a finite number"):
        lsmr(A, b, damping="little")
    with pytest.raises(ValueError, match="scale is '1'; expected a positive number"):
        neumann(A, b, scale="1")
    with pytest.raises(torch.linalg.LinAlgError, match="A times a random vector has the norm 0"):
        neumann(torch.zeros(40, 40).double(), b)
    nearly = with_spectrum(torch.logspace(0, -14, 40))
    with pytest.raises(torch.linalg.LinAlgError, match="LSMR stopped after 500 iterations"):
        lsmr(nearly, b, tol=0.0)
    assert lsmr(nearly, b, tol=0.0, max_iterations=3).isfinite().all()  # a truncation
