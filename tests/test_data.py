"""Samples of a map-style dataset become batches: tensors as a whole, other items one by one."""

import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from paraboloid.data import Chunks, sample_count, take

X, Y = torch.arange(12.0).view(6, 2), torch.arange(6)
CPU = torch.device("cpu")


class Items(Dataset):
    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return self.make(i)


DATASETS = {
    "tensors": TensorDataset(X, Y),
    "pair": (X, Y),
    "subset": Subset(TensorDataset(X.flip(0), Y.flip(0)), range(5, -1, -1)),
    "items": Items(lambda i: (X[i], int(Y[i]))),
    "lists": Items(lambda i: [X[i], Y[i]]),
}


@pytest.mark.parametrize("name", DATASETS)
def test_samples_are_taken_in_the_order_asked_for(name):
    x, y = take(DATASETS[name], torch.tensor([4, 1]), CPU)
    assert torch.equal(x, X[[4, 1]])
    assert y.tolist() == [4, 1]


@pytest.mark.parametrize("name", DATASETS)
def test_chunks_are_all_of_it_each_time(name):
    chunks = Chunks(DATASETS[name], 4, CPU)
    for _ in range(2):
        sizes, targets = zip(*((len(x), y) for x, y in chunks), strict=True)
        assert sizes == (4, 2)
        assert torch.cat(targets).tolist() == Y.tolist()


def test_inputs_may_be_tuples_and_dicts():
    x, y = take(Items(lambda i: ((X[i], X[i]), i)), Y, CPU)
    assert torch.equal(x[1], X)
    x, y = take(Items(lambda i: {"ids": X[i], "labels": i}), Y, CPU)
    assert list(x) == ["ids"]
    assert y.tolist() == Y.tolist()


@pytest.mark.parametrize("data", [TensorDataset(X, Y, Y), Items(lambda i: X[i])])
def test_items_must_be_pairs(data):
    with pytest.raises(ValueError, match=r"the dataset's items are of type \w+; expected pairs"):
        take(data, Y, CPU)


def test_lengths_must_agree():
    data = TensorDataset(X, Y)
    data.tensors = (X, Y[:4])
    for dataset in (data, (X, Y[:4])):
        with pytest.raises(ValueError, match=r"the inputs have shape \(6, 2\) and the targets \(4,\)"):
            sample_count(dataset)


@pytest.mark.parametrize("data", [iter([]), X, {"inputs": X}])
def test_what_is_no_map_style_dataset(data):
    with pytest.raises(ValueError, match=r"the dataset is a .*; expected a map-style dataset"):
        sample_count(data)
