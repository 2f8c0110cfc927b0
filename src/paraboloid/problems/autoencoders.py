"""Deep autoencoders, the classic test of second-order optimisers: ReLU, linear code, linear output, targets = inputs.

The loss is summed over pixels and averaged over samples. Architectures: Hinton and Salakhutdinov 2006; Martens 2010.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import torch
from torch import nn
from torch.utils.data import TensorDataset

from paraboloid import losses
from paraboloid.problems.curves import draw_curves
from paraboloid.problems.digits import pixels_and_labels
from paraboloid.problems.faces import draw_faces
from paraboloid.problems.problem import Problem, Training, halves


def network(*widths: int) -> nn.Sequential:
    """Encoder with these widths, inputs first and code last, and its mirror image as decoder."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for part, sizes in (("encoder", widths), ("decoder", widths[::-1])):
        for i, (p, q) in enumerate(pairwise(sizes), start=1):
            layers[f"{part}{i}"] = nn.Linear(p, q)
            if i < len(sizes) - 1:
                layers[f"{part}{i}_relu"] = nn.ReLU()
    return nn.Sequential(layers)


def digits() -> Problem:
    """64-48-24-8-24-48-64 on the 8x8 digits; binary cross-entropy."""
    (x, _), (x_test, _) = pixels_and_labels()
    return Problem(
        network(64, 48, 24, 8),
        losses.BCEWithLogits(reduction="batchmean"),
        TensorDataset(x, x),
        TensorDataset(x_test, x_test),
        title="Handwritten digits, autoencoder",
        description="scikit-learn's 1797 images of digits, 8x8 pixels, through a code of 8 numbers.",
        training=Training("adam", lr=1e-3, batch_size=100, epochs=25),
    )


def curves(seed: int = 0, samples: int = 20_000, width: float = 1.0) -> Problem:
    """784-400-200-100-50-25-6 and back on drawn curves; binary cross-entropy. Tests on a quarter as many samples.

    `width` multiplies the hidden layers' unit counts.
    """
    x = torch.from_numpy(draw_curves(samples + samples // 4, seed)).flatten(1)
    return Problem(
        network(784, *(max(1, round(width * n)) for n in (400, 200, 100, 50, 25)), 6),
        losses.BCEWithLogits(reduction="batchmean"),
        *halves(samples, x, x),
        title="Curves, deep autoencoder",
        description=f"{samples:,} generated 28x28 images of a curve through three points, through a code of 6 numbers.",
        training=Training("adam", lr=1e-3, batch_size=1000, epochs=20),
    )


def faces(seed: int = 0, samples: int = 10_000, width: float = 1.0) -> Problem:
    """625-2000-1000-500-30 and back on drawn faces; half the squared error. Tests on a quarter as many samples.

    `width` multiplies the hidden layers' unit counts.
    """
    x = torch.from_numpy(draw_faces(samples + samples // 4, seed)).flatten(1)
    return Problem(
        network(625, *(max(1, round(width * n)) for n in (2000, 1000, 500)), 30),
        0.5 * losses.MSE(reduction="batchmean"),
        *halves(samples, x, x),
        title="Faces-like fields, deep autoencoder",
        description=f"{samples:,} generated 25x25 grey images that vary as faces do, through a code of 30 numbers.",
        training=Training("adam", lr=1e-3, batch_size=1000, epochs=10),
    )
