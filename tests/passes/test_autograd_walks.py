import torch
from torch import nn

from paraboloid.passes.autograd_walks import depending, depends


def net(width):
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))


def test_depending_finds_what_each_walk_finds():
    model = net(4)
    f = model(torch.randn(5, 3))
    u = torch.zeros_like(f, requires_grad=True)
    parts = dict(enumerate(torch.autograd.grad(f, list(model.parameters()), u, create_graph=True)))
    v = torch.ones(2, requires_grad=True)
    others = {9: (v * 2).sum(), 10: v, 11: u, 12: (v.sum() * u.square()).sum(), 13: torch.ones(2)}
    ts = parts | others
    for leaf in (u, v, next(model.parameters())):
        assert depending(ts, leaf) == {i for i, t in ts.items() if depends(t, [leaf])}
    assert depending({}, u) == set()


def test_a_diamond_is_walked_once_and_counts():
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    a = x * y
    ts = {0: a + a.sin(), 1: a.detach() * y, 2: (a * 2).exp()}
    assert depending(ts, x) == {0, 2}
    assert depending(ts, y) == {0, 1, 2}
