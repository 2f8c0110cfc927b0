"""Lengths of straight rays inside the pixels of a square image or a cube: the matrix of line integrals, sparse."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Rays = tuple[
    NDArray[np.float64], NDArray[np.float64]
]  # where each starts and ends, outside the image: (x, y[, z]), [R, 2 or 3]
CHUNK = 2048  # rays that are traced together


def intersection_lengths(
    size: int, starts: NDArray[np.float64], ends: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float64]]:
    """The length of ray r inside pixel p, as compressed rows (row starts [R + 1], pixels [nonzeros], lengths).

    Pixel (i, j) of the [size, size] image is the square of side 1 around x = j - (size - 1) / 2 and
    y = i - (size - 1) / 2, and has the number i size + j; rays with a third coordinate z cross the cubes of a volume,
    whose slices have size^2 numbers each.  The image is constant in each pixel, so a row's product with it is the exact
    line integral.  A ray along the border of two pixels belongs to the one above it.

    Source: Siddon 1985, "Fast calculation of the exact radiological path for a three-dimensional CT array".
    """
    counts, pixels, lengths = [np.zeros(1, np.int64)], [], []
    for first in range(0, len(starts), CHUNK):
        which, found = _traced(size, starts[first : first + CHUNK], ends[first : first + CHUNK])
        inside = found > 0
        counts.append(inside.sum(1))
        pixels.append(which[inside])
        lengths.append(found[inside])
    return np.cumsum(np.concatenate(counts)), np.concatenate(pixels), np.concatenate(lengths)


def _traced(
    size: int, start: NDArray[np.float64], end: NDArray[np.float64]
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Pixels and lengths of every segment between two crossings of grid lines, [R, d (size + 1) + 1]; 0 outside."""
    step, dimensions = end - start, start.shape[1]
    lines = np.arange(size + 1) - size / 2
    times = [np.zeros((len(start), 1)), np.ones((len(start), 1))]
    for axis in range(dimensions):
        along = step[:, axis, None]
        safe = np.where(along == 0, 1.0, along)
        times.append(np.where(along == 0, 1.0, (lines - start[:, axis, None]) / safe))
    t = np.sort(np.clip(np.concatenate(times, 1), 0, 1), 1)
    lengths = np.diff(t, axis=1) * np.linalg.norm(step, axis=1)[:, None]
    middle = (t[:, 1:] + t[:, :-1]) / 2
    inside, number = np.full(lengths.shape, True), np.zeros(lengths.shape, np.int32)
    for axis in reversed(range(dimensions)):
        at = np.floor(start[:, axis, None] + middle * step[:, axis, None] + size / 2).astype(np.int32)
        inside &= (at >= 0) & (at < size)
        number = number * size + at
    return np.where(inside, number, 0).astype(np.int32), np.where(inside, lengths, 0.0)
