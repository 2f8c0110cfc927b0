"""Draw smooth curves with a soft pen."""

from __future__ import annotations

import numpy as np

SIZE = 28
PEN = 0.7  # standard deviation of the pen, in pixels
INK = 3.0  # darkness at the middle of a straight stroke, before it saturates at 1 - exp(-INK)


def draw_curves(samples: int, seed: int) -> np.ndarray:
    """Images [N, 28, 28], float32 in [0, 1), each of the parabola through three random points at times 0, 1/2 and 1.

    Ink is the integral of a Gaussian pen along the curve's length, ink = INK / (sqrt(2 pi) PEN) int exp(-d^2 / 2 PEN^2)
    ds, and a pixel is 1 - exp(-ink). The pen separates over the two axes, so an image is one small matrix product.
    """
    points = np.random.default_rng(seed).uniform(4.0, SIZE - 5.0, size=(samples, 3, 2)).astype(np.float32)
    images = np.empty((samples, SIZE, SIZE), np.float32)
    for start in range(0, samples, 500):  # small pieces stay in the processor's cache
        images[start : start + 500] = _draw(points[start : start + 500])
    return images


def _draw(points: np.ndarray) -> np.ndarray:
    """Images [N, 28, 28] of the curves through `points` [N, 3, 2]."""
    t = (np.arange(64, dtype=np.float32) + 0.5) / 64
    lagrange = np.stack([(2 * t - 1) * (t - 1), 4 * t * (1 - t), t * (2 * t - 1)])  # [3 T]
    velocity = np.stack([4 * t - 3, 4 - 8 * t, 4 * t - 1])
    length = np.linalg.norm(np.einsum("pt,npa->nta", velocity, points), axis=2) / len(t)  # ds, [N T]
    path = np.einsum("pt,npa->nta", lagrange, points)
    distance = path[..., None] - np.arange(SIZE, dtype=np.float32)  # [N T 2 28]
    pen = np.exp(-0.5 * (distance / PEN) ** 2)
    weight = np.float32(INK / (np.sqrt(2 * np.pi) * PEN)) * length
    ink = np.swapaxes(pen[:, :, 1] * weight[..., None], 1, 2) @ pen[:, :, 0]
    return 1 - np.exp(-ink)
