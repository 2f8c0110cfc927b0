"""The cone beam: line integrals of a volume along rays from a point source to a flat detector, by blocks of views."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch import Tensor

from paraboloid.passes.memory import DENSE
from paraboloid.tomography import beams
from paraboloid.tomography.intersection_lengths import intersection_lengths
from paraboloid.tomography.projector import Matrix, Projector

BLOCK = 2**24  # lengths that are traced together
LENGTHS = 1.7  # of a ray, over the voxels along a side
KEPT = 4  # blocks are kept where all of them take this part of what a dense matrix may


class ConeBeam(Projector):
    """Line integrals of a [size, size, size] volume along rays from a point source to a flat detector.

    A @ volume is [..., angles, rows, columns]; A.T @ projections its exact Euclidean adjoint, [..., z, y, x].

    angles             a number of them, equidistant in [0, 2 pi); or the angles themselves, any and in any order
    rows, columns      of the detector, along the axis of rotation and across; by default as many as cover the shadow of
                       the ball around the volume
    source_distance    from the source to the axis of rotation, in voxels; by default 3 size
    detector_distance  from the axis to the detector's plane; by default size
    spacing            of the detector's elements, both ways; by default a voxel, magnified
    dtype              of volumes that are not of floating point

    Voxels are cubes of side 1: slice i upwards in z, row j in y, column k in x, around the axis and the plane of the
    circle.  The source stands at -source_distance (-sin a, cos a, 0), the detector at +detector_distance of the same
    direction.  The matrix is made in blocks of views, which are kept where they fit and made anew for every product
    where they do not; lengths are exact (Siddon 1985).

    Raises ValueError as `FanBeam` does, for a source or a detector inside the volume's ball, and for a product, or one
    view's lengths, that would not fit into 8 GiB.
    """

    def __init__(
        self, size: int, angles: beams.Angles, rows: int | None = None, columns: int | None = None,
        dtype: torch.dtype | None = None, *, source_distance: float | None = None,
        detector_distance: float | None = None, unit: str = "radians", spacing: float | None = None,
    ):  # fmt: skip
        self.size = size = beams.count("size", size, "volumes are cubes; pad others with zeros")
        self.angles = beams.angles_of(angles, unit, 2 * np.pi)
        self.source_distance = beams.length("source_distance", 3 * size if source_distance is None else source_distance)
        self.detector_distance = beams.length(
            "detector_distance", size if detector_distance is None else detector_distance
        )
        radius, whole = size * 3**0.5 / 2, self.source_distance + self.detector_distance
        if min(self.source_distance, self.detector_distance) <= radius:
            raise ValueError(f"the source is {self.source_distance:g} and the detector {self.detector_distance:g} from "
                             f"the axis; expected both outside the volume's ball, above {radius:.4g}.")  # fmt: skip
        self.spacing = beams.length("spacing", whole / self.source_distance if spacing is None else spacing)
        shadow = 2 * whole * radius / (self.source_distance**2 - radius**2) ** 0.5
        self.rows, self.columns = (beams.detectors_of(n, size, self.spacing, shadow) for n in (rows, columns))
        self._check_memory()
        linear = _Blocks(self)
        gives = (len(self.angles), self.rows, self.columns)
        super().__init__(linear, (size,) * 3, gives, ("volume", "projections"), beams.float_type(dtype))

    def _check_memory(self) -> None:
        """Raise ValueError where a product, or the lengths of one view, would not fit."""
        view = self.rows * self.columns
        need = max(8 * (self.size**3 + len(self.angles) * view), 2 * 12 * view * self.size * LENGTHS)
        if need > DENSE.of():
            raise ValueError(f"products of {self.size}^3 voxels with {len(self.angles)} views of {self.rows} x "
                             f"{self.columns} would take about {need / 2**30:.0f} GiB at a time; expected at most "
                             f"{DENSE.of() / 2**30:.0f}. Take larger voxels or fewer detectors.")  # fmt: skip

    def ends(self, angle: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Where the rays of one view start and end, (x, y, z), [rows * columns, 3]."""
        axis, along = np.array([np.cos(angle), np.sin(angle), 0]), np.array([-np.sin(angle), np.cos(angle), 0])
        v, u = ((np.arange(n) - (n - 1) / 2) * self.spacing for n in (self.rows, self.columns))
        up = np.array([0.0, 0.0, 1.0])
        ends = self.detector_distance * along + v[:, None, None] * up + u[None, :, None] * axis
        ends = ends.reshape(-1, 3)
        return np.broadcast_to(-self.source_distance * along, ends.shape), ends


class _Blocks:
    """The matrix of a cone beam, or its transpose, by blocks of views."""

    def __init__(self, beam: ConeBeam, of: _Blocks | None = None):
        self.beam, self.of = beam, of
        a_view = beam.rows * beam.columns * beam.size * LENGTHS
        views = max(1, int(BLOCK / a_view))
        self.parts = [list(part) for part in np.array_split(beam.angles.numpy(), -(-len(beam.angles) // views))]
        self.keep = 2 * 12 * a_view * len(beam.angles) <= DENSE.of() / KEPT
        self.made: dict[int, Matrix] = {}

    @property
    def shape(self) -> tuple[int, int]:
        beam = self.beam
        m, n = len(beam.angles) * beam.rows * beam.columns, beam.size**3
        return (m, n) if self.of is None else (n, m)

    @property
    def T(self) -> _Blocks:
        return _Blocks(self.beam, self) if self.of is None else self.of

    def times(self, x: Tensor) -> Tensor:
        """x [B, n] to [B, m]."""
        if self.of is None:
            return torch.cat([self.block(i).times(x) for i in range(len(self.parts))], 1)
        at, found = 0, x.new_zeros(len(x), self.shape[0])
        for i in range(len(self.parts)):
            block = self.of.block(i)
            found += block.T.times(x[:, at : at + block.shape[0]])
            at += block.shape[0]
        return found

    def block(self, i: int) -> Matrix:
        """The rows of the views of part i."""
        if i in self.made:
            return self.made[i]
        starts, ends = (np.concatenate(e) for e in zip(*(self.beam.ends(a) for a in self.parts[i]), strict=True))
        firsts, at, lengths = intersection_lengths(self.beam.size, starts, ends)
        shape = (len(starts), self.beam.size**3)
        block = Matrix(scipy.sparse.csr_array((lengths, at, firsts.astype(np.int32)), shape=shape))
        if self.keep:
            self.made[i] = block
        return block

    def __deepcopy__(self, memo: dict[int, Any]) -> _Blocks:
        return self  # nothing ever changes it

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "made": {}}
