"""Where hyperparameters start: in any unit of the targets, and not where the evidence has no slope."""

import pytest
import torch
from gp.test_hyperparameters import drawn

import paraboloid as pb
from paraboloid.gp.hyperparameters import log_evidence
from paraboloid.gp.starting import in_units_of, multiplied

KERNELS = [pb.gp.Matern(1.5, 1.3), pb.gp.RBF() + 0.3, 2.0 * pb.gp.RBF() * pb.gp.RationalQuadratic(), pb.gp.Tanimoto()]


class Linear(pb.gp.Kernel):
    def __call__(self, x, z=None):
        return x @ (x if z is None else z).T

    def diagonal(self, x):
        return x.square().sum(1)

    def points(self, x, shift):
        return [x]

    def tile(self, left, right, buffers):
        return torch.mm(left[0], right[0].T, out=buffers.take(len(left[0]), len(right[0])))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_start_is_the_best_of_all_factors(kernel):
    x, y = drawn(60)
    x, y = x.abs(), 30 * y
    found, noise = in_units_of(y, x, kernel, 0.2)
    torch.testing.assert_close(found(x) / kernel(x), torch.full((60, 60), noise / 0.2, dtype=x.dtype))
    assert found.hyperparameters().keys() == kernel.hyperparameters().keys()

    def evidence(factor):
        return float(log_evidence(multiplied(found, factor), x, y, torch.tensor(factor * noise, dtype=x.dtype)))

    assert evidence(0.9) < evidence(1.0) > evidence(1.1)


def test_a_kernel_that_cannot_be_multiplied_stays():
    x, y = drawn(20)
    for kernel in (Linear(), Linear() + pb.gp.RBF(), Linear() * Linear()):
        assert in_units_of(1e3 * y, x, kernel, 0.2) == (kernel, 0.2)
    half = multiplied(Linear() * pb.gp.RBF(), 3.0)
    torch.testing.assert_close(half(x), 3 * Linear()(x) * pb.gp.RBF()(x))


@pytest.mark.parametrize("options", [{}, {"method": "pathwise", "steps": 5}])
def test_targets_may_have_any_unit(options):
    x, y = drawn(150)
    few = pb.gp.fit_hyperparameters(pb.gp.Matern(1.5), x, y, 0.5, **options)
    for unit in (1e6, 1e-5):
        found = pb.gp.fit_hyperparameters(pb.gp.Matern(1.5), x, unit * y, 0.5, **options)
        assert found.noise_variance == pytest.approx(unit**2 * few.noise_variance, rel=1e-3)
        ratio = found.kernel(x) / few.kernel(x)
        torch.testing.assert_close(ratio, torch.full_like(ratio, unit**2), rtol=1e-2, atol=0)
    estimator = {"kernel": pb.gp.Matern(1.5), "noise_variance": 0.5, "normalize_y": False}
    means = [pb.gp.GPRegressor(**estimator).fit(x, unit * y).predict(x) / unit for unit in (1.0, 1e6)]
    torch.testing.assert_close(*map(torch.from_numpy, means), rtol=1e-2, atol=1e-3)


def test_inputs_of_another_size_than_the_lengthscales_are_told():
    x, y = drawn(50)
    with pytest.warns(
        UserWarning, match=r"relates no two of 50 inputs, which are 3\.04e\+05 from .* start from larger"
    ):
        pb.gp.fit_hyperparameters(pb.gp.RBF(), 1e5 * x, y, steps=2)
    with pytest.warns(UserWarning, match="tells no two apart of 50 inputs, .* start from smaller"):
        pb.gp.fit_hyperparameters(pb.gp.RBF() + pb.gp.Matern(2.5), 1e-5 * x, y, method="pathwise", steps=1)
