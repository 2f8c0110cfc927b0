"""What is promised of every solver's defaults, on kernels, noises and numbers of samples that are not each other's."""

import pytest
import torch
from torch.testing import assert_close

import paraboloid as pb

N = 250
PROBLEMS = {  # kernel, noise
    "lengthscales of their own": (pb.gp.RBF(torch.tensor([0.7, 1.5, 2.0]), 2.0), 0.01),
    "rough": (pb.gp.Matern(0.5, 1.4), 0.05),
    "smooth, noisy": (pb.gp.Matern(2.5, 0.9, 0.6), 0.3),
    "a sum": (pb.gp.RationalQuadratic(1.5, 1.2) + 0.5, 0.02),
    "a product": (pb.gp.RBF(2.0) * pb.gp.Matern(1.5, 1.0), 0.1),
}
MET = {"cg": 1e-3, "block": 1e-3, "sdd": 1e-3, "sgd": 1e-2}


def data(count, seed, noise):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=g, dtype=torch.float64)
    f = torch.sin(2 * x[:, 0]) + x[:, 1:].cos().sum(1)
    return x, f + noise**0.5 * torch.randn(count, generator=g, dtype=torch.float64)


def exact(kernel, noise, x, y, new):
    """Mean and variance of f, by the textbook's formula."""
    A, k = kernel(x) + noise * torch.eye(len(x), dtype=x.dtype), kernel(new, x)
    return k @ torch.linalg.solve(A, y), kernel.diagonal(new) - (k * torch.linalg.solve(A, k.T).T).sum(1)


@pytest.mark.parametrize("solver", MET)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_mean_meets_its_accuracy_and_no_warning_is_given(problem, solver):
    kernel, noise = PROBLEMS[problem]
    (x, y), (new, _) = data(N, 3, noise), data(80, 4, noise)
    options = {"batch_size": 60} if solver == "block" else {}  # else one block would be everything
    gp = pb.gp.condition(kernel, x, y, noise, solver, 0, seed=1, **options)
    mean, _ = exact(kernel, noise, x, y, new)
    assert (gp.mean(new) - mean).norm() < MET[solver] * mean.norm()
    assert gp.notes == []


ROUGH = {  # few data for what the kernel expects: means elsewhere are much smaller than at the data
    "large": (pb.gp.RBF(1.0, 5.0), 0.01),
    "a rough sum": (pb.gp.RBF(0.7, 2.5) + pb.gp.Matern(2.5, torch.tensor([0.5, 1.0, 2.0])), 0.1),
    "its product": ((pb.gp.RBF(0.7, 2.5) + pb.gp.RBF(0.7)) * pb.gp.Matern(2.5, torch.tensor([0.5, 1.0, 2.0])), 0.01),
}


@pytest.mark.parametrize("count", [60, 200])
@pytest.mark.parametrize("problem", ROUGH)
def test_stochastic_gradients_see_every_direction_of_few_data(problem, count):
    kernel, noise = ROUGH[problem]
    (x, y), (new, _) = data(count, 7, noise), data(80, 8, noise)
    gp = pb.gp.condition(kernel, x, y, noise, "sgd", 0)
    (mean, _), (at_data, _) = (exact(kernel, noise, x, y, points) for points in (new, x))
    assert (gp.mean(new) - mean).norm() < MET["sgd"] * mean.norm() and gp.notes == []
    told, true = gp.residual, (gp.mean(x) - at_data).norm() / at_data.norm()
    assert true < 1.01 * told < 1.02e-3


def test_the_error_that_stochastic_gradients_tell_bounds_what_few_columns_do_not_see():
    kernel, noise = ROUGH["a rough sum"]
    x, y = data(300, 7, noise)
    at_data, _ = exact(kernel, noise, x, y, x)
    for steps in (30, 100):
        gp = pb.gp.condition(kernel, x, y, noise, "sgd", 0, steps=steps, rank=20)
        assert (gp.mean(x) - at_data).norm() < 1.01 * gp.residual * at_data.norm()


def test_many_directions_made_alike_do_not_diverge():
    kernel, noise = ROUGH["a rough sum"]  # nine times too large a step, by the largest eigenvalues of blocks alone
    x, y = data(900, 7, noise)
    gp = pb.gp.condition(kernel, x, y, noise, "sgd", 0, steps=80)
    assert gp.notes == [] and gp.residual < 0.05


SLOW = {("lengthscales of their own", "sdd"), ("a sum", "sdd")}
SAMPLED = [
    pytest.param(p, s, marks=pytest.mark.slow if (p, s) in SLOW else ())
    for s in ("cholesky", *MET) for p in PROBLEMS
]  # fmt: skip


@pytest.mark.parametrize("problem, solver", SAMPLED)
def test_the_variance_of_many_samples_and_the_likelihood_are_those_of_a_factor(problem, solver):
    kernel, noise = PROBLEMS[problem]
    (x, y), (new, target) = data(120, 3, noise), data(80, 4, noise)
    options = {"batch_size": 50} if solver == "block" else {}
    gp = pb.gp.condition(kernel, x, y, noise, solver, 1024, seed=2, features=512, **options)
    mean, variance = exact(kernel, noise, x, y, new)
    assert (gp.mean(new) - mean).norm() < MET.get(solver, 1e-9) * mean.norm() and gp.notes == []
    ratio = gp.sample(new).var(0) / variance
    assert abs(float(ratio.mean()) - 1) < 0.05
    assert float((ratio - 1).abs().quantile(0.9)) < 0.1  # their standard error is .044
    told = variance if solver == "cholesky" else ((gp.sample(new) - gp.mean(new)) ** 2).mean(0)
    assert_close(gp.variance(new), told)
    expected = -torch.distributions.Normal(mean, (variance + noise).sqrt()).log_prob(target).mean()
    assert abs(gp.nll(new, target) - float(expected)) < 0.01


@pytest.mark.parametrize("solver", MET)
def test_float32_meets_it_too(solver):
    kernel, noise = PROBLEMS["smooth, noisy"]
    (x, y), (new, _) = data(N, 5, noise), data(50, 6, noise)
    gp = pb.gp.condition(kernel, x.float(), y.float(), noise, solver, 0)
    mean, _ = exact(kernel, noise, x, y, new)
    assert (gp.mean(new).double() - mean).norm() < MET[solver] * mean.norm() and gp.notes == []
