"""Tomography with uncertainty: projectors, the deep image prior, its posterior; imports from `posteriors` and below."""

from paraboloid.tomography.angle_choice import best_angles
from paraboloid.tomography.beams import FanBeam, ParallelBeam
from paraboloid.tomography.cone_beam import ConeBeam
from paraboloid.tomography.image_posterior import ImagePosterior, linearised
from paraboloid.tomography.measurement import as_projector
from paraboloid.tomography.projector import Projector
from paraboloid.tomography.reconstruction import Reconstruction, deep_image_prior
from paraboloid.tomography.scans import Scan, read_scan
from paraboloid.tomography.variation import total_variation

__all__ = [
    "ConeBeam", "FanBeam", "ImagePosterior", "ParallelBeam", "Projector", "Reconstruction", "Scan", "as_projector",
    "best_angles", "deep_image_prior", "linearised", "read_scan", "total_variation",
]  # fmt: skip
