"""Bayesian linear regression, where everything has a closed form and the Laplace approximation is exact."""

import pytest
import torch
from posteriors.dense import close
from torch import nn

from paraboloid.posteriors import laplace

N, D, C = 30, 4, 2
PRECISION, NOISE = 0.7, 0.2


@pytest.fixture(scope="module")
def regression():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(N, D, generator=g, dtype=torch.float64)
    Y = X @ torch.randn(D, C, generator=g, dtype=torch.float64)
    Y = Y + 0.5 * torch.randn(N, C, generator=g, dtype=torch.float64)
    model = nn.Linear(D, C, bias=False).double()
    A = X.T @ X / NOISE + PRECISION * torch.eye(D)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.solve(A, X.T @ Y / NOISE).T)
    return model, X, Y, torch.linalg.inv(A)


def evidence(X, Y, precision, noise):
    """log p(Y | X) of independent columns, by the marginal Gaussian over the data."""
    K = X @ X.T / precision + noise * torch.eye(len(X), dtype=X.dtype)
    marginal = torch.distributions.MultivariateNormal(torch.zeros(len(X), dtype=X.dtype), K)
    return sum(marginal.log_prob(Y[:, i]) for i in range(Y.shape[1]))


def fitted(regression, structure, **options):
    model, X, Y, _ = regression
    data = [(X[:7], Y[:7]), (X[7:], Y[7:])]
    options = {"rank": D * C, "prior_precision": PRECISION, "noise_variance": NOISE, **options}
    return laplace(model, nn.MSELoss(), data, structure=structure, **options)


EXACT = ["full", "functional", "lowrank", "kron", "ekfac"]


@pytest.mark.parametrize("structure", EXACT)
def test_evidence_and_its_gradient(regression, structure):
    _, X, Y, _ = regression
    found = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (PRECISION, NOISE)]
    true = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (PRECISION, NOISE)]
    posterior = fitted(regression, structure)
    value, expected = posterior.log_evidence(*found), evidence(X, Y, *true)
    close(value.detach(), expected.detach())
    # At the maximum of the posterior the optimum's own motion does not count, so the derivatives are those of the truth.
    for g, h in zip(torch.autograd.grad(value, found), torch.autograd.grad(expected, true), strict=True):
        close(g, h, 1e-8)


@pytest.mark.parametrize("structure", EXACT)
def test_predictive(regression, structure):
    model, _, _, S = regression
    posterior = fitted(regression, structure)
    x = torch.randn(3, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.einsum("nd,de,ne->n", x, S, x)
    prediction = posterior.predict(x)
    close(prediction.mean, model(x).detach())
    close(prediction.model_variance, expected.unsqueeze(1).expand(-1, C))
    close(prediction.variance, expected.unsqueeze(1).expand(-1, C) + NOISE)
    covariance = posterior.functional(x)[1]
    close(covariance, torch.einsum("n,ck->nck", expected, torch.eye(C, dtype=x.dtype)))
    _, joint = posterior.functional(x, joint=True)
    close(joint[:, 0, :, 0], x @ S @ x.T)
    assert joint[:, 0, :, 1].abs().max() < 1e-12


@pytest.mark.parametrize("structure", EXACT)
def test_the_adapted_optimum_is_the_evidence_maximiser(regression, structure):
    _, X, Y, _ = regression
    posterior = fitted(regression, structure, prior_precision=5.0, noise_variance=1.0).tune_prior(noise=True, steps=500)
    at = [torch.tensor(v, dtype=torch.float64, requires_grad=True)
          for v in (posterior.prior_precision, posterior.noise_variance)]  # fmt: skip
    for v, g in zip(at, torch.autograd.grad(evidence(X, Y, *at), at), strict=True):
        assert abs(v.item() * g.item()) < 1e-4
    assert posterior.prior_precision != 5.0


@pytest.mark.parametrize("structure", EXACT)
def test_samples_have_the_analytic_covariance(regression, structure):
    model, _, _, S = regression
    draws = fitted(regression, structure).sample(40_000, seed=3)["weight"]
    assert draws.shape == (40_000, C, D)
    expected = torch.block_diag(S, S)
    found = torch.cov(draws.flatten(1).T)
    # The standard error of a covariance of Gaussians is sqrt((s_ii s_jj + s_ij^2) / n).
    error = ((expected.diagonal()[:, None] * expected.diagonal() + expected.square()) / 40_000).sqrt()
    assert ((found - expected) / error).abs().max() < 4.5
    assert ((draws.mean(0) - model.weight).flatten() / (expected.diagonal() / 40_000).sqrt()).abs().max() < 4.5


def test_effective_dimension(regression):
    _, X, _, _ = regression
    H = torch.block_diag(*[X.T @ X / NOISE] * C)
    expected = torch.trace(H @ torch.linalg.inv(H + PRECISION * torch.eye(D * C)))
    for structure in EXACT:
        assert fitted(regression, structure).effective_dimension() == pytest.approx(expected.item(), rel=1e-9)


def test_ridge(regression):
    """The optimum of the linearised model is ridge regression, wherever the network was left."""
    from paraboloid.posteriors.prior_tuning.linearised import LinearisedModel, optimum

    trained, X, Y, _ = regression
    model = nn.Linear(D, C, bias=False).double()
    posterior = laplace(model, nn.MSELoss(), (X, Y), "full", prior_precision=PRECISION, noise_variance=NOISE)
    linear = LinearisedModel.of(model, posterior.likelihood.loss, (X, Y), None, None)
    precision = torch.full((D * C,), PRECISION, dtype=torch.float64)
    delta = optimum(linear, precision, posterior.strength())
    close(model.weight.detach().flatten() + delta, trained.weight.detach().flatten())
