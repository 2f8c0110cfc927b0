"""Inner products of all pulled-back vectors of two batches, by the sides of outer products, against J W J^T."""

import pytest
import torch
from reductions.test_contractions import MODELS as SIMPLE
from torch import nn

import paraboloid as pb
from paraboloid.passes.memory import PIECES, ROWS
from paraboloid.posteriors.prediction.jacobian import pull_outputs
from paraboloid.reductions import inner_products as products


class Pooled(nn.Module):
    """A layer at two positions, then the sum over them."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x.view(-1, 2, 2))).sum(1))


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.outer = nn.Embedding(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.outer(torch.tanh(self.table((x.abs() * 3).long().clamp(max=5)).sum(1)))


MODELS = SIMPLE | {
    "groups": lambda: nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 6, 1, groups=2), nn.Flatten()),
    "positions": Pooled,
    "table": Table,
    "hidden by a product": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
}


def pulled(model, x):
    with pb.record(model) as tape:
        return pull_outputs(tape, model(x))


def weights(model, kind):
    g = torch.Generator().manual_seed(3)
    found = {}
    for k, p in model.named_parameters():
        shape = {"one": (1,) * p.dim(), "by parameter": (1,) * p.dim(), "every": p.shape}.get(kind)
        if shape is None:  # by input
            shape = [1, *p.shape[1:]] if p.dim() > 1 else [1] * p.dim()
        one = torch.ones(shape) if kind == "one" else torch.rand(shape, generator=g)
        found[k] = (one.double() + 0.1).expand(p.shape)
    return found


@pytest.mark.parametrize("kind", ["one", "by parameter", "by input", "every"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", ["cheapest", "sides", "outputs"])
def test_it_is_that_of_the_rows(name, kind, form, monkeypatch):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    x = torch.randn(11, 4, dtype=torch.float64)
    a, b = pulled(model, x[:7]), pulled(model, x[7:])
    W = weights(model, kind)
    if form != "cheapest":  # whatever it costs, a few numbers at a time
        whole = products._costs
        monkeypatch.setattr(
            products, "_costs", lambda *o: {k: c for k, c in whole(*o).items() if k == form} or whole(*o)
        )
        monkeypatch.setattr(PIECES, "default", 200)
        monkeypatch.setattr(ROWS, "default", 200)
    K = torch.zeros(len(a.outputs[0].flatten()), 7, len(b.outputs[0].flatten()), 4, dtype=torch.float64)
    products.add_inner_products(K, a.uses, b.uses, W)
    flat = torch.cat([w.reshape(-1) for w in W.values()])
    expected = torch.einsum("nvd,d,mud->vnum", a.dense(), flat, b.dense())
    torch.testing.assert_close(K, expected, rtol=1e-12, atol=1e-12)


def test_rows_in_single_are_multiplied_in_double():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4)
    J, W = pulled(model, x), weights(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), "every")
    K = torch.zeros(3, 6, 3, 6, dtype=torch.float64)
    products.add_inner_products(K, J.uses, J.uses, W)
    flat, rows = torch.cat([w.reshape(-1) for w in W.values()]), J.dense().double()
    torch.testing.assert_close(K, torch.einsum("nvd,d,mud->vnum", rows, flat, rows), rtol=1e-6, atol=1e-7)


def test_what_it_takes():
    """A wide layer takes its sides, one seen at many positions its rows."""
    torch.manual_seed(0)
    wide = pulled(nn.Linear(100, 10), torch.randn(2, 100)).uses
    assert products.multiplications(wide, False) < products.multiplications(wide, True) < 10 * 10 * 1010 / 4
    long = nn.Sequential(nn.Unflatten(1, (1, 40)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(76, 3))
    uses = pulled(long, torch.randn(2, 40)).uses
    assert products._costs(uses["1.weight"], uses["1.weight"], False)["rows"] == 9 * 6
    assert products.multiplications({"1.weight": uses["1.weight"]}, False) == 9 * 6
