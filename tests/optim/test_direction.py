"""The parts of a step, each alone, against its formula; and chained, against torch's optimisers."""

import pytest
import torch

from paraboloid.optim import direction, foreach
from paraboloid.optim.direction import Graft, Move, TrustRegion

F64 = torch.float64


def move(seed=0, **group):
    g = torch.Generator().manual_seed(seed)
    shapes = [(3, 2), (4,)]
    params, gradient, d = ([torch.randn(s, generator=g, dtype=F64) for s in shapes] for _ in range(3))
    options = {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.0, "damping": 0.1, **group}
    m = Move(options)
    for name, p, each in zip(("w", "b"), params, gradient, strict=True):
        m.add(name, p, {}, each)
    m.direction = d
    return m


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def renewed(m, seed):
    """The same parameters and states with the next batch's gradient as direction."""
    fresh = move(seed)
    m.gradient = m.direction = fresh.gradient


@pytest.mark.parametrize("decoupled", [False, True])
def test_weight_decay(decoupled):
    m = move(weight_decay=0.3, decoupled=decoupled)
    theta, g = flat(m.params), flat(m.gradient)
    direction.coupled_decay(m)
    torch.testing.assert_close(flat(m.gradient), g if decoupled else g + 0.3 * theta)
    direction.decoupled_decay(m)
    torch.testing.assert_close(flat(m.params), theta * (1 - 0.03) if decoupled else theta)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_momentum_is_torch_s(mu, nesterov):
    m = move(momentum=mu, nesterov=nesterov, weight_decay=0.2)
    theirs = [p.clone().requires_grad_() for p in m.params]
    sgd = torch.optim.SGD(theirs, lr=0.1, momentum=mu, nesterov=nesterov and mu > 0, weight_decay=0.2)
    for t in range(4):
        renewed(m, t)
        for p, g in zip(theirs, m.gradient, strict=True):
            p.grad = g.clone()
        for part in (direction.coupled_decay, direction.momentum, direction.descend):
            part(m)
        sgd.step()
    torch.testing.assert_close(flat(m.params), flat(theirs).detach(), rtol=1e-14, atol=1e-14)


def test_momentum_as_a_running_average():
    m, mean = move(momentum=0.8), 0
    for t in range(3):
        renewed(m, t)
        mean = 0.8 * mean + 0.2 * flat(m.gradient)
        direction.averaged(m)
        torch.testing.assert_close(flat(m.direction), mean, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("kind", [None, "sgd", "adam"])
def test_grafting(kind):
    m, graft = move(), Graft(kind)
    adam_params = [p.clone().requires_grad_() for p in m.params]
    adam = torch.optim.Adam(adam_params, lr=1.0)
    for t in range(3):
        fresh = move(t)
        m.gradient, m.direction, d = fresh.gradient, fresh.direction, fresh.direction
        before = [p.detach().clone() for p in adam_params]
        for p, g in zip(adam_params, m.gradient, strict=True):
            p.grad = g.clone()
        adam.step()
        graft(m)
        lengths = {
            None: [v.norm() for v in d],
            "sgd": [g.norm() for g in m.gradient],
            "adam": [(p.detach() - b).norm() for p, b in zip(adam_params, before, strict=True)],
        }[kind]
        for found, v, length in zip(m.direction, d, lengths, strict=True):
            torch.testing.assert_close(found, v * (length / v.norm()), rtol=1e-10, atol=1e-12)
    m.direction = [torch.zeros_like(p) for p in m.params]
    graft(m)
    assert not flat(m.direction).any()  # a direction of length zero has none


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_trust_regions(limit):
    for options in ({"kl_clip": limit}, {"max_step": limit}, {}):
        m = move(lr=0.2)
        m.gradient = [2 * d for d in m.direction]
        d, g = flat(m.direction), flat(m.gradient)
        TrustRegion(**options)(m)
        sizes = {"kl_clip": 0.04 * d @ g, "max_step": 0.2 * d.norm()}
        factor = 1.0
        for name in options:
            share = limit / float(sizes[name])
            factor = min(1.0, share**0.5 if name == "kl_clip" else share)
        torch.testing.assert_close(flat(m.direction), factor * d, rtol=1e-12, atol=0)
    m = move()
    m.direction = [-g for g in m.gradient]  # uphill: no divergence is predicted, nothing to clip
    TrustRegion(kl_clip=1e-9)(m)
    assert torch.equal(flat(m.direction), -flat(m.gradient))


def test_finite_numbers_are_told_from_others():
    big = torch.full((5,), 1e30)  # whose norm overflows
    assert foreach.finite([]) and foreach.finite([big, torch.ones(2, dtype=F64), torch.ones(3, dtype=torch.bfloat16)])
    for wrong in (float("nan"), float("inf"), -float("inf")):
        assert not foreach.finite([torch.ones(3), torch.tensor([1.0, wrong])])
