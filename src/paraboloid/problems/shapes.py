"""Classify generated images of textured shapes with 3c3d, a convolutional network of middle size."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch import nn

from paraboloid.problems.problem import Problem, Training, halves

SIZE = 32
CLASSES = ["disc", "ring", "triangle", "square", "frame", "cross", "star", "bar", "crescent", "pair"]


def cnn(seed: int = 0, samples: int = 10_000, width: float = 1.0, depth: int = 3) -> Problem:
    """3c3d: three convolutions and three linear layers, 895,210 parameters. Tests on a fifth as many samples.

    `width` multiplies every channel and unit count; `depth` is the number of convolutions: those beyond the third are
    3x3, as wide as the third, and stand before the last pooling.
    """
    images, labels = draw_shapes(samples + samples // 5, seed)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    return Problem(
        network(width, depth),
        nn.CrossEntropyLoss(),
        *halves(samples, x, y),
        title="Textured shapes, 3c3d",
        description=(
            f"{samples:,} generated 32x32 colour images of ten textured shapes; {depth} convolutions and three linear "
            "layers."
        ),
        training=Training("adam", lr=1e-3, batch_size=64, epochs=5),
    )


def network(width: float = 1.0, depth: int = 3) -> nn.Sequential:
    """3c3d of the DeepOBS suite (Schneider, Balles and Hennig 2019), inputs [N, 3, 32, 32]."""
    if depth < 3 or width <= 0:
        raise ValueError(f"depth is {depth} and width {width}; expected a depth of at least 3 and a positive width.")
    a, b, c, d, e = (max(1, round(width * n)) for n in (64, 96, 128, 512, 256))
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers.update(conv1=nn.Conv2d(3, a, 5), relu1=nn.ReLU(), pool1=nn.MaxPool2d(3, 2, ceil_mode=True))
    layers.update(conv2=nn.Conv2d(a, b, 3), relu2=nn.ReLU(), pool2=nn.MaxPool2d(3, 2, ceil_mode=True))
    for i in range(3, depth + 1):
        layers[f"conv{i}"] = nn.Conv2d(b if i == 3 else c, c, 3, padding="same")
        layers[f"relu{i}"] = nn.ReLU()
    layers.update(pool3=nn.MaxPool2d(3, 2, ceil_mode=True), flatten=nn.Flatten())
    layers.update(linear1=nn.Linear(9 * c, d), relu_linear1=nn.ReLU())
    layers.update(linear2=nn.Linear(d, e), relu_linear2=nn.ReLU(), linear3=nn.Linear(e, len(CLASSES)))
    return nn.Sequential(layers)


def draw_shapes(samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 3, 32, 32], float32 in [-1, 1], and labels [N], int64: place, size, turn, colours and textures vary.

    Shape and background are each a texture between two random colours; the shape's edge is about a pixel wide.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(CLASSES), size=samples)
    axis = np.linspace(-1, 1, SIZE, dtype=np.float32)
    down, across = np.meshgrid(axis, axis, indexing="ij")

    def draw(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, size=(samples, *shape, 1, 1)).astype(np.float32)

    size, angle = draw(0.45, 0.75), draw(0, 2 * np.pi)
    left, up = across - draw(-0.3, 0.3), down - draw(-0.3, 0.3)
    x = (np.cos(angle) * left + np.sin(angle) * up) / size  # [N 32 32], the shape's own coordinates
    y = (np.cos(angle) * up - np.sin(angle) * left) / size
    depth = np.empty_like(x)  # inside > 0 > outside, in units of the shape's size
    for k, name in enumerate(CLASSES):
        mine = labels == k
        depth[mine] = _depth(name, x[mine], y[mine])
    mask = 1 / (1 + np.exp(-2 * SIZE * np.clip(size * depth, -0.4, 0.4)))

    fields = []
    for _ in ("shape", "background"):
        turn, wave, shift = draw(0, np.pi), draw(6, 20), draw(0, 2 * np.pi)
        stripes = np.sin(wave * (np.cos(turn) * across + np.sin(turn) * down) + shift)
        crossed = stripes * np.sin(wave * (np.cos(turn) * down - np.sin(turn) * across))
        texture = np.where(draw(0, 1) < 0.5, stripes, crossed)[:, None]  # [N 1 32 32]
        fields.append(draw(-0.7, 0.7, 3) + draw(0, 0.3, 3) * texture)
    mask = mask[:, None]
    image = mask * fields[0] + (1 - mask) * fields[1]
    image += 0.05 * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image, -1, 1), labels


def _depth(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far inside the shape a point lies (negative outside); each shape about fills the unit disc."""
    radius = np.hypot(x, y)
    if name == "disc":
        return 0.9 - radius
    if name == "ring":
        return 0.22 - np.abs(radius - 0.75)
    if name == "triangle":
        return 0.5 - np.maximum(y, np.abs(x) * np.sin(np.pi / 3) - y / 2)
    if name == "square":
        return 0.7 - np.maximum(np.abs(x), np.abs(y))
    if name == "frame":
        return 0.18 - np.abs(np.maximum(np.abs(x), np.abs(y)) - 0.6)
    if name == "cross":
        return np.maximum(np.minimum(0.25 - np.abs(x), 0.9 - np.abs(y)), np.minimum(0.25 - np.abs(y), 0.9 - np.abs(x)))
    if name == "star":
        return 0.65 + 0.35 * np.cos(5 * np.arctan2(y, x)) - radius
    if name == "bar":
        return np.minimum(0.28 - np.abs(y), 1.0 - np.abs(x))
    if name == "crescent":
        return np.minimum(0.95 - radius, np.hypot(x - 0.45, y) - 0.75)
    return 0.45 - np.hypot(np.abs(x) - 0.6, y)  # a pair of discs
