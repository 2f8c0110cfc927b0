"""Classify scikit-learn's 1797 handwritten digits, 8x8 pixels with values in [0, 1]."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from paraboloid.problems.problem import Problem, Training

TRAIN_SAMPLES = 1437
ADAM = Training("adam", lr=1e-3, batch_size=64, epochs=60)
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
    layers = Layers(hidden=nn.Linear(64, 100), relu=nn.ReLU(), output=nn.Linear(100, 10))
    return _classifier(layers, "multilayer perceptron", "8x8 pixels; one hidden layer of 100 ReLU units.")


def tanh() -> Problem:
    """64-8-10 with tanh: 610 parameters, so few that dense curvature matrices are cheap."""
    layers = Layers(hidden=nn.Linear(64, 8), tanh=nn.Tanh(), output=nn.Linear(8, 10))
    training = Training("sgd", lr=0.5, batch_size=128, steps=300, weight_decay=1e-3)
    return _classifier(layers, "610 parameters", "8x8 pixels; one hidden layer of 8 tanh units.", training)


def cnn() -> Problem:
    """Two 3x3 convolutions with pooling and a linear layer, on images enlarged to 16x16 (bilinear): 3818 parameters."""
    layers = Layers(
        conv1=nn.Conv2d(1, 8, 3, padding="same"), relu1=nn.ReLU(), pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(8, 16, 3, padding="same"), relu2=nn.ReLU(), pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(), linear=nn.Linear(256, 10),
    )  # fmt: skip
    what = "enlarged to 16x16 pixels; two convolutions of 8 and 16 channels and a linear layer."
    return _classifier(layers, "small convolutional network", what, prepared=_enlarge)


def _classifier(
    layers: Layers, title: str, what: str, training: Training = ADAM,
    prepared: Callable[[Tensor], Tensor] = lambda x: x,
) -> Problem:  # fmt: skip
    (x, y), (x_test, y_test) = pixels_and_labels()
    return Problem(
        nn.Sequential(layers), nn.CrossEntropyLoss(), TensorDataset(prepared(x), y),
        TensorDataset(prepared(x_test), y_test), title=f"Handwritten digits, {title}",
        description=f"scikit-learn's 1797 images of digits, {what}", training=training,
    )  # fmt: skip


def _enlarge(x: Tensor) -> Tensor:
    """[N, 64] -> [N, 1, 16, 16]."""
    return F.interpolate(x.view(-1, 1, 8, 8), size=(16, 16), mode="bilinear", align_corners=False)
