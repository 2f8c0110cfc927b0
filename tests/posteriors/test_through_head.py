"""Variances of many classes from the covariance of the few features before them: those of the Jacobian, in fewer pulls."""

import pytest
import torch
from torch import nn

import paraboloid as pb
from paraboloid.posteriors.prediction import through_head

F64 = torch.float64
CE = nn.CrossEntropyLoss()


class Words(nn.Module):
    def __init__(self, tied=False, bias=True, words=30, width=4):
        super().__init__()
        self.embed, self.mix = nn.Embedding(words, width), nn.Linear(width, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=bias)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        h = self.embed(ids)
        h = h + self.mix(h).tanh().cumsum(1)
        return self.head(self.norm(h)).transpose(1, 2)


def fitted(structure="kron", model=None, **options):
    torch.manual_seed(0)
    model = (Words() if model is None else model).to(F64)
    ids = torch.randint(30, (6, 5))
    return pb.laplace(model, CE, (ids, ids.roll(1, 1)), structure, **options), ids


def without(posterior, x, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(through_head, "variances", lambda *_: None)
        return posterior.functional(x, diagonal=True)


def pulled(run, monkeypatch):
    """How many vectors were pulled back."""
    from paraboloid.engine.tape import Tape

    counts, own = [], Tape.pull
    with monkeypatch.context() as patch:
        patch.setattr(Tape, "pull", lambda tape, f, v, *a, **k: counts.append(len(v)) or own(tape, f, v, *a, **k))
        return run(), sum(counts)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [
    {"structure": "kron"}, {"structure": "diag"}, {"structure": "ekfac"}, {"structure": "kron", "debias": True},
    {"structure": "kron", "max_memory": 2**19}, {"structure": "lowrank"}, {"structure": "lowrank", "max_memory": 2**19},
    {"structure": "functional", "subset": 1},
])  # fmt: skip
def test_variances_are_those_of_the_jacobian(options, bias, monkeypatch):
    posterior, ids = fitted(model=Words(bias=bias), **options)
    want = without(posterior, ids, monkeypatch)
    for _ in range(2):  # the second knows what the first has learnt
        (mean, variance), vectors = pulled(lambda: posterior.functional(ids, diagonal=True), monkeypatch)
        torch.testing.assert_close(mean, want[0])
        torch.testing.assert_close(variance, want[1], rtol=1e-9, atol=1e-12)
    assert vectors <= 6 * 5 * 4  # features, not words, of each position


@pytest.mark.parametrize(
    "model",
    [Words(tied=True), nn.Sequential(nn.Embedding(30, 4), nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 30)),
     nn.Sequential(Words(), nn.Softplus())],
    ids=["tied", "no fewer features", "not the last"],
)  # fmt: skip
def test_other_last_layers_take_the_jacobian(model, monkeypatch):
    torch.manual_seed(0)
    model = model.to(F64)
    ids = torch.randint(30, (6, 5))
    f = model(ids)
    y = torch.randint(f.shape[1], (6, *f.shape[2:]))
    posterior = pb.laplace(model, CE, (ids, y), "diag")
    found = posterior.functional(ids, diagonal=True)
    for a, b in zip(found, without(posterior, ids, monkeypatch), strict=True):
        assert torch.equal(a, b)


def test_images_as_well(monkeypatch):
    """One position: a wide classifier behind a narrow layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 40))
    model, x, y = model.to(F64), torch.randn(7, 1, 4, 4, dtype=F64), torch.randint(40, (7,))
    posterior = pb.laplace(model, CE, (x, y), "kron")
    found, vectors = pulled(lambda: posterior.functional(x, diagonal=True), monkeypatch)
    for a, b in zip(found, without(posterior, x, monkeypatch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert vectors <= 10
