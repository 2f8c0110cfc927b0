"""Kernels and estimators of other libraries: the same values, and scikit-learn's own checks."""

import pickle

import numpy as np
import pytest
import torch
from gp.test_conditioning import NEW, data
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process import kernels as sk
from sklearn.utils.estimator_checks import check_estimator

import paraboloid as pb
from paraboloid.gp.gram import Gram
from paraboloid.gp.other_libraries import kernel_of

X = NEW[:20]
THEIRS = [
    2.0 * sk.RBF([0.5, 2.0]), sk.Matern(0.7, nu=1.5) + sk.ConstantKernel(0.3), sk.Matern(nu=0.5) * sk.RBF(3.0),
    sk.RationalQuadratic(0.5, 1.5), sk.Matern(1.0, nu=0.8) + sk.RBF(), sk.DotProduct(1.0),
]  # fmt: skip


@pytest.mark.parametrize("theirs", THEIRS, ids=str)
def test_kernels_of_scikit_learn(theirs):
    kernel, expected = kernel_of(theirs), torch.from_numpy(theirs(X.numpy()))
    torch.testing.assert_close(kernel(X), expected)
    torch.testing.assert_close(kernel.diagonal(X), expected.diagonal())
    torch.testing.assert_close(Gram(kernel, X, torch.tensor(0.0, dtype=X.dtype)).dense(), expected)


def test_a_process_with_their_kernel_is_theirs():
    x, y = data(100)
    theirs = 1.7 * sk.Exponentiation(sk.RBF(0.9), 2) + sk.DotProduct(0.5)
    gp = pb.gp.condition(theirs, x, y, 0.1, samples=0)
    peer = GaussianProcessRegressor(theirs, alpha=0.1, optimizer=None).fit(x.numpy(), y.numpy())
    mean, std = peer.predict(NEW.numpy(), return_std=True)
    torch.testing.assert_close(gp.mean(NEW), torch.from_numpy(mean))
    torch.testing.assert_close(gp.variance(NEW), torch.from_numpy(std**2))
    few = pb.gp.condition(theirs, x, y, 0.1, solver="cg", samples=0, tol=1e-8).variance(NEW[:5])
    torch.testing.assert_close(few, torch.from_numpy(std[:5] ** 2), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"has no random features, .*samples=0 \(variances are then exact"):
        pb.gp.condition(theirs, x, y, 0.1)


@pytest.mark.parametrize(
    "theirs", [sk.RationalQuadratic(0.5, 1.5), sk.DotProduct(1.0), sk.Matern([1.0, 0.6], nu=0.8), sk.Matern(nu=np.inf)],
    ids=str,
)  # fmt: skip
def test_samples_with_their_kernels(theirs):
    kernel, total = kernel_of(theirs), 0
    for seed in range(20):
        phi = kernel.features(2000, 2, torch.Generator().manual_seed(seed), X)(X).flatten(1)
        total = total + phi @ phi.T / 20
    assert (total - kernel(X)).abs().max() < 0.03 * kernel.diagonal(X).max()
    x, y = data(80)
    gp = pb.gp.condition(theirs, x, y, 0.1, samples=512, features=512)
    variance = pb.gp.condition(theirs, x, y, 0.1, samples=0).variance(NEW)
    assert ((gp.sample(NEW) - gp.mean(NEW)).square().mean(0) / variance - 1).abs().mean() < 0.1


def test_what_is_no_kernel_is_said():
    with pytest.raises(
        ValueError, match=r"Foreign\(DotProduct\) names no hyperparameters .*GPRegressor: optimize=False"
    ):
        pb.gp.GPRegressor(sk.DotProduct()).fit(X, X[:, 0])
    with pytest.raises(ValueError, match=r"leave it out, and give noise_variance=0\.3"):
        kernel_of(sk.RBF() + sk.WhiteKernel(0.3))
    for thing in (3, "rbf", torch.nn.Linear(2, 2), sk.RBF):
        with pytest.raises(ValueError, match=r"expected one of pb\.gp"):
            kernel_of(thing)


def test_kernels_of_gpytorch():
    gpytorch = pytest.importorskip("gpytorch", reason="install it with: make peers")
    k = gpytorch.kernels
    scaled = k.ScaleKernel(k.MaternKernel(nu=1.5, ard_num_dims=2))
    scaled.outputscale, scaled.base_kernel.lengthscale = 2.0, torch.tensor([0.5, 1.5])
    for theirs in (
        scaled,
        scaled + k.RBFKernel(active_dims=[1]),
        k.RBFKernel() * scaled,
        k.RQKernel(),
        k.LinearKernel(),
        k.ScaleKernel(k.RBFKernel(active_dims=[1])),
        k.ScaleKernel(k.RQKernel(), active_dims=[0]) + k.ScaleKernel(scaled),
    ):
        expected = theirs.double()(X).to_dense().detach()
        kernel = kernel_of(theirs)
        torch.testing.assert_close(kernel(X).detach(), expected)
        phi = kernel.features(40_000, 2, torch.Generator().manual_seed(0), X)(X).flatten(1)
        assert (phi @ phi.T - expected).abs().max() < 0.03 * expected.abs().max()
    first, second = k.RBFKernel(active_dims=[0]).double(), k.MaternKernel(nu=2.5, active_dims=[1]).double()
    product = first(X).to_dense() * second(X).to_dense()  # theirs of a product adds jitter
    torch.testing.assert_close(kernel_of(first * second)(X), product.detach())
    summed = k.ScaleKernel(k.RBFKernel() + k.RQKernel(), active_dims=[1]).double()  # as it is, without samples
    inner = sum(part(X[:, 1:]).to_dense() for part in summed.base_kernel.kernels)
    torch.testing.assert_close(kernel_of(summed)(X), (summed.outputscale * inner).detach())
    with pytest.raises(ValueError, match=r"Kernel has the batch shape \(2,\); expected one kernel"):
        kernel_of(k.RBFKernel() + k.RBFKernel(batch_shape=torch.Size([2])))


def test_estimators_can_be_pickled_with_kernels_of_other_libraries():
    x, y = (t.numpy() for t in data(40))
    for kernel, samples in ((sk.Matern(nu=0.8) + sk.DotProduct(), 2), (sk.Exponentiation(sk.RBF(), 2), 0)):
        model = pb.gp.GPRegressor(kernel, optimize=False, samples=samples).fit(x, y)
        again = pickle.loads(pickle.dumps(model))
        assert np.array_equal(again.predict(x), model.predict(x))
        assert np.array_equal(again.sample_y(x, samples), model.sample_y(x, samples))
    with pytest.raises(ValueError, match="noise_variance has 40 entries; expected a number"):
        pb.gp.GPRegressor(noise_variance=np.full(40, 0.1), optimize=False).fit(x, y)


def test_the_estimator():
    x, y = (t.numpy() for t in data(400))
    y = 100 + 30 * y
    model = pb.gp.GPRegressor(pb.gp.RBF(torch.ones(2)), samples=32).fit(x, y)
    peer = GaussianProcessRegressor(sk.RBF([1.0, 1.0]) + sk.WhiteKernel(0.1), normalize_y=True).fit(x, y)
    mean, std = model.predict(NEW.numpy(), return_std=True)
    expected, theirs = peer.predict(NEW.numpy(), return_std=True)
    inside = NEW.norm(dim=1).numpy() < 2
    assert np.abs(mean - expected)[inside].max() < 3 and np.abs(std / theirs - 1)[inside].max() < 0.15
    assert model.score(x, y) > 0.7
    drawn = model.sample_y(NEW.numpy(), 500, random_state=1)
    assert drawn.shape == (60, 500)
    assert np.abs(drawn.mean(1) - mean).max() < 5 and np.array_equal(
        model.sample_y(NEW.numpy(), 3), model.sample_y(NEW.numpy(), 3)
    )


def test_scikit_learns_own_checks():
    found = check_estimator(pb.gp.GPRegressor(samples=2, subset=50), on_fail=None, on_skip=None)
    failed = {r["check_name"]: str(r["exception"]) for r in found if r["status"] == "failed"}
    assert failed == {}
