"""A regression's intervals: as wide as Kronecker factors make them, whatever the structure."""

import pytest
import torch
from posteriors.dense import close, jacobian
from torch import nn

from paraboloid.posteriors import laplace, load_posterior

F64 = torch.float64


def fitted(n=60, structure="diag", **options):
    torch.manual_seed(0)
    x = torch.randn(n, 3, dtype=F64)
    y = x[:, :1].sin() + 0.3 * torch.randn(n, 1, dtype=F64)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return laplace(model, nn.MSELoss(), (x, y), structure, **options), x


@pytest.mark.parametrize("structure", ["diag", "ekfac", "lowrank", "full", "functional"])
def test_the_mean_variance_is_that_of_kronecker_factors(structure, tmp_path):
    kron, x = fitted(structure="kron")
    expected = kron.tune_prior().predict(x).variance.mean()
    assert kron.spread == 1.0
    posterior = fitted(structure=structure)[0].tune_prior()
    plain = fitted(structure=structure)[0].tune_prior(match=None)
    variance = plain.predict(x).variance
    own = variance.mean()
    if structure in ("full", "functional"):  # without the sample itself
        _, J = jacobian(posterior.model, x)
        prior = posterior.prior_precision * torch.eye(J.shape[2], dtype=F64)
        H = torch.einsum("nkd,nke->de", J, J) / posterior.noise_variance
        left = [j @ torch.linalg.inv(H - j.T @ j / posterior.noise_variance + prior) @ j.T for j in J]
        own = torch.stack(left).mean() + posterior.noise_variance
    assert posterior.spread == pytest.approx((expected / own).item(), rel=1e-6)
    assert posterior.spread != pytest.approx(1.0, abs=1e-2) or structure == "ekfac"
    found = posterior.predict(x)
    close(found.variance, posterior.spread * variance)
    close(found.noise_variance, torch.full_like(variance, posterior.spread * posterior.noise_variance))
    # The Bayesian part is what it was.
    assert posterior.noise_variance == plain.noise_variance and posterior.prior_precision == plain.prior_precision
    assert torch.equal(posterior.functional(x)[1], plain.functional(x)[1])
    posterior.save(tmp_path / "posterior.pt")
    loaded = load_posterior(tmp_path / "posterior.pt", posterior.model, nn.MSELoss())
    assert torch.equal(loaded.predict(x).variance, found.variance)
    posterior.prior_precision = posterior.prior_precision  # by hand: plain again
    close(posterior.predict(x).variance, variance)


def test_factors_that_are_exact_change_nothing():
    """One linear layer of one output: its Kronecker block is the whole matrix."""
    torch.manual_seed(0)
    x, model = torch.randn(50, 3, dtype=F64), nn.Linear(3, 1).double()
    y = x.sum(1, keepdim=True) + torch.randn(50, 1, dtype=F64)
    posterior = laplace(model, nn.MSELoss(), (x, y), "lowrank", rank=4).tune_prior()
    assert posterior.spread == 1.0


def test_where_it_is_left_alone():
    assert fitted()[0].tune_prior(match=None).spread == 1.0
    assert fitted()[0].tune_prior(noise=False).spread == 1.0
    assert fitted(weights=torch.tensor([0, 3, 25]))[0].tune_prior().spread == 1.0


@pytest.mark.parametrize("structure", ["kron", "full"])
def test_single_precision_tunes_the_same_noise(structure):
    """A network that was trained until it fits its noise is far from the optimum of its linearisation; a squared
    error is solved for whatever it is multiplied by, in float32 too, where a few products left the noise 85 times too
    large."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(80, 4, generator=g)
    y = 2 * (6 * x[:, :1]).sin() + x[:, 1:2] + 0.5 * torch.randn(80, 1, generator=g)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 1))
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    for _ in range(1500):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    single = laplace(model, nn.MSELoss(), (x, y), structure).tune_prior(match=None)
    found = single.noise_variance, single.prior_precision
    double = laplace(model.double(), nn.MSELoss(), (x.double(), y.double()), structure).tune_prior(match=None)
    assert found == pytest.approx((double.noise_variance, double.prior_precision), rel=0.02)
    trained = nn.functional.mse_loss(model(x.double()), y.double()).item()
    assert double.noise_variance > 1.5 * trained  # the network has learned some of the noise
