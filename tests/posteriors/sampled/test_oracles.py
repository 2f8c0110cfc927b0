"""Samples against the dense posterior: covariances, effective dimension, and the fixed point of EM."""

import math

import pytest
import torch
from posteriors.dense import curvature, jacobian
from torch import nn

import paraboloid as pb
from paraboloid.operators.matrix_free.output_graph import OutputGraph
from paraboloid.posteriors.likelihood import Likelihood
from paraboloid.posteriors.sampled import noise
from paraboloid.posteriors.sampled.expectation_maximisation import Run
from paraboloid.posteriors.sampled.tangent_curvature import TangentCurvature
from paraboloid.posteriors.sampled.tangent_system import TangentSystem

F64 = torch.float64
SAMPLES = 256


def classifier(seed=0, inputs=4, classes=3, n=40):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, inputs, generator=g, dtype=F64)
    y = torch.randint(classes, (n,), generator=g)
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, classes)).double(), x, y


@pytest.fixture(scope="module")
def fitted():
    model, x, y = classifier()
    data = [(x[:11], y[:11]), (x[11:], y[11:])]
    posterior = pb.sampled_laplace(
        model, nn.CrossEntropyLoss(), data, SAMPLES, em_steps=0, g_prior=False, prior_precision=0.5, tol=1e-8
    )
    return model, x, y, posterior


def close_within_errors(estimate, truth, samples, errors=3.0):
    """Variances estimated by the mean of `samples` squares have the relative standard error sqrt(2 / samples)."""
    off = (estimate - truth).abs() / (truth * math.sqrt(2 / samples))
    assert off.max() <= errors + 1, f"the worst is off by {off.max():.2f} standard errors"
    assert (off <= errors).double().mean() > 0.98


def test_functional_variances(fitted):
    model, x, y, posterior = fitted
    full = pb.laplace(model, nn.CrossEntropyLoss(), (x, y), "full", prior_precision=0.5)
    mean, variance = posterior.functional(x, diagonal=True)
    expected_mean, expected = full.functional(x, diagonal=True)
    torch.testing.assert_close(mean, expected_mean)
    close_within_errors(variance, expected, SAMPLES)
    _, covariance = posterior.functional(x)
    torch.testing.assert_close(covariance.diagonal(dim1=1, dim2=2), variance)
    _, joint = posterior.functional(x, joint=True)
    torch.testing.assert_close(joint[3, :, 3], covariance[3])
    functions = posterior.functional_samples(x)
    torch.testing.assert_close((functions - mean).square().mean(0), variance)
    drawn = posterior.sample(SAMPLES)
    flat = torch.cat([(drawn[k] - w).flatten(1) for k, w in posterior.weights.items()], 1)
    _, J = jacobian(model, x)
    torch.testing.assert_close(functions - mean, torch.einsum("nkd,sd->snk", J, flat))


def test_samples_solve_their_system(fitted):
    """Each is the draw that its noise says: (H + Lambda) w = Lambda^1/2 theta_0 + sum_n J_n^T L_n eps_n."""
    model, x, y, posterior = fitted
    f, J = jacobian(model, x)
    H = curvature(model, nn.CrossEntropyLoss(), x, y)
    roots = torch.stack(list(pb.losses.CrossEntropy().hessian_root(f, y)), 2)  # [N, K, V]
    eps = noise.of_data(0, 0, len(x), range(SAMPLES), roots.shape[2], f)
    prior = torch.stack([noise.of_prior(0, s, len(H), f) for s in range(SAMPLES)])
    b = 0.5**0.5 * prior + torch.einsum("nkd,nkv,snv->sd", J, roots, eps)
    expected = torch.linalg.solve(H + 0.5 * torch.eye(len(H), dtype=F64), b.T).T
    flat = torch.cat([posterior.samples[k].flatten(1) for k in posterior.weights], 1)
    torch.testing.assert_close(flat, expected, rtol=1e-5, atol=1e-6)


def test_the_diagonal(monkeypatch):
    """Exact for few columns of the root; by the samples' noise for more, whatever the batches."""
    model, x, y = classifier(n=600)
    loss = Likelihood.of(nn.CrossEntropyLoss()).loss
    exact = curvature(model, nn.CrossEntropyLoss(), x, y).diagonal()
    found = []
    for cuts in ([600], [150, 450]):
        data = list(zip(x.split(cuts), y.split(cuts), strict=True))
        one = TangentSystem(TangentCurvature(model, loss, data), 2.0, 0, range(1))
        torch.testing.assert_close(one.diagonal(), 2 * exact)
        with monkeypatch.context() as patched:
            patched.setattr("paraboloid.posteriors.sampled.tangent_system.FEW", 1)
            found.append(one.diagonal() / 2)
    torch.testing.assert_close(found[1], found[0])
    assert abs(found[0].sum() / exact.sum() - 1) < 0.1
    assert (found[0] / exact - 1).abs().max() < 0.5
    assert not torch.allclose(found[0], exact, rtol=1e-3)


@pytest.mark.parametrize("precision", [0.05, 1.0])
def test_effective_dimension(precision):
    model, x, y = classifier(1, n=60)
    H = curvature(model, nn.CrossEntropyLoss(), x, y)
    expected = torch.trace(torch.linalg.solve(H + precision * torch.eye(len(H), dtype=F64), H)).item()
    posterior = pb.sampled_laplace(
        model, nn.CrossEntropyLoss(), (x, y), SAMPLES, em_steps=0, g_prior=False, prior_precision=precision
    )
    assert abs(posterior.effective_dimension / expected - 1) < 0.05
    assert posterior.prior_precision == precision


def regression(n=200, inputs=12, outputs=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, inputs, generator=g, dtype=F64) * torch.linspace(0.2, 2, inputs, dtype=F64)
    true = 0.7 * torch.randn(inputs, outputs, generator=g, dtype=F64)
    y = x @ true + 0.5 * torch.randn(n, outputs, generator=g, dtype=F64)
    return nn.Linear(inputs, outputs, bias=False).double(), x, y


def test_fixed_point_of_em_is_the_maximum_of_the_evidence():
    model, x, y = regression()
    posterior = pb.sampled_laplace(
        model, nn.MSELoss(), (x, y), 512, em_steps=30, g_prior=False, prior_precision=20.0, noise_variance=0.25
    )
    grid = torch.linspace(-2, 3, 4001, dtype=F64).exp()
    eigenvalues, U = torch.linalg.eigh(x.T @ x / 0.25)
    b = (U.T @ (x.T @ y / 0.25)).square().sum(1)
    e, lam = eigenvalues.clamp(min=0), grid[:, None]
    evidence = (2 * (lam.log() - (e + lam).log()) + b / (e + lam)).sum(1)
    best = grid[evidence.argmax()].item()
    assert abs(posterior.prior_precision / best - 1) < 0.03
    assert posterior.history[-1].step < 30  # it noticed that it had arrived


@pytest.mark.parametrize("solver", ["cg", "dual"])
@pytest.mark.parametrize("g_prior", [False, True])
def test_noise_and_precision_by_em_are_the_maximum_of_the_evidence(g_prior, solver, tmp_path):
    """Of a conjugate model; under the g-prior, whose unit is the noise, of the features over their lengths."""
    model, x, y = regression(n=120)
    options = {"g_prior": g_prior, "solver": solver, "noise_variance": None, "tol": 1e-6, "match": None}
    posterior = pb.sampled_laplace(model, nn.MSELoss(), (x, y), 512, em_steps=60, prior_precision=5.0, **options)
    X = x / x.norm(dim=0) if g_prior else x
    eigenvalues, U = torch.linalg.eigh(X.T @ X)
    c, rest = (U.T @ (X.T @ y)).square().sum(1), y.square().sum()
    e = eigenvalues.clamp(min=1e-12)
    noise, ratio = torch.linspace(-2.5, 0, 501, dtype=F64).exp(), torch.linspace(-6, 4, 1001, dtype=F64).exp()
    s, r = noise[:, None], ratio[None]  # ratio: the prior's precision times the noise
    determinants = 2 * (r.log()[..., None] - (e + r[..., None]).log()).sum(-1)
    fit = (rest - (c / (e + r[..., None])).sum(-1)) / s
    best = (determinants - y.numel() * s.log() - fit).argmax()
    want_noise, want = noise[best // len(ratio)].item(), ratio[best % len(ratio)].item()
    assert abs(posterior.noise_variance / want_noise - 1) < 0.03
    precision = posterior.prior_precision * (1 if g_prior else posterior.noise_variance)
    assert abs(precision / want - 1) < 0.05
    assert posterior.history[-1].noise_variance == posterior.noise_variance
    assert posterior.predict(x).variance.min() > posterior.noise_variance
    short = {**options, "checkpoint": tmp_path / "run", "prior_precision": 5.0}
    pb.sampled_laplace(model, nn.MSELoss(), (x, y), 4, em_steps=3, **short)
    more = pb.sampled_laplace(model, nn.MSELoss(), (x, y), 4, em_steps=4, **short)
    whole = pb.sampled_laplace(model, nn.MSELoss(), (x, y), 4, em_steps=4, **{**short, "checkpoint": None})
    assert more.history == whole.history and torch.equal(more.samples["weight"], whole.samples["weight"])


def test_predictions_do_not_change_when_features_are_rescaled():
    model, x, y = classifier(2)
    c = torch.logspace(-2, 2, x.shape[1], dtype=F64)
    other, _, _ = classifier(2)
    with torch.no_grad():
        other[0].weight.div_(c)
    options = {"samples": 8, "em_steps": 3, "seed": 5}
    one = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), **options)
    two = pb.sampled_laplace(other, nn.CrossEntropyLoss(), (x * c, y), **options)
    torch.testing.assert_close(two.predict(x * c), one.predict(x), rtol=1e-5, atol=0)
    torch.testing.assert_close(two.functional(x * c)[1], one.functional(x)[1], rtol=1e-5, atol=1e-12)
    assert abs(two.prior_precision / one.prior_precision - 1) < 1e-5


def test_precisions_of_layers():
    model, x, y = classifier(3)
    posterior = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), SAMPLES, em_steps=1, per="layer")
    assert set(posterior.prior_precision) == {k for k, _ in model.named_parameters()}
    assert posterior.prior_precision["0.weight"] == posterior.prior_precision["0.bias"]
    H = curvature(model, nn.CrossEntropyLoss(), x, y)
    s = H.diagonal().rsqrt()
    scaled = s[:, None] * H * s
    first = torch.linalg.solve(scaled + torch.eye(len(H), dtype=F64), scaled).diagonal()
    assert abs(posterior.history[0].effective_dimension[0] / first[:30].sum() - 1) < 0.1
    assert abs(posterior.history[0].effective_dimension[1] / first[30:].sum() - 1) < 0.1


class Once(torch.autograd.Function):
    """tanh with a backward pass that cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0].tanh().square())


class Branches(nn.Module):
    def __init__(self, op):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.op = nn.Linear(4, 3), nn.Linear(4, 3), op

    def forward(self, x):
        return self.op(self.a(x)) + self.b(x).tanh()


@pytest.mark.filterwarnings("ignore:an operation of the model has no second derivative in torch")
def test_predictions_see_weights_behind_a_kernel_that_cannot_be_differentiated():
    """Cut off from double backward are those of one branch alone, so that nothing raises."""
    _, x, y = classifier()
    options = {"samples": 8, "em_steps": 0, "max_memory": 4000}
    found, want = (
        pb.sampled_laplace(Branches(op).double(), nn.CrossEntropyLoss(), (x, y), **options)
        for op in (Once.apply, torch.tanh)
    )
    for name, value in want.samples.items():
        torch.testing.assert_close(found.samples[name], value)
    for a, b in zip(found.functional(x), want.functional(x), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(found.predict(x), want.predict(x))


@pytest.mark.parametrize("g_prior", [True, False])
def test_a_curvature_that_rounding_made_indefinite_is_taken_by_its_root(g_prior, monkeypatch):
    """Sure networks in float32: the plain product fails, L L^T cannot."""
    model, x, y = classifier()
    options = {"samples": 4, "em_steps": 0, "g_prior": g_prior, "solver": "cg", "tol": 1e-10, "match": None, "seed": 1}
    exact = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), **options)
    monkeypatch.setattr(OutputGraph, "hessian", lambda self, u: -1e6 * u)
    monkeypatch.setattr(Run, "_measured", lambda self, b, w, precision: ([1.0], [1.0], 0.0))
    found = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), **options)
    for name, samples in exact.samples.items():
        torch.testing.assert_close(found.samples[name], samples, rtol=1e-6, atol=1e-8)
