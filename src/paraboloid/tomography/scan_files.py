"""Arrays in the files that scanners and their users write: NumPy, MATLAB, TIFF stacks, HDF5."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse

Damaged = (EOFError, OSError, BadZipFile)  # what readers raise for files that are cut off
TIFF = (".tif", ".tiff")
HDF5 = (".h5", ".hdf5", ".hdf", ".nxs")
DATA_EXCHANGE = {"data": "exchange/data", "flat": "exchange/data_white", "dark": "exchange/data_dark",
                 "angles": "exchange/theta"}  # fmt: skip
EXCHANGE_AXES = {"theta": "angles", "y": "slices", "x": "detectors"}


class Arrays:
    """The arrays of a file by name, read when asked for.

    axes   the order that the format itself fixes for its data, or None
    units  what the file says about an array's unit, or ""
    """

    def __init__(self, path: Path, read: Mapping[str, Callable[[], NDArray[Any]]], units: Mapping[str, str],
                 names: Mapping[str, str] | None = None, axes: str | None = None):  # fmt: skip
        self.path, self.read, self.units, self.names, self.axes = path, read, units, dict(names or {}), axes

    def get(self, name: str) -> NDArray[Any]:
        name = name if name in self.read else name.strip("/")
        if name not in self.read:
            raise ValueError(f"{str(self.path)!r} has no array {name!r}; expected one of {sorted(self.read)}.")
        try:
            return np.asarray(self.read[name]())
        except Damaged as e:
            raise _damaged(self.path, e) from e

    def data(self, key: str | None) -> NDArray[Any]:
        """The array `key`, that of the format, or the only one."""
        if key is None:
            key = self.names.get("data") or (next(iter(self.read)) if len(self.read) == 1 else None)
        if key is None:
            raise ValueError(
                f"{str(self.path)!r} has the arrays {sorted(self.read)}; say which is the sinogram by key=."
            )
        return self.get(key)

    def unit(self, name: str) -> str:
        return self.units.get(name.strip("/"), "")


def arrays(path: str | Path) -> Arrays:
    """What is in a file, or in a folder of TIFF images in the order of their names.

    Raises FileNotFoundError; ValueError for a kind of file that is not known; ImportError where the package that reads
    it is missing.
    """
    if not isinstance(path, str | Path):
        raise ValueError(f"path is a {type(path).__name__}; expected the name of a file or a folder.")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {str(path)!r}.")
    try:
        return _opened(path, path.suffix.lower())
    except Damaged as e:
        raise _damaged(path, e) from e


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{str(path)!r} cannot be read ({type(error).__name__}: {str(error)[:100]}); expected a whole "
                      f"file of the kind that its ending {path.suffix!r} says.")  # fmt: skip


def _opened(path: Path, kind: str) -> Arrays:
    if path.is_dir():
        return _tiff_folder(path)
    if kind == ".npy":
        return Arrays(path, {"data": lambda: _numpy(path)}, {})
    if kind == ".npz":
        file = _numpy(path)
        return Arrays(path, {name: (lambda n=name: _entry(path, file, n)) for name in file.files}, {})
    if kind in TIFF:
        return Arrays(path, {"data": lambda: _tiff(path)}, {})
    if kind == ".mat":
        return _matlab(path)
    if kind in HDF5:
        return _hdf5(path)
    known = [".npy", ".npz", ".mat", *TIFF, *HDF5]
    raise ValueError(f"{str(path)!r} ends in {kind!r}; expected one of {known}, or a folder of TIFF images.")


def _numpy(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except ValueError as e:  # a damaged file is taken for a pickle
        raise _damaged(path, e) from e


def _entry(path: Path, file: Any, name: str) -> NDArray[Any]:
    try:
        return file[name]
    except ValueError as e:  # of objects, which would have to be unpickled
        raise _damaged(path, e) from e


def _tiff(path: Path) -> NDArray[Any]:
    package = _tifffile()
    try:
        with package.TiffFile(path) as file:
            samples = file.pages[0].samplesperpixel
            found = np.asarray(file.asarray())
    except (package.TiffFileError, ValueError) as e:  # the latter where numbers are cut off
        raise _damaged(path, e) from e
    if samples > 1:
        raise ValueError(f"{str(path)!r} has {samples} numbers a pixel, such as colours; expected one.")
    return found


def _by_number(path: Path) -> list[Any]:
    """view_2 before view_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _tiff_folder(path: Path) -> Arrays:
    files = sorted((p for p in path.iterdir() if p.suffix.lower() in TIFF), key=_by_number)
    if not files:
        raise ValueError(f"the folder {str(path)!r} has no TIFF images ({', '.join(TIFF)}).")

    def stack() -> NDArray[Any]:
        images = [_tiff(file) for file in files]
        if len({image.shape for image in images}) > 1:
            odd = next(i for i, image in enumerate(images) if image.shape != images[0].shape)
            raise ValueError(f"{files[odd].name!r} has shape {images[odd].shape} and {files[0].name!r} "
                             f"{images[0].shape}; expected images of one size.")  # fmt: skip
        return np.stack(images)

    return Arrays(path, {"data": stack}, {})


def _matlab(path: Path) -> Arrays:
    """Versions 4 to 7 by SciPy; 7.3 is HDF5, whose axes MATLAB writes in reverse."""
    with open(path, "rb") as file:
        is_hdf5 = b"MATLAB 7.3" in file.read(128)
    if is_hdf5:
        return _hdf5(path, reverse=True)
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        read = loadmat(path)
    except (ValueError, TypeError, NotImplementedError, MatReadError) as e:
        raise _damaged(path, e) from e
    read = {name: value.toarray() if issparse(value) else value for name, value in read.items()}
    found = {k: v for k, v in read.items() if not k.startswith("__") and isinstance(v, np.ndarray)}
    return Arrays(path, {name: (lambda v=value: v) for name, value in found.items()}, {})


def _hdf5(path: Path, reverse: bool = False) -> Arrays:
    h5py = _package("h5py", "HDF5 files (.h5, and .mat of version 7.3)")
    names: dict[str, str] = {}
    order: list[str] = []

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "iuf":
            names[name] = _text(item.attrs.get("units", ""))
            if name == DATA_EXCHANGE["data"]:
                order.extend(_text(item.attrs.get("axes", "theta:y:x")).split(":"))

    with h5py.File(path, "r") as file:
        file.visititems(note)

    def read(name: str) -> NDArray[Any]:
        with h5py.File(path, "r") as file:
            value = np.asarray(file[name])
        return value.T if reverse else value

    exchange = {what: name for what, name in DATA_EXCHANGE.items() if name in names}
    is_exchange = "data" in exchange
    said = [EXCHANGE_AXES[axis.strip()] for axis in order if axis.strip() in EXCHANGE_AXES]
    axes = " ".join(said) if is_exchange and len(said) == len(order) else None  # what it says, if that is understood
    return Arrays(
        path, {name: (lambda n=name: read(n)) for name in names}, names, exchange if is_exchange else None, axes
    )


def _text(value: Any) -> str:
    """An attribute: text, bytes, or an array of one of them."""
    value = np.asarray(value).reshape(-1)
    first = value[0] if len(value) == 1 else ""
    return first.decode() if isinstance(first, bytes) else str(first)


def _tifffile() -> Any:
    return _package("tifffile", "TIFF images")


def _package(name: str, what: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{what} are read by the package {name}, which is not installed. Install it: "
                          f"pip install 'paraboloid[tomography]' (or pip install {name}).") from error  # fmt: skip
