"""A model whose modules or parameters are other objects than before is noticed; one that trained is the same."""

import pytest
import torch
from torch import nn

from paraboloid.passes.module_tree import ModuleTree, modules_and_parameters_of, modules_of, named_parameters_of


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2)))


def test_training_changes_nothing():
    m = model()
    tree = ModuleTree(m)
    m(torch.randn(5, 3)).sum().backward()
    torch.optim.SGD(m.parameters(), 0.1).step()
    m.eval().load_state_dict(model().state_dict())
    assert tree.is_unchanged()
    assert tree.modules == list(m.modules())


def test_other_modules_and_parameters_are_noticed():
    def replaced(m):
        m[2][0] = nn.Linear(4, 2)

    def appended(m):
        m[2].append(nn.ReLU())

    def reinitialised(m):
        m[0].weight = nn.Parameter(m[0].weight.detach().clone())

    def without_bias(m):
        m[0].bias = None

    def parametrized(m):
        nn.utils.parametrizations.weight_norm(m[0])

    for change in (replaced, appended, reinitialised, without_bias, parametrized):
        m = model()
        tree = ModuleTree(m)
        change(m)
        assert not tree.is_unchanged(), change.__name__


class Twice(nn.Module):
    """A module and a weight used under two names, a missing child, and a wrapper with names of its own."""

    def __init__(self):
        super().__init__()
        self.first = model()
        self.again = self.first[2]
        self.none = None
        self.register_module("absent", None)
        self.head = nn.Linear(4, 2)
        self.head.weight = self.first[2][0].weight


class Named(nn.Linear):
    def named_parameters(self, *args, **kwargs):
        yield "own", self.weight


class Hidden(nn.Sequential):
    def named_modules(self, *args, **kwargs):
        yield "", self


@pytest.mark.parametrize(
    "m", [model(), Twice(), Named(2, 2), nn.Sequential(Named(2, 2)), Hidden(nn.Linear(2, 2)), nn.ModuleList([Twice()])]
)
def test_one_walk_finds_what_torch_finds(m):
    assert modules_of(m) == list(m.modules())
    expected, found = list(m.named_parameters()), named_parameters_of(m)
    assert list(found) == [name for name, _ in expected]
    assert all(p is found[name] for name, p in expected)
    modules, parameters = modules_and_parameters_of(m)
    assert modules == list(m.modules())
    assert [id(p) for p in parameters] == [id(p) for _, p in expected]
    nested = nn.Sequential(m)
    assert modules_of(nested) == list(nested.modules())
    assert list(named_parameters_of(nested)) == [name for name, _ in nested.named_parameters()]


def test_a_plain_callable_has_no_modules():
    assert modules_of(lambda x: x) == []
