"""Small files in the formats of MNIST, for the tests of what reads them."""

import gzip
import struct

import numpy as np


def pixels(N, channels=3, side=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (N, channels, side, side), dtype=np.uint8)


def idx(array, magic):
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()


def write_mnist(folder, zipped=True, N=6):
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for part, seed in (("train", 0), ("t10k", 1)):
        x, y = pixels(N, 1, 28, seed)[:, 0], np.arange(N, dtype=np.uint8) % 10
        for name, data in (("images-idx3", idx(x, 2051)), ("labels-idx1", idx(y, 2049))):
            path = folder / f"{part}-{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(data) if zipped else data)
        found.append((x, y))
    return found
