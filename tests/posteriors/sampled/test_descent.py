"""Stochastic descent on the samples' systems: its limit, its gradients' noise, its step, and what diverges."""

import pytest
import torch
from posteriors.sampled.test_oracles import classifier
from torch import nn

import paraboloid as pb
from paraboloid.linalg.stochastic_descent import Diverged, NesterovDescent, largest_eigenvalue

F64 = torch.float64
OPTIONS = {"samples": 6, "em_steps": 0, "prior_precision": 5.0, "seed": 1, "batch_size": 20}


def rows(posterior):
    return torch.cat([posterior.samples[k].flatten(1) for k in posterior.weights], 1)


@pytest.mark.parametrize("objective", ["low-variance", "noisy-targets"])
@pytest.mark.parametrize("g_prior", [True, False])
def test_both_objectives_have_the_solution_of_conjugate_gradients(objective, g_prior):
    model, x, y = classifier()
    exact = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), g_prior=g_prior, tol=1e-10, **OPTIONS)
    found = pb.sampled_laplace(
        model, nn.CrossEntropyLoss(), (x, y), g_prior=g_prior, solver="sgd", epochs=100, objective=objective, **OPTIONS
    )
    off = (rows(found) - rows(exact)).norm() / rows(exact).norm()
    assert off < (0.02 if objective == "low-variance" else 0.08)
    assert found.history[-1].residual < (0.02 if objective == "low-variance" else 0.1)


def test_em_by_descent_agrees_with_conjugate_gradients():
    model, x, y = classifier(n=60)
    options = {**OPTIONS, "samples": 8, "em_steps": 2, "match": None}
    exact = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), **options)
    found = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), solver="sgd", epochs=30, **options)
    assert abs(found.prior_precision / exact.prior_precision - 1) < 0.15
    assert abs(found.effective_dimension / exact.effective_dimension - 1) < 0.15


@pytest.mark.parametrize("options", [{"solver": "sgd"}, {}, {"max_memory": 1}])
def test_a_learning_rate_set_by_hand_that_diverges(options):
    """Also where no solver is named: a rate asks for a descent."""
    model, x, y = classifier()
    with pytest.raises(
        ValueError, match=r"lr is 100, with which the descent diverges .* expected at most about 0\.\d+"
    ):
        pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), lr=100.0, **options, **OPTIONS)


def test_a_measured_rate_that_diverges_is_halved_and_told(monkeypatch):
    model, x, y = classifier()
    monkeypatch.setattr("paraboloid.posteriors.sampled.solvers.steepest", lambda *args: 0.02)
    with pytest.warns(RuntimeWarning, match=r"diverged at the learning rate .* starts again at half of it"):
        found = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), solver="sgd", epochs=100, **OPTIONS)
    assert found.history[-1].residual < 0.1


def test_descent_on_a_plain_quadratic():
    g = torch.Generator().manual_seed(0)
    M = torch.randn(7, 7, generator=g, dtype=F64)
    A, b = M @ M.T / 7, torch.randn(2, 7, generator=g, dtype=F64)
    precision = torch.full((7,), 0.5, dtype=F64)
    exact = torch.linalg.solve(A + precision.diag(), b.T).T
    top = largest_eigenvalue(lambda v: A @ v, torch.ones(7, dtype=F64), 200)
    assert abs(top / torch.linalg.eigvalsh(A)[-1] - 1) < 1e-6
    scale = torch.linspace(0.5, 2, 7, dtype=F64)
    for s, B in ((None, A), (scale, A / scale / scale[:, None])):
        x = torch.zeros(2, 7, dtype=F64)
        descent = NesterovDescent(x, 0.5 / top, preconditioner=torch.full((7,), 0.5, dtype=F64))
        for step in range(800):
            if step == 700:
                descent.start_average()
            for k in range(2):
                inner = x[k] if s is None else s * x[k]
                descent.step(k, list((B @ inner).split([3, 4])), 1.0, precision, b[k], s)
            descent.advance()
        torch.testing.assert_close(descent.result(), exact, rtol=1e-6, atol=1e-8)
    descent = NesterovDescent(torch.ones(1, 7, dtype=F64), 1e3)
    with pytest.raises(Diverged, match="the squared gradient has grown from"):
        for _ in range(50):
            descent.step(0, [A @ descent.x[0]], 1.0, precision, None)


def test_samples_that_are_no_solutions_leave_the_networks_predictions():
    """Their variances are alike on all training data and larger elsewhere: matched by them, all would be uniform."""
    model, x, y = classifier()
    with pytest.warns(RuntimeWarning) as told:
        posterior = pb.sampled_laplace(
            model, nn.CrossEntropyLoss(), (x, y), 4, solver="sgd", epochs=1, batch_size=8, seed=0
        )
    assert posterior.unweighted.residual > 1
    assert any(
        "the samples by which confidence is matched is 6.3; expected less than 0.5" in str(w.message) for w in told
    )
    new = torch.randn(30, 4, dtype=F64)
    for link in ("probit", "mc", "weights"):
        torch.testing.assert_close(posterior.predict(new, link), model(new).softmax(1))
    with pytest.warns(RuntimeWarning):
        early = pb.sampled_laplace(
            model, nn.CrossEntropyLoss(), (x, y), 4, solver="sgd", epochs=1, batch_size=8, match="early"
        )
    torch.testing.assert_close(early.predict(new), model(new).softmax(1))
