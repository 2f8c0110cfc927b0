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


def test_errors():
    x, labels = points()
    with pytest.raises(ValueError, match=r"all labels are \[1\]; expected at least two classes"):
        pb.gp.classify(pb.gp.RBF(), x, torch.ones(150, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels have shape \(3,\); expected \[150\]"):
        pb.gp.classify(pb.gp.RBF(), x, labels[:3])
    with pytest.raises(ValueError, match="noise_variance follows from the likelihood"):
        pb.gp.classify(pb.gp.RBF(), x, labels, noise_variance=0.1)
    with pytest.warns(UserWarning, match="in step 1; expected 1e-05: raise max_newton"):
        pb.gp.classify(pb.gp.RBF(), x, labels, max_newton=1, samples=0)
