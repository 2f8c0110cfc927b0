"""Samples by the tangent kernel in float32 where precisions are tiny: small weights are differences of large ones."""

import torch
from posteriors.sampled.test_output_kernel import system
from torch import nn

from paraboloid.losses import Loss
from paraboloid.posteriors.sampled import expectation_maximisation as em
from paraboloid.posteriors.sampled.state import State
from paraboloid.posteriors.sampled.tangent_kernel import TangentKernel


def run_of(dtype, tiny):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 3)).to(dtype)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(40, 8, generator=g, dtype=torch.float64).to(dtype)
    y = torch.randint(3, (40,), generator=g)
    of = system(model, nn.CrossEntropyLoss(), [(x, y)], scale=False)
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    loss = Loss.from_torch(nn.CrossEntropyLoss())
    places = [list(range(len(list(model.parameters()))))]
    run = em.Run(of, places, theta, of.diagonal(), 1e-3, None, TangentKernel(of), False, None, False, 0.0, 1.0, loss)
    return run, State([tiny])


def solved(dtype, tiny):
    run, state = run_of(dtype, tiny)
    run.sample(state, lambda state: None)
    return state.w, state.history[-1].residual


def test_what_rounding_left_is_asked_for_again(monkeypatch):
    w, residual = solved(torch.float32, 1e-4)
    assert residual < 1e-3
    monkeypatch.setattr(em, "TOGETHER", 1)  # sample by sample
    each, _ = solved(torch.float32, 1e-4)
    assert (each - w).norm() < 1e-3 * w.norm()
    monkeypatch.setattr(em, "REFINED", 0)
    assert solved(torch.float32, 1e-4)[1] > 1e-2


def test_it_ends_where_that_does_not_help(monkeypatch):
    _, residual = solved(torch.float32, 1e-6)  # rounding is all there is
    monkeypatch.setattr(em, "REFINED", 0)
    assert residual <= 1.01 * solved(torch.float32, 1e-6)[1]
    _, exact = solved(torch.float64, 1e-6)
    assert exact < 1e-6
