"""Laplace's method against scikit-learn's Gaussian-process classifier with the same kernel."""

import pytest
import torch
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.gaussian_process import kernels as sk

import paraboloid as pb


def points(classes=2, N=150):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, 2, generator=g, dtype=torch.float64)
    score = x[:, 0] + 0.5 * torch.sin(3 * x[:, 1]) + 0.3 * torch.randn(N, generator=g, dtype=torch.float64)
    cuts = torch.linspace(-0.7, 0.7, classes - 1, dtype=torch.float64) if classes > 2 else torch.zeros(1).double()
    return x, torch.bucketize(score, cuts)


NEW = torch.randn(50, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("solver", ["cholesky", "cg", "block"])
def test_two_classes(solver):
    x, labels = points()
    found = pb.gp.classify(pb.gp.RBF(0.8, 3.0), x, labels + 4, solver=solver, samples=200, tol=1e-8, features=512)
    peer = GaussianProcessClassifier(3.0 * sk.RBF(0.8), optimizer=None, max_iter_predict=100).fit(
        x.numpy(), labels.numpy()
    )
    ours, theirs = found.probabilities(NEW), torch.from_numpy(peer.predict_proba(NEW.numpy()))
    torch.testing.assert_close(ours.sum(1), torch.ones(50, dtype=x.dtype))
    # scikit-learn integrates the sigmoid by another approximation, samples have their own error
    assert (ours - theirs).abs().max() < (0.02 if solver == "cholesky" else 0.04)
    assert found.classes.tolist() == [4, 5]
    assert (found.predict(NEW) == 4 + torch.from_numpy(peer.predict(NEW.numpy()))).double().mean() > 0.97


def test_the_mode_is_where_the_gradient_vanishes():
    x, labels = points()
    kernel = pb.gp.RBF(0.8, 3.0)
    (gp,) = pb.gp.classify(kernel, x, labels, samples=0).processes
    f = gp.mean(x)
    gradient = labels - torch.sigmoid(f)
    torch.testing.assert_close(f, kernel(x) @ gradient, rtol=1e-4, atol=1e-4)


def test_several_classes_are_one_against_the_rest():
    x, labels = points(3)
    found = pb.gp.classify(pb.gp.RBF(0.8, 3.0), x, labels, samples=0)
    peer = GaussianProcessClassifier(3.0 * sk.RBF(0.8), optimizer=None).fit(x.numpy(), labels.numpy())
    assert (found.probabilities(NEW) - torch.from_numpy(peer.predict_proba(NEW.numpy()))).abs().max() < 0.03
    assert len(found.processes) == 3


def mode(kernel, x, t):
    """The mode [N C] and the covariance of all latent functions at NEW, by Newton's method on dense matrices."""
    N, C = t.shape
    one = torch.eye(C, dtype=x.dtype)
    K, k, new = (torch.kron(one, kernel(*at)) for at in ((x,), (NEW, x), (NEW,)))  # class by class
    f = torch.zeros(C * N, dtype=x.dtype)
    for _ in range(30):
        p = torch.softmax(f.view(C, N), 0)
        W = p.flatten().diag() - torch.einsum("cn,dn,nm->cndm", p, p, torch.eye(N, dtype=x.dtype)).reshape(C * N, -1)
        f = K @ torch.linalg.solve(torch.eye(C * N, dtype=x.dtype) + W @ K, W @ f + t.T.flatten() - p.flatten())
    left = k @ torch.linalg.solve(torch.eye(C * N, dtype=x.dtype) + W @ K, W @ k.T)
    return f.view(C, N).T, (k @ (t.T.flatten() - p.flatten())).view(C, -1).T, new - left


def test_several_classes_together():
    x, labels = points(3, N=60)
    kernel = pb.gp.Matern(1.5, 0.8, 3.0)
    found = pb.gp.classify(kernel, x, labels + 2, likelihood="softmax", samples=2048, features=256)
    assert isinstance(found, pb.gp.SoftmaxClassifier) and found.classes.tolist() == [2, 3, 4]
    f, mean, covariance = mode(kernel, x, torch.nn.functional.one_hot(labels).to(x))
    torch.testing.assert_close(found.mean(x), f, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.mean(NEW), mean, rtol=1e-4, atol=1e-4)
    variance = covariance.diagonal().view(3, -1).T
    torch.testing.assert_close(found.variance(NEW), variance, rtol=1e-4, atol=1e-5)
    drawn = found.sample(NEW)
    assert drawn.shape == (2048, 50, 3)
    assert ((drawn.mean(0) - mean) / variance.sqrt()).abs().max() < 5 / 2048**0.5
    deviations = (drawn - drawn.mean(0)).permute(0, 2, 1).flatten(1)
    std = covariance.diagonal().sqrt()
    assert ((deviations.T @ deviations / 2048 - covariance) / std.outer(std)).abs().max() < 0.2
    torch.testing.assert_close(drawn[:, :4], found.sample(NEW[:4]))  # whatever else is asked for
    exact = torch.softmax(drawn, 2).mean(0)
    torch.testing.assert_close(found.probabilities(NEW), exact)
    without = pb.gp.classify(kernel, x, labels, likelihood="softmax", samples=0)
    assert (without.probabilities(NEW) - exact).abs().max() < 0.06
    assert (found.predict(NEW) == 2 + without.predict(NEW)).double().mean() > 0.9
    with pytest.raises(ValueError, match="there are no samples; classify with samples=64"):
        without.sample(NEW)


def test_two_classes_together_are_one_function_of_twice_the_variance():
    x, labels = points(N=80)
    both = pb.gp.classify(pb.gp.RBF(0.8, 1.5), x, labels, likelihood="softmax", samples=0)
    one = pb.gp.classify(pb.gp.RBF(0.8, 3.0), x, labels, samples=0)
    difference = both.mean(NEW) @ torch.tensor([-1.0, 1.0], dtype=x.dtype)
    torch.testing.assert_close(difference, one.processes[0].mean(NEW), rtol=1e-3, atol=1e-3)


def test_errors():
    x, labels = points()
    with pytest.raises(ValueError, match=r"all labels are \[1\]; expected at least two classes"):
        pb.gp.classify(pb.gp.RBF(), x, torch.ones(150, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels have shape \(3,\); expected \[150\]"):
        pb.gp.classify(pb.gp.RBF(), x, labels[:3])
    with pytest.raises(ValueError, match="noise_variance follows from the likelihood"):
        pb.gp.classify(pb.gp.RBF(), x, labels, noise_variance=0.1)
    with pytest.raises(ValueError, match="likelihood='softmax' takes no solver, tol; expected options among samples"):
        pb.gp.classify(pb.gp.RBF(), x, labels, likelihood="softmax", solver="cg", tol=1e-3)
    with pytest.warns(UserWarning, match="latent functions by .* in step 1; expected 1e-05: raise max_newton"):
        pb.gp.classify(pb.gp.RBF(), x, labels, max_newton=1, samples=0, likelihood="softmax")
    with pytest.warns(UserWarning, match="in step 1; expected 1e-05: raise max_newton"):
        pb.gp.classify(pb.gp.RBF(), x, labels, max_newton=1, samples=0)


def test_factor_of_softmax_system_solves_as_conjugate_gradients(monkeypatch):
    x, labels = _three()
    by_factor = pb.gp.classify(pb.gp.RBF(), x, labels, likelihood="softmax", samples=8, features=64)
    monkeypatch.setattr("paraboloid.gp.softmax.FACTOR", 0)
    by_gradients = pb.gp.classify(pb.gp.RBF(), x, labels, likelihood="softmax", samples=8, features=64)
    torch.testing.assert_close(by_factor.weights, by_gradients.weights, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(by_factor.sample(x), by_gradients.sample(x), rtol=1e-2, atol=1e-2)


def test_large_kernel_behind_softmax_finds_the_labels():
    x, labels = _three()
    found = pb.gp.classify(1e6 * pb.gp.RBF(), x, labels, likelihood="softmax", samples=0)
    assert bool((found.mean(x).argmax(1) == labels).all())


def test_sure_labels_keep_their_digits_in_float32():
    """t - softmax(f) has none left where a probability rounds to 1: the mean was 91% off, in silence."""
    x, labels = _three()
    new = x + 0.1
    for scale, within in ((1e2, 1e-4), (1e4, 1e-3)):
        exact, found = (
            pb.gp.classify(scale * pb.gp.RBF(), t, labels, likelihood="softmax", samples=0).mean(new.to(t)).double()
            for t in (x, x.float())
        )
        assert float((found - exact).abs().max() / exact.abs().max()) < within
    with pytest.warns(UserWarning, match=r"sure to 0\.\d+ of themselves in torch.float32; expected 0.001: give x"):
        pb.gp.classify(1e7 * pb.gp.RBF(), x.float(), labels, likelihood="softmax", samples=0)


@pytest.mark.parametrize("limit", [0, 2000])
def test_indefinite_kernel_behind_softmax_is_refused(monkeypatch, limit):
    class Parabola(pb.gp.RBF):
        def tile(self, left, right, buffers):
            return super().tile(left, right, buffers).log_().add_(1)

    monkeypatch.setattr("paraboloid.gp.softmax.FACTOR", limit)
    x, labels = _three()
    with pytest.raises(torch.linalg.LinAlgError, match=r"30 inputs and 3 classes.*lower its outputscale"):
        pb.gp.classify(Parabola(), x, labels, likelihood="softmax", samples=0)


def _three():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 2, generator=g, dtype=torch.float64)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
