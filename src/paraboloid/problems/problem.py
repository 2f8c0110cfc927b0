"""A problem: a model, a loss, data to train and to test on, and how to train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.data import TensorDataset

from paraboloid import losses
from paraboloid.data.batches import Samples, sample_count
from paraboloid.passes import trees

OPTIMIZERS = ("adam", "sgd")


@dataclass(frozen=True)
class Training:
    """How `train` minimises the training loss + weight_decay / 2 ||theta||^2.

    `steps`, where given, counts instead of `epochs`; zero epochs leave the model as it is.
    """

    optimizer: str = "adam"
    lr: float = 1e-3
    momentum: float = 0.0  # of SGD
    batch_size: int = 64
    epochs: int = 20
    steps: int | None = None
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {self.optimizer!r}; expected one of {OPTIMIZERS}.")
        for name, good, expected in (
            ("lr", self.lr > 0, "a positive number"),
            ("momentum", 0 <= self.momentum < 1, "a number in [0, 1)"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("epochs", self.epochs >= 0, "at least 0"),
            ("steps", self.steps is None or self.steps >= 0, "at least 0, or None"),
            ("weight_decay", self.weight_decay >= 0, "a number that is not negative"),
        ):
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {expected}.")
        if self.optimizer != "sgd" and self.momentum:
            raise ValueError(f"momentum is {self.momentum} with optimizer {self.optimizer!r}; only 'sgd' takes it.")


@dataclass(frozen=True, eq=False)
class Problem:
    """What `paraboloid inspect` works on; `Problem(model, loss_fn, train, test)` is enough.

    `train` and `test` are map-style datasets of `(input, target)`, or pairs of tensors `(inputs, targets)`. `accuracy`
    says whether the share of right classes is recorded; None: where the targets are class indices. Raises ValueError
    for a model without trainable parameters, with parameters that are not real floating-point numbers or lie on
    several devices, and for empty data.
    """

    model: nn.Module
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    train: Samples
    test: Samples
    name: str = ""
    title: str = ""
    description: str = ""
    training: Training = field(default_factory=Training)
    accuracy: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise ValueError(f"model is a {type(self.model).__name__}; expected a torch.nn.Module.")
        if not callable(self.loss_fn):
            raise ValueError(
                f"loss_fn is a {type(self.loss_fn).__name__}; expected a loss module such as nn.CrossEntropyLoss()."
            )
        if not isinstance(self.training, Training):
            raise ValueError(f"training is a {type(self.training).__name__}; expected a pb.problems.Training.")
        loss_of(self.loss_fn)
        for name, p in self.model.named_parameters():
            if not p.is_floating_point():
                raise ValueError(
                    f"parameter {name!r} has dtype {p.dtype}; expected a real floating-point type. "
                    "Values that are not trained belong in a buffer (register_buffer)."
                )
        trees.parameters(self.model)
        for split in ("train", "test"):
            object.__setattr__(self, split, _samples(getattr(self, split), split))


def loss_of(loss_fn: Callable[[Tensor, Tensor], Tensor]) -> losses.Loss | None:
    """The `Loss` that knows `loss_fn`'s reduction and targets; None for a plain callable, taken as a mean over samples.

    Raises ValueError for ``reduction="none"``.
    """
    try:
        return losses.Loss.from_torch(loss_fn)
    except TypeError:
        return None


def halves(samples: int, *tensors: Tensor) -> tuple[TensorDataset, TensorDataset]:
    """The first `samples` to train on, and the rest to test on."""
    return TensorDataset(*(t[:samples] for t in tensors)), TensorDataset(*(t[samples:] for t in tensors))


def _samples(dataset: Any, split: str) -> Samples:
    """`dataset`, checked; a pair of tensors becomes a TensorDataset."""
    try:
        count = sample_count(dataset)
    except ValueError as error:
        raise ValueError(f"the {split} data does not fit: {error}") from error
    if count == 0:
        raise ValueError(f"the {split} data is empty; expected at least one sample.")
    pair = isinstance(dataset, tuple | list) and all(isinstance(t, Tensor) for t in dataset)
    return TensorDataset(*dataset) if pair else dataset
