"""Hyperparameters: gradients against autograd through the dense evidence, and optima that the data was drawn with."""

import pytest
import torch
from gp.test_conditioning import data

import paraboloid as pb
from paraboloid.gp.hyperparameters import _Logarithms, _surrogate, log_evidence


def drawn(N=500, kernel=None, noise=0.05, seed=0):
    kernel = pb.gp.Matern(1.5, 0.7, 2.0) if kernel is None else kernel
    g = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(N, 2, generator=g, dtype=torch.float64)
    L = torch.linalg.cholesky(kernel(x) + noise * torch.eye(N, dtype=x.dtype))
    return x, L @ torch.randn(N, generator=g, dtype=x.dtype)


def test_the_pathwise_gradient_is_that_of_the_evidence():
    x, y = drawn(200)
    kernel, start = pb.gp.Matern(1.5, torch.tensor([1.0, 1.5])), None
    start = _Logarithms(kernel, 0.2)
    logs = start.flat.clone().requires_grad_()
    found, noise = start.at(logs)
    (exact,) = torch.autograd.grad(log_evidence(found, x, y, noise) / 200, logs)
    gp = pb.gp.condition(kernel, x, y, 0.2, samples=1000, solver="cholesky", features=512)
    (estimate,) = torch.autograd.grad(_surrogate(start, logs, x, gp, torch.arange(200)), logs)
    torch.testing.assert_close(estimate, exact, rtol=0.05, atol=0.02)


def test_the_evidence_finds_what_the_data_was_drawn_with():
    x, y = drawn()
    found = pb.gp.fit_hyperparameters(pb.gp.Matern(1.5), x, y, 0.5)
    values = found.kernel.hyperparameters()
    assert 0.5 < float(values["lengthscale"]) < 1.0 and 1 < float(values["outputscale"]) < 4
    assert 0.03 < found.noise_variance < 0.08
    assert found.trace[-1] > found.trace[0]
    truth = log_evidence(pb.gp.Matern(1.5, 0.7, 2.0), x, y, torch.tensor(0.05, dtype=x.dtype)) / 500
    assert max(found.trace) >= float(truth)


def test_paths_come_near_the_evidences_optimum_on_all_data():
    x, y = drawn(400)
    best = pb.gp.fit_hyperparameters(pb.gp.Matern(1.5), x, y, 0.5, subset=400)
    found = pb.gp.fit_hyperparameters(
        pb.gp.Matern(1.5), x, y, 0.5, method="pathwise", steps=40, solver="cg", samples=16
    )
    ours = log_evidence(found.kernel, x, y, torch.tensor(found.noise_variance, dtype=x.dtype)) / 400
    assert max(best.trace) - 0.03 < float(ours)
    assert len(found.trace) == 40 and found.trace[-1] < found.trace[0]


def test_warm_starts_save_iterations():
    x, y = drawn(400)
    a = pb.gp.condition(pb.gp.Matern(1.5), x, y, 0.05, solver="cg", samples=4, rank=20)
    near = pb.gp.Matern(1.5, 1.02)
    cold = pb.gp.condition(near, x, y, 0.05, solver="cg", samples=4, rank=20)
    warm = pb.gp.condition(near, x, y, 0.05, solver="cg", samples=4, rank=20, start=a.solved.solution.x)
    assert warm.iterations < cold.iterations


def test_every_hyperparameter_of_a_composite_is_learned():
    x, y = data(200)
    kernel = pb.gp.RBF(torch.tensor([1.0, 1.0])) + pb.gp.Constant(0.5) * pb.gp.Matern(0.5)
    found = pb.gp.fit_hyperparameters(kernel, x, y, 0.1, steps=20)
    before, after = kernel.hyperparameters(), found.kernel.hyperparameters()
    assert before.keys() == after.keys() and all(bool((before[k] != after[k]).any()) for k in before)


def test_errors():
    x, y = data(20)
    with pytest.raises(ValueError, match="y is 0 everywhere; expected targets that vary"):
        pb.gp.fit_hyperparameters(pb.gp.RBF(), x, torch.zeros(20))
    with pytest.raises(ValueError, match="noise_variance is 0; expected a positive number"):
        pb.gp.fit_hyperparameters(pb.gp.RBF(), x, y, 0)
    with pytest.raises(ValueError, match="method is 'magic'"):
        pb.gp.fit_hyperparameters(pb.gp.RBF(), x, y, method="magic")
