"""scikit-learn's and laplace-torch's interfaces, training by evidence, and preferences."""

import numpy as np
import pytest
import torch
from posteriors.dense import close
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import nn

from paraboloid.posteriors import laplace
from paraboloid.posteriors.laplace_torch import Laplace
from paraboloid.posteriors.online import train_by_evidence
from paraboloid.posteriors.sklearn import LaplaceClassifier, LaplaceRegressor

F64 = torch.float64


def network(outputs, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def test_classifier():
    X = np.random.default_rng(0).normal(size=(30, 3))
    y = np.array(["cat", "dog", "emu"])[np.arange(30) % 3]
    classifier = LaplaceClassifier(network(3), structure="full", prior_precision=2.0, batch_size=7).fit(X, y)
    p = classifier.predict_proba(X)
    same = laplace(
        classifier.model, nn.CrossEntropyLoss(), (torch.tensor(X), torch.arange(30) % 3), "full", prior_precision=2.0
    )
    np.testing.assert_allclose(p, same.predict(torch.tensor(X)).numpy(), rtol=1e-9)
    assert set(classifier.predict(X)) <= {"cat", "dog", "emu"}
    assert 0 <= classifier.score(X, y) <= 1
    assert classifier.get_params()["structure"] == "full"
    with pytest.raises(NotFittedError):
        clone(classifier).predict_proba(X)
    with pytest.raises(ValueError, match="y has 2 different labels and the model 3 outputs"):
        classifier.fit(X, np.arange(30) % 2)


def test_regressor():
    rng = np.random.default_rng(0)
    X, w = rng.normal(size=(60, 3)), rng.normal(size=3)
    y = X @ w + 0.3 * rng.normal(size=60)
    model = nn.Linear(3, 1).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor(np.linalg.lstsq(X, y, rcond=None)[0]))
        model.bias.zero_()
    regressor = LaplaceRegressor(model, structure="full").fit(X, y)
    mean, std = regressor.predict(X, return_std=True)
    assert mean.shape == std.shape == (60,)
    assert 0.2 < regressor.posterior_.noise_variance**0.5 < 0.4
    assert (std >= regressor.posterior_.noise_variance**0.5).all()
    assert regressor.score(X, y) > 0.8
    assert np.array_equal(regressor.predict(X), mean)


def test_the_door_of_laplace_torch():
    X, y = torch.randn(30, 3, dtype=F64, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    model = network(3)
    loader = [(X[:11], y[:11]), (X[11:], y[11:])]
    la = Laplace(model, "classification", subset_of_weights="all", hessian_structure="full", prior_precision=3.0)
    with pytest.raises(RuntimeError, match="is not fitted yet"):
        la(X)
    la.fit(loader)
    same = laplace(model, nn.CrossEntropyLoss(), (X, y), "full", prior_precision=3.0)
    close(la(X), same.predict(X))
    close(la.log_marginal_likelihood(), same.log_evidence())
    assert la.sample(5).shape == (5, 31)
    assert la(X, pred_type="nn", n_samples=3).shape == (30, 3)
    la.optimize_prior_precision(prior_structure="scalar", n_steps=400)
    assert float(la.prior_precision) == pytest.approx(same.tune_prior("evidence", match=None).prior_precision, rel=1e-3)
    la.optimize_prior_precision("adapted")
    assert la.prior_precision == pytest.approx(same.tune_prior("adapted", match=None).prior_precision, rel=1e-5)
    close(Laplace(model, "classification", "all", "full").fit(loader[:1]).fit(loader[1:], override=False)(X),
          Laplace(model, "classification", "all", "full").fit(loader)(X))  # fmt: skip
    regression = Laplace(network(2), "regression", hessian_structure="gp", sigma_noise=0.5).fit([(X, X[:, :2])])
    mean, covariance = regression(X)
    assert (mean.shape, covariance.shape) == ((30, 2), (30, 2, 2))
    assert regression.posterior.noise_variance == 0.25
    with pytest.raises(ValueError, match="likelihood is 'count'"):
        Laplace(model, "count")
    with pytest.raises(ValueError, match="hessian_structure is 'block'"):
        Laplace(model, "regression", hessian_structure="block")
    with pytest.raises(ValueError, match="pred_type is 'mean'"):
        la(X, pred_type="mean")
    with pytest.raises(ValueError, match="method is 'cv'"):
        la.optimize_prior_precision("cv")


def test_training_by_evidence_finds_the_maximum_with_several_outputs():
    """On a linear model with K outputs the weights end at the posterior's mean, the prior at the evidence's maximum."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(40, 4, generator=g, dtype=F64)
    Y = X @ torch.randn(4, 3, generator=g, dtype=F64) + 0.4 * torch.randn(40, 3, generator=g, dtype=F64)
    model = nn.Linear(4, 3, bias=False).double()
    seen = []
    posterior = train_by_evidence(
        model,
        nn.MSELoss(),
        [(X, Y)],
        torch.optim.SGD(model.parameters(), 0.3, momentum=0.5),
        400,
        structure="full",
        burn_in=20,
        steps=5,
        lr=0.05,
        callback=lambda epoch, p: seen.append(p.log_evidence().item()),
    )
    assert len(seen) == 380
    assert seen[-1] > seen[0]
    at = [
        torch.tensor(v, dtype=F64, requires_grad=True)
        for v in (posterior.prior_precision["weight"], posterior.noise_variance)
    ]
    K = X @ X.T / at[0] + at[1] * torch.eye(40, dtype=F64)
    marginal = torch.distributions.MultivariateNormal(torch.zeros(40, dtype=F64), K)
    value = marginal.log_prob(Y.T).sum()
    slopes = [g * v for g, v in zip(torch.autograd.grad(value, at), at, strict=True)]
    assert max(abs(s.item()) for s in slopes) < 0.05
    assert abs(value.item() - posterior.log_evidence().item()) < 1e-2


def test_preferences():
    """Rewards of two candidates are the logits of which one is preferred; single inputs get a reward with error bars."""
    from paraboloid.posteriors import Candidates

    reward = network(1)
    g = torch.Generator().manual_seed(1)
    pairs, preferred = torch.randn(50, 2, 3, generator=g, dtype=F64), torch.randint(2, (50,), generator=g)
    posterior = laplace(Candidates(reward), nn.CrossEntropyLoss(), (pairs, preferred), "full")
    p = posterior.predict(pairs)
    assert p.shape == (50, 2)
    difference = reward(pairs[:, 0]) - reward(pairs[:, 1])
    J = torch.stack(
        [
            torch.cat([t.flatten() for t in torch.autograd.grad(d, list(reward.parameters()), retain_graph=True)])
            for d in difference
        ]
    )
    s = difference[:, 0].sigmoid().detach()
    H = (J * (s * (1 - s))[:, None]).T @ J
    close(posterior.curvature.to_dense(), H)
    mean, variance = posterior.functional(pairs[:, :1], diagonal=True)
    close(mean, reward(pairs[:, 0]).detach())
    assert (variance > 0).all()


@pytest.mark.parametrize("weights", ["all", "last_layer"])
@pytest.mark.parametrize("structure", ["full", "functional", "kron", "diag"])
def test_nothing_is_predicted_of_no_inputs(structure, weights):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(20, 3)
    posterior = laplace(model, nn.CrossEntropyLoss(), (x, torch.randint(2, (20,))), structure, weights).tune_prior()
    for link in ("probit", "mc", "bridge", "weights"):
        assert posterior.predict(x[:0], link, samples=3).shape == (0, 2)
    assert posterior.predict(x).shape == (20, 2)  # as ever
    assert posterior.novelty(x[:0]).shape == (0,)
    assert [tuple(t.shape) for t in posterior.functional(x[:0])] == [(0, 2), (0, 2, 2)]
    assert posterior.functional_samples(x[:0], 5).shape == (5, 0, 2)
    regression = laplace(model, nn.MSELoss(), (x, torch.randn(20, 2)), structure, weights).tune_prior().predict(x[:0])
    assert regression.mean.shape == regression.variance.shape == (0, 2)


def test_a_noise_that_vanishes_is_named():
    """Zero targets and zero weights: no residual, no noise."""
    model, x = nn.Linear(2, 1), torch.randn(6, 2)
    with torch.no_grad():
        model.weight.zero_(), model.bias.zero_()
    posterior = laplace(model, nn.MSELoss(), (x, torch.zeros(6, 1)), "full")
    with pytest.raises(ValueError, match="the residuals of 6 targets vanish"):
        posterior.tune_prior()
    assert posterior.tune_prior(noise=False).noise_variance == 1.0


def test_inputs_that_hold_no_numbers_are_named():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(20, 3)
    posterior = laplace(model, nn.CrossEntropyLoss(), (x, torch.randint(2, (20,))))
    with pytest.raises(ValueError, match=r"'0\.weight' holds NaN or infinity"):
        posterior.predict(torch.full((2, 3), torch.nan))
