"""Language-model size: nothing of classes x classes, nor of positions x positions x classes, is ever formed."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import paraboloid as pb

VOCABULARY, POSITIONS, DIM = 32_000, 512, 2


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.found = max([self.found, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))])
        return result


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, DIM), nn.Linear(DIM, VOCABULARY, bias=False)

    def forward(self, x):
        return self.head(torch.tanh(self.tokens(x))).transpose(1, 2)


@pytest.mark.parametrize("Operator", [pb.GGN, pb.Hessian, pb.Fisher, pb.EmpiricalFisher])
def test_a_head_with_32000_classes_and_512_positions(Operator):
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Decoder()
    x, y = (torch.randint(VOCABULARY, (1, POSITIONS), generator=generator) for _ in range(2))
    y[0, :9] = -100
    with Largest() as largest:
        A = Operator(model, nn.CrossEntropyLoss(), (x, y))
        v = torch.randn(A.shape[0], generator=generator)
        product = A @ v
        form = A.quadratic_forms(v[None]).item()
    assert largest.found == POSITIONS * VOCABULARY
    assert form == pytest.approx((v @ product).item(), rel=1e-3)


def test_the_product_there_is_the_right_one():
    """The same network with few enough classes for the dense Hessian of its outputs, applied by hand."""
    f = torch.randn(1, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([[0, 1, -100, 3, 6]])
    u = torch.randn(f.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = pb.losses.CrossEntropy()
    p = f.softmax(1)
    expected = p * u - p * (p * u).sum(1, keepdim=True)
    expected[:, :, 2] = 0
    torch.testing.assert_close(loss.hessian_product(f, y, u), expected)
