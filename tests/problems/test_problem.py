"""What a problem accepts, and how it refuses the rest."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paraboloid.problems import Problem, Training, train

X, Y = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 1, 1, 0])
DATA = TensorDataset(X, Y)
EMPTY = TensorDataset(X[:0], Y[:0])


def linear():
    return nn.Linear(3, 2)


def test_four_arguments_are_enough():
    problem = Problem(linear(), nn.CrossEntropyLoss(), DATA, DATA)
    assert problem.train is DATA
    assert problem.training == Training()
    assert problem.name == ""


def test_a_pair_of_tensors_is_a_dataset():
    problem = Problem(linear(), nn.CrossEntropyLoss(), (X, Y), (X[:2], Y[:2]))
    assert (len(problem.train), len(problem.test)) == (6, 2)
    assert problem.test[1][1] == 1


def test_a_list_of_samples_is_a_dataset():
    samples = [(x, int(y)) for x, y in zip(X, Y, strict=True)]
    problem = Problem(linear(), nn.CrossEntropyLoss(), samples, samples[:2])
    assert problem.train is samples
    assert train(problem, steps=1)[-1]["train_loss"] > 0


def with_parameter(parameter):
    model = linear()
    model.register_parameter("odd", nn.Parameter(parameter, requires_grad=parameter.is_complex()))
    return model


def two_devices():
    return nn.Sequential(OrderedDict(here=nn.Linear(3, 3), there=nn.Linear(3, 2, device="meta")))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": nn.ReLU()}, "ReLU has no parameter with requires_grad=True"),
        ({"model": linear().requires_grad_(False)}, "Linear has no parameter with requires_grad=True"),
        ({"model": with_parameter(torch.zeros(2, dtype=torch.complex64))}, "'odd' has dtype torch.complex64"),
        ({"model": with_parameter(torch.zeros(2, dtype=torch.int64))}, "'odd' has dtype torch.int64"),
        ({"model": two_devices()}, r"parameters lie on several devices \['cpu', 'meta'\]"),
        ({"model": torch.relu}, "model is a builtin_function_or_method; expected a torch.nn.Module"),
        ({"loss_fn": "cross-entropy"}, "loss_fn is a str; expected a loss module"),
        ({"loss_fn": nn.CrossEntropyLoss(reduction="none")}, "reduction is 'none'; expected one of"),
        ({"train": EMPTY}, "the train data is empty"),
        ({"test": EMPTY}, "the test data is empty"),
        ({"train": (X, Y[:4])}, r"the train data does not fit: the inputs have shape \(6, 3\) and the targets \(4,\)"),
        (
            {"train": iter([])},
            "the train data does not fit: the dataset is a list_iterator; expected a map-style dataset",
        ),
        (
            {"test": DataLoader(DATA)},
            "the test data does not fit: the dataset is a DataLoader; expected a map-style dataset",
        ),
        ({"training": {"lr": 1.0}}, "training is a dict; expected a pb.problems.Training"),
    ],
)
def test_refusals(change, message):
    arguments = {"model": linear(), "loss_fn": nn.CrossEntropyLoss(), "train": DATA, "test": DATA, **change}
    with pytest.raises(ValueError, match=message):
        Problem(**arguments)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"optimizer": "lbfgs"}, "optimizer is 'lbfgs'; expected one of"),
        ({"lr": 0.0}, "lr is 0.0; expected a positive number"),
        ({"optimizer": "sgd", "momentum": 1.0}, r"momentum is 1.0; expected a number in \[0, 1\)"),
        ({"momentum": 0.9}, "momentum is 0.9 with optimizer 'adam'; only 'sgd' takes it"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"epochs": -1}, "epochs is -1; expected at least 0"),
        ({"steps": -1}, "steps is -1; expected at least 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; expected a number that is not negative"),
    ],
)
def test_training_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        Training(**settings)
