"""Pictures for tomography: characters of a few strokes, and the phantom of Shepp and Logan."""

from __future__ import annotations

import numpy as np

from paraboloid.problems.curves import draw_curves

STROKES = 3  # of a character
# intensity, semi-axes along x and y, centre (x, y), angle in degrees; the unit square is [-1, 1]^2.  Toft 1996.
ELLIPSES = (
    (1.0, 0.69, 0.92, 0.0, 0.0, 0.0), (-0.8, 0.6624, 0.874, 0.0, -0.0184, 0.0), (-0.2, 0.11, 0.31, 0.22, 0.0, -18.0),
    (-0.2, 0.16, 0.41, -0.22, 0.0, 18.0), (0.1, 0.21, 0.25, 0.0, 0.35, 0.0), (0.1, 0.046, 0.046, 0.0, 0.1, 0.0),
    (0.1, 0.046, 0.046, 0.0, -0.1, 0.0), (0.1, 0.046, 0.023, -0.08, -0.605, 0.0), (0.1, 0.023, 0.023, 0.0, -0.606, 0.0),
    (0.1, 0.023, 0.046, 0.06, -0.605, 0.0),
)  # fmt: skip
FINER = 4  # points of a pixel along each axis whose mean it is


def draw_characters(samples: int, seed: int) -> np.ndarray:
    """Images [N, 28, 28], float32 in [0, 1), each of three curves drawn one over the other with a soft pen."""
    strokes = draw_curves(samples * STROKES, seed).reshape(samples, STROKES, *(28, 28))
    return 1 - np.prod(1 - strokes, axis=1)


def phantom(size: int) -> np.ndarray:
    """The modified Shepp-Logan phantom, [size, size], float32 in [0, 1], row 0 at the top; pixels are means.

    Source: Toft 1996, "The Radon transform", appendix B; the same as scikit-image's, which is drawn at 400 x 400.
    """
    fine = size * FINER
    at = (2 * np.arange(fine) + 1) / fine - 1
    x, y = at[None, :], -at[:, None]
    image = np.zeros((fine, fine))
    for value, a, b, x0, y0, degrees in ELLIPSES:
        c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        u, v = (x - x0) * c + (y - y0) * s, -(x - x0) * s + (y - y0) * c
        image += value * ((u / a) ** 2 + (v / b) ** 2 <= 1)
    return image.reshape(size, FINER, size, FINER).mean((1, 3)).astype(np.float32)
