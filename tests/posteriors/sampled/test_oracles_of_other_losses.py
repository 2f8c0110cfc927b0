"""Sampled posteriors against float64 oracles where the loss, the prior's units, the type or the solver are others."""

import copy

import pytest
import torch
from posteriors.dense import curvature, jacobian
from posteriors.sampled.test_oracles import close_within_errors, regression
from torch import nn

import paraboloid as pb

F64 = torch.float64
LOSSES = {
    "bce": (nn.BCEWithLogitsLoss(reduction="sum"), 2, lambda f: (f > 0).to(f.dtype)),
    "mse": (nn.MSELoss(), 2, lambda f: f.sin()),
    "weighted": (nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 2.5]), label_smoothing=0.1), 3, lambda f: f.argmax(1)),
    "ignored": (nn.CrossEntropyLoss(ignore_index=1), 3, lambda f: f.argmax(1)),
}  # fmt: skip


def problem(name, dtype=F64, n=50):
    """A convolutional network without biases in its first layer, and targets that it does not quite predict."""
    loss, outputs, targets = LOSSES[name]
    g = torch.Generator().manual_seed(4)
    x = torch.randn(n, 2, 6, generator=g, dtype=F64)
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3, bias=False), nn.SiLU(), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(8, outputs)
    ).double()
    y = targets(model(x).detach() + torch.randn(n, outputs, generator=g, dtype=F64))
    y = y if y.dtype == torch.long else y.to(dtype)
    loss = nn.CrossEntropyLoss(weight=loss.weight.to(dtype), label_smoothing=0.1) if name == "weighted" else loss
    return model.to(dtype), loss, x.to(dtype), y


def dense(name, g_prior, precision, noise=1.0):
    """GGN of the summed loss over the noise, the prior's precision by weight, and both traces' effective dimension."""
    model, loss, x, y = problem(name)
    H = curvature(model, loss, x, y) / (2 * noise if name == "mse" else 1.0)  # half the square is the likelihood's
    prior = precision * (H.diagonal() if g_prior else torch.ones(len(H), dtype=F64))
    return H, prior, torch.trace(torch.linalg.solve(H + prior.diag(), H)).item()


@pytest.mark.parametrize(
    ("name", "g_prior", "solver", "dtype"),
    [("bce", True, "auto", F64), ("bce", False, "cg", torch.float32), ("mse", True, "block", F64),
     ("mse", False, "dual", torch.float32), ("weighted", False, "auto", F64), ("ignored", True, "cg", F64),
     ("bce", False, "sgd", F64)],
)  # fmt: skip
def test_variances_and_the_effective_dimension(name, g_prior, solver, dtype):
    model, loss, x, y = problem(name, dtype)
    precision, noise = (0.3, 0.4) if g_prior else (2.0, 0.4)
    options = {"noise_variance": noise} if name == "mse" else {"epochs": 20, "batch_size": 25}  # of descent
    posterior = pb.sampled_laplace(
        model,
        loss,
        (x, y),
        256,
        em_steps=0,
        g_prior=g_prior,
        prior_precision=precision,
        solver=solver,
        seed=9,
        **options,
    )
    H, prior, expected = dense(name, g_prior, precision, noise)
    assert abs(posterior.effective_dimension / expected - 1) < 0.05
    exact, _, exact_x, _ = problem(name)
    _, J = jacobian(exact, exact_x)
    truth = torch.einsum("nkd,de,nke->nk", J, torch.linalg.inv(H + prior.diag()), J)
    close_within_errors(posterior.functional(x, diagonal=True)[1].double(), truth, 256)


@pytest.mark.filterwarnings("ignore:the relative")  # few epochs
@pytest.mark.parametrize("solver", ["dual", "block", "sgd"])
def test_the_fixed_point_of_em_by_other_solvers(solver):
    """Of a conjugate model, in the units of the features under the g-prior: theta_j = u_j / ||x_j||, u ~ N(0, noise / r)."""
    model, x, y = regression(n=150, inputs=9, outputs=3, seed=5)
    noise = 0.25
    posterior = pb.sampled_laplace(
        model, nn.MSELoss(), (x, y), 256, em_steps=30, prior_precision=0.5, noise_variance=noise, solver=solver, tol=1e-5,
        batch_size=50,
    )  # fmt: skip
    X = x / x.norm(dim=0)
    e, U = torch.linalg.eigh(X.T @ X)
    c, grid = (U.T @ (X.T @ y)).square().sum(1), torch.linspace(-6, 2, 8001, dtype=F64).exp()
    r = grid[:, None]
    evidence = (3 * (r.log() - (e + r).log()) + c / (e + r) / noise).sum(1)
    assert abs(posterior.prior_precision / grid[evidence.argmax()].item() - 1) < 0.03


@pytest.mark.parametrize(("per", "match"), [("layer", None), ("all", "auto"), ("parameter", "exponent")])
def test_rescaled_features_leave_predictions(per, match):
    """Those of a convolution: channels of the input, and of the hidden layer before a linear one."""
    model, loss, x, y = problem("weighted")
    relu = nn.Sequential(model[0], nn.ReLU(), model[2], model[3], model[4])
    other, c, d = copy.deepcopy(relu), 50.0, 0.02
    with torch.no_grad():
        other[0].weight[:, 0] /= c
        other[0].weight[1] *= d
        other[4].weight[:, 2:4] /= d  # two positions of that channel
    scaled = x.clone()
    scaled[:, 0] *= c
    torch.testing.assert_close(other(scaled), relu(x))
    options = {"samples": 6, "em_steps": 2, "seed": 3, "per": per, "match": match, "tol": 1e-8}
    one, two = (pb.sampled_laplace(m, loss, (z, y), **options) for m, z in ((relu, x), (other, scaled)))
    torch.testing.assert_close(two.predict(scaled), one.predict(x), rtol=1e-5, atol=0)
    torch.testing.assert_close(two.functional(2 * scaled)[1], one.functional(2 * x)[1], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("solver", ["cg", "dual"])
@pytest.mark.parametrize("per", ["layer", "parameter"])
def test_the_fixed_point_of_several_precisions(per, solver):
    """MacKay's equations at dense matrices, lambda_g ||w*||_g^2 = gamma_g, of a conjugate model with a bias."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(120, 7, generator=g, dtype=F64)
    y = 0.4 * x[:, :2] + 2.0 + 0.6 * torch.randn(120, 2, generator=g, dtype=F64)
    model, noise = nn.Linear(7, 2).double(), 0.36
    posterior = pb.sampled_laplace(
        model, nn.MSELoss(), (x, y), 512, em_steps=40, g_prior=False, noise_variance=noise, solver=solver, per=per, seed=2,
    )  # fmt: skip
    found = posterior.prior_precision
    found = {"weight": found, "bias": found} if per == "layer" else found  # of one layer, a number
    X = torch.cat([x, torch.ones(120, 1, dtype=F64)], 1)
    lam, bias = torch.ones(8, dtype=F64), torch.arange(8) == 7
    for _ in range(500):  # MacKay's updates, exactly: both outputs have the same features
        A = X.T @ X / noise + lam.diag()
        w = torch.linalg.solve(A, X.T @ y / noise)
        gamma = 2 * (1 - lam * torch.linalg.inv(A).diagonal())
        squares = w.square().sum(1)
        for at in [torch.ones(8, dtype=torch.bool)] if per == "layer" else [~bias, bias]:
            lam[at] = gamma[at].sum() / squares[at].sum()
    assert abs(found["weight"] / lam[0].item() - 1) < 0.03
    assert abs(found["bias"] / lam[7].item() - 1) < 0.03


@pytest.mark.parametrize("solver", ["dual", "cg"])
def test_a_group_of_which_the_data_determines_less_than_half_a_weight(solver):
    """One weight t of curvature h: the evidence is largest at h / (h t^2 - 1), where 1 - 1 / (h t^2) of it is determined."""
    x = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
    h, told = x.square().sum(), 1.6
    t = (told / h).sqrt()
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(t)
    p = pb.sampled_laplace(
        model, nn.MSELoss(reduction="sum"), (x, t * x), 256, em_steps=30, g_prior=False, seed=1, solver=solver
    )
    assert abs(p.prior_precision / float(h / (told - 1)) - 1) < 0.02
