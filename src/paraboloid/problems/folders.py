"""Read MNIST, CIFAR-10, CIFAR-100 and folders of images from a directory of the user's, in the formats they come in."""

from __future__ import annotations

import gzip
import io
import pickle
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Split = tuple[Tensor, Tensor]  # images [N, C, H, W], uint8; labels [N], int64
IDX_IMAGES, IDX_LABELS = 2051, 2049
PICTURES = (".jpeg", ".jpg", ".png", ".bmp", ".webp")


def mnist(folder: str | Path) -> tuple[Split, Split]:
    """Train and test split from the four idx files, plain or .gz, in `folder` or its subfolders MNIST/raw or raw.

    Raises FileNotFoundError for a missing file, ValueError for one that does not hold what its name says.
    """
    places = [Path(folder), *(Path(folder) / sub for sub in ("raw", "MNIST/raw", "mnist"))]
    splits = []
    for part in ("train", "t10k"):
        images = _idx(
            _find(places, [f"{part}-images-idx3-ubyte", f"{part}-images.idx3-ubyte"], (".gz", "")), IDX_IMAGES
        )
        labels = _idx(
            _find(places, [f"{part}-labels-idx1-ubyte", f"{part}-labels.idx1-ubyte"], (".gz", "")), IDX_LABELS
        )
        splits.append(_checked(images.unsqueeze(1), labels.long(), f"MNIST's {part} files", 10))
    return splits[0], splits[1]


def cifar10(folder: str | Path) -> tuple[Split, Split]:
    """Train and test split of CIFAR-10, from the Python or the binary version, in `folder` or its usual subfolder.

    The pickled files are read without running what they may contain.  Raises as `mnist`.
    """
    names = [f"data_batch_{i}" for i in range(1, 6)]
    return _cifar(folder, "cifar-10-batches", names, ["test_batch"], "labels", "py", "bin", 1, 10)


def cifar100(folder: str | Path) -> tuple[Split, Split]:
    """The same of CIFAR-100, with its 100 fine labels."""
    return _cifar(folder, "cifar-100", ["train"], ["test"], "fine_labels", "python", "binary", 2, 100)


def _cifar(folder, stem, train, test, key, python, binary, bytes_before, classes) -> tuple[Split, Split]:
    tried = [Path(folder), Path(folder) / f"{stem}-{python}", Path(folder) / f"{stem}-{binary}"]
    for place in tried:
        if (place / train[0]).is_file():
            parts = [[_pickled(_find([place], [name]), key) for name in names] for names in (train, test)]
            break
        if (place / f"{train[0]}.bin").is_file():
            parts = [[_records(_find([place], [f"{n}.bin"]), bytes_before) for n in names] for names in (train, test)]
            break
    else:
        raise FileNotFoundError(f"found neither {train[0]} nor {train[0]}.bin in {', '.join(map(str, tried))}; "
                                f"expected the files of the Python or the binary version of {stem}.")  # fmt: skip
    splits = []
    for files in parts:
        images, labels = (torch.cat(each) for each in zip(*files, strict=True))
        splits.append(_checked(images, labels, stem, classes))
    return splits[0], splits[1]


class Pictures:
    """A folder with a subfolder of pictures for each class, as ImageNet is kept: `dataset[i]` is (image, label).

    Pictures are decoded when they are asked for: the shorter side becomes size * 8 / 7, of which the central square
    [3, size, size] is taken, float32 in [0, 1], normalised by ImageNet's mean and standard deviation of each channel.
    `classes` are the sorted names of the subfolders; those of another split may be given, so that labels agree.

    Raises FileNotFoundError where there are no subfolders or no pictures, ValueError for a file that is none.
    """

    MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, folder: str | Path, size: int = 224, classes: list[str] | None = None):
        self.folder, self.size = Path(folder), size
        found = sorted(p.name for p in self.folder.iterdir() if p.is_dir()) if self.folder.is_dir() else []
        if not found:
            raise FileNotFoundError(f"{self.folder} has no subfolders; expected one with pictures for each class.")
        self.classes = found if classes is None else classes
        if unknown := sorted(set(found) - set(self.classes)):
            raise ValueError(f"{self.folder} has the classes {unknown[:5]}, which the training pictures do not have.")
        self.items = [
            (path, label)
            for label, name in enumerate(self.classes)
            for path in sorted((self.folder / name).glob("*")) if path.suffix.lower() in PICTURES
        ]  # fmt: skip
        if not self.items:
            raise FileNotFoundError(f"the subfolders of {self.folder} have no pictures; expected files that end in "
                                    f"{', '.join(PICTURES)}.")  # fmt: skip

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image, UnidentifiedImageError

        path, label = self.items[index]
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} is no picture that can be read: {error}") from error
        scale = self.size * 8 / 7 / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255
        mean, spread = (torch.tensor(values).view(3, 1, 1) for values in (self.MEAN, self.SPREAD))
        return (pixels - mean) / spread, label


def _find(places: Iterable[Path], names: list[str], endings: tuple[str, ...] = ("",)) -> Path:
    tried = [place / (name + ending) for place in places for name in names for ending in endings]
    for path in tried:
        if path.is_file():
            return path
    raise FileNotFoundError(f"found no {names[0]} in {', '.join(dict.fromkeys(str(p.parent) for p in tried))}.")


def _idx(path: Path, magic: int) -> Tensor:
    """An idx file of unsigned bytes: big-endian magic number, sizes, data."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be decompressed ({error}); expected a whole file of gzip.") from error
    found = int.from_bytes(raw[:4], "big")
    if found != magic:
        raise ValueError(f"{path} begins with the magic number {found}; expected {magic}, that of an idx file of "
                         f"{'images' if magic == IDX_IMAGES else 'labels'}.")  # fmt: skip
    axes = magic % 256
    if len(raw) < 4 * (axes + 1):
        raise ValueError(
            f"{path} has {len(raw)} bytes; expected at least the {4 * (axes + 1)} of an idx file's header."
        )
    shape = [int.from_bytes(raw[4 * (i + 1) : 4 * (i + 2)], "big") for i in range(axes)]
    data = np.frombuffer(raw, np.uint8, offset=4 * (axes + 1))
    if data.size != int(np.prod(shape)):
        raise ValueError(f"{path} holds {data.size} bytes of data; expected {int(np.prod(shape))} for shape {shape}.")
    return torch.from_numpy(data.copy()).view(shape)


class _ArraysOnly(pickle.Unpickler):
    """Numbers, strings, containers and NumPy arrays; nothing else is looked up, so nothing is run."""

    ALLOWED = frozenset({
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"),
        ("numpy", "dtype"), ("_codecs", "encode"),
    })  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _pickled(path: Path, key: str) -> Split:
    try:
        found = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        images, labels = np.asarray(found[b"data"]), torch.tensor(found[key.encode()], dtype=torch.int64)
        if images.dtype != np.uint8 or images.shape != (len(labels), 3072):
            raise ValueError(f"its data are {list(images.shape)} of {images.dtype} for {len(labels)} labels")
    except Exception as error:  # whatever pickle says to bytes that are none of its own
        raise ValueError(f"{path} is not a file of the Python version of CIFAR ({error}); expected a pickled dict with "
                         f"'data' and {key!r}, made of numbers and arrays.") from error  # fmt: skip
    return torch.from_numpy(images.copy()).view(-1, 3, 32, 32), labels


def _records(path: Path, labels: int) -> Split:
    """Records of label bytes (the last one counts) and 3072 bytes of pixels."""
    size = labels + 3072
    raw = np.fromfile(path, np.uint8)
    if raw.size == 0 or raw.size % size:
        raise ValueError(f"{path} has {raw.size} bytes; expected a multiple of {size}, the size of a record.")
    data = torch.from_numpy(raw).view(-1, size)
    return data[:, labels:].reshape(-1, 3, 32, 32), data[:, labels - 1].long()


def _checked(images: Tensor, labels: Tensor, what: str, classes: int) -> Split:
    if len(images) != len(labels):
        raise ValueError(f"{what} hold {len(images)} images and {len(labels)} labels; expected as many.")
    if bool(((labels < 0) | (labels >= classes)).any()):
        raise ValueError(f"{what} hold labels from {int(labels.min())} to {int(labels.max())}; expected 0 to "
                         f"{classes - 1}.")  # fmt: skip
    return images, labels
