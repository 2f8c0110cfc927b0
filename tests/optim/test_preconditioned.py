"""Preconditioned descent takes exactly (C + (damping + weight_decay) I)^-1 (g + weight_decay theta)."""

import pytest
import torch
from torch import nn

import paraboloid as pb

LOSS = nn.CrossEntropyLoss()
EXACT = ["diag_ggn", "diag_hessian", "second_moment", "variance", "kflr", "kfac_empirical", "kfra"]


def net(activation=nn.Tanh):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), activation(), nn.Flatten(), nn.Linear(108, 10), activation(), nn.Linear(10, 4)
    ).double()  # fmt: skip


def batch(N=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, 1, 8, 8, generator=g, dtype=torch.float64), torch.randint(4, (N,), generator=g)


def step(model, opt, x, y):
    opt.zero_grad()
    LOSS(model(x), y).backward()
    opt.step()


@pytest.mark.parametrize("curvature", EXACT)
def test_the_step(curvature):
    model, (x, y) = net(), batch()
    opt = pb.optim.Preconditioned(model, LOSS, curvature=curvature, lr=0.3, damping=0.2, weight_decay=0.1)
    for _ in range(2):  # of each batch alone: nothing is carried over
        C = pb.statistics(model, LOSS, (x, y), [curvature])[curvature]
        names = [n for n, _ in model.named_parameters()]
        grads = dict(zip(names, torch.autograd.grad(LOSS(model(x), y), list(model.parameters())), strict=True))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        step(model, opt, x, y)
        for name, p in model.named_parameters():
            g = grads[name] + 0.1 * before[name]
            kron = isinstance(C[name], pb.Kron)
            want = C[name].inverse(0.3) @ g if kron else g / (C[name] + 0.3)
            torch.testing.assert_close(before[name] - p.detach(), 0.3 * want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("curvature", ["diag_ggn_mc", "kfac"])
def test_sampled_curvature_follows_the_seed(curvature):
    ends = []
    for seed in (0, 0, 1):
        model, (x, y) = net(), batch()
        opt = pb.optim.Preconditioned(model, LOSS, curvature=curvature, seed=seed)
        step(model, opt, x, y)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_negative_curvature_counts_by_its_size_where_damping_does_not_cover_it():
    model, (x, y) = net(), batch()
    opt = pb.optim.Preconditioned(model, LOSS, curvature="diag_hessian", lr=1.0, damping=1e-3)
    h = pb.statistics(model, LOSS, (x, y), ["diag_hessian"])["diag_hessian"]["3.weight"]
    assert (h < -9e-4).any()
    (g,) = torch.autograd.grad(LOSS(model(x), y), model[3].weight)
    before = model[3].weight.detach().clone()
    step(model, opt, x, y)
    want = g / (torch.where(h + 1e-3 < 1e-4, h.abs(), h) + 1e-3)
    torch.testing.assert_close(before - model[3].weight.detach(), want, rtol=1e-9, atol=1e-12)


def test_a_running_average_of_the_curvature():
    model, (x, y) = net(), batch()
    opt = pb.optim.Preconditioned(model, LOSS, curvature="diag_ggn", decay=0.75)
    first = pb.statistics(model, LOSS, (x, y), ["diag_ggn"])["diag_ggn"]["3.weight"]
    step(model, opt, x, y)
    second = pb.statistics(model, LOSS, (x, y), ["diag_ggn"])["diag_ggn"]["3.weight"]
    step(model, opt, x, y)
    torch.testing.assert_close(opt._blocks["3.weight"].kron.left, ((first + second) / 2).flatten())


def test_a_weight_without_kronecker_structure():
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 4)).double()
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.randint(4, (8,))
    opt = pb.optim.Preconditioned(model, LOSS, curvature="kflr", lr=1.0, damping=0.1)
    weight = dict(model.named_parameters())["0.parametrizations.weight.original1"]
    C = pb.statistics(model, LOSS, (x, y), ["diag_ggn"])["diag_ggn"]["0.parametrizations.weight.original1"]
    (g,) = torch.autograd.grad(LOSS(model(x), y), weight)
    before = weight.detach().clone()
    step(model, opt, x, y)
    torch.testing.assert_close(before - weight.detach(), g / (C + 0.1))


def test_errors():
    model = net()
    with pytest.raises(ValueError, match="curvature is 'grad'; expected one of"):
        pb.optim.Preconditioned(model, LOSS, curvature="grad")
    with pytest.raises(ValueError, match="damping is -1; expected a number of at least 0"):
        pb.optim.Preconditioned(model, LOSS, damping=-1)
    x, y = batch()
    dead = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 4)).double()
    with torch.no_grad():
        dead[1].bias.fill_(-100)
    opt = pb.optim.Preconditioned(dead, LOSS, curvature="diag_ggn", damping=0)
    LOSS(dead(x), y).backward()
    with pytest.raises(ValueError, match=r"are both 0 somewhere.*expected damping > 0"):
        opt.step()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_second_moments_of_several_passes_are_weighted_by_samples(reduction):
    model, (x, y), loss = net(), batch(), nn.CrossEntropyLoss(reduction=reduction)
    opt = pb.optim.Preconditioned(model, loss, curvature="second_moment")
    for part in (slice(0, 4), slice(4, 12)):
        loss(model(x[part]), y[part]).backward()
    want = pb.statistics(model, loss, (x, y), ["second_moment"])["second_moment"]["3.weight"]
    opt.step()
    torch.testing.assert_close(opt._blocks["3.weight"].kron.left, want.flatten())
