"""Means, variances and samples of every solver against a Cholesky factor in plain view, in float64."""

import re
import warnings

import pytest
import torch
from sklearn.gaussian_process.kernels import DotProduct

import paraboloid as pb
from paraboloid.gp import choosing
from paraboloid.gp.gram import Gram
from paraboloid.gp.preconditioned import Preconditioned

KERNEL = pb.gp.Matern(1.5, lengthscale=torch.tensor([0.8, 1.3]), outputscale=1.7)
NOISE = 0.1
MET = {"cholesky": 1e-8, "cg": 1e-3, "block": 1e-3, "sdd": 1e-3, "sgd": 1e-2}  # of the mean, relative


def data(N=300, d=2, outputs=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, d, generator=g, dtype=torch.float64)
    f = torch.sin(2 * x[:, 0]) + x[:, 1].cos()
    y = f + NOISE**0.5 * torch.randn(N, generator=g, dtype=torch.float64)
    return x, y if outputs is None else torch.stack([y * (1 + c) - c for c in range(outputs)], 1)


def exact(kernel, x, y, new, noise=NOISE):
    """Posterior mean and covariance of f at new inputs, by the textbook's formula."""
    A = kernel(x) + noise * torch.eye(len(x), dtype=x.dtype)
    k = kernel(new, x)
    return k @ torch.linalg.solve(A, y), kernel(new) - k @ torch.linalg.solve(A, k.T)


NEW = data(60, seed=1)[0]


@pytest.mark.parametrize("solver", MET)
def test_the_mean_meets_its_accuracy_by_default(solver):
    x, y = data()
    gp = pb.gp.condition(KERNEL, x, y, NOISE, solver=solver, samples=2, seed=0)
    mean, _ = exact(KERNEL, x, y, NEW)
    assert gp.mean(NEW).shape == (60,) and gp.mean(NEW).dtype == torch.float64
    assert (gp.mean(NEW) - mean).norm() < MET[solver] * mean.norm()
    assert gp.solver == solver and gp.notes == []


@pytest.mark.parametrize("solver", ["cholesky", "cg", "block"])
def test_samples_have_the_posteriors_mean_and_covariance(solver):
    x, y = data()
    gp = pb.gp.condition(KERNEL, x, y, NOISE, solver=solver, samples=1024, seed=0, features=512)
    mean, covariance = exact(KERNEL, x, y, NEW)
    drawn = gp.sample(NEW)
    assert drawn.shape == (1024, 60)
    std = covariance.diagonal().sqrt()
    assert ((drawn.mean(0) - mean) / std).abs().max() < 5 / 1024**0.5
    ratio = drawn.var(0) / covariance.diagonal()
    assert (ratio.mean() - 1).abs() < 0.05 and ratio.min() > 0.8 and ratio.max() < 1.25
    correlation = covariance / std.outer(std)
    assert (drawn.T.corrcoef() - correlation).abs().max() < 0.2
    variance = gp.variance(NEW)
    expected = covariance.diagonal() if solver == "cholesky" else (drawn - gp.mean(NEW)).square().mean(0)
    torch.testing.assert_close(variance, expected)
    both = gp.predict(NEW)
    torch.testing.assert_close(both, (gp.mean(NEW), variance))


@pytest.mark.parametrize("solver", ["cg", "block", "sdd", "sgd"])
def test_without_samples_the_variance_is_exact(solver):
    x, y = data(150)
    gp = pb.gp.condition(KERNEL, x, y, NOISE, solver=solver, samples=0)
    _, covariance = exact(KERNEL, x, y, NEW)
    rtol, atol = (0.1, 5e-3) if solver == "sgd" else (0.02, 2e-4)  # its tolerance is of the function, and loose
    torch.testing.assert_close(gp.variance(NEW), covariance.diagonal(), rtol=rtol, atol=atol)
    torch.testing.assert_close(gp.predict(NEW)[1], gp.variance(NEW))


@pytest.mark.parametrize("solver", ["cg", "block", "sdd", "sgd"])
@pytest.mark.parametrize("kernel, noise", [(DotProduct(1.0), 0.1), (pb.gp.RBF(50.0), 0.01)], ids=["linear", "smooth"])
def test_without_samples_small_variances_keep_their_digits(solver, kernel, noise):
    """The data leaves a thousandth of the prior's variance and less, which residuals of the tolerance are far above."""
    x, y = data(150)
    reference = pb.gp.condition(kernel, x, y, noise, solver="cholesky").variance(NEW)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a few steps do not reach the tolerance
        gp = pb.gp.condition(kernel, x, y, noise, solver=solver, samples=0, tol=1e-3, steps=20)
        torch.testing.assert_close(gp.variance(NEW), reference, rtol=0.01, atol=0)


def test_a_value_does_not_depend_on_what_else_is_asked_for():
    x, y = data()
    gp = pb.gp.condition(KERNEL, x, y, NOISE, solver="cg", samples=40, seed=3)
    every = gp.sample(NEW)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gp.sample(NEW[order]), every[:, order])
    torch.testing.assert_close(gp.sample(NEW[7:8]), every[:, 7:8])
    again = pb.gp.condition(KERNEL, x, y, NOISE, solver="cg", samples=40, seed=3)
    assert torch.equal(again.sample(NEW), every)
    assert not torch.equal(pb.gp.condition(KERNEL, x, y, NOISE, solver="cg", samples=40).sample(NEW), every)


def test_nothing_touches_the_global_random_state():
    x, y = data(100)
    before = torch.get_rng_state()
    for solver in MET:
        pb.gp.condition(KERNEL, x, y, NOISE, solver=solver, samples=2, steps=20)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_evidence_and_the_likelihood_include_their_constants():
    x, y = data(80)
    gp = pb.gp.condition(KERNEL, x, y, NOISE, solver="cholesky", samples=0)
    A = KERNEL(x) + NOISE * torch.eye(80, dtype=x.dtype)
    density = torch.distributions.MultivariateNormal(torch.zeros(80, dtype=x.dtype), A)
    assert gp.log_evidence() == pytest.approx(float(density.log_prob(y)))
    mean, covariance = exact(KERNEL, x, y, NEW)
    target = torch.ones(60, dtype=x.dtype)
    expected = -torch.distributions.Normal(mean, (covariance.diagonal() + NOISE).sqrt()).log_prob(target).mean()
    assert gp.nll(NEW, target) == pytest.approx(float(expected))


@pytest.mark.parametrize("solver", MET)
def test_several_outputs_share_a_kernel(solver):
    x, y = data(outputs=3)
    gp = pb.gp.condition(KERNEL, x, y, NOISE, solver=solver, samples=5)
    mean, covariance = exact(KERNEL, x, y, NEW)
    assert (gp.mean(NEW) - mean).norm() < MET[solver] * mean.norm()
    assert gp.sample(NEW).shape == (5, 60, 3) and gp.variance(NEW).shape == (60,)
    if solver == "cholesky":
        torch.testing.assert_close(gp.variance(NEW), covariance.diagonal())


@pytest.mark.parametrize("solver", ["cholesky", "cg", "block", "sdd"])
def test_noise_of_its_own_for_every_input(solver):
    x, y = data(200)
    noise = torch.linspace(0.05, 0.5, 200, dtype=x.dtype)
    gp = pb.gp.condition(KERNEL, x, y, noise, solver=solver, samples=0)
    mean = KERNEL(NEW, x) @ torch.linalg.solve(KERNEL(x) + noise.diag(), y)
    assert (gp.mean(NEW) - mean).norm() < 1e-3 * mean.norm()


def test_a_step_that_diverges_is_noticed_halved_and_told():
    x, y = data()
    with pytest.warns(UserWarning, match="started again with"):
        gp = pb.gp.condition(KERNEL, x, y, NOISE, solver="sdd", samples=2, step_size=1.0)
    mean, _ = exact(KERNEL, x, y, NEW)
    assert gp.step < 1 and (gp.mean(NEW) - mean).norm() < 1e-3 * mean.norm()


def test_too_few_steps_are_taken_as_asked_for_and_too_hard_a_system_is_told():
    x, y = data()
    gp = pb.gp.condition(KERNEL, x, y, NOISE, solver="cg", samples=0, steps=2, rank=5)
    assert gp.iterations == 2 and gp.residual > 1e-3 and gp.notes == []


def test_float32_comes_back_as_float32():
    x, y = data()
    for solver in ("cholesky", "cg", "block", "auto"):
        gp = pb.gp.condition(KERNEL, x.float(), y.float(), NOISE, solver=solver, samples=3)
        mean, _ = exact(KERNEL, x, y, NEW)
        assert gp.mean(NEW).dtype == torch.float32 and gp.sample(NEW).dtype == torch.float32
        assert (gp.mean(NEW) - mean).norm() < 1e-3 * mean.norm()


@pytest.mark.parametrize("kernel", [KERNEL, pb.gp.RBF()])
def test_columns_are_added_while_they_save_more_than_they_cost(kernel):
    x, y = data(N=900)
    gram = Gram(kernel, x, torch.tensor(1e-2, dtype=x.dtype))
    system = Preconditioned(gram, None, 0, tol=1e-6)
    found = system.solve(y.unsqueeze(1), 1e-6, None, None)
    assert 0.4 * system.iterations < found.iterations < 1.5 * system.iterations  # as its columns predicted
    fewer, more = (Preconditioned(gram, rank, 0, tol=1e-6) for rank in (system.rank // 2, 2 * system.rank))
    assert fewer.predicted() > system.predicted() < more.predicted()
    assert Preconditioned(gram, None, 0, tol=1e-6, S=500).rank >= system.rank  # iterations are dearer


def test_auto_says_what_it_chose():
    x, y = data(50)
    gp = pb.gp.condition(KERNEL, x, y, NOISE, samples=0)
    assert gp.solver == "cholesky" and "50 inputs" in gp.reason
    x, y = data(1500)
    smooth = pb.gp.condition(pb.gp.RBF(2.0), x, y, NOISE, samples=0)
    assert smooth.solver == "cg" and "iterations of conjugate gradients" in smooth.reason
    assert abs(smooth.iterations - float(smooth.reason.split()[5])) < 15
    rough = pb.gp.condition(pb.gp.Matern(0.5), x, y, 1e-6, samples=0)
    assert rough.solver == "cholesky" and "a factor of 1500 inputs is faster" in rough.reason


@pytest.mark.parametrize("kernel, noise", [(pb.gp.Matern(0.5), 1e-4), (pb.gp.RBF(1.5), 0.1)])
def test_where_a_factor_does_not_fit_hard_systems_are_raced_for(kernel, noise, monkeypatch):
    monkeypatch.setattr(choosing.DENSE, "default", 10_000)
    monkeypatch.setattr(choosing, "HARD", 0)
    x, y = data(1200)
    gp = pb.gp.condition(kernel, x, y, noise, samples=0, steps=2)
    residuals = re.findall(r"residual of (\S+), blocks one of (\S+)$", gp.reason)[0]
    assert gp.solver == ("cg" if float(residuals[0]) <= float(residuals[1]) else "block")
    assert gp.solver == ("block" if noise == 1e-4 else "cg")
