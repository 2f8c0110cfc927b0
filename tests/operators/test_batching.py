"""Several products in one vectorised pass: which models it serves, that nothing changes, and when it gives way."""

import pytest
import torch
from operators.oracle import LOSSES, MODELS, classes, make_inputs, make_model
from torch import nn

import paraboloid as pb
from paraboloid.operators import GGN, Hessian
from paraboloid.operators.matrix_free.batching import Batching

CE = nn.CrossEntropyLoss()
OPERATORS = [GGN, Hessian, pb.Fisher, pb.EmpiricalFisher]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(name, n=4):
    return make_inputs(name, n, n), classes(n, n)


def looped(A):
    A.replay.batching = Batching(torch.zeros(1), flops=10**12, size=1, max_memory=10**9)
    return A


@pytest.mark.parametrize("Operator", OPERATORS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("blocks", ["all", "layer"])
def test_they_are_those_of_the_loop(name, Operator, blocks):
    """Five vectors in passes of two at most."""
    model, data = make_model(name), [batch(name, 4), batch(name, 3)]
    A, B = Operator(model, CE, data, blocks=blocks), looped(Operator(model, CE, data, blocks=blocks))
    for operator in (A, B):
        if Operator is not Hessian:
            operator.root.columns = 0
    V = random(A.shape[0], 5)
    A @ V[:, :2]
    A.replay.batching.most = 2
    expected = B @ V
    torch.testing.assert_close(A @ V, expected, rtol=1e-10, atol=1e-12 * expected.abs().max().item())
    assert A.replay.batching.compared
    torch.testing.assert_close(A.quadratic_forms(V.T), (V * expected).sum(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss):
    loss_fn, targets = LOSSES[loss]
    data = (make_inputs("mlp", 4, 4), targets(4, 4))
    for Operator in OPERATORS:
        A, B = Operator(make_model("mlp"), loss_fn, data), looped(Operator(make_model("mlp"), loss_fn, data))
        V = random(A.shape[0], 3)
        torch.testing.assert_close(A @ V, B @ V, rtol=1e-10, atol=1e-13)
        assert A.replay.batching.wanted


def test_who_takes_it():
    p, options = torch.zeros(1000), {"size": 1, "max_memory": 100}
    assert Batching(p, flops=10**6, **options).wanted
    assert not Batching(p, flops=10**9, **options).wanted
    assert Batching(p, flops=10**6, **options).most == 32
    assert Batching(p, flops=0, size=60, max_memory=100).together([torch.zeros(3, 2)], list) is None


class NoRule(torch.autograd.Function):
    """A cube that knows its derivatives but cannot be vectorised."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        assert float(g.detach().sum()) is not None  # reads a number, of which there are several in a vectorised pass
        return 3 * x**2 * g


def test_an_operation_without_a_rule_takes_the_loop():
    class Cubes(nn.Linear):
        def forward(self, x):
            return NoRule.apply(super().forward(x))

    model = Cubes(5, 3).double()
    A = GGN(model, CE, batch("mlp"))
    V = random(A.shape[0], 3)
    product = A @ V
    assert not A.replay.batching.wanted
    torch.testing.assert_close(product, torch.stack([A @ v for v in V.T], 1))


def test_a_difference_takes_the_loop():
    A = GGN(make_model("mlp"), CE, batch("mlp"))
    V = random(57, 3)
    expected = torch.stack([A @ v for v in V.T], 1)
    graph = A.replay.kept[0]
    original = graph.product
    graph.product = lambda v, block: [
        t * (1 + (t.dim() > p.dim()) * 1e-3) for t, p in zip(original(v, block), graph.parameters, strict=True)
    ]
    torch.testing.assert_close(A @ V, expected)
    assert not A.replay.batching.wanted


def test_single_precision_is_compared_loosely():
    x, y = batch("mlp")
    A = GGN(make_model("mlp").float(), CE, (x.float(), y))
    A @ random(57, 3)
    assert A.replay.batching.compared
