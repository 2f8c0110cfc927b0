"""Contractions of pulled-back vectors with rows and weights, a layer's bias together with its weight, against J."""

import pytest
import torch
from torch import nn

import paraboloid as pb
from paraboloid.posteriors.prediction.jacobian import pull_outputs
from paraboloid.reductions.contractions import layers, weighted_grams


class Flipped(nn.Module):
    """x W + b, with W stored input first."""

    def __init__(self):
        super().__init__()
        self.W, self.b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))

    def forward(self, x):
        return torch.addmm(self.b, x, self.W)


def shared():
    linear = nn.Linear(4, 4)
    return nn.Sequential(linear, nn.Tanh(), linear, nn.Linear(4, 3))


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Linear(4, 3)),
    "flipped": Flipped,
    "used twice": shared,
    "scale": lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 3, 2), nn.Flatten()),
}


@pytest.mark.parametrize("name", MODELS)
def test_layers_together_are_the_parameters_one_by_one(name):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    x = torch.randn(7, 4, dtype=torch.float64)
    with pb.record(model) as tape:
        f = model(x)
    J = pull_outputs(tape, f)
    dense = J.dense()
    rows = torch.randn(5, dense.shape[2], dtype=torch.float64)
    torch.testing.assert_close(J.times(rows), dense @ rows.T)
    weights = {k: torch.rand(p.shape, dtype=torch.float64) for k, p in model.named_parameters()}
    W = torch.cat([w.flatten() for w in weights.values()])
    gram = weighted_grams(J.uses, weights, diagonal=False, memory=None)
    torch.testing.assert_close(gram, (dense * W) @ dense.mT)
    torch.testing.assert_close(weighted_grams(J.uses, weights, True, None), gram.diagonal(dim1=1, dim2=2))
    assert sorted(k for pair in layers(J.uses) for k in pair if k) == sorted(weights)


def test_biases_go_with_their_weights():
    torch.manual_seed(0)
    model, x = MODELS["mlp"](), torch.randn(7, 4)
    with pb.record(model) as tape:
        f = model(x)
    assert layers(pull_outputs(tape, f).uses) == [("0.weight", "0.bias"), ("2.weight", None), ("3.weight", "3.bias")]
