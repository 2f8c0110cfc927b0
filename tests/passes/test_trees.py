"""Vectors in parameter space: names, order, flat and dict forms, and every error."""

import pytest
import torch
from torch import nn

from paraboloid.passes import trees
from paraboloid.passes.wrappers import plain_name


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.b = nn.Linear(3, 2, bias=False)
        self.b.weight = self.a.weight


def test_parameters_are_the_trainable_ones_once_and_in_order():
    model = Model()
    found = trees.parameters(model)
    assert list(found) == ["scale", "a.weight", "a.bias"]
    assert found["a.weight"] is model.a.weight


@pytest.mark.parametrize("name", ["_orig_mod.a.weight", "_fsdp_wrapped_module.a._checkpoint_wrapped_module.weight"])
def test_wrappers_leave_no_trace_in_names(name):
    assert plain_name(name) == "a.weight"


def test_wrapped_models_have_the_plain_names():
    model = Model()
    wrapped = nn.DataParallel(model)
    assert list(trees.parameters(wrapped)) == list(trees.parameters(model))
    compiled = torch.compile(model, backend="eager")
    assert list(trees.parameters(compiled)) == list(trees.parameters(model))


@pytest.mark.parametrize("columns", [(), (4,)])
def test_flat_and_dict_are_inverse(columns):
    order = trees.parameters(Model())
    size = sum(p.numel() for p in order.values())
    flat = torch.randn(size, *columns, generator=torch.Generator().manual_seed(0))
    tree = trees.unflatten(flat, order)
    assert {k: t.shape for k, t in tree.items()} == {k: p.shape + columns for k, p in order.items()}
    assert torch.equal(trees.flatten(tree, order), flat)
    shuffled = dict(reversed(tree.items()))
    assert torch.equal(trees.flatten(shuffled, order), flat)


def test_names_must_match():
    order = trees.parameters(Model())
    tree = {k: torch.zeros_like(p) for k, p in order.items() if k != "scale"} | {"other": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"missing \['scale'\], unknown \['other'\]; expected"):
        trees.flatten(tree, order)


def test_shapes_must_match():
    order = trees.parameters(Model())
    tree = {k: torch.zeros_like(p) for k, p in order.items()}
    with pytest.raises(ValueError, match=r"entry 'a.weight' has shape \(3, 2\); expected \(2, 3\)"):
        trees.flatten(tree | {"a.weight": torch.zeros(3, 2)}, order)
    with pytest.raises(ValueError, match=r"entry '.*' has shape"):  # one entry with columns, the others without
        trees.flatten(tree | {"a.bias": torch.zeros(2, 5)}, order)
    with pytest.raises(ValueError, match="all entries may carry one trailing axis of columns"):
        trees.flatten({k: torch.zeros(*p.shape, 2, 2) for k, p in order.items()}, order)
    for wrong in (torch.zeros(8), torch.zeros(()), torch.zeros(9, 1, 1)):
        with pytest.raises(ValueError, match=r"the vector has shape .*; expected \[9\] or \[9, K\]"):
            trees.unflatten(wrong, order)


def test_a_model_without_trainable_parameters():
    with pytest.raises(ValueError, match="Linear has no parameter with requires_grad=True"):
        trees.parameters(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match="ReLU has no parameter"):
        trees.parameters(nn.ReLU())


def test_complex_parameters():
    with pytest.raises(ValueError, match=r"parameter 'weight' has dtype torch.complex64; expected a real"):
        trees.parameters(nn.Linear(2, 2, dtype=torch.complex64))


def test_parameters_on_several_devices():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"parameters lie on several devices \['cpu', 'meta'\]; expected one"):
        trees.parameters(model)
