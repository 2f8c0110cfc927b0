"""Scanners: where the rays of each geometry run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch import Tensor

from paraboloid.linalg.operand import check_choice
from paraboloid.passes.memory import DENSE
from paraboloid.tomography.intersection_lengths import intersection_lengths
from paraboloid.tomography.projector import Matrix, Projector, native

Angles = int | Sequence[float] | NDArray[Any] | Tensor
UNITS = ("radians", "degrees")
MOST = 10**6  # angles
FAR = 1e9  # pixels; beyond, rounding would decide which pixels a ray meets


class ParallelBeam(Projector):
    """Line integrals of a [size, size] image along parallel rays, one apart: A @ image, [..., angles, detectors].

    angles     a number of them, equidistant in [0, pi); or the angles themselves, any and in any order
    unit       "radians" or "degrees", of angles that are given
    detectors  how many rays there are at each angle; by default the least number that covers the image's diagonal and
               is even where `size` is, so that no ray at 0 or 90 degrees runs along a border of pixels
    spacing    of the detectors, in pixels
    centre     by how many detectors the axis of rotation is off the middle of the detectors
    dtype      of images that are not of floating point; products have the image's own dtype

    Pixels are squares of side 1, row i upwards in y, column j in x, around the axis of rotation.  At angle a the rays
    run along (-sin a, cos a), and detector k has the offset (k - (detectors - 1) / 2 - centre) spacing along
    (cos a, sin a): at angle 0 a view is the sums of columns.  The matrix holds exact lengths (Siddon 1985).

    Raises ValueError for a size that is no positive integer (images are square: pad others with zeros), for no angles,
    angles that are not finite or look like degrees, and for a matrix that would not fit into 8 GiB.
    """

    def __init__(
        self, size: int, angles: Angles, detectors: int | None = None, dtype: torch.dtype | None = None, *,
        unit: str = "radians", spacing: float = 1.0, centre: float = 0.0,
    ):  # fmt: skip
        size = count("size", size, "images are square; pad others with zeros")
        self.angles = angles_of(angles, unit, math.pi)
        self.detectors = detectors_of(detectors, size, spacing)
        self.spacing, self.centre, self.size = length("spacing", spacing), _finite("centre", centre), size
        _check_memory(size, len(self.angles) * self.detectors)
        direction, foot = _views(self)
        far = (size / math.sqrt(2) + 1) * direction[:, None]  # outside the image
        super().__init__(*_built(size, (foot - far, foot + far), len(self.angles), self.detectors, dtype))

    def at(self, angles: Angles, unit: str = "radians") -> ParallelBeam:
        """The same scanner at other angles."""
        return ParallelBeam(
            self.size, angles, self.detectors, self.dtype, unit=unit, spacing=self.spacing, centre=self.centre
        )


class FanBeam(Projector):
    """Line integrals of a [size, size] image along rays from a point source to a flat detector.

    angles             a number of them, equidistant in [0, 2 pi); or the angles themselves
    source_distance    from the source to the axis of rotation, in pixels; by default 2 size
    detector_distance  from the axis to the detector's plane; by default size
    spacing            of the detectors; by default a pixel of the image, magnified
    detectors          by default as many as cover the circle around the image

    The source stands at -source_distance (-sin a, cos a), the detector at +detector_distance (-sin a, cos a), its
    elements along (cos a, sin a).  Otherwise as `ParallelBeam`.

    Raises ValueError as `ParallelBeam` does, and for a source or a detector inside the image's circle.
    """

    def __init__(
        self, size: int, angles: Angles, detectors: int | None = None, dtype: torch.dtype | None = None, *,
        source_distance: float | None = None, detector_distance: float | None = None, unit: str = "radians",
        spacing: float | None = None, centre: float = 0.0,
    ):  # fmt: skip
        size = count("size", size, "images are square; pad others with zeros")
        self.angles = angles_of(angles, unit, 2 * math.pi)
        self.source_distance = length("source_distance", 2 * size if source_distance is None else source_distance)
        self.detector_distance = length("detector_distance", size if detector_distance is None else detector_distance)
        radius, whole = size / math.sqrt(2), self.source_distance + self.detector_distance
        if min(self.source_distance, self.detector_distance) <= radius:
            raise ValueError(f"the source is {self.source_distance:g} and the detector {self.detector_distance:g} from "
                             f"the axis; expected both outside the image's circle, above {radius:.4g}.")  # fmt: skip
        self.spacing = length("spacing", whole / self.source_distance if spacing is None else spacing)
        shadow = 2 * whole * radius / math.sqrt(self.source_distance**2 - radius**2)
        self.detectors = detectors_of(detectors, size, self.spacing, shadow)
        self.centre, self.size = _finite("centre", centre), size
        _check_memory(size, len(self.angles) * self.detectors)
        direction, foot = _views(self)
        source = np.broadcast_to(-self.source_distance * direction[:, None], foot.shape)
        ends = foot + self.detector_distance * direction[:, None]
        super().__init__(*_built(size, (source, ends), len(self.angles), self.detectors, dtype))

    def at(self, angles: Angles, unit: str = "radians") -> FanBeam:
        """The same scanner at other angles."""
        return FanBeam(
            self.size, angles, self.detectors, self.dtype, source_distance=self.source_distance,
            detector_distance=self.detector_distance, unit=unit, spacing=self.spacing, centre=self.centre,
        )  # fmt: skip


def _views(beam: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unit vectors along the rays, [angles, 2], and the detectors' offsets, [angles, detectors, 2]."""
    a = beam.angles.numpy()
    axis, direction = np.stack([np.cos(a), np.sin(a)], 1), np.stack([-np.sin(a), np.cos(a)], 1)
    offsets = (np.arange(beam.detectors) - (beam.detectors - 1) / 2 - beam.centre) * beam.spacing
    return direction, offsets[None, :, None] * axis[:, None]


def _built(size: int, rays: Any, angles: int, detectors: int, dtype: torch.dtype | None) -> Any:
    starts, at, lengths = intersection_lengths(size, *(ends.reshape(-1, 2) for ends in rays))
    narrow = starts.astype(np.int32) if starts[-1] < 2**31 else starts
    rows = scipy.sparse.csr_array((lengths, at.astype(narrow.dtype), narrow), shape=(angles * detectors, size**2))
    return Matrix(rows), (size, size), (angles, detectors), ("image", "sinogram"), float_type(dtype)


def float_type(dtype: Any) -> torch.dtype:
    """The type of products with images of integers: the default one for None."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}; expected a real floating-point type.")
    return dtype


def count(name: str, value: Any, why: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise ValueError(f"{name} is {value!r}; expected a positive integer{': ' if why else ''}{why}.")
    return int(value)


def length(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= FAR:
        raise ValueError(f"{name} is {value!r}; expected a positive number of pixels, at most {FAR:g}.")
    return float(value)


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not abs(float(value)) <= FAR:
        raise ValueError(f"{name} is {value!r}; expected a finite number of detectors.")
    return float(value)


def angles_of(angles: Any, unit: str, whole: float) -> Tensor:
    """[angles], radians, float64."""
    check_choice("unit", unit, UNITS)
    if isinstance(angles, Integral) and not isinstance(angles, bool):
        many = count("angles", angles)
        _check_many(many)
        return torch.arange(many, dtype=torch.float64) * (whole / many)
    try:
        given = angles if isinstance(angles, Tensor) else np.asarray(angles)
        if given.ndim == 0:
            raise TypeError
        found = (given if isinstance(given, Tensor) else torch.as_tensor(native(given))).detach().cpu()
        if found.is_complex() or found.dtype == torch.bool:
            raise TypeError
        found = found.double().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"angles is {angles!r}; expected a number of angles, or the angles.") from error
    if found.dim() != 1 or not len(found):
        raise ValueError(f"angles has shape {tuple(found.shape)}; expected [angles], at least one.")
    _check_many(len(found))
    if not found.isfinite().all():
        raise ValueError(f"angle {int((~found.isfinite()).nonzero()[0])} is {found[~found.isfinite()][0].item()}; "
                         "expected finite numbers.")  # fmt: skip
    if unit == "degrees":
        return torch.deg2rad(found)
    most = 2 * math.pi if bool((found == found.round()).all()) else 4 * math.pi  # radians are hardly ever whole numbers
    if found.abs().max() > most:
        raise ValueError(f"angles reach {found.abs().max():g}; expected radians. Say unit='degrees' if they are.")
    return found


def _check_many(angles: int) -> None:
    if angles > MOST:
        raise ValueError(f"there are {angles} angles; expected at most {MOST}.")


def detectors_of(detectors: Any, size: int, spacing: Any, shadow: float | None = None) -> int:
    if detectors is not None:
        return count("detectors", detectors)
    least = math.ceil((size * math.sqrt(2) if shadow is None else shadow) / length("spacing", spacing))
    return least + (least - size) % 2


def _check_memory(size: int, rays: int) -> None:
    """Raise ValueError where the lengths, those of the transpose too, would not fit."""
    need = rays * size * 1.3 * 2 * 12
    if need > DENSE.of():
        raise ValueError(f"the lengths of {rays} rays through {size} x {size} pixels would take about "
                         f"{need / 2**30:.0f} GiB; expected at most {DENSE.of() / 2**30:.0f}. Take fewer angles or "
                         "larger pixels.")  # fmt: skip
