import torch
from torch import nn

from paraboloid.jobs.inspection.subject import layers, subject
from paraboloid.problems import Problem


class Odd(nn.Module):
    """A parameter of its own, a frozen layer, and one weight used twice."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.block = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
        self.block[1].weight = self.block[0].weight


def test_parameters_are_grouped_by_the_module_that_owns_them():
    found = layers(Odd())
    described = [(layer.name, layer.kind, layer.size) for layer in found]
    assert described == [("scale", "parameter", 1), ("block.0", "Linear", 6)]
    assert list(found[1].parameters) == ["block.0.weight", "block.0.bias"]


def problem(size):
    x = torch.arange(size, dtype=torch.float32)[:, None]
    return Problem(nn.Linear(1, 1), nn.MSELoss(), (x, x), (x, x), name="line")


def test_all_samples_are_measured_where_they_are_few():
    s = subject(problem(600), 1000, 0)
    assert s.size == 600
    assert [len(x) for x, _ in s.batches] == [200, 200, 200]


def test_a_subset_is_drawn_by_the_seed():
    first, again, other = (subject(problem(600), 50, seed) for seed in (0, 0, 1))
    assert first.size == 50
    assert torch.equal(first.batches[0][0], again.batches[0][0])
    assert not torch.equal(first.batches[0][0], other.batches[0][0])
    assert [first.dataset[i][0].item() for i in range(50)] == first.batches[0][0].flatten().tolist()
