"""Draw grey fields that vary as photographs of faces do: position, shape, expression, light, and fine detail."""

from __future__ import annotations

import numpy as np

SIZE = 25
# (across, down, half width, half height, brightness) in units where the face is an ellipse of half axes .7 and .95.
FEATURES = [
    (-0.30, -0.25, 0.15, 0.08, -0.9),  # eyes
    (0.30, -0.25, 0.15, 0.08, -0.9),
    (-0.30, -0.45, 0.22, 0.05, -0.5),  # brows
    (0.30, -0.45, 0.22, 0.05, -0.5),
    (0.00, 0.08, 0.08, 0.22, 0.4),  # nose
    (0.00, 0.48, 0.28, 0.07, -0.7),  # mouth
    (0.00, -0.95, 0.60, 0.25, -0.8),  # hair
]


def draw_faces(samples: int, seed: int) -> np.ndarray:
    """Images [N, 25, 25], float32, with mean 0 and variance 1 over all pixels of all images.

    A face is an ellipse with Gaussian spots for its features, all with jittered places, sizes and brightness, under
    light from a random side, plus a smooth random field whose amplitude falls as 1 / (1 + frequency^2).
    """
    rng = np.random.default_rng(seed)

    def jitter(scale: float, *shape: int) -> np.ndarray:
        return scale * rng.standard_normal((samples, *shape, 1, 1))

    axis = np.linspace(-1, 1, SIZE)
    down, across = np.meshgrid(axis, axis, indexing="ij")
    turn, size = jitter(0.08), 1 + jitter(0.06)
    x = (across + turn * down - jitter(0.06)) / size  # [N 25 25]
    y = (down - turn * across - jitter(0.06)) / size
    image = 1 / (1 + np.exp(12 * ((x / (0.7 + jitter(0.04))) ** 2 + (y / 0.95) ** 2 - 1)))
    for place_x, place_y, width, height, brightness in FEATURES:
        spot_x = (x - place_x - jitter(0.03)) / (width * np.exp(jitter(0.15)))
        spot_y = (y - place_y - jitter(0.03)) / (height * np.exp(jitter(0.25)))
        image += brightness * (1 + jitter(0.25)) * np.exp(-0.5 * (spot_x**2 + spot_y**2))
    image += jitter(0.25) * x + jitter(0.15) * y + jitter(0.1)

    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIZE, 1 / SIZE), np.fft.rfftfreq(SIZE, 1 / SIZE), indexing="ij"))
    noise = np.fft.rfft2(rng.standard_normal((samples, SIZE, SIZE)))
    image += np.fft.irfft2(noise / (1 + frequency**2), s=(SIZE, SIZE))
    return ((image - image.mean()) / image.std()).astype(np.float32)
