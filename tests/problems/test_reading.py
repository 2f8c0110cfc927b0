"""Samples become batches: tensors as a whole, other datasets one by one."""

import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from paraboloid.problems import read

X, Y = torch.arange(12.0).view(6, 2), torch.arange(6)


class Items(Dataset):
    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return self.make(i)


def test_a_tensor_dataset_is_indexed():
    data = TensorDataset(X, Y)
    assert read(data)[0] is X
    x, y = read(data, torch.tensor([4, 1]))
    assert torch.equal(x, X[[4, 1]])
    assert y.tolist() == [4, 1]


@pytest.mark.parametrize(
    "data", [Items(lambda i: (X[i], int(Y[i]))), Subset(TensorDataset(X, Y), range(6)), Items(lambda i: [X[i], Y[i]])]
)
def test_any_map_style_dataset_is_read(data):
    x, y = read(data, torch.tensor([4, 1]))
    assert torch.equal(x, X[[4, 1]])
    assert y.tolist() == [4, 1]
    assert len(read(data)[1]) == 6


def test_inputs_may_be_tuples_and_dicts():
    x, y = read(Items(lambda i: ((X[i], X[i]), i)), device=torch.device("cpu"))
    assert torch.equal(x[1], X)
    x, y = read(Items(lambda i: {"ids": X[i], "labels": i}), device=torch.device("cpu"))
    assert list(x) == ["ids"]
    assert y.tolist() == Y.tolist()


def test_items_must_be_pairs():
    with pytest.raises(ValueError, match="items are tuples of 3 elements; expected pairs"):
        read(TensorDataset(X, Y, Y))
    with pytest.raises(ValueError, match="items are of type Tensor; expected pairs"):
        read(Items(lambda i: X[i]))


def test_lengths_must_agree():
    data = TensorDataset(X, Y)
    data.tensors = (X, Y[:4])
    with pytest.raises(ValueError, match="the inputs have 6 samples but the targets have 4"):
        read(data)
