"""Reconstructions: total variation at its optimum, the deep image prior better than both its rivals, exact resumes."""

import math

import pytest
import scipy.optimize
import torch
from tomography.characters import observed, picture, scanned
from torch import nn

import paraboloid as pb
from paraboloid.tomography import ParallelBeam, as_projector, deep_image_prior, total_variation, training
from paraboloid.tomography.reconstruction import iterations_for
from paraboloid.tomography.sinograms import noise_variance_of
from paraboloid.tomography.u_net import UNet
from paraboloid.tomography.variation import scale_of, squared_norm, variation


def off(x, truth):
    return float((x - truth).square().mean().sqrt())


def test_total_variation_is_at_its_optimum():
    A, _, y, _ = scanned(angles=5, size=6)
    found = total_variation(A, y, weight=0.0, iterations=1500)
    _, least = scipy.optimize.nnls(A.to_scipy().toarray(), y.flatten().numpy())
    assert float((A @ found - y).norm()) == pytest.approx(least, rel=5e-3)

    def objective(x, weight=0.3):
        return float((A @ x - y).square().sum() / 2 + weight * variation(x))

    found = total_variation(A, y, weight=0.3, iterations=600)
    best, generator = objective(found), torch.Generator().manual_seed(0)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            step = size * torch.randn(6, 6, dtype=torch.float64, generator=generator)
            assert objective((found + step).clamp(min=0)) > best - 1e-6 * best
    assert variation(total_variation(A, y, weight=10.0)) < variation(found)
    assert (found >= 0).all()


def test_the_adjoint_of_differences_the_norm_and_the_scale():
    x = torch.randn(5, 6, dtype=torch.float64)
    from paraboloid.tomography.variation import _adjoint

    for dim in (-2, -1):
        e = torch.randn_like(x.diff(dim=dim))
        torch.testing.assert_close((e * x.diff(dim=dim)).sum(), (_adjoint(e, dim) * x).sum())
    A, _, y, _ = scanned()
    norm = torch.linalg.matrix_norm(torch.from_numpy(A.to_scipy().toarray()), 2)
    assert squared_norm(A, y) == pytest.approx(float(norm) ** 2, rel=1e-2)
    assert 0.5 < scale_of(A, y) < 1.5


def test_the_noise_of_a_sinogram():
    A = ParallelBeam(96, 12)
    smooth = nn.functional.interpolate(picture()[None, None], size=96, mode="bicubic")[0, 0]
    y, s2 = observed(A, smooth, level=0.05)
    assert noise_variance_of(y) == pytest.approx(s2, rel=0.25)
    assert noise_variance_of(torch.zeros(3, 9)) > 0


def test_the_image_is_nearer_than_the_least_squares_one_and_no_global_state_moves():
    A, x, y, s2 = scanned(dtype=torch.float32)
    before = torch.random.get_rng_state()
    fit = deep_image_prior(A, y, s2, iterations=150)
    assert torch.equal(torch.random.get_rng_state(), before)
    least_squares = pb.linalg.cg(Normal(A), (A.T @ y).flatten(), max_iterations=30).view(12, 12)
    assert off(fit.image, x) < 0.85 * off(least_squares, x)
    assert fit.image.shape == (12, 12) and fit.image.dtype == torch.float32
    torch.testing.assert_close(fit.model(fit.input)[0], fit.image)
    assert fit.noise_variance == s2 and fit.misfit[-1] < 0.3 * fit.misfit[0]
    assert (fit.image >= 0).all() and fit.image.max() < 1.3 * float(fit.input.max())
    first, again, other = (deep_image_prior(A, y, s2, iterations=3, seed=seed).image for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


class Normal:
    """A^T A."""

    def __init__(self, A):
        self.A, self.shape, self.dtype = A, (A.shape[1],) * 2, torch.float32

    def __matmul__(self, v):
        return (self.A.T @ (self.A @ v.T.reshape(-1, *self.A.takes))).reshape(-1, self.shape[0]).T.reshape(v.shape)


def test_training_ends_at_the_discrepancy():
    A, _, y, s2 = scanned()
    fit = deep_image_prior(A, y, 4 * s2, iterations=200)
    assert fit.stopped == "discrepancy" and len(fit.misfit) < 200
    assert float((A @ fit.image - y).square().mean()) <= 4 * s2 < fit.misfit[-1]
    fit = deep_image_prior(A, y, 4 * s2, iterations=len(fit.misfit) + 5, stop=None)
    assert fit.stopped == "iterations"


def test_a_training_that_is_taken_up_again_ends_as_the_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 10)
    A, _, y, s2 = scanned()
    whole = deep_image_prior(A, y, s2, iterations=23, stop=None)

    def interrupt(done, total):
        if done == 15:
            raise KeyboardInterrupt

    path = tmp_path / "fit.pt"
    with pytest.raises(KeyboardInterrupt):
        deep_image_prior(A, y, s2, iterations=23, stop=None, checkpoint=path, progress=interrupt)
    seen = []
    again = deep_image_prior(
        A, y, s2, iterations=23, stop=None, checkpoint=path, progress=lambda done, _: seen.append(done)
    )
    assert seen[0] == 11
    assert torch.equal(again.image, whole.image) and again.misfit == whole.misfit
    done = deep_image_prior(A, y, s2, iterations=23, stop=None, checkpoint=path)
    assert torch.equal(done.image, whole.image)
    with pytest.raises(ValueError, match="is that of another sinogram, operator or options"):
        deep_image_prior(A, y + 1, s2, iterations=23, stop=None, checkpoint=path)


def test_a_stack_of_slices_other_operators_and_networks():
    A, x, y, s2 = scanned()
    stack = torch.stack([y, 0.5 * y])
    fit = deep_image_prior(A, stack, s2, iterations=30)
    assert fit.image.shape == (2, 12, 12)
    assert off(fit.image[1], 0.5 * x) < off(fit.image[0], x)
    same = deep_image_prior(A.to_scipy(), y.numpy(), s2, iterations=5)
    torch.testing.assert_close(same.image, deep_image_prior(A, y, s2, iterations=5).image, rtol=1e-6, atol=1e-8)
    plain = deep_image_prior(A, y, s2, iterations=20, bounds=(-math.inf, math.inf))
    assert not plain.model.bounded
    with torch.random.fork_rng():
        torch.manual_seed(0)
        own = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Flatten(1, 2)).double()
    fit = deep_image_prior(A, y, s2, iterations=20, model=own, input=torch.ones(1, 1, 12, 12))
    assert fit.model is own and fit.misfit[-1] < fit.misfit[0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients_change_nothing(mode):
    A, _, y, s2 = scanned(angles=4, size=6)
    fit = deep_image_prior(A, y, s2, iterations=3)
    expected = pb.tomography.linearised(fit, steps=1, samples=2)
    with mode():
        same = deep_image_prior(A, y.clone(), s2, iterations=3, input=fit.input.clone())
        found = pb.tomography.linearised(same, steps=1, samples=2)
        assert torch.equal(found.samples, expected.samples)
        assert pb.tomography.linearised(fit, steps=1, evidence="sampled", samples=2).std.isfinite().all()
        own = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Flatten(1, 2)).double()
        made = torch.ones(1, 1, 6, 6)
    assert torch.equal(same.image, fit.image) and not same.image.is_inference()
    if mode is torch.inference_mode:
        with pytest.raises(ValueError, match=r"Sequential was made under torch\.inference_mode"):
            deep_image_prior(A, y, s2, model=own, input=made)
    else:
        assert deep_image_prior(A, y, s2, model=own, input=made, iterations=1).image.shape == (6, 6)


def test_autocast_changes_nothing():
    A, x, y, s2 = scanned(angles=4, size=6, dtype=torch.float32)

    def found():
        fit = deep_image_prior(A, y, s2, iterations=3)
        ours = [pb.tomography.linearised(fit, steps=1, samples=2, evidence=kind) for kind in ("exact", "sampled")]
        return [fit.image, *(t for one in ours for t in (one.mean, one.std, one.sample(2), one.log_likelihood(x, 2)))]

    expected = found()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for ours, theirs in zip(found(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_network_takes_any_size_and_starts_at_its_level():
    for size in (4, 9, 13):
        x = UNet(1, (), (0.0, 2.0), level=0.5)(torch.randn(1, 1, size, size))
        assert x.shape == (1, size, size) and (x > 0).all() and (x < 2).all()
    assert UNet(1, (2, 3), (0.0, 2.0))(torch.randn(1, 1, 8, 8)).shape == (1, 2, 3, 8, 8)


A, X, Y, S2 = scanned()
ERRORS = [
    (lambda: deep_image_prior(A, Y.clone().index_fill_(1, torch.tensor(3), math.nan), S2), "holds 6 numbers that are not finite"),
    (lambda: deep_image_prior(A, Y[:4], S2), "expected .* 6 angles and 18 detectors"),
    (lambda: deep_image_prior(A, Y.to(torch.complex64), S2), "expected real numbers"),
    (lambda: deep_image_prior(A, Y, -1.0), "noise_variance is -1.0; expected a positive number, or None"),
    (lambda: deep_image_prior(A, Y, S2, bounds=(1.0, 0.0)), "bounds is"),
    (lambda: deep_image_prior(A, Y, S2, tv=-1.0), "tv is -1.0"),
    (lambda: deep_image_prior(A, Y, S2, lr=0.0), "lr is 0.0"),
    (lambda: deep_image_prior(A, Y.float(), 1e-44), "noise_variance is .*, so small that the misfit over it overflows in torch.float32"),
    (lambda: deep_image_prior(A, Y, S2, seed=2**70), "seed is 1180591620717411303424; expected an integer of 64 bits"),
    (lambda: deep_image_prior(A, Y, S2, model=nn.Linear(2, 2).double()), "the model Linear raises RuntimeError .* for its input"),
    (lambda: deep_image_prior(A, Y, S2, stop="soon"), "stop is 'soon'"),
    (lambda: deep_image_prior(A, Y, S2, iterations=0), "iterations is 0"),
    (lambda: deep_image_prior(A, Y, S2, model=nn.Flatten(), iterations=1), r"the model gives \[1, 144\] .* expected \[1, 12, 12\]"),
    (lambda: total_variation(A, Y, weight=-1.0), "weight is -1.0"),
    *((lambda w=w: total_variation(A, Y, weight=w), f"weight is {w!r}") for w in (math.nan, math.inf, "a")),
    *((lambda v=v: deep_image_prior(A, Y, v), "noise_variance is .*; expected a positive number, or None")
      for v in (0, math.nan, "a", torch.ones(6))),
    (lambda: total_variation(A, Y, noise_variance=-1.0), "noise_variance is -1.0"),
    *((lambda f=f: deep_image_prior(A, f * Y, S2), "no pixel is seen by rays with a positive sum") for f in (0, -1)),
    (lambda: deep_image_prior(A, 1e200 * Y, S2), r"reaches .*e\+20\d, whose squares overflow in torch.float64"),
    (lambda: deep_image_prior(A, None, S2), "the sinogram is a NoneType that is no array of numbers"),
    (lambda: deep_image_prior(A, [[1.0], [1.0, 2.0]], S2), "the sinogram is a list that is no array of numbers"),
    (lambda: deep_image_prior(0 * A.to_scipy(), Y, S2), "no pixel is seen|A maps images to 0"),
    (lambda: total_variation(0 * A.to_scipy(), Y, S2), "A maps images to 0"),
    (lambda: deep_image_prior(1j * A.to_scipy(), Y, S2), "A has dtype complex128; expected real numbers"),
    *((lambda b=b: deep_image_prior(A, Y, S2, bounds=b), "bounds is .*; expected") for b in (1, "ab", (0, "a"), (0, None))),
    *((lambda t=t: deep_image_prior(A, Y, S2, **{t: True}), f"{t} is True") for t in ("tv", "lr", "seed", "stop")),
    (lambda: deep_image_prior(A, Y.to("meta"), S2), "on meta; expected real numbers"),
    (lambda: deep_image_prior(ParallelBeam(3, 2), torch.ones(2, 5), S2), "images have 3 x 3 pixels; expected at least 4"),
    (lambda: deep_image_prior(A, Y, S2, model="a"), "model is a str; expected an nn.Module"),
    (lambda: deep_image_prior(A, Y, S2, checkpoint=1), "checkpoint is a int; expected the name of a file"),
    (lambda: deep_image_prior(A, Y, S2, progress="a"), "progress is a str; expected a function"),
    (lambda: deep_image_prior(A, Y, S2, input="a"), "the input is a str that is no array of numbers"),
    (lambda: deep_image_prior(A, Y, S2, input=torch.ones(1, 1, 12, 12) * 1j), "the input has shape .* expected real numbers"),
    (lambda: total_variation(A, Y, weight=True), "weight is True"),
    (lambda: as_projector(A, "a"), "the sinogram is a str that is no array of numbers"),
    *((lambda s=s: as_projector(A.to_scipy(), Y, s), "image_shape is ") for s in ("a", 3, (12,), (12, "a"))),
    (lambda: as_projector(torch.zeros(3), Y), r"A is an array of shape \(3,\); expected a matrix"),
    (lambda: deep_image_prior(A, Y, S2, tv="a"), "tv is 'a'"),
    (lambda: deep_image_prior(A, Y, S2, seed=None), "seed is None; expected an integer"),
    (lambda: deep_image_prior(A, Y, S2, input=torch.zeros(12, 12)), r"input has shape \[12, 12\]; expected finite"),
    (lambda: deep_image_prior(A, Y, S2, input=torch.zeros(1, 1, 8, 8)), r"gives \[1, 8, 8\] .* expected \[1, 12, 12\]"),
    (lambda: deep_image_prior(A, Y, S2, model=nn.Conv2d(1, 1, 1)), "weights of torch.float32; expected .* torch.float64"),
    (lambda: deep_image_prior(A, Y, S2, model=nn.Flatten(0, 1)), "the model Flatten has no parameters that require gradients"),
    (lambda: deep_image_prior(A, Y, S2, checkpoint="/no/such/folder/file"), "folder '/no/such/folder' is missing"),
    (lambda: deep_image_prior(A, Y, S2, checkpoint=__file__), "is no checkpoint of a reconstruction"),
    (lambda: noise_variance_of(torch.zeros(3, 4)), "has 4 detectors; expected at least 5"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", ERRORS, ids=[m for _, m in ERRORS])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("size", "expected"), [(8, 600), (40, 600), (80, 2400), (128, 6144), (200, 6144)])
def test_larger_images_are_trained_longer(size, expected):
    assert iterations_for(ParallelBeam(size, 2)) == expected
