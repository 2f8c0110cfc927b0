"""Samples that float32 does not carry are those of the same network in float64, or refused; never wrong numbers."""

import copy

import pytest
import torch
from torch import nn

import paraboloid as pb
from paraboloid.linalg.operand import LinAlgError

TINY = {"samples": 4, "em_steps": 0, "prior_precision": 1e-8, "solver": "dual"}


class Float32Inside(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).float()


def network(classes=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, classes))
    g = torch.Generator().manual_seed(1)
    return model, torch.randn(40, 8, generator=g), torch.randint(classes, (40,), generator=g)


@pytest.mark.parametrize("g_prior", [True, False])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(label_smoothing=0.1), nn.MSELoss()])
def test_a_tiny_precision_gives_what_float64_gives(loss, g_prior):
    model, x, y = network()
    y = x[:, :3].sin() if isinstance(loss, nn.MSELoss) else y
    found = pb.sampled_laplace(model, loss, (x, y), g_prior=g_prior, **TINY)
    exact = copy.deepcopy(model).double()
    data = (x.double(), y.double() if y.is_floating_point() else y)
    want = pb.sampled_laplace(exact, loss, data, g_prior=g_prior, **TINY)
    assert found.residual < 1e-3
    got, expected = (p.functional(d, diagonal=True)[1] for p, d in ((found, x), (want, x.double())))
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:the relative gradient")  # under that first precision, in float64 too
def test_em_and_matched_confidence_go_on_from_there():
    model, x, y = network()
    options, loss = {**TINY, "em_steps": 1}, nn.CrossEntropyLoss()
    found = pb.sampled_laplace(model, loss, [(x[:25], y[:25]), (x[25:], y[25:])], **options)
    want = pb.sampled_laplace(copy.deepcopy(model).double(), loss, (x.double(), y), **options)
    assert found.prior_precision == pytest.approx(want.prior_precision, rel=1e-4)
    for name, samples in want.samples.items():
        torch.testing.assert_close(found.samples[name], samples, rtol=1e-4, atol=1e-5 * samples.abs().max().item())
    p = found.predict(x)
    torch.testing.assert_close(p.sum(1), torch.ones_like(p[:, 0]))


def test_such_a_run_goes_on_from_its_checkpoint(tmp_path):
    model, x, y = network()
    calls, options = [], {**TINY, "checkpoint": tmp_path / "run"}

    def callback(progress):
        calls.append(progress)
        if len(calls) == at:
            raise KeyboardInterrupt

    at = 0
    whole = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), callback=callback, **TINY)
    for at in range(1, len(calls) + 1):
        options["checkpoint"], calls = tmp_path / f"run-{at}", []
        with pytest.raises(KeyboardInterrupt):
            pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), callback=callback, **options)
        again = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), **options)
        assert all(torch.equal(again.samples[k], w) for k, w in whole.samples.items())


def test_what_cannot_run_in_float64_is_told_or_refused(monkeypatch):
    model, x, y = network()
    model = Float32Inside(model)
    options = {**TINY, "prior_precision": 1e-4, "g_prior": True}
    monkeypatch.setattr("paraboloid.posteriors.sampled.expectation_maximisation.REFINED", 0)
    with pytest.warns(RuntimeWarning, match=r"a Cholesky factor in torch\.float32 did not do.*the model in float64"):
        pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), **options)
    with pytest.raises(
        LinAlgError, match=r"residual of a sample by a Cholesky factor in torch\.float32 is \d.*float64"
    ):
        pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), **{**options, "prior_precision": 1e-14})
