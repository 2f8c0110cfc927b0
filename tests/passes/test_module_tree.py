"""A model whose modules or parameters are other objects than before is noticed; one that trained is the same."""

import torch
from torch import nn

from paraboloid.passes.module_tree import ModuleTree


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
