"""Inputs whose samples do not lie along axis 0 of every tensor: cut where they lie, or not at all."""

import pytest
import torch
from posteriors.dense import close, jacobian
from torch import nn

import paraboloid as pb
from paraboloid.data.cutting import Cuts
from paraboloid.posteriors.prediction import confidence

F64 = torch.float64
CE = nn.CrossEntropyLoss()


class Recurrent(nn.Module):
    """torch's own layout, [T, N, D]; one output for each sequence."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.RNN(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.cell(x)[0][-1])


class Positions(nn.Module):
    """Token ids [N, T] and positions [1, T], as language models take them."""

    def __init__(self):
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(7, 4), nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, position_ids, ids):
        return self.head(torch.tanh(self.words(ids) + self.places(position_ids))).mean(1)


class Operator(nn.Module):
    """DeepONet: functions [N, M], and one grid of points [P, 1] for all of them."""

    def __init__(self):
        super().__init__()
        self.branch, self.trunk = nn.Linear(6, 4), nn.Linear(1, 4)

    def forward(self, u, grid):
        return torch.tanh(self.branch(u)) @ torch.tanh(self.trunk(grid)).T


class Centred(nn.Module):
    """Couples its samples: nothing to cut."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x) - self.head(x).mean(0)


def recurrent(N, T=4):
    return Recurrent(), torch.randn(T, N, 3), torch.arange(N) % 2


def positions(N):
    x = {"position_ids": torch.arange(5)[None], "ids": torch.arange(5 * N).view(N, 5) ** 2 % 7}
    return Positions(), x, torch.arange(N) % 3


def operator(N, P=5):
    return Operator(), (torch.randn(N, 6), torch.linspace(0, 1, P)[:, None]), torch.randn(N, P)


CASES = {
    "recurrent": lambda N: recurrent(N), "as long as many": lambda N: recurrent(N, N), "positions": positions,
    "operator": lambda N: operator(N), "points as samples": lambda N: operator(N, N),
}  # fmt: skip
AXES = {
    "recurrent": (1,), "as long as many": (1,), "positions": (None, 0), "operator": (0, None),
    "points as samples": (0, None),
}  # fmt: skip


WEIGHTS = {"positions": ["words", "head"], "operator": ["branch"], "points": ["branch"]}  # the samples' own


def problem(name, N=6):
    torch.manual_seed(0)
    model, x, y = CASES[name](N)
    model = model.double()
    cast = lambda t: t.double() if t.is_floating_point() else t  # noqa: E731
    x = {k: cast(t) for k, t in x.items()} if isinstance(x, dict) else tuple(map(cast, x)) if isinstance(x, tuple) else cast(x)  # fmt: skip
    return model, x, cast(y), (nn.MSELoss() if y.is_floating_point() else CE)


def called(model, x):
    return (
        (lambda: model(**x))
        if isinstance(x, dict)
        else (lambda: model(*x))
        if isinstance(x, tuple)
        else lambda: model(x)
    )


@pytest.mark.parametrize("N", [6, 20])
@pytest.mark.parametrize("name", CASES)
def test_where_samples_lie(name, N):
    model, x, _, _ = problem(name, N)
    cuts = Cuts()
    for _ in range(2):  # the second time from memory
        cut = cuts.of(model, x)
        assert (cut.axes, cut.samples) == (AXES[name], N)
    f = called(model, x)()
    part = cut.take(x, torch.tensor([1, 4]))
    torch.testing.assert_close(called(model, part)(), f[[1, 4]])
    if name not in ("as long as many", "points as samples"):
        more = problem(name, 9)[1]
        assert (cuts.of(model, more).axes, cuts.of(model, more).samples, len(cuts.known)) == (AXES[name], 9, 1)


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:parameter .* is used by an operation that could not be recorded")
def test_predictions_have_a_row_for_each_sample_however_they_are_cut(name, structure):
    model, x, y, loss_fn = problem(name)
    weights = WEIGHTS.get(name.split()[0], "all")
    params = {k: p for k, p in model.named_parameters() if weights == "all" or k.split(".")[0] in weights}
    f = called(model, x)()
    J = torch.stack([
        torch.cat([g.flatten() for g in torch.autograd.grad(e, list(params.values()), retain_graph=True, materialize_grads=True)])
        for e in f.flatten()
    ]).view(*f.shape, -1)  # fmt: skip
    posterior = pb.laplace(model, loss_fn, (x, y), structure, weights=weights)
    Sigma = posterior.precision().apply(torch.eye(J.shape[-1], dtype=F64))
    expected = J @ Sigma @ J.mT
    for max_memory in (None, 1, 20_000):
        posterior.max_memory = max_memory
        for _ in range(2):
            mean, covariance = posterior.functional(x)
            close(mean, f.detach())
            close(covariance, expected)
        close(posterior.functional(x, diagonal=True)[1], expected.diagonal(dim1=1, dim2=2))
        assert posterior.functional_samples(x, 3).shape == (3, *f.shape)
        found = posterior.predict(x)
        assert (found.mean if loss_fn is not CE else found).shape == f.shape
    single = Cuts().of(model, x).take(x, slice(2, 3))
    close(posterior.functional(single)[1], expected[2:3])


def test_fits_over_a_loader_do_not_join_sequences_along_time():
    model, x, y, _ = problem("as long as many", 4)
    parts = [(x, y), (x.flip(1), y.flip(0))]
    one = pb.laplace(model, CE, (torch.cat([x, x.flip(1)], 1), torch.cat([y, y.flip(0)])), "diag")
    two = pb.laplace(model, CE, parts, "diag")
    close(two.curvature.diagonal(), one.curvature.diagonal())
    assert two.count == 8
    halves = pb.laplace(model, CE, parts, "kron", debias=True)
    assert halves.count == 8
    some = pb.laplace(model, CE, parts, "functional", subset=3)
    assert len(some.curvature.A) == 3


def test_what_couples_its_samples_is_not_cut():
    torch.manual_seed(0)
    model, x = Centred().double(), torch.randn(5, 3, dtype=F64)
    assert not Cuts().of(model, x).possible
    assert Cuts().of(model, x).samples == 5
    fitted = pb.laplace(nn.Linear(3, 2).double(), CE, (x, torch.arange(5) % 2), "functional")
    fitted.model = model  # what a posterior that was loaded for another model would do
    with pytest.raises((ValueError, RuntimeError)):
        fitted.predict(x)


class Language(nn.Module):
    def __init__(self, words=40, tied=False):
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(words, 6), nn.Linear(6, 6), nn.Linear(6, words, bias=not tied)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.inner(self.words(ids)))).transpose(1, 2)  # [N, words, T]


@pytest.mark.parametrize("structure", ["diag", "kron", "ekfac"])
@pytest.mark.parametrize("tied", [False, True])
def test_variances_of_every_word_at_every_position_without_their_covariances(structure, tied):
    torch.manual_seed(0)
    model = Language(tied=tied).double()
    ids = torch.arange(12).view(4, 3) * 7 % 40
    posterior = pb.laplace(model, CE, (ids, ids), structure, weights="last_layer")
    _, expected = posterior.functional(ids)
    for max_memory in (None, 10_000, 1):
        posterior.max_memory = max_memory
        mean, found = posterior.functional(ids, diagonal=True)
        close(found.flatten(1), expected.diagonal(dim1=1, dim2=2))
        close(mean, model(ids).detach())
    assert posterior.predict(ids).shape == (4, 40, 3)


def test_draws_take_the_place_of_covariances_that_are_too_large(monkeypatch):
    from paraboloid.passes import memory

    torch.manual_seed(0)
    model = Language().double()
    ids = torch.arange(12).view(4, 3) * 7 % 40
    posterior = pb.laplace(model, CE, (ids, ids), weights="last_layer")
    exact = posterior.predict(ids, "mc", samples=4000)
    monkeypatch.setattr(memory.COVARIANCES, "default", 100)
    found = posterior.predict(ids, "mc", samples=4000)
    assert (found - exact).abs().max() < 0.02
    assert not torch.equal(found, exact)


def test_large_outputs_take_the_memory_of_their_variances():
    """2,000 words at 64 positions: covariances would take 130 GB."""
    model = Language(2000)
    ids = torch.arange(128).view(2, 64)
    found = pb.laplace(model, CE, (ids, ids), "kron", weights="last_layer", fisher="mc").predict(ids)
    assert found.shape == (2, 2000, 64)
    assert torch.allclose(found.sum(1), torch.ones(2, 64))


def test_jacobians_of_a_sequence_model_are_those_of_the_dense_one():
    model, x, y, _ = problem("recurrent")
    _, J = jacobian(model, x)
    posterior = pb.laplace(model, CE, (x, y), "diag", weights="last_layer")
    at = [i for i, (k, _) in enumerate(model.named_parameters()) if k.startswith("head")]
    sizes = [p.numel() for p in model.parameters()]
    rows = torch.cat([J.split(sizes, 2)[i] for i in at], 2)
    Sigma = posterior.precision().apply(torch.eye(rows.shape[2], dtype=F64))
    close(posterior.functional(x)[1], rows @ Sigma @ rows.mT)


@pytest.mark.parametrize(("structure", "curvature"), [("kron", "ggn"), ("full", "jacobian")])
def test_of_many_outputs_fewer_samples_are_looked_at(structure, curvature, monkeypatch):
    """Every third of them here, whatever the batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x, y = torch.randn(30, 3, dtype=F64), torch.randint(4, (30,))
    posterior = pb.laplace(model, CE, (x, y), structure, curvature=curvature)
    whole, _ = confidence.seen(posterior, (x, y))
    monkeypatch.setattr(confidence, "OUTPUTS", 40)
    monkeypatch.setattr(confidence, "VARIANCES", 9)
    for data in ((x, y), [(x[:1], y[:1]), (x[1:3], y[1:3]), (x[3:20], y[3:20]), (x[20:], y[20:])]):
        close(confidence.seen(posterior, data)[0], whole[::3])
    assert len(confidence.seen(posterior, (x[::5], y[::5]), 30)[0]) == 2
    monkeypatch.setattr(confidence, "VARIANCES", 15)
    close(confidence.seen(posterior, (x, y))[0], whole[::2])
