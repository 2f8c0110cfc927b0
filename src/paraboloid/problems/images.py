"""Problems on image data of the user's own (``--data DIR``): MNIST, CIFAR-10, CIFAR-100, ImageNet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from paraboloid import losses
from paraboloid.problems import networks
from paraboloid.problems.autoencoders import network
from paraboloid.problems.folders import Pictures, Split, cifar10, cifar100, mnist
from paraboloid.problems.problem import Problem, Training


def mnist_mlp(data: str | None = None) -> Problem:
    """MNIST with 784-100-10, ReLU (needs --data DIR with the idx files)."""
    train, test = _scaled(mnist(_folder(data, "MNIST")))
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    return _classifier(model, train, test, "MNIST, multilayer perceptron", Training("sgd", lr=0.1, epochs=10))


def mnist_cnn(data: str | None = None) -> Problem:
    """MNIST with two convolutions and two dense layers (needs --data DIR with the idx files)."""
    train, test = _scaled(mnist(_folder(data, "MNIST")))
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1568, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    return _classifier(model, train, test, "MNIST, convolutional network", Training("sgd", lr=0.1, epochs=10))


def mnist_autoencoder(data: str | None = None) -> Problem:
    """MNIST's autoencoder 784-1000-500-250-30, ReLU and a linear code (needs --data DIR with the idx files)."""
    (x, _), (t, _) = mnist(_folder(data, "MNIST"))
    x, t = (each.flatten(1).float() / 255 for each in (x, t))
    return Problem(
        network(784, 1000, 500, 250, 30), losses.BCEWithLogits(reduction="batchmean"),
        TensorDataset(x, x), TensorDataset(t, t),
        title="MNIST, autoencoder", description="784-1000-500-250-30 and back; BCE summed over pixels.",
        training=Training("adam", lr=1e-3, batch_size=1000, epochs=20),
    )  # fmt: skip


def cifar10_resnet8(data: str | None = None) -> Problem:
    """CIFAR-10 with ResNet-8 (needs --data DIR)."""
    return _cifar(10, networks.small_resnet(8), data, "ResNet-8")


def cifar10_resnet32(data: str | None = None) -> Problem:
    """CIFAR-10 with ResNet-32 (needs --data DIR)."""
    return _cifar(10, networks.small_resnet(32), data, "ResNet-32")


def cifar10_allcnnc(data: str | None = None) -> Problem:
    """CIFAR-10 with All-CNN-C (needs --data DIR)."""
    return _cifar(10, networks.all_cnn_c(10), data, "All-CNN-C")


def cifar100_resnet32(data: str | None = None) -> Problem:
    """CIFAR-100 with ResNet-32 (needs --data DIR)."""
    return _cifar(100, networks.small_resnet(32, 100), data, "ResNet-32")


def cifar100_allcnnc(data: str | None = None) -> Problem:
    """CIFAR-100 with All-CNN-C (needs --data DIR)."""
    return _cifar(100, networks.all_cnn_c(100), data, "All-CNN-C")


def cifar100_wrn40_4(data: str | None = None) -> Problem:
    """CIFAR-100 with WRN-40-4 (needs --data DIR)."""
    return _cifar(100, networks.wide_resnet(40, 4, 100), data, "WRN-40-4")


def imagenet_resnet18(data: str | None = None) -> Problem:
    """ImageNet, or any folders train/ and val/ of pictures by class, with ResNet-18 (needs --data DIR)."""
    return _imagenet(networks.resnet18, "ResNet-18", data)


def imagenet_resnet50(data: str | None = None) -> Problem:
    """The same with ResNet-50 (needs --data DIR)."""
    return _imagenet(networks.resnet50, "ResNet-50", data)


def _imagenet(network: Callable[[int], nn.Module], name: str, data: str | None) -> Problem:
    folder = Path(_folder(data, "ImageNet"))
    train = Pictures(folder / "train")
    test = Pictures(folder / "val", classes=train.classes)
    return Problem(
        network(len(train.classes)), nn.CrossEntropyLoss(), train, test, title=f"ImageNet, {name}",
        description=f"Pictures of {len(train.classes)} classes from {folder}, 224x224 pixels, not augmented.",
        training=Training("sgd", lr=0.1, momentum=0.9, batch_size=256, epochs=90, weight_decay=1e-4),
    )  # fmt: skip


def _folder(data: str | None, what: str) -> str:
    if data is None:
        raise ValueError(
            f"the data of {what} is not shipped; expected --data DIR (load(..., data=DIR)) with its files."
        )
    return data


def _cifar(classes: int, model: nn.Module, data: str | None, network: str) -> Problem:
    name, read = f"CIFAR-{classes}", cifar10 if classes == 10 else cifar100
    train, test = _scaled(read(_folder(data, name)))
    training = Training("sgd", lr=0.1, momentum=0.9, batch_size=128, epochs=160, weight_decay=5e-4)
    return _classifier(model, train, test, f"{name}, {network}", training)


def _classifier(model: nn.Module, train: Split, test: Split, title: str, training: Training) -> Problem:
    shape = "x".join(map(str, train[0].shape[1:]))
    return Problem(
        model, nn.CrossEntropyLoss(), TensorDataset(*train), TensorDataset(*test), title=title,
        description=f"{len(train[0])} images of shape {shape}, normalised by channel, not augmented.",
        training=training,
    )  # fmt: skip


def _scaled(splits: tuple[Split, Split]) -> tuple[Split, Split]:
    """float32, with the training images' mean 0 and standard deviation 1 in each channel."""
    (x, y), (t, u) = splits
    mean, spread = _moments(x)
    return ((x.float() / 255 - mean) / spread, y), ((t.float() / 255 - mean) / spread, u)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per channel [1, C, 1, 1], of the pixels divided by 255; from counts of the grey levels, without a copy."""
    counts = torch.stack([torch.bincount(channel.flatten().long(), minlength=256) for channel in x.unbind(1)]).double()
    levels = torch.arange(256) / 255
    total = counts.sum(1, keepdim=True)
    mean = (counts * levels).sum(1, keepdim=True) / total
    spread = ((counts * (levels - mean).square()).sum(1, keepdim=True) / total).sqrt().clamp(min=1e-6)
    return mean.float().view(1, -1, 1, 1), spread.float().view(1, -1, 1, 1)
