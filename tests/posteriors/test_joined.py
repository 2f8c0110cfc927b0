"""Joining small batches changes nothing but the time."""

import pytest
import torch
from torch import nn

import paraboloid as pb
from paraboloid.data.joined import joined
from paraboloid.passes.memory import JOINED


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def data(*sizes):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)) for n in sizes]


@pytest.mark.parametrize("structure", ["full", "diag", "kron", "ekfac", "lowrank", "functional"])
def test_a_fit_is_that_of_the_batches_alone(structure):
    model, batches = mlp(), data(7, 5, 12)
    one = pb.laplace(model, nn.CrossEntropyLoss(), batches, structure)
    alone = pb.laplace(model, nn.CrossEntropyLoss(), batches, structure, max_memory=2**30)  # nothing is joined
    torch.testing.assert_close(one.functional(batches[0][0])[1], alone.functional(batches[0][0])[1])
    assert one.count == alone.count == 24 and one.loss == pytest.approx(alone.loss)
    torch.testing.assert_close(one.log_evidence(), alone.log_evidence())


def test_what_is_joined():
    batches = data(7, 5, 12)
    (only,) = joined(batches, mlp(), None)
    assert torch.equal(only[0], torch.cat([x for x, _ in batches])) and len(only[1]) == 24
    wide = torch.zeros(JOINED.default // 8 // 100, 100, dtype=torch.float64)
    found = list(joined([(wide, torch.zeros(len(wide)))] * 2, mlp(), None))
    assert [len(x) for x, _ in found] == [len(wide)] * 2
    tokens = [(torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3))] * 2
    mixed = [*tokens, *data(2, 3), ({"a": torch.zeros(2, 2)}, torch.zeros(2)), *data(4)]
    assert [len(y) for _, y in joined(mixed, mlp(), None)] == [3, 3, 5, 2, 4]
    assert joined(batches[0], mlp(), None) is batches[0]
    assert joined(batches, mlp(), 2**20) is batches
    assert joined(batches, nn.Linear(1001, 1001), None) is batches


def test_samples_of_square_batches_are_found_by_the_model():
    square = [(torch.randn(4, 4, dtype=torch.float64), torch.zeros(4))] * 3
    (only,) = joined(square, mlp(), None)
    assert len(only[1]) == 12

    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, x):
            return self.inner(x.T)

    assert [len(y) for _, y in joined(square, Transposed(), None)] == [4, 4, 4]
