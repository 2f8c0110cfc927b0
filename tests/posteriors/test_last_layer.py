"""A linear last layer has its variances in closed form, at sizes where no Jacobian would fit."""

import resource
import subprocess
import sys

import pytest
import torch
from torch import nn

import paraboloid as pb
from paraboloid.posteriors.prediction import last_layer

BIG = """
import resource, torch
from torch import nn
import paraboloid as pb
torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(16, 2048), nn.ReLU(), nn.Linear(2048, 10_000))
x, y = torch.randn(8, 16), torch.randint(10_000, (8,))
with torch.no_grad():
    model(x)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
posterior = pb.laplace(model, nn.CrossEntropyLoss(), (x, y), "diag", weights="last_layer", fisher="mc")
probabilities = posterior.predict(x)
assert probabilities.shape == (8, 10_000)
torch.testing.assert_close(probabilities.sum(1), torch.ones(8), rtol=1e-4, atol=0)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def net(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=bias)).double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [
    {"structure": "diag"}, {"structure": "kron"}, {"structure": "ekfac"}, {"structure": "kron", "debias": True}
])  # fmt: skip
@pytest.mark.parametrize("samples", [3, 40])  # few: thin eigenbases
def test_variances_are_those_of_the_jacobian(options, bias, samples, monkeypatch):
    model = net(bias)
    x, y = torch.randn(samples, 4, dtype=torch.float64), torch.randint(3, (samples,))
    posterior = pb.laplace(model, nn.CrossEntropyLoss(), (x, y), weights="last_layer", **options)
    mean, variance = posterior.functional(x, diagonal=True)
    assert last_layer.variances(posterior, x, posterior.precision()) is not None
    monkeypatch.setattr(last_layer, "variances", lambda *args: None)
    want_mean, want = posterior.functional(x, diagonal=True)
    torch.testing.assert_close(mean, want_mean)
    torch.testing.assert_close(variance, want, rtol=1e-9, atol=1e-12)


def test_later_calls_take_what_the_first_one_learnt_of_the_outputs(monkeypatch):
    model = net()
    x, y = torch.randn(40, 4, dtype=torch.float64), torch.randint(3, (40,))
    posterior = pb.laplace(model, nn.CrossEntropyLoss(), (x, y), "kron", weights="last_layer")
    passes = []
    handle = model.register_forward_hook(lambda module, inputs, f: passes.append(len(f)))
    first = posterior.functional(x, diagonal=True)
    passes.clear()
    assert all(torch.equal(a, b) for a, b in zip(first, posterior.functional(x, diagonal=True), strict=True))
    assert passes == [40]
    monkeypatch.setattr(last_layer, "CHUNK", 16)
    passes.clear()
    torch.testing.assert_close(posterior.functional(x, diagonal=True), first)
    assert passes == [16, 16, 8]
    handle.remove()
    images = torch.randn(40, 5, 4, dtype=torch.float64)  # of other shapes: learnt anew, larger outputs
    mean, variance = posterior.functional(images, diagonal=True)
    torch.testing.assert_close(mean, model(images).detach())
    each = [posterior.functional(images[:, t], diagonal=True)[1] for t in range(5)]
    torch.testing.assert_close(variance, torch.stack(each, 1))


def test_what_is_no_linear_last_layer_takes_the_jacobian():
    torch.manual_seed(0)
    scaled = nn.Sequential(nn.Linear(4, 3), nn.Softplus()).double()
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randint(3, (9,))
    for model, weights in ((scaled, "all"), (net(), "all")):
        posterior = pb.laplace(model, nn.CrossEntropyLoss(), (x, y), "diag", weights=weights)
        assert last_layer.variances(posterior, x, posterior.precision()) is None
        covariance = posterior.functional(x)[1]
        torch.testing.assert_close(posterior.functional(x, diagonal=True)[1], covariance.diagonal(dim1=1, dim2=2))


@pytest.mark.skipif(not hasattr(resource, "RUSAGE_SELF"), reason="no memory figures here")
def test_ten_thousand_classes_fit_into_a_gibibyte():
    done = subprocess.run([sys.executable, "-c", BIG], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1024
