"""Networks so sure that their curvature is all rounding in float32: solved for all the same, or told; never silent."""

import pytest
import torch
from posteriors.dense import curvature, jacobian
from posteriors.sampled.test_descent import rows
from torch import nn

import paraboloid as pb
from paraboloid.posteriors.sampled import noise


def sure(dtype=torch.float32):
    """Logits up to about 40 apart, and an input that few samples have."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 8, generator=g, dtype=torch.float64)
    x[:, 0] *= (torch.rand(60, generator=g) < 0.1).double()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    y = model(x).argmax(1)
    with torch.no_grad():
        model[2].weight.mul_(60)
    return model.to(dtype), x.to(dtype), y


@pytest.mark.parametrize(
    ("solver", "g_prior", "precision"),
    [("cg", True, 1.0), ("cg", True, 0.01), ("cg", False, 1.0), ("cg", False, 0.01), ("dual", True, 1.0),
     ("dual", True, 0.01), ("dual", False, 1.0), ("sgd", True, 1.0)],
)  # fmt: skip
def test_float32_draws_what_float64_says(solver, g_prior, precision):
    """Each sample solves the dense system, formed in float64, of the noise that it was made of."""
    options = {"samples": 4, "em_steps": 0, "g_prior": g_prior, "prior_precision": precision, "solver": solver}
    model, x, y = sure()
    found = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), epochs=400, **options)
    exact, exact_x, _ = sure(torch.float64)
    f, J = jacobian(exact, exact_x)
    H = curvature(exact, nn.CrossEntropyLoss(), exact_x, y)
    S = H.diagonal().rsqrt() if g_prior else torch.ones(len(H), dtype=H.dtype)
    roots = torch.stack(list(pb.losses.CrossEntropy().hessian_root(f, y)), 2)
    eps = noise.of_data(0, 0, len(x), range(4), roots.shape[2], x).double()
    prior = torch.stack([noise.of_prior(0, s, len(H), x) for s in range(4)]).double()
    b = precision**0.5 * prior + S * torch.einsum("nkd,nkv,snv->sd", J, roots, eps)
    A = S[:, None] * H * S + precision * torch.eye(len(H), dtype=H.dtype)
    want = torch.linalg.solve(A, b.T).T
    off = rows(found).double() / S - want
    energy = lambda w: torch.einsum("sd,de,se->s", w, A, w).sqrt()  # noqa: E731
    assert (energy(off) < (0.05 if solver == "sgd" else 0.01) * energy(want)).all()
    assert found.residual <= (0.1 if solver == "sgd" else 0.01)


def test_what_the_linearised_optimum_leaves_is_told():
    model, x, y = sure()
    found = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), 4, em_steps=2, match=None)
    assert found.history[0].optimum is None
    assert all(step.optimum <= 0.01 for step in found.history[1:])


def test_samples_that_are_not_solved_for_are_told(monkeypatch):
    model, x, y = sure()
    loss, options = nn.CrossEntropyLoss(), {"samples": 2, "em_steps": 0, "prior_precision": 0.01}
    message = r"the relative residual of a sample is \d.*expected at most 0\.1: .* 2 epochs of descent did not do"
    with pytest.warns(RuntimeWarning, match=message):
        found = pb.sampled_laplace(model, loss, (x, y), solver="sgd", epochs=2, **options)
    assert found.residual > 0.1
    monkeypatch.setattr("paraboloid.posteriors.sampled.expectation_maximisation.MOST_ITERATIONS", 2)
    monkeypatch.setattr("paraboloid.posteriors.sampled.expectation_maximisation.FEW", 1)
    with pytest.warns(RuntimeWarning, match=r"iterations of conjugate gradients in torch\.float32 did not do"):
        pb.sampled_laplace(model, loss, (x, y), solver="cg", g_prior=False, **{**options, "samples": 100})
    pb.sampled_laplace(model, loss, (x, y), solver="dual", g_prior=False, **options)  # asked again for what was left
    monkeypatch.setattr("paraboloid.posteriors.sampled.expectation_maximisation.REFINED", 0)
    monkeypatch.setattr("paraboloid.posteriors.sampled.fitting.in_float64", lambda *_: None)  # of what cannot run so
    with pytest.warns(RuntimeWarning, match=r"a Cholesky factor in torch\.float32 did not do"):
        pb.sampled_laplace(model, loss, (x, y), solver="dual", g_prior=False, **options)
