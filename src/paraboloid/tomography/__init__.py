"""Tomography with uncertainty: projectors of images to line integrals, with their adjoints; imports from `passes`."""

from paraboloid.tomography.beams import FanBeam, ParallelBeam
from paraboloid.tomography.measurement import as_projector
from paraboloid.tomography.projector import Projector

__all__ = ["FanBeam", "ParallelBeam", "Projector", "as_projector"]
