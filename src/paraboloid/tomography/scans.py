"""A scan from a file: line integrals with their angles and axis, nothing about them guessed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paraboloid.linalg.operand import check_choice
from paraboloid.tomography.beams import UNITS, ParallelBeam, angles_of
from paraboloid.tomography.scan_files import Arrays, arrays

AXES = ("slices", "angles", "detectors")
SAID = {"deg": "degrees", "degree": "degrees", "degrees": "degrees", "rad": "radians", "radian": "radians",
        "radians": "radians", "°": "degrees"}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Scan:
    """Line integrals of a parallel beam.

    sinogram  [angles, detectors], or [slices, angles, detectors]
    angles    [angles], in radians
    centre    by how many detectors the axis of rotation is off their middle
    """

    sinogram: Tensor
    angles: Tensor
    centre: float

    def beam(self, size: int | None = None) -> ParallelBeam:
        """The projector of this scan, for images of [size, size] pixels as wide as a detector; by default as many as
        there are detectors."""
        detectors = self.sinogram.shape[-1]
        return ParallelBeam(detectors if size is None else size, self.angles, detectors, centre=self.centre)


def read_scan(
    path: str | Path,
    *,
    axes: str | None = None,
    log: bool | None = None,
    centre: float | str | None = None,
    angles: Any = None,
    unit: str | None = None,
    key: str | None = None,
    flat: Any = None,
    dark: Any = None,
    least: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Scan:
    """Read line integrals from a file: NumPy (.npy, .npz), MATLAB (.mat of any version), TIFF (a file, or a folder of
    images in the order of their names, numbers in them by value), HDF5 (.h5; Data Exchange, as synchrotrons write it,
    knows its own fields).

    axes    the order of the data's axes, such as "angles detectors" or "angles slices detectors" (for .mat, MATLAB's
            own order); Data Exchange fixes it
    log     whether the data are intensities, of which -log is taken, or line integrals already; a file with flat fields
            holds intensities
    centre  the detector, counted from 0, that the axis of rotation projects on (it may lie between two), "middle", or
            the name of that number in the file
    angles  numbers, or the name of an array in the file; Data Exchange has its own (exchange/theta)
    unit    of the angles, "radians" or "degrees", unless the file says it
    key     the name of the data, where there are several arrays
    flat, dark   images without an object and without a beam, or the names of arrays in the file; several are averaged:
            -log((data - dark) / (flat - dark))
    least   the least transmission that is taken as it is; smaller ones, which noise makes, are set to it

    Raises ValueError where any of these is neither given nor in the file, for counts that have no logarithm, numbers
    that are not finite, and angles that do not fit; ImportError where a package is missing.
    """
    file = arrays(path)
    _check_types(axes=(axes, str), key=(key, str), log=(log, bool))
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}; expected a real floating-point type.")
    data = file.data(key)
    order = _order(file, axes, data)
    flat, dark = (_field(file, what, given) for what, given in (("flat", flat), ("dark", dark)))
    if log is None:
        if flat is None:
            raise _missing(file, "log", "whether it holds intensities (log=True) or line integrals (log=False)")
        log = True
    moved = _in_order(data, order)
    flat, dark = (None if f is None else _field_in_order(f, order, moved) for f in (flat, dark))
    values = _integrals(moved, flat, dark, log, least)
    found = _angles(file, angles, unit, values.shape[-2])
    off = _off_middle(file, centre, values.shape[-1])
    return Scan(torch.from_numpy(np.ascontiguousarray(values)).to(dtype), found, off)


def _check_types(**given: tuple[Any, type]) -> None:
    for name, (value, kind) in given.items():
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{name} is {value!r}; expected a {kind.__name__}, or None where the file says it.")


def _reals(what: str, value: Any) -> NDArray[np.float64]:
    try:
        found = np.asarray(value)
    except ValueError:  # lists of different lengths
        found = np.asarray(None)
    if found.dtype.kind not in "iuf":
        raise ValueError(f"the {what} are a {type(value).__name__} of {found.dtype}; expected real numbers, or the "
                         "name of an array in the file.")  # fmt: skip
    return found.astype(np.float64)


def _missing(file: Arrays, name: str, what: str) -> ValueError:
    return ValueError(f"{str(file.path)!r} does not say {what}; expected {name}=.")


def _order(file: Arrays, axes: str | None, data: NDArray[Any]) -> list[str]:
    given = file.axes if axes is None else axes
    if given is None:
        raise _missing(file, "axes", f"what the axes of its {list(data.shape)} numbers are (such as "
                       "axes='angles detectors')")  # fmt: skip
    if data.ndim not in (2, 3):
        raise ValueError(f"the data have shape {list(data.shape)}; expected 2 axes, or 3 with slices.")
    order = given.replace(",", " ").split()
    if sorted(order) not in (sorted(AXES), sorted(AXES[1:])) or len(order) != data.ndim:
        raise ValueError(f"axes is {given!r} for data of shape {list(data.shape)}; expected {data.ndim} of the names "
                         f"{AXES}, each once.")  # fmt: skip
    return order


def _in_order(data: NDArray[Any], order: list[str]) -> NDArray[np.float64]:
    if data.dtype.kind not in "iuf":
        raise ValueError(f"the data have the type {data.dtype}; expected real numbers.")
    wanted = [name for name in AXES if name in order]
    return np.transpose(data, [order.index(name) for name in wanted]).astype(np.float64)


def _field(file: Arrays, what: str, given: Any) -> NDArray[np.float64] | None:
    if given is None:
        return file.get(file.names[what]).astype(np.float64) if what in file.names else None
    return _reals(f"{what} field", file.get(given) if isinstance(given, str) else given)


def _field_in_order(field: NDArray[np.float64], order: list[str], data: NDArray[np.float64]) -> NDArray[np.float64]:
    """A flat or dark field as [slices, 1, detectors] or [1, detectors]: several exposures stand along the angles."""
    if not field.size:
        raise ValueError(f"a flat or dark field has shape {list(field.shape)}, no exposure; expected some: give flat= "
                         "or dark= (0.0 for none).")  # fmt: skip
    own = [name for name in order if name != "angles"]
    if field.ndim == len(order):
        field = field.mean(order.index("angles"))
    if field.ndim == 0:
        return field
    wanted = [name for name in AXES if name in own]
    if field.ndim != len(own):
        raise ValueError(f"a flat or dark field has {field.ndim} axes; expected {len(own)} ({' '.join(own)}), or one "
                         "more of exposures, where the angles are.")  # fmt: skip
    field = np.expand_dims(np.transpose(field, [own.index(name) for name in wanted]), -2)
    expected = [n for n, name in zip(data.shape, [n for n in AXES if n in order], strict=True) if name != "angles"]
    if [n for i, n in enumerate(field.shape) if i != field.ndim - 2] != expected:
        raise ValueError(f"a flat or dark field has shape {list(field.shape)}, the data {list(data.shape)}; expected "
                         "the same slices and detectors.")  # fmt: skip
    return field


def _integrals(
    data: NDArray[np.float64], flat: Any, dark: Any, log: bool, least: float | None
) -> NDArray[np.float64]:  # fmt: skip
    if bad := int((~np.isfinite(data)).sum()):
        raise ValueError(f"the data hold {bad} numbers that are not finite; expected counts or line integrals. Mask or "
                         "interpolate dead detectors first.")  # fmt: skip
    if not log:
        if flat is not None:
            raise ValueError("log=False with a flat field; expected intensities, of which -log is taken, where there "
                             "is one.")  # fmt: skip
        return data
    zero = 0.0 if dark is None else dark
    bright = (1.0 if flat is None else flat) - zero
    if not (np.all(np.isfinite(bright)) and np.all(bright > 0)):
        raise ValueError(f"the flat field less the dark one is {np.min(bright):.4g} at its least; expected positive "
                         "counts at every detector.")  # fmt: skip
    share = (data - zero) / bright
    if least is not None:
        if isinstance(least, bool) or not isinstance(least, Real) or not 0 < least < 1:
            raise ValueError(f"least is {least!r}; expected a transmission between 0 and 1.")
        share = np.maximum(share, least)
    if bad := int((share <= 0).sum()):
        raise ValueError(f"{bad} of {share.size} transmissions are not positive (the least is {share.min():.4g}), so "
                         "they have no logarithm; expected counts above the dark field. Give least=, such as 1e-4, to "
                         "raise those that noise makes.")  # fmt: skip
    return -np.log(share)


def _off_middle(file: Arrays, given: Any, detectors: int) -> float:
    if given is None:
        raise _missing(file, "centre", "the detector of the axis of rotation (a number from 0, the name of one in the "
                       "file, or centre='middle')")  # fmt: skip
    if isinstance(given, str) and given == "middle":
        return 0.0
    value = _number(file, given) if isinstance(given, str) else given
    middle = (detectors - 1) / 2
    if isinstance(value, bool) or not isinstance(value, Real) or not abs(float(value) - middle) <= middle + 0.5:
        found = f"centre is {given!r}" + (f", {value!r} in the file" if isinstance(given, str) else "")
        raise ValueError(f"{found}; expected a detector in 0..{detectors - 1}, or 'middle'.")
    return float(value) - middle


def _number(file: Arrays, name: str) -> float:
    found = _reals(f"numbers {name!r}", file.get(name))
    if found.size != 1:
        raise ValueError(f"{name!r} has shape {list(found.shape)} in {str(file.path)!r}; expected one number, the "
                         "detector of the axis of rotation.")  # fmt: skip
    return float(found.reshape(()))


def _angles(file: Arrays, given: Any, unit: str | None, count: int) -> Tensor:
    name = file.names.get("angles") if given is None else given if isinstance(given, str) else None
    if given is None and name is None:
        raise _missing(file, "angles", f"the {count} angles")
    values = _reals("angles", file.get(name) if name is not None else given).reshape(-1)
    if unit is None and name is not None:
        unit = SAID.get(file.unit(name).strip().lower().rstrip("."))
    if unit is None:
        raise _missing(file, "unit", f"the unit of the angles, which reach {np.abs(values).max():.4g} ({UNITS})")
    check_choice("unit", unit, UNITS)
    if len(values) != count:
        raise ValueError(f"there are {len(values)} angles and {count} views in the data; expected as many.")
    if not np.isfinite(values).all():
        raise ValueError("the angles hold NaN or infinity; expected finite numbers.")
    return angles_of(values, unit, math.pi)
