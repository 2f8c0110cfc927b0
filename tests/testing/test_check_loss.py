"""A user's loss by `pb.testing.check_loss`: right ones pass, each wrong one is caught with the right words."""

import pytest
import torch
from losses.test_losses import CASES
from losses.test_user import Coupled, Dice, LearnedVariance, Scalar, draw, images
from torch import nn

import paraboloid as pb

BEAM = pb.tomography.ParallelBeam(4, 2)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", CASES)
def test_every_torch_loss(name, reduction):
    module, options, shape, y = CASES[name]
    pb.testing.check_loss(module(reduction=reduction, **options), draw(*shape, seed=5), y)


@pytest.mark.parametrize(
    "loss, f, y",
    [
        (LearnedVariance(), draw(3, 4), draw(3, 2, seed=1)),
        (Dice(), *images()),
        (Dice("clip"), *images()),
        (pb.losses.GaussianNLL(log_variance=True), draw(3, 4), draw(3, 2, seed=1)),
        (pb.losses.Observed(nn.MSELoss(), BEAM), draw(3, 4, 4), draw(3, *BEAM.gives, seed=1)),
        (2 * pb.losses.Observed(pb.losses.PoissonNLL(), BEAM), draw(2, 3, 4, 4), draw(2, 3, *BEAM.gives).exp()),
        (pb.losses.Observed(pb.losses.MSE("sum") + pb.losses.MSE(), BEAM), draw(2, 4, 4), draw(2, *BEAM.gives)),
        (2 * pb.losses.MSE() + pb.losses.MSE(reduction="sum"), draw(3, 2), draw(3, 2, seed=1)),
    ],
    ids=["learned variance", "dice", "dice, clipped", "gaussian", "observed", "observed counts", "observed sum", "sum"],
)
def test_losses_of_all_kinds(loss, f, y):
    pb.testing.check_loss(loss, f, y)


class Squares(pb.Loss):
    """|f - y|^2 with everything in closed form; what is overridden below is wrong."""

    def sample_losses(self, f, y):
        return (f - y).square().sum(1)

    def gradient(self, f, y):
        return 2 * (f - y)

    def hessian_product(self, f, y, u):
        return 2 * u

    def hessian_root(self, f, y):
        for c in range(f.shape[1]):
            s = torch.zeros_like(f)
            s[:, c] = 2**0.5
            yield s

    def sample_targets(self, f, generator):
        return f + 0.5**0.5 * torch.randn(f.shape, generator=generator, dtype=f.dtype)


def test_a_loss_in_closed_form_passes():
    pb.testing.check_loss(Squares(), draw(3, 2), draw(3, 2, seed=1))


WRONG = {
    "gradient": (
        lambda self, f, y: f - y,
        r"Wrong.gradient over the normalizer: entry \[\d, \d\] is .*, 50.00%; 6 of 6 entries differ. Everywhere 0.5 times",
    ),
    "hessian_product": (
        lambda self, f, y, u: 2 * u.flip(-1),
        r"Wrong.hessian_product, \[vectors, \*outputs\],: entry \[\d, \d, \d\] .* by autograd: off by",
    ),
    "hessian_root": (
        lambda self, f, y: (s / 2**0.5 for s in Squares().hessian_root(f, y)),
        r"Wrong.hessian_root: the sum of its squares: entry \[0, 0, 0\] is 1, expected 2 by autograd: .* 0.5 times",
    ),
    "root_columns": (
        lambda self, f: 3,
        r"Wrong.hessian_root yields 2 vectors \[3, 2\]; expected root_columns\(f\) = 3 like the outputs",
    ),
    "curvature_product": (
        lambda self, f, y, u: u,
        r"Wrong.curvature_product, \[vectors, \*outputs\],: .* by hessian_root: off by",
    ),
    "curvature_at": (
        lambda self, f, y: lambda u: u,
        r"Wrong.curvature_at, one vector,: entry .* by hessian_root: off by",
    ),
    "normalizer": (
        lambda self, f, y: float(len(f)) ** 2,
        r"Wrong.normalizer is|Wrong.normalizer: entry \[\] is 9, expected 5 by adding up those of two parts of the batch",
    ),
    "value": (
        lambda self, f, y: (f - y).square().mean(),
        r"Wrong.value: entry \[\] is .* by sample_losses and normalizer: off by .* Everywhere 0.5 times",
    ),
    "sample_targets": (
        lambda self, f, generator: f + torch.randn(f.shape, generator=generator, dtype=f.dtype),
        r"of sample_targets, the mean of its squares less the Hessian: .* \(the information identity\): off by .* standard",
    ),
    "sampled_gradients": (
        lambda self, f, y, samples, generator: iter(
            torch.randn(samples, *f.shape, generator=generator, dtype=f.dtype) / samples**0.5
        ),
        r"Wrong.sampled_gradients: the mean of their squares: entry .* expected 2 by hessian_root: off by .* standard err",
    ),
}


@pytest.mark.parametrize("method", WRONG)
def test_a_wrong_loss_is_caught(method):
    function, message = WRONG[method]
    loss = type("Wrong", (Squares,), {method: function})()
    with pytest.raises(AssertionError, match=message):
        pb.testing.check_loss(loss, draw(3, 2), draw(3, 2, seed=1))


def test_labels_off_their_mean():
    class Shifted(Squares):
        def sample_targets(self, f, generator):
            return super().sample_targets(f, generator) + 0.2

    with pytest.raises(AssertionError, match=r"its mean over labels of sample_targets: .* \(the mean score\)"):
        pb.testing.check_loss(Shifted(), draw(3, 2), draw(3, 2, seed=1))
    pb.testing.check_loss(Shifted(), draw(3, 2), draw(3, 2, seed=1), draws=0)


def test_labels_from_the_global_generator():
    class Global(Squares):
        def sample_targets(self, f, generator):
            return f + 0.5**0.5 * torch.randn(f.shape, dtype=f.dtype)

    with (
        torch.random.fork_rng(),
        pytest.raises(AssertionError, match="expected that they come from the given generator"),
    ):
        pb.testing.check_loss(Global(), draw(3, 2), draw(3, 2, seed=1))


def test_samples_that_are_not_separate():
    with pytest.raises(
        AssertionError, match=r"the loss of sample 0 is .* in the batch and .* alone; expected a loss that"
    ):
        pb.testing.check_loss(Coupled(), draw(3, 2), draw(3, 2, seed=1))
    with pytest.raises(
        AssertionError, match=r"sample_losses returned shape \(\) .*; expected one number per sample, \[3\]"
    ):
        pb.testing.check_loss(Scalar(), draw(3, 2), draw(3, 2, seed=1))

    class Last(pb.Loss):
        """Sample 0 is right; the last one feels its neighbour."""

        def sample_losses(self, f, y):
            return (f - y).square().sum(1) + torch.cat([0 * f[:-1, 0], f[:1, 0] * (len(f) - 1)])

    with pytest.raises(
        AssertionError, match=r"Last.sample_losses of the batch: entry \[2\] .* by the samples one by one"
    ):
        pb.testing.check_loss(Last(), draw(3, 2), draw(3, 2, seed=1))


def test_one_sample_says_nothing_of_separation():
    with pytest.raises(ValueError, match="outputs has 1 samples; expected at least 2"):
        pb.testing.check_loss(nn.MSELoss(), draw(1, 2), draw(1, 2))
