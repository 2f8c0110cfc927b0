"""Predictive distributions against brute-force integration, and the moments of every likelihood."""

import math

import pytest
import torch
from posteriors.dense import close
from torch import nn

import paraboloid as pb
from paraboloid.posteriors import Prediction, laplace
from paraboloid.posteriors.prediction.predictive import bridge, gaussian_draws, probit

F64 = torch.float64


def fitted(loss_fn, outputs, y, structure="full", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    x = torch.randn(len(y), 3, dtype=F64)
    return laplace(model, loss_fn, (x, y), structure, **options), x


def classes(n=12, c=3):
    return torch.arange(n) % c


def test_probit_of_two_classes_is_close_to_the_integral():
    mean, variance = torch.tensor([[0.7]], dtype=F64), torch.tensor([[1.9]], dtype=F64)
    z = torch.linspace(-12, 12, 20001, dtype=F64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    integral = torch.trapezoid((mean + variance.sqrt() * z).sigmoid() * density, z)
    assert abs(probit(mean, variance, False).item() - integral.item()) < 0.01
    close(probit(torch.tensor([[1.0, 0.0]], dtype=F64), torch.zeros(1, 2, dtype=F64), True),
          torch.tensor([[1.0, 0.0]], dtype=F64).softmax(1))  # fmt: skip


@pytest.mark.parametrize("normalised", [False, True])
def test_bridge_against_its_formula(normalised):
    g = torch.Generator().manual_seed(0)
    f, R = torch.randn(2, 4, generator=g, dtype=F64), torch.randn(2, 4, 4, generator=g, dtype=F64)
    S = R @ R.mT
    expected = []
    for m, C in zip(f, S, strict=True):
        ones = torch.ones(4, dtype=F64)
        m = m - (C @ ones) * (ones @ m) / (ones @ C @ ones)
        C = C - torch.outer(C @ ones, ones @ C) / (ones @ C @ ones)
        if normalised:
            size = C.diagonal().mean() / 2**0.5
            m, C = m / size.sqrt(), C / size
        alpha = (1 - 2 / 4 + m.exp() * (-m).exp().sum() / 16) / C.diagonal()
        expected.append(alpha / alpha.sum())
    close(bridge(f, S, normalised), torch.stack(expected))
    assert torch.isfinite(bridge(1e4 * f, S, normalised)).all()


def test_draws_are_common_to_all_inputs_and_have_the_covariance():
    S = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64)
    draws = gaussian_draws(torch.zeros(3, 2, dtype=F64), S.expand(3, 2, 2), 50_000, seed=1)
    assert torch.equal(draws[:, 0], draws[:, 2])
    assert (torch.cov(draws[:, 0].T) - S).abs().max() < 0.05
    near = gaussian_draws(torch.zeros(1, 2, dtype=F64), S[None] * (1 + 1e-6), 50_000, seed=1)
    assert (near[:, 0] - draws[:, 0]).abs().max() < 1e-5  # smooth in the input


@pytest.mark.parametrize("link", ["probit", "bridge", "bridge_norm", "mc", "weights"])
def test_links_give_probabilities(link):
    posterior, x = fitted(nn.CrossEntropyLoss(), 3, classes())
    p = posterior.predict(x, link, samples=20)
    assert p.shape == (12, 3)
    close(p.sum(1), torch.ones(12, dtype=F64))
    assert torch.equal(p, posterior.predict(x, link, samples=20))  # the same seed, the same prediction
    if link != "weights":
        close(p[:5], posterior.predict(x[:5], link, samples=20))  # an input's prediction is its own


def test_mc_and_weights_agree_with_a_sharp_posterior():
    """Where the posterior is narrow the network is linear over it, and both are the same integral."""
    posterior, x = fitted(nn.CrossEntropyLoss(), 3, classes(), prior_precision=1e4)
    both = [posterior.predict(x, link, samples=4000) for link in ("mc", "weights")]
    assert (both[0] - both[1]).abs().max() < 2e-3


def test_bernoulli():
    y = (classes() % 2).double().unsqueeze(1)
    posterior, x = fitted(nn.BCEWithLogitsLoss(), 1, y)
    p = posterior.predict(x)
    assert p.shape == (12, 1)
    assert ((p > 0) & (p < 1)).all()
    assert (p - posterior.predict(x, "mc", samples=5000)).abs().max() < 0.02
    with pytest.raises(ValueError, match="link='bridge' is for class probabilities"):
        posterior.predict(x, "bridge")


def test_poisson_moments():
    y = torch.arange(12, dtype=F64).unsqueeze(1) % 4
    posterior, x = fitted(nn.PoissonNLLLoss(), 1, y, prior_precision=5.0)
    found, drawn = posterior.predict(x), posterior.predict(x, "mc", samples=200_000)
    assert isinstance(found, Prediction)
    assert ((found.mean - drawn.mean) / found.mean).abs().max() < 0.02
    assert ((found.variance - drawn.variance) / found.variance).abs().max() < 0.1
    close(found.variance, found.model_variance + found.noise_variance)


@pytest.mark.parametrize("log_variance", [True, False])
def test_heteroscedastic_moments(log_variance):
    class Positive(nn.Module):
        def forward(self, f):
            return f if log_variance else torch.cat([f[:, :1], nn.functional.softplus(f[:, 1:]) + 0.1], 1)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), Positive()).double()
    x = torch.randn(12, 3, dtype=F64)
    posterior = laplace(
        model, pb.losses.GaussianNLL(log_variance=log_variance), (x, x[:, :1]), "full", prior_precision=9.0
    )
    found, drawn = posterior.predict(x), posterior.predict(x, "mc", samples=100_000)
    assert found.mean.shape == (12, 1)
    assert (found.mean - drawn.mean).abs().max() < 0.01
    assert ((found.noise_variance - drawn.noise_variance) / found.noise_variance).abs().max() < 0.02


def test_a_given_variance_is_a_squared_error():
    y = torch.linspace(-1, 1, 12, dtype=F64).unsqueeze(1)
    given, x = fitted(pb.losses.GaussianNLL(variance=0.3), 1, y)
    squared, _ = fitted(nn.MSELoss(), 1, y, noise_variance=0.3)
    close(given.predict(x).variance, squared.predict(x).variance)
    close(given.log_evidence(), squared.log_evidence())


def test_a_loss_of_ones_own():
    class Laplacian(pb.Loss):
        def sample_losses(self, f, y):
            return ((f - y).square() + 1).sqrt().flatten(1).sum(1)

    class Predicting(Laplacian):
        def predictive(self, f):
            return f

    y = torch.linspace(-1, 1, 12, dtype=F64).unsqueeze(1)
    posterior, x = fitted(Laplacian(), 1, y)
    with pytest.raises(NotImplementedError, match="Laplacian does not say what an output predicts"):
        posterior.predict(x)
    posterior, x = fitted(Predicting(), 1, y)
    assert (posterior.predict(x, samples=20_000) - posterior.functional(x)[0]).abs().max() < 0.05


def test_functional_samples_belong_together():
    posterior, x = fitted(nn.CrossEntropyLoss(), 3, classes())
    draws = posterior.functional_samples(x, 20_000, seed=2)
    assert draws.shape == (20_000, 12, 3)
    _, joint = posterior.functional(x, joint=True)
    found = torch.cov(draws.flatten(1).T)
    expected = joint.flatten(0, 1).flatten(1)
    error = ((expected.diagonal()[:, None] * expected.diagonal() + expected.square()) / 20_000).sqrt()
    assert ((found - expected) / error).abs().max() < 5
    assert torch.equal(draws[:, 3:5], posterior.functional_samples(x, 20_000, seed=2)[:, 3:5])


def test_temperature_multiplies_the_curvature():
    y = classes()
    cold, x = fitted(nn.CrossEntropyLoss(), 3, y, temperature=0.25)
    plain, _ = fitted(nn.CrossEntropyLoss(), 3, y, prior_precision=0.25)
    close(cold.functional(x)[1], 0.25 * plain.functional(x)[1])
    close(cold.log_likelihood(), 4 * plain.log_likelihood())


@pytest.mark.parametrize("max_memory", [1, 4000])
def test_chunks_do_not_change_the_answer(max_memory):
    posterior, x = fitted(nn.CrossEntropyLoss(), 3, classes())
    whole = posterior.functional(x)[1]
    posterior.max_memory = max_memory
    close(posterior.functional(x)[1], whole)


def test_wrong_links():
    posterior, x = fitted(nn.MSELoss(), 1, torch.zeros(12, 1, dtype=F64))
    with pytest.raises(ValueError, match="link is 'logit'; expected one of"):
        posterior.predict(x, "logit")
    with pytest.raises(ValueError, match="link is 'probit' with a gaussian likelihood"):
        posterior.predict(x, "probit")


class OnlyOnce(torch.autograd.Function):
    """A cube whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


def test_gradients_in_the_inputs_are_refused_behind_what_cannot_be_differentiated_twice():
    """The variance's part of them would be missing, without a word."""

    class Cubed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

        def forward(self, x):
            return self.b(OnlyOnce.apply(self.a(x)) + self.a(x))

    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    posterior = pb.laplace(Cubed(), nn.CrossEntropyLoss(), (x, torch.tensor([0, 1, 0, 1, 1])), "diag")
    with pytest.raises(RuntimeError, match=r"differentiable=True.*OnlyOnce cannot be differentiated"):
        posterior.predict(x.clone().requires_grad_(), differentiable=True)
