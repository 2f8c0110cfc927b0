"""Networks that are trained side by side against each one trained alone."""

import pytest
import torch
from tomography.characters import observed, picture

import paraboloid as pb
from paraboloid.tomography.side_by_side import deep_image_priors


def scans():
    A = [pb.tomography.ParallelBeam(12, angles) for angles in (4, 7, 5)]
    pairs = [observed(B, picture(), level, seed) for B, level, seed in zip(A, (0.05, 0.3, 0.1), range(3), strict=True)]
    return A, [y for y, _ in pairs], [s2 for _, s2 in pairs]


def test_each_is_what_it_is_alone():
    A, y, s2 = scans()
    s2[1] *= 9  # reached on the way
    found = deep_image_priors(A, y, s2, [3, 4, 5], iterations=25)
    for k in range(3):
        alone = pb.tomography.deep_image_prior(A[k], y[k], s2[k], 3 + k, iterations=25)
        mine = found.fits[k]
        assert mine.stopped == alone.stopped and len(mine.misfit) == len(alone.misfit)
        torch.testing.assert_close(mine.misfit[:20], alone.misfit[:20], rtol=1e-8, atol=0)
        torch.testing.assert_close(mine.image, alone.image, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(mine.image, mine.model(mine.input)[0])
    assert {fit.stopped for fit in found.fits} == {"discrepancy", "iterations"}


def test_dropout_masks_every_network():
    A, y, s2 = scans()
    state = torch.get_rng_state()
    found = deep_image_priors(A, y, s2, [0, 1, 2], iterations=5, stop=False, dropout=0.2)
    images = found.masked(6, 0)
    assert images.shape == (3, 6, 12, 12) and bool((images.std(1).mean((1, 2)) > 0).all())
    assert torch.equal(images, found.masked(6, 0)) and not torch.equal(images, found.masked(6, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert [len(fit.misfit) for fit in found.fits] == [5, 5, 5]


def test_errors():
    A, y, s2 = scans()
    assert deep_image_priors(A[:1], y[:1], s2[:1], [0], iterations=1).fits[0].image.shape == (12, 12)
    with pytest.raises(RuntimeError, match=r"the misfit of network 0 in iteration .* Lower lr"):
        deep_image_priors(A, y, s2, [0, 1, 2], iterations=30, lr=1e200)
    with pytest.raises(ValueError, match="iterations is 0"):
        deep_image_priors(A, y, s2, [0, 1, 2], iterations=0)
