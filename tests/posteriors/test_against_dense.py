"""Every structure against the dense matrix, over the models and losses of the house."""

import math

import losses_table
import models
import oracle
import pytest
import torch
from posteriors.dense import close, curvature, jacobian, log_evidence, theta
from torch import nn

from paraboloid.posteriors import laplace

EXACT = ["full", "functional", "lowrank"]
SMALL = ["mlp", "sequence mlp", "residual cnn", "conv1d", "class token", "shared", "low rank", "flattened", "tagger"]


def problem(name, loss="ce", n=5):
    model, x = models.make(name, n)
    f = model(*x) if isinstance(x, tuple) else model(x)
    if f.dim() > 2 and loss.startswith("ce") and name in ("sequence mlp",):
        loss = "mse"
    return model, x, *losses_table.make(loss, f)


def precisions(model):
    size = len(theta(model))
    return torch.linspace(0.5, 2, size, dtype=torch.float64)


def halves(x, y):
    first = tuple(t[:2] for t in x) if isinstance(x, tuple) else x[:2]
    rest = tuple(t[2:] for t in x) if isinstance(x, tuple) else x[2:]
    return [(first, y[:2]), (rest, y[2:])]


def scale_of(loss_fn):
    """A squared error is read as N(f, I): half of it."""
    return 0.5 if isinstance(loss_fn, nn.MSELoss) else 1.0


@pytest.mark.parametrize("structure", EXACT)
@pytest.mark.parametrize("name", SMALL)
def test_exact_structures_on_models(name, structure):
    model, x, loss_fn, y = problem(name)
    H, precision = curvature(model, loss_fn, x, y, scale_of(loss_fn)), precisions(model)
    S = torch.linalg.inv(H + precision.diag())
    posterior = laplace(model, loss_fn, halves(x, y), structure, prior_precision=precision, rank=len(S))
    f, J = jacobian(model, x)
    mean, covariance = posterior.functional(x)
    close(mean, f)
    close(covariance, J @ S @ J.mT)
    _, variance = posterior.functional(x, diagonal=True)
    close(variance.flatten(1), (J @ S @ J.mT).diagonal(dim1=1, dim2=2))
    _, joint = posterior.functional(x, joint=True)
    close(joint.flatten(0, 1).flatten(1), J.flatten(0, 1) @ S @ J.flatten(0, 1).T)
    close(posterior.precision().variances(), S.diagonal())
    found = posterior.log_evidence()
    total = sum(oracle.unreduced(loss_fn, f, y)) * scale_of(loss_fn)
    constant = y.numel() * math.log(2 * math.pi) / 2 if isinstance(loss_fn, nn.MSELoss) else 0
    close(found, log_evidence(-total - constant, H, precision, theta(model)))


@pytest.mark.parametrize("name", ["mlp", "residual cnn", "gpt", "vit", "shared", "reparametrised", "unet", "detector"])
def test_diagonal_on_models(name):
    model, x, loss_fn, y = problem(name)
    h, precision = curvature(model, loss_fn, x, y).diagonal(), precisions(model)
    posterior = laplace(model, loss_fn, halves(x, y), "diag", prior_precision=precision)
    _, J = jacobian(model, x)
    expected = (J / (h + precision)) @ J.mT
    close(posterior.functional(x)[1], expected)
    close(posterior.functional(x, diagonal=True)[1].flatten(1), expected.diagonal(dim1=1, dim2=2))
    close(posterior.functional(x, joint=True)[1][0, :, 1], (J[0] / (h + precision)) @ J[1].T)


@pytest.mark.parametrize("structure", ["full", "functional", "lowrank", "diag"])
@pytest.mark.parametrize("loss", losses_table.LOSSES)
def test_losses(loss, structure):
    model, x, loss_fn, y = problem("mlp", loss, 5)
    H = curvature(model, loss_fn, x, y, scale_of(loss_fn))
    H = H.diagonal().diag() if structure == "diag" else H
    S = torch.linalg.inv(H + 0.3 * torch.eye(len(H), dtype=H.dtype))
    posterior = laplace(model, loss_fn, halves(x, y), structure, prior_precision=0.3, rank=len(H))
    _, J = jacobian(model, x)
    close(posterior.functional(x)[1], J @ S @ J.mT)


@pytest.mark.parametrize("structure", ["full", "functional", "lowrank", "diag"])
def test_evidence_by_finite_differences(structure):
    model, x, loss_fn, y = problem("mlp", n=6)
    posterior = laplace(model, loss_fn, (x, y), structure, rank=5)
    value = torch.tensor([0.3, 1.1, 2.0, 0.7], dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(posterior.log_evidence(value), value)
    for i in range(4):
        step = 1e-5 * torch.eye(4, dtype=torch.float64)[i]
        with torch.no_grad():
            slope = (posterior.log_evidence(value + step) - posterior.log_evidence(value - step)) / 2e-5
        close(g[i], slope, 1e-6)


def test_a_subset_of_weights():
    model, x, loss_fn, y = problem("mlp", n=6)
    H = curvature(model, loss_fn, x, y)
    places = {"0.weight": slice(0, 20), "0.bias": slice(20, 25), "2.weight": slice(25, 40), "2.bias": slice(40, 43)}
    for weights, names in [
        ("last_layer", ["2.weight", "2.bias"]), (["0"], ["0.weight", "0.bias"]), (["2.bias", "0.weight"], None),
        (lambda name: "bias" in name, ["0.bias", "2.bias"]),
    ]:  # fmt: skip
        names = names or ["0.weight", "2.bias"]
        at = torch.cat([torch.arange(43)[places[k]] for k in names])
        posterior = laplace(model, loss_fn, (x, y), "full", weights=weights)
        assert list(posterior.weights) == names
        close(posterior.curvature.to_dense(), H[at][:, at])
        _, J = jacobian(model, x)
        S = torch.linalg.inv(H[at][:, at] + torch.eye(len(at), dtype=H.dtype))
        close(posterior.functional(x)[1], J[..., at] @ S @ J[..., at].mT)
    assert all(p.requires_grad for p in model.parameters())
