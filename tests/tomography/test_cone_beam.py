"""The cone beam against boxes that rays are clipped to, a ball's chords, its own transpose and the fan beam."""

import copy
import math
import pickle

import pytest
import torch

import paraboloid as pb
from paraboloid.tomography import ConeBeam, FanBeam, cone_beam

SIZE = 6
CASES = {
    "default": lambda: ConeBeam(SIZE, 3),
    "near, any order": lambda: ConeBeam(
        SIZE, [2.0, -0.3, 0.7], rows=7, columns=9, source_distance=8.0, detector_distance=9.5, spacing=1.3
    ),
    "degrees, one row": lambda: ConeBeam(SIZE, [10, 95, 200.0], rows=1, columns=8, unit="degrees"),
}


def clipped(beam):
    """The matrix by another method: every ray clipped to every voxel's box, [rays, voxels]."""
    found = []
    middle = torch.arange(SIZE).double() - (SIZE - 1) / 2
    low = torch.cartesian_prod(middle, middle, middle).flip(1) - 0.5  # voxel (i, j, k) lies at x = k, y = j, z = i
    for a in beam.angles.tolist():
        u = (torch.arange(beam.columns) - (beam.columns - 1) / 2).double() * beam.spacing
        v = (torch.arange(beam.rows) - (beam.rows - 1) / 2).double() * beam.spacing
        v, u = torch.meshgrid(v, u, indexing="ij")
        c, s = math.cos(a), math.sin(a)
        end = torch.stack([u * c - beam.detector_distance * s, u * s + beam.detector_distance * c, v], -1).view(
            -1, 1, 3
        )
        start = torch.tensor([beam.source_distance * s, -beam.source_distance * c, 0.0], dtype=torch.float64)
        step = torch.where((end - start).abs() < 1e-14, 1e-14, end - start)
        near, far = (low - start) / step, (low + 1 - start) / step
        enter, leave = torch.minimum(near, far).amax(2).clamp(min=0), torch.maximum(near, far).amin(2).clamp(max=1)
        found.append((leave - enter).clamp(min=0) * step.norm(dim=2))
    return torch.cat(found)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_lengths_and_the_adjoint_are_those_of_the_dense_matrix(name, kept, monkeypatch):
    monkeypatch.setattr(cone_beam, "BLOCK", 1200)  # one or two views a block
    monkeypatch.setattr(cone_beam, "KEPT", 4 if kept else 1e12)
    A = CASES[name]()
    assert A.linear.keep == kept and (A.rows == 1 or len(A.linear.parts) > 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, SIZE, SIZE, SIZE, dtype=torch.float64, generator=generator)
    y = torch.randn(2, 3, A.rows, A.columns, dtype=torch.float64, generator=generator)
    dense = clipped(A)
    assert A.shape == dense.shape and A.T.shape == dense.T.shape
    torch.testing.assert_close((A @ x).flatten(1), x.flatten(1) @ dense.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((A.T @ y).flatten(1), y.flatten(1) @ dense, rtol=1e-12, atol=1e-12)
    assert len(A.linear.made) == (len(A.linear.parts) if kept else 0)
    assert (A @ x.float()).dtype == torch.float32
    for other in (copy.deepcopy(A), pickle.loads(pickle.dumps(A))):
        assert torch.equal(other @ x, A @ x)


def test_a_ball_casts_its_chords():
    """Of a ball of radius r around the axis, seen along a ray at the distance d: 2 sqrt(r^2 - d^2)."""
    size, radius = 40, 14.0
    A = ConeBeam(size, [0.4], rows=24, columns=24, spacing=2.0)
    at = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    z, y, x = torch.meshgrid(at, at, at, indexing="ij")
    ball = (radius + 0.5 - (x * x + y * y + z * z).sqrt()).clamp(0, 1)
    start, ends = (torch.from_numpy(t.copy()) for t in A.ends(0.4))
    along = (ends - start) / (ends - start).norm(dim=1, keepdim=True)
    distance = (start - (start * along).sum(1, keepdim=True) * along).norm(dim=1)
    chords = 2 * (radius**2 - distance.square()).clamp(min=0).sqrt()
    found = (A @ ball).flatten()
    assert (found - chords)[distance < 0.9 * radius].abs().max() < 1.0  # a voxel
    assert found[distance > radius + 2].abs().max() == 0 and (found - chords).abs().mean() < 0.3
    assert float(found.sum()) == pytest.approx(float(chords.sum()), rel=5e-3)


def test_the_middle_row_is_a_fan_beam():
    cone = ConeBeam(5, 3, rows=1, columns=9)
    fan = FanBeam(5, 3, detectors=9, source_distance=cone.source_distance, detector_distance=cone.detector_distance,
                  spacing=cone.spacing)  # fmt: skip
    x = torch.rand(5, 5, 5, dtype=torch.float64)
    torch.testing.assert_close((cone @ x)[:, 0], fan @ x[2], rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, on its first forward mode
def test_derivatives_and_transforms():
    A = ConeBeam(3, 1, rows=2, columns=3)
    x = torch.randn(3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: A @ x, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: (A @ x).square() / 2, x, check_fwd_over_rev=True)
    batch = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(A.__matmul__)(batch), A @ batch)
    found = pb.tomography.total_variation(A, A @ torch.ones(3, 3, 3, dtype=torch.float64), weight=1e-6, iterations=5)
    assert found.shape == (3, 3, 3)


ERRORS = [
    (lambda: ConeBeam((4, 4, 3), 2), "size is .*: volumes are cubes"),
    (lambda: ConeBeam(4, 0), "angles is 0"),
    (lambda: ConeBeam(4, 2, rows="a"), "detectors is 'a'"),
    (lambda: ConeBeam(4, 2, source_distance=2.0), "expected both outside the volume's ball, above 3.464"),
    (lambda: ConeBeam(4, 2, dtype="float32"), "dtype is 'float32'"),
    (lambda: ConeBeam(4, 2) @ torch.zeros(4, 4), r"the volume has shape \(4, 4\); expected \[..., 4, 4, 4\]"),
    (lambda: pb.tomography.as_projector(ConeBeam(4, 2, 3, 3), torch.zeros(2, 9)), r"projections have shape \(2, 9\)"),
    (lambda: pb.tomography.deep_image_prior(ConeBeam(4, 2, 3, 3), torch.ones(2, 3, 3), 0.1), "A takes volumes of shape"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", ERRORS, ids=[m for _, m in ERRORS])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
