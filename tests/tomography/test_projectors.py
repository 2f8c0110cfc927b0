"""Projectors: exact line integrals, their exact adjoint, derivatives of every kind; other people's operators."""

import copy
import math
import pickle

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch

import paraboloid as pb
from paraboloid.tomography import ConeBeam, FanBeam, ParallelBeam, as_projector

# torch itself scripts functions when forward mode is first used
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

CASES = {
    "parallel": lambda: ParallelBeam(8, 5),
    "parallel, odd": lambda: ParallelBeam(7, 4, detectors=12, spacing=0.9, centre=0.25),
    "limited view, any order": lambda: ParallelBeam(8, [2.0, 0.3, 0.31, math.pi / 2, -1.0]),
    "one angle": lambda: ParallelBeam(6, [0.0]),
    "degrees": lambda: ParallelBeam(8, np.array([0, 45, 90.0, 178]), unit="degrees"),
    "an array in reverse": lambda: ParallelBeam(8, np.array([0.3, 1.2, 2.5], ">f4")[::-1]),
    "fan": lambda: FanBeam(8, 6),
    "fan, near": lambda: FanBeam(8, 3, detectors=15, source_distance=9.0, detector_distance=20.0, spacing=2.5),
}


def clipped(beam):
    """The matrix by another method: every ray clipped to every pixel's box, [rays, pixels]."""
    a, size = beam.angles, beam.size
    axis, direction = torch.stack([a.cos(), a.sin()], 1), torch.stack([-a.sin(), a.cos()], 1)
    offset = (torch.arange(beam.detectors) - (beam.detectors - 1) / 2 - beam.centre).double() * beam.spacing
    foot = offset[None, :, None] * axis[:, None]
    if isinstance(beam, FanBeam):
        start = (-beam.source_distance * direction[:, None]).expand_as(foot)
        end = foot + beam.detector_distance * direction[:, None]
    else:
        start, end = foot - 50 * direction[:, None], foot + 50 * direction[:, None]
    start, step = start.reshape(-1, 1, 2), (end - start).reshape(-1, 1, 2)
    middle = torch.arange(size) - (size - 1) / 2
    low = torch.cartesian_prod(middle, middle).flip(1).double() - 0.5  # pixel (i, j) lies at x = j, y = i
    step = torch.where(step.abs() < 1e-14, 1e-14, step)
    near, far = (low - start) / step, (low + 1 - start) / step
    enter, leave = torch.minimum(near, far).amax(2).clamp(min=0), torch.maximum(near, far).amin(2).clamp(max=1)
    return (leave - enter).clamp(min=0) * step.norm(dim=2)


@pytest.mark.parametrize("name", CASES)
def test_lengths_are_those_of_rays_clipped_to_pixels(name):
    beam = CASES[name]()
    x = torch.rand(beam.size, beam.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = beam @ x
    assert found.shape == (len(beam.angles), beam.detectors)
    if name != "parallel, odd":  # whose first view runs along the pixels' borders
        torch.testing.assert_close(found.flatten(), clipped(beam) @ x.flatten(), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(beam.to_scipy() @ x.numpy().ravel(), found.numpy().ravel(), rtol=1e-13)


def test_the_first_view_sums_columns_and_every_view_holds_the_whole_mass():
    beam, x = ParallelBeam(8, 6), torch.rand(8, 8, dtype=torch.float64)
    first = (beam @ x)[0]
    inside = (beam.detectors - 8) // 2
    torch.testing.assert_close(first[inside : inside + 8], x.sum(0))
    wide = ParallelBeam(8, 6, detectors=1200, spacing=0.01)
    torch.testing.assert_close((wide @ x).sum(1) * 0.01, x.sum().expand(6), rtol=2e-3, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_the_transpose_is_the_adjoint(name):
    A = CASES[name]()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(A.takes, dtype=torch.float64, generator=generator)
    y = torch.randn(A.gives, dtype=torch.float64, generator=generator)
    one, other = ((A @ x) * y).sum(), (x * (A.T @ y)).sum()
    assert abs(one - other) <= 1e-12 * (A @ x).norm() * y.norm()
    assert A.T.T.shape == A.shape == (math.prod(A.gives), math.prod(A.takes))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, on its first forward mode
@pytest.mark.parametrize("A", [ParallelBeam(3, 2), ParallelBeam(3, 2).T, FanBeam(3, 2)], ids=["forth", "back", "fan"])
def test_derivatives(A):
    x = torch.randn(2, *A.takes, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: A @ x, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradcheck(lambda x: A @ x, x, check_batched_forward_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: (A @ x).square() / 2, x, check_fwd_over_rev=True)


def test_transforms():
    A = ParallelBeam(5, 3)
    x, v = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(A.__matmul__)(x), A @ x)
    torch.testing.assert_close(torch.vmap(A.__matmul__, in_dims=2, out_dims=2)(x.movedim(0, 2)), (A @ x).movedim(0, 2))
    torch.testing.assert_close(torch.vmap(torch.vmap(A.__matmul__))(x.view(2, 2, 5, 5)), (A @ x).view(2, 2, *A.gives))
    dense = torch.from_numpy(A.to_scipy().toarray())
    jacobian = torch.func.jacrev(A.__matmul__)(x[0])
    torch.testing.assert_close(jacobian.reshape(dense.shape), dense)
    torch.testing.assert_close(torch.func.jacfwd(A.__matmul__)(x[0]), jacobian)
    _, tangent = torch.func.jvp(A.__matmul__, (x,), (v,))
    torch.testing.assert_close(tangent, A @ v)
    hessian = torch.func.hessian(lambda x: (A @ x).square().sum() / 2)(x[0])
    torch.testing.assert_close(hessian.reshape(25, 25), dense.T @ dense)


def test_axes_types_and_kinds_of_arrays():
    A = ParallelBeam(6, 4)
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    y = A @ x
    assert y.shape == (2, 3, 4, A.detectors)
    torch.testing.assert_close(y[1, 2], A @ x[1, 2], rtol=1e-14, atol=0)
    torch.testing.assert_close(A.T @ y, torch.stack([torch.stack([A.T @ y[i, j] for j in range(3)]) for i in (0, 1)]))
    assert (A @ x.float()).dtype == torch.float32
    assert (A @ x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(A @ x, y, rtol=0, atol=0)
        torch.testing.assert_close(A.T @ y[0, 0].float(), (A.T @ y[0, 0]).float())
    assert (A @ torch.ones(6, 6, dtype=torch.int64)).dtype == torch.float32
    assert (ParallelBeam(6, 4, dtype=torch.float64) @ torch.ones(6, 6, dtype=torch.int64)).dtype == torch.float64
    assert isinstance(A @ x.numpy(), np.ndarray)
    np.testing.assert_allclose(A.T @ y.numpy(), (A.T @ y).numpy())
    np.testing.assert_allclose(A @ x.numpy().astype(">f8")[..., ::-1], (A @ x.flip(-1)).numpy())
    assert (A @ x[:0]).shape == (0, 3, 4, A.detectors)
    for other in (copy.deepcopy(A), pickle.loads(pickle.dumps(A))):
        torch.testing.assert_close(other @ x, y, rtol=0, atol=0)
    assert repr(A) == f"ParallelBeam([6, 6] to [4, {A.detectors}])"
    torch.testing.assert_close(A.at([0.3]) @ x, ParallelBeam(6, [0.3]) @ x, rtol=0, atol=0)
    torch.testing.assert_close(FanBeam(6, 3).at([0.3]) @ x, FanBeam(6, [0.3]) @ x, rtol=0, atol=0)


def test_an_independent_library_gives_the_same_lengths():
    CT = pytest.importorskip("mirtorch.linear").CT
    x = torch.rand(16, 16, dtype=torch.float64)
    for beam in (ParallelBeam(16, 7), ParallelBeam(16, 4, detectors=23), FanBeam(16, 5)):
        fan = {} if isinstance(beam, ParallelBeam) else {
            "geometry": "fan", "source_distance": beam.source_distance, "detector_distance": beam.detector_distance}  # fmt: skip
        other = CT((16, 16), beam.angles, beam.detectors, detector_spacing=beam.spacing, **fan)
        torch.testing.assert_close(beam @ x, other(x), rtol=1e-10, atol=1e-10)


class OnImages:
    """Somebody's operator on single images, of tensors or of arrays."""

    def __init__(self, A, of_numpy=False, adjoint=1.0):
        self.A, self.of_numpy, self.adjoint = A, of_numpy, adjoint

    def __matmul__(self, x):
        assert isinstance(x, np.ndarray) == self.of_numpy
        assert x.ndim == 2
        return self.A @ x

    @property
    def T(self):
        return OnImages(
            self.adjoint * self.A if isinstance(self.A, Scaled) else Scaled(self.A.T, self.adjoint), self.of_numpy
        )


class Of:
    """Functions as an operator and its adjoint."""

    def __init__(self, forth, back):
        self.forth, self.back = forth, back

    def __matmul__(self, x):
        return self.forth(x)

    @property
    def T(self):
        return Of(self.back, self.forth)


class Scaled:
    def __init__(self, A, scale):
        self.A, self.scale = A, scale

    def __matmul__(self, x):
        return self.scale * (self.A @ x)

    @property
    def T(self):
        return Scaled(self.A.T, self.scale)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, on its first forward mode
def test_any_object_with_a_product_and_a_transpose_is_an_operator():
    A = ParallelBeam(5, 3)
    y = torch.rand(A.gives, dtype=torch.float64)
    x = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    matrix = A.to_scipy()
    for given in (A, matrix, scipy.sparse.coo_matrix(matrix), scipy.sparse.linalg.aslinearoperator(matrix), matrix.toarray(),
                  torch.from_numpy(matrix.toarray()), torch.from_numpy(matrix.toarray()).to_sparse_coo(), OnImages(A), OnImages(A, of_numpy=True)):  # fmt: skip
        found = as_projector(given, y)
        torch.testing.assert_close(found @ x, A @ x)
        torch.testing.assert_close(found.T @ y, A.T @ y)
        assert torch.autograd.gradcheck(lambda x, found=found: found @ x, x, check_forward_ad=True)
        assert as_projector(given, torch.stack([y, y])).gives == A.gives
        coarse = as_projector(given, y.bfloat16()) if not isinstance(given, OnImages) else found
        assert (coarse @ x.detach().bfloat16()).dtype == torch.bfloat16
    shaped = Of(A.__matmul__, A.T.__matmul__)
    shaped.shape = A.shape  # multiplies images all the same
    torch.testing.assert_close(as_projector(shaped, y) @ x, A @ x)
    flat = as_projector(matrix, y.flatten())
    assert (flat @ x).shape == (2, y.numel())
    wide = as_projector(matrix[:, :20], y, image_shape=(4, 5))
    assert wide.takes == (4, 5)


ERRORS = [
    (lambda: ParallelBeam(0, 3), "size is 0; expected a positive integer"),
    (lambda: ParallelBeam((8, 6), 3), r"size is \(8, 6\); expected a positive integer: images are square"),
    (lambda: ParallelBeam(8, 0), "angles is 0; expected a positive integer"),
    (lambda: ParallelBeam(8, []), r"angles has shape \(0,\)"),
    (lambda: ParallelBeam(8, [0.0, math.nan]), "angle 1 is nan; expected finite"),
    (lambda: ParallelBeam(8, [0, 90, 179]), "angles reach 179; expected radians. Say unit='degrees'"),
    *((lambda a=a, beam=beam: beam(4, a), "angles reach .*; expected radians. Say unit='degrees'")
      for beam in (ParallelBeam, FanBeam, ConeBeam) for a in ([0, 5, 10], np.arange(0, 180, 20.0), torch.tensor([-90, 0, 90]))),
    *((lambda a=a, beam=beam: beam(4, a), "angles is .*; expected a number of angles, or the angles")
      for beam in (ParallelBeam, FanBeam, ConeBeam) for a in ("many", 3.0, True, None, torch.tensor(3), [True, False], ["a"])),
    *((lambda beam=beam: beam(4, 10**9), "there are 1000000000 angles; expected at most 1000000")
      for beam in (ParallelBeam, FanBeam, ConeBeam)),
    *((lambda beam=beam, s=s: beam(4, 3, spacing=s), "spacing is .*; expected a positive number of pixels, at most 1e.09")
      for beam in (ParallelBeam, FanBeam, ConeBeam) for s in (1e12, math.nan, 0, "a")),
    *((lambda A=A, x=x: A @ x, "the (image|volume) has (dtype|layout) .*; expected")
      for A, x in ((ParallelBeam(4, 2), torch.zeros(4, 4)), (ConeBeam(4, 2), torch.zeros(4, 4, 4)))
      for x in (x.to_sparse(), x.to("meta"), x.to(torch.float8_e4m3fn), x + 0j)),
    (lambda: ConeBeam(2048, 720), "products of 2048.3 voxels with 720 views .* would take about"),
    (lambda: as_projector(ParallelBeam(8, 3), torch.rand(3, 12).to_sparse()), "the sinogram has shape .* layout torch.sparse_coo"),
    (lambda: as_projector(scipy.sparse.linalg.LinearOperator((27, 25), matvec=lambda v: np.zeros(27)), torch.rand(3, 9)), "A.T @ sinogram raises NotImplementedError"),
    (lambda: as_projector(scipy.sparse.linalg.aslinearoperator(np.eye(27, 25)), torch.rand(3, 8)), "24 numbers; expected 27 of them"),
    (lambda: as_projector(torch.zeros(27, 0), torch.rand(3, 9)), r"A has the shape \(27, 0\); expected rows and columns"),
    (lambda: as_projector(torch.zeros(27, 25, device="meta"), torch.rand(3, 9)), "on the meta device"),
    (lambda: as_projector(Of(lambda x: 1 / 0, lambda y: y.sum() + torch.zeros(5, 5)), torch.rand(3, 9)), "A @ image raises ZeroDivisionError"),
    (lambda: as_projector(Of(lambda x: x + 0j, lambda y: y + 0j), torch.rand(3, 9)), "the product has dtype torch.complex64; expected real"),
    (lambda: ParallelBeam(8, 3, unit="turns"), "unit is 'turns'"),
    (lambda: ParallelBeam(8, 3, detectors=2.5), "detectors is 2.5"),
    (lambda: ParallelBeam(8, 3, spacing=-1.0), "spacing is -1.0"),
    (lambda: ParallelBeam(8, 3, dtype=torch.int32), "dtype is torch.int32"),
    (lambda: ParallelBeam(8, 3, dtype="float32"), "dtype is 'float32'"),
    *((lambda c=c, beam=beam: beam(8, 3, centre=c), f"centre is {c!r}; expected a finite number of detectors")
      for beam in (ParallelBeam, FanBeam) for c in (math.nan, math.inf, "a", None)),
    (lambda: ParallelBeam(8, torch.tensor([1j])), "expected a number of angles, or the angles"),
    (lambda: ParallelBeam(4096, 720), "would take about .* GiB; expected at most 8"),
    (lambda: FanBeam(8, 3, source_distance=2.0), "the source is 2 and the detector 8 from the axis"),
    (lambda: ParallelBeam(8, 3) @ torch.zeros(8, 9), r"the image has shape \(8, 9\); expected \[..., 8, 8\]"),
    (lambda: ParallelBeam(8, 3).T @ torch.zeros(4, 12), r"the sinogram has shape \(4, 12\); expected \[..., 3, 12\]"),
    (lambda: ParallelBeam(8, 3) @ torch.zeros(8, 8, dtype=torch.complex64), "expected real numbers"),
    (lambda: as_projector(ParallelBeam(8, 3), torch.zeros(4, 12)), "with 3 angles and 12 detectors, as A has"),
    (lambda: as_projector(torch.rand(6, 16), torch.zeros(7)), "7 numbers; expected 6 of them"),
    (lambda: as_projector(torch.rand(6, 15), torch.zeros(6)), "A has 15 columns, which are no 3 x 3 image"),
    (lambda: as_projector(OnImages(ParallelBeam(5, 3), adjoint=1.02), torch.rand(3, 9)), "A.T is not the adjoint of A: <A x, y> = "),
]  # fmt: skip


@pytest.mark.parametrize("call, message", ERRORS, ids=[m for _, m in ERRORS])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Words:
    """Multiplies nothing."""

    T = property(lambda self: self)

    def __matmul__(self, x):
        raise KeyError("no product")


def test_what_is_no_operator():
    with pytest.raises(TypeError, match="A is a list; expected an operator, that is"):
        as_projector([[1.0]], torch.zeros(1))
    for x in ([1.0], "a", None, 1.0, np.array(["a"])):
        with pytest.raises(TypeError, match=r"the image is a .*; expected a tensor or an array of numbers"):
            ParallelBeam(8, 3) @ x
    with pytest.raises(ValueError, match=r"A.T @ sinogram raises .*; expected an image \[H, W\]"):
        as_projector(Words(), torch.rand(3, 9))
    with pytest.raises(NotImplementedError, match="known by its products alone"):
        as_projector(OnImages(ParallelBeam(5, 3)), torch.rand(3, 9)).to_scipy()
    assert pb.tomography.ParallelBeam is ParallelBeam
