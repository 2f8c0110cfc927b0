"""Directions of an averaged gradient, as long as Adam's own steps."""

import pytest
import torch
from torch import nn

import paraboloid as pb
from paraboloid.optim import direction
from paraboloid.optim.adam_length import AdamLength
from paraboloid.optim.direction import Move

LOSS = nn.CrossEntropyLoss()


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-6), (torch.bfloat16, 2e-2)])
def test_lengths_are_those_of_adams_steps(dtype, rtol):
    torch.manual_seed(0)
    p = [torch.zeros(3, 2, dtype=dtype), torch.zeros(4, dtype=dtype)]
    twins = [nn.Parameter(t.double()) for t in p]
    length, adam = AdamLength(0.5), torch.optim.Adam(twins, lr=0.5)
    states = [{}, {}]
    for _ in range(4):
        m = Move({"momentum": 0.9, "lr": 1.0})
        for i, t in enumerate(p):
            m.add(str(i), t, states[i], torch.randn_like(t) * 1e-2)
            twins[i].grad = m.gradient[i].double()
        before = [t.detach().clone() for t in twins]
        adam.step()
        direction.averaged(m)
        length.measure(m)
        m.direction = turned = [-3 * d.flip(0) for d in m.direction]
        length(m)
        for d, other, twin, old in zip(m.direction, turned, twins, before, strict=True):
            want = (twin.detach() - old).norm()
            torch.testing.assert_close(d.double().norm(), want, rtol=rtol, atol=0.0)
            torch.testing.assert_close(d / d.norm(), other / other.norm())


def test_a_direction_of_length_zero_stays():
    m = Move({"momentum": 0.9, "lr": 1.0})
    m.add("w", torch.ones(2), {}, torch.zeros(2))
    length = AdamLength(1.0)
    direction.averaged(m)
    length.measure(m)
    length(m)
    assert torch.equal(m.direction[0], torch.zeros(2))


def steps(make):
    """Parameters after three steps, with a closure on each batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()
    g = torch.Generator().manual_seed(1)
    data = [(torch.randn(16, 5, generator=g).double(), torch.randint(3, (16,), generator=g)) for _ in range(3)]
    opt = make(model)
    if isinstance(opt, pb.optim.KBFGS):
        opt.warm_start(data)
    for x, y in data:

        def closure(x=x, y=y):
            opt.zero_grad()
            loss = LOSS(model(x), y)
            loss.backward()
            return loss

        opt.step(*([(x, y)] if isinstance(opt, pb.optim.HessianFree) else [closure]))
    return torch.cat([p.detach().flatten() for p in model.parameters()])


FREE = {"kl_clip": None, "rise_factor": None}
PAPERS = [
    ("KBFGS", {"lr": 0.3, "damping": 0.3, "graft": None, "rise_factor": None}),
    ("KBFGSL", {"lr": 0.3, "damping": 0.3, "graft": None, "rise_factor": None}),
    ("Preconditioned", {"curvature": "diag_ggn_mc", "lr": 0.1, "damping": 1e-2, "momentum": 0.0, "decay": 0.0, **FREE}),
    ("KFAC", {"lr": 1.0, "damping": 150.0, "factor_interval": 1, "inverse_interval": 20, "adapt_damping": True,
              "step_size": "quadratic", **FREE}),
    ("EKFAC", {"factor_interval": 1, **FREE}),
    ("HessianFree", {"warm_start": 0.95, "preconditioner": "second_moment", "judge": False}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), PAPERS)
def test_the_papers_step_is_one_argument_away(kind, options):
    make = getattr(pb.optim, kind)
    paper = steps(lambda m: make(m, LOSS, paper=True))
    assert torch.equal(paper, steps(lambda m: make(m, LOSS, **options)))
    assert not torch.equal(paper, steps(lambda m: make(m, LOSS)))


def test_what_is_given_beside_the_papers_constants_counts():
    opt = pb.optim.KFAC(nn.Linear(2, 2), LOSS, paper=True, damping=3.0)
    assert opt.param_groups[0]["damping"] == 3.0
    assert opt.param_groups[0]["lr"] == 1.0
    assert opt.step_size == "quadratic"


@pytest.mark.parametrize("make", [pb.optim.KBFGS, pb.optim.KBFGSL])
def test_a_learning_rate_of_ones_own_is_the_papers(make):
    assert torch.equal(steps(lambda m: make(m, LOSS, lr=0.2)), steps(lambda m: make(m, LOSS, lr=0.2, graft=None)))
    assert torch.equal(steps(lambda m: make(m, LOSS)), steps(lambda m: make(m, LOSS, lr=0.3, graft="adam")))


def test_the_diagonals_damping_has_no_units():
    ends = []
    for scale in (1.0, 1e4):
        loss = scale * pb.losses.CrossEntropy()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        opt = pb.optim.Preconditioned(model, loss)
        g = torch.Generator().manual_seed(1)
        for _ in range(3):
            x, y = torch.randn(16, 5, generator=g).double(), torch.randint(3, (16,), generator=g)
            opt.zero_grad()
            loss(model(x), y).backward()
            opt.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-7)
