"""A parameter without axes (a logit scale) in every quantity, next to loops of autograd in float64."""

import warnings

import pytest
import torch
from oracle import close, sample_diag_ggn, sample_grads
from torch import nn

import paraboloid as pb

CE = nn.CrossEntropyLoss()


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.tensor(1.3))

    def forward(self, x):
        return self.layer(x) * self.scale.exp()


class Multiplied(Scaled):
    def forward(self, x):
        return self.layer(x) * self.scale


@pytest.mark.parametrize("cls", [Scaled, Multiplied])
def test_every_quantity_of_a_scalar(cls):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = cls().double(), torch.randn(5, 4).double()
    y, params = torch.arange(5) % 3, dict(model.named_parameters())
    names = ["grad", "sample_grads", "square_norms", "gram", "second_moment", "variance", "diag_ggn", "sample_diag_ggn"]
    stats = pb.statistics(model, CE, (x, y), names)
    g = sample_grads(CE, model(x), y, params)["scale"]
    d = sample_diag_ggn(CE, model(x), y, params)["scale"]
    close(stats["grad"]["scale"], g.mean())
    close(stats["sample_grads"]["scale"], g)
    close(stats["square_norms"]["scale"], g.square())
    close(stats["gram"]["scale"], torch.outer(g, g))
    close(stats["second_moment"]["scale"], g.square().mean())
    close(stats["variance"]["scale"], g.var(unbiased=False))
    close(stats["diag_ggn"]["scale"], d.mean())
    close(stats["sample_diag_ggn"]["scale"], d)
    kron = pb.statistics(model, CE, (x, y), ["kflr", "kfac", "kfac_empirical"], seed=0)
    close(kron["kflr"]["scale"].left, d.mean().view(1, 1))
    close(kron["kfac_empirical"]["scale"].left, g.square().mean().view(1, 1))
    with warnings.catch_warnings():  # exp(scale) is not affine in it
        warnings.filterwarnings("ignore", message=r"diag_hessian: the parameters \['scale'\]")
        diagonal = pb.statistics(model, CE, (x, y), ["diag_hessian"])["diag_hessian"]
    close(torch.cat([t.flatten() for t in diagonal.values()]), pb.Hessian(model, CE, (x, y)).diagonal())
    loader = pb.statistics(model, CE, [(x[:2], y[:2]), (x[2:], y[2:])], names)
    for name in names:
        close(loader[name]["scale"], stats[name]["scale"], name)
    for structure in ("diag", "kron", "ekfac", "full", "lowrank"):
        posterior = pb.laplace(model, CE, (x, y), structure=structure)
        assert posterior.predict(x).shape == (5, 3) and posterior.sample(2, seed=0)["scale"].shape == (2,)
