"""Classify scikit-learn's 1797 handwritten digits, 8x8 pixels with values in [0, 1]."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from paraboloid.problems.problem import Problem, Training

TRAIN_SAMPLES = 1437
Layers = OrderedDict[str, nn.Module]


def pixels_and_labels() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Train and test pairs of pixels [N, 64] (float32, the 16 grey levels divided by 16) and labels [N].

    The split is the same for every seed: the first 1437 of `numpy.random.default_rng(0).permutation(1797)`, the rest.
    """
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.from_numpy((pixels / 16).astype(np.float32)[order])
    y = torch.from_numpy(labels.astype(np.int64)[order])
    return (x[:TRAIN_SAMPLES], y[:TRAIN_SAMPLES]), (x[TRAIN_SAMPLES:], y[TRAIN_SAMPLES:])


def mlp() -> Problem:
    """64-100-10 with ReLU."""
    train, test = pixels_and_labels()
    layers = Layers(hidden=nn.Linear(64, 100), relu=nn.ReLU(), output=nn.Linear(100, 10))
    return Problem(
        nn.Sequential(layers),
        nn.CrossEntropyLoss(),
        TensorDataset(*train),
        TensorDataset(*test),
        title="Handwritten digits, multilayer perceptron",
        description="scikit-learn's 1797 images of digits, 8x8 pixels; one hidden layer of 100 ReLU units.",
        training=Training("adam", lr=1e-3, batch_size=64, epochs=60),
    )


def tanh() -> Problem:
    """64-8-10 with tanh: 610 parameters, so few that dense curvature matrices are cheap."""
    train, test = pixels_and_labels()
    layers = Layers(hidden=nn.Linear(64, 8), tanh=nn.Tanh(), output=nn.Linear(8, 10))
    return Problem(
        nn.Sequential(layers),
        nn.CrossEntropyLoss(),
        TensorDataset(*train),
        TensorDataset(*test),
        title="Handwritten digits, 610 parameters",
        description="scikit-learn's 1797 images of digits, 8x8 pixels; one hidden layer of 8 tanh units.",
        training=Training("sgd", lr=0.5, batch_size=128, steps=300, weight_decay=1e-3),
    )


def cnn() -> Problem:
    """Two 3x3 convolutions with pooling and a linear layer, on images enlarged to 16x16 (bilinear): 3818 parameters."""
    train, test = pixels_and_labels()
    layers = Layers(
        conv1=nn.Conv2d(1, 8, 3, padding="same"),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(8, 16, 3, padding="same"),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        linear=nn.Linear(256, 10),
    )
    return Problem(
        nn.Sequential(layers),
        nn.CrossEntropyLoss(),
        TensorDataset(_enlarge(train[0]), train[1]),
        TensorDataset(_enlarge(test[0]), test[1]),
        title="Handwritten digits, small convolutional network",
        description=(
            "scikit-learn's 1797 images of digits, enlarged to 16x16 pixels; two convolutions of 8 and 16 "
            "channels and a linear layer."
        ),
        training=Training("adam", lr=1e-3, batch_size=64, epochs=60),
    )


def _enlarge(x: Tensor) -> Tensor:
    """[N, 64] -> [N, 1, 16, 16]."""
    return F.interpolate(x.view(-1, 1, 8, 8), size=(16, 16), mode="bilinear", align_corners=False)
