"""Inputs that all samples share, behind trainable layers: derived weights, if the model confirms that they are shared."""

import warnings

import pytest
import torch
from oracle import close
from torch import nn

import paraboloid as pb

F64 = torch.float64
CE, SQUARES = nn.CrossEntropyLoss(), nn.MSELoss()
pytestmark = [pytest.mark.filterwarnings(f"ignore:.*{said}") for said in ("falling back", "no Kronecker factors")]


class DeepONet(nn.Module):
    """A branch net of the samples [N, 5] and a trunk net of the grid [M, 1]; output [N, M]."""

    def __init__(self, form):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
        self.trunk = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 4))
        self.shift, self.form = nn.Parameter(torch.zeros(())), form

    def forward(self, u, grid):
        b, t = self.branch(u), self.trunk(grid)
        forms = {
            "einsum": lambda: torch.einsum("np,mp->nm", b, t),
            "product": lambda: b @ t.T,
            "sum": lambda: (b.unsqueeze(1) * t).sum(2),
            "mixed": lambda: (b - b.mean(0)) @ t.T,
        }
        return forms[self.form]() + self.shift


class Words(nn.Module):
    """A tiny language model whose learned positions are looked up by ids that are given, [1, T]."""

    def __init__(self, positions_first):
        super().__init__()
        self.words, self.places = nn.Embedding(7, 4), nn.Embedding(6, 4)
        self.hidden, self.head, self.positions_first = nn.Linear(4, 4), nn.Linear(4, 3), positions_first

    def forward(self, a, b):
        ids, places = (b, a) if self.positions_first else (a, b)
        return self.head(self.hidden(self.words(ids) + self.places(places)).tanh().mean(1))


def make(case, N=5):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind, option = case
        if kind == "net":
            form, M = option
            return DeepONet(form).to(F64), SQUARES, (torch.randn(N, 5, dtype=F64), torch.rand(M, 1, dtype=F64)), torch.randn(N, M, dtype=F64), (0,)  # fmt: skip
        ids, places = torch.randint(7, (N, 6)), torch.arange(6).unsqueeze(0)
        inputs = (places, ids) if option else (ids, places)
        return Words(option).to(F64), CE, inputs, torch.randint(3, (N,)), (1 if option else 0,)


def alone(inputs, cut, n):
    return tuple(t[n : n + 1] if i in cut else t for i, t in enumerate(inputs))


def jacobian(model, inputs, cut, N):
    """[N, outputs, D], one sample and one output at a time."""
    ps, J = list(model.parameters()), []
    for n in range(N):
        rows = []
        for e in model(*alone(inputs, cut, n)).flatten():
            g = torch.autograd.grad(e, ps, retain_graph=True, allow_unused=True)
            rows.append(torch.cat([(torch.zeros_like(p) if a is None else a).flatten() for a, p in zip(g, ps, strict=True)]))  # fmt: skip
        J.append(torch.stack(rows))
    return torch.stack(J)


def curvature(loss_fn, f):
    if loss_fn is SQUARES:
        return 2 * torch.eye(f.shape[1], dtype=F64).expand(len(f), -1, -1)
    p = f.softmax(1)
    return torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)


NETS = [("net", (form, M)) for form in ("einsum", "product", "sum") for M in (1, 7, 20)]
CASES = [*NETS, ("words", False), ("words", True)]


@pytest.mark.parametrize("verify", ["auto", "always", False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_quantities(case, verify):
    model, loss_fn, inputs, y, cut = make(case)
    J, f = jacobian(model, inputs, cut, len(y)), model(*inputs).detach()
    v = 2 * (f - y) if loss_fn is SQUARES else f.softmax(1) - nn.functional.one_hot(y, 3)
    g, a = torch.einsum("nc,ncd->nd", v, J), 1 / (f.numel() if loss_fn is SQUARES else len(f))
    ggn = a * torch.einsum("nci,ncd,ndi->i", J, curvature(loss_fn, f), J)
    for _ in range(3):
        stats = pb.statistics(model, loss_fn, (inputs, y), ["sample_grads", "variance", "diag_ggn", "kfac"], verify=verify)  # fmt: skip
        flat = {q: torch.cat([t.reshape(*t.shape[:1], -1) if q == "sample_grads" else t.flatten() for t in stats[q].values()], -1) for q in ("sample_grads", "variance", "diag_ggn")}  # fmt: skip
        close(flat["sample_grads"], g)
        close(flat["variance"], g.var(0, unbiased=False))
        close(flat["diag_ggn"], ggn)


@pytest.mark.parametrize("structure", ["full", "functional", "diag"])
@pytest.mark.parametrize("case", [("net", ("product", 7)), ("words", True)], ids=str)
def test_posteriors(case, structure):
    model, loss_fn, inputs, y, cut = make(case)
    J, f = jacobian(model, inputs, cut, len(y)), model(*inputs).detach()
    scale = 0.5 if loss_fn is SQUARES else 1.0  # of a Gaussian likelihood of variance one
    precision = scale * torch.einsum("nci,ncd,ndj->ij", J, curvature(loss_fn, f), J)
    precision = torch.diag(precision.diagonal()) if structure == "diag" else precision
    S = torch.linalg.inv(precision + torch.eye(len(precision), dtype=F64))
    mean, covariance = pb.laplace(model, loss_fn, (inputs, y), structure).functional(inputs)
    close(mean, f)
    close(covariance, torch.einsum("nci,ij,ndj->ncd", J, S, J))


@pytest.mark.parametrize("make_optimiser", [pb.optim.KFAC, pb.optim.EKFAC, pb.optim.Preconditioned])
def test_optimisers_train(make_optimiser):
    model, loss_fn, inputs, y, _ = make(("net", ("product", 7)), N=12)
    opt, losses = make_optimiser(model, loss_fn), []
    for _ in range(8):
        opt.zero_grad()
        loss = loss_fn(model(*inputs), y)
        loss.backward()
        losses.append(loss.item())
        opt.step()
    assert losses[-1] < losses[0]


def test_positions_keep_their_kronecker_factors():
    model, loss_fn, inputs, y, _ = make(("words", False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pb.statistics(model, loss_fn, (inputs, y), ["kfac"], seed=0)["kfac"]["places.weight"]
    wide = tuple(t.expand(len(y), -1) for t in inputs)
    close(found.right, pb.statistics(model, loss_fn, (wide, y), ["kfac"], seed=0)["kfac"]["places.weight"].right)


class Centred(DeepONet):
    """Samples that see each other before the first layer, where no gradient tells of it."""

    def forward(self, u, grid):
        return super().forward(u - u.mean(0), grid * u.mean())


@pytest.mark.parametrize("verify", ["auto", "always"])
@pytest.mark.parametrize("model", [DeepONet("mixed"), Centred("product")], ids=["activations", "inputs"])
def test_samples_that_mix_are_refused(model, verify):
    _, _, inputs, y, _ = make(("net", ("product", 7)))
    for _ in range(3):
        with pytest.raises(ValueError, match=r"does not separate into the 5 samples .* a mean over the batch"):
            pb.statistics(model.to(F64), SQUARES, (inputs, y), ["variance"], verify=verify)


def test_batch_statistics_are_refused():
    model, _, inputs, y, _ = make(("net", ("product", 7)))
    model.branch = nn.Sequential(model.branch, nn.BatchNorm1d(4).to(F64))
    with pytest.raises(ValueError, match="BatchNorm in training mode"):
        pb.statistics(model, SQUARES, (inputs, y), ["variance"])


def test_as_many_rows_as_samples_say_what_to_do():
    model, _, inputs, y, _ = make(("net", ("product", 5)))
    with pytest.raises(ValueError, match="samples share although it has 5 rows"):
        pb.statistics(model, SQUARES, (inputs, y), ["variance"])
    assert not model._forward_hooks and not model._forward_pre_hooks
