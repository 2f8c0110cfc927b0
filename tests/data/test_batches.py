"""What is a batch and what is not, how a model is called on it, and how samples of a dataset become batches."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from paraboloid.data.batches import Chunks, as_batch, batches, call, check_finite, sample_count, take

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


def test_what_is_a_batch():
    assert as_batch((X, Y)) == (X, Y)
    assert as_batch([X, Y]) == (X, Y)
    assert as_batch(((X, X), Y)) == ((X, X), Y)
    inputs, targets = as_batch({"ids": X, "mask": Y, "labels": Y})
    assert list(inputs) == ["ids", "mask"]
    assert targets is Y
    for other in (X, (X, Y, Y), [(X, Y), (X, Y)], {"ids": X}, (X, "targets")):
        assert as_batch(other) is None


def test_batches_of_a_batch_and_of_iterables():
    assert [b[1].tolist() for b in batches((X, Y))] == [Y.tolist()]
    assert [len(y) for _, y in batches([(X[:2], Y[:2]), {"x": X[2:], "labels": Y[2:]}])] == [2, 4]
    assert [len(y) for _, y in batches(DataLoader(TensorDataset(X, Y), batch_size=4))] == [4, 2]


@pytest.mark.parametrize(
    "data, message",
    [
        (X, "data is a Tensor; expected a batch"),
        ("digits", "data is a str; expected a batch"),
        (3, "data is a int; expected a batch"),
        ({"ids": X}, "data is a dict; expected a batch"),
        ([], "the data is empty: it yielded no batch"),
        ([X], "the data yielded a Tensor; expected batches"),
        ([(X, Y, Y)], "the data yielded a tuple of length 3; expected batches"),
    ],
)
def test_what_are_no_batches(data, message):
    with pytest.raises(ValueError, match=message):
        list(batches(data))


def test_calls_and_outputs():
    def model(x, scale=1.0):
        return {"logits": scale * x}

    def logits(o):
        return o["logits"]

    assert torch.equal(call(model, X, logits), X)
    assert torch.equal(call(model, (X, 2.0), logits), 2 * X)
    assert torch.equal(call(model, {"x": X, "scale": 3.0}, logits), 3 * X)
    with pytest.raises(ValueError, match="the model returned a dict; expected a tensor"):
        call(model, X)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_must_be_finite(value):
    assert check_finite(torch.tensor(1.0)) == 1
    with pytest.raises(ValueError, match=f"the loss is {value}; expected a finite number"):
        check_finite(torch.tensor(value))
