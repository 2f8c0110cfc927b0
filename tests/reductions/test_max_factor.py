"""Sides longer than max_factor are diagonals: the factor's own, in statistics, operators, posteriors and optimisers."""

import copy
import warnings

import models
import pytest
import torch
from oracle import close
from torch import nn

import paraboloid as pb

CE = nn.CrossEntropyLoss()
LIMIT = 5


class Tied(nn.Module):
    """A language model whose embedding is its decoder, over more words than LIMIT."""

    def __init__(self, words=9, d=4):
        super().__init__()
        self.table = nn.Embedding(words, d)
        self.inner = nn.Linear(d, d)
        self.head = nn.Linear(d, words, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.inner(self.table(ids)).tanh()).movedim(-1, 1)


def wide():
    return nn.Sequential(nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 8))


def grouped():
    return nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))


def make(name, N=6):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "tied":
            return Tied().double(), torch.randint(9, (N, 3)), torch.randint(9, (N, 3))
        model = (wide if name == "wide" else grouped)().double()
        x = torch.randn(N, 7) if name == "wide" else torch.randn(N, 4, 4, 4)
        return model, x.double(), torch.randint(3, (N,))


NAMES = pytest.mark.parametrize("name", ["tied", "wide", "grouped"])


def limited(kron):
    """The same block with its long sides as their diagonals."""
    sides = []
    for side in kron.sides:
        data = side.dense()
        sides.append(data.diagonal(dim1=1, dim2=2).diag_embed() if data.shape[1] > LIMIT else data)
    return torch.block_diag(*(torch.kron(a.contiguous(), b.contiguous()) for a, b in zip(*sides, strict=True)))


@NAMES
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_statistics_keep_the_diagonal_of_a_long_side_and_say_so_once(name, sharing, fisher):
    model, x, y = make(name)
    whole = pb.statistics(model, CE, (x, y), pb.quantities.KFAC(fisher, sharing=sharing))
    quantity = pb.quantities.KFAC(fisher, sharing=sharing, max_factor=LIMIT)
    for data in ((x, y), [(x[:2], y[:2]), (x[2:], y[2:])]):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = pb.statistics(model, CE, data, quantity)
        (said,) = [str(w.message) for w in caught]
        assert "longer than max_factor=5: its diagonal is kept" in said
        if fisher == "mc" and data != (x, y):
            continue  # other labels
        for k, kron in whole[quantity.name].items():
            close(found[quantity.name][k].to_dense(), limited(kron), k)
            longest = max(side.size for side in kron.sides)
            assert all(side.kind == "diagonal" for side in found[quantity.name][k].sides if side.size > LIMIT), k
            assert (repr(k) in said) == (longest > LIMIT) or "more" in said


@NAMES
def test_operators(name):
    model, x, y = make(name)
    with pytest.warns(UserWarning, match="longer than max_factor=5"):
        K = pb.KFAC(model, CE, (x, y), fisher="exact", max_factor=LIMIT)
    want = torch.block_diag(*(limited(kron) for kron in pb.KFLR(model, CE, (x, y)).krons.values()))
    close(K.to_dense(), want)
    close(K.inverse(0.1).to_dense(), torch.linalg.inv(want + 0.1 * torch.eye(len(want)).double()))
    close(K.eigsh(2)[0], torch.linalg.eigvalsh(want).flip(0)[:2])
    with pytest.warns(UserWarning, match="longer than max_factor=5"):
        E = pb.EKFAC(model, CE, (x, y), fisher="exact", max_factor=LIMIT)
    ggn = pb.GGN(model, CE, (x, y), blocks="parameter")
    close(torch.tensor(E.trace()), torch.tensor(ggn.trace()))


@NAMES
def test_posteriors(name):
    model, x, y = make(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior = pb.laplace(model, CE, (x, y), "kron", max_factor=LIMIT)
    assert len([w for w in caught if "longer than max_factor=5" in str(w.message)]) == 1
    S = nn.CrossEntropyLoss(reduction="sum")
    want = torch.block_diag(*(limited(kron) for kron in pb.KFLR(model, S, (x, y)).krons.values()))
    close(posterior.curvature.to_dense(), want)
    covariance = torch.linalg.inv(want + torch.eye(len(want)).double())
    close(posterior.precision().variances(), covariance.diagonal())
    with pytest.warns(UserWarning, match="longer than max_factor=5"):
        posterior.update((x, y))


def test_the_recursion():
    model, x, y = make("wide")
    whole = pb.statistics(model, CE, (x, y), "kfra")["kfra"]
    with pytest.warns(UserWarning, match="longer than max_factor=5"):
        found = pb.statistics(model, CE, (x, y), pb.quantities.KFRA(max_factor=LIMIT))["kfra"]
    for k, kron in whole.items():
        close(found[k].to_dense(), limited(kron), k)


@NAMES
@pytest.mark.parametrize("optimiser", ["kfac", "split", "ekfac", "kflr"])
def test_optimisers(name, optimiser):
    model, x, y = make(name)
    options = {"lr": 1.0, "damping": 1e-2, "max_factor": LIMIT}
    opt = {
        "kfac": lambda: pb.optim.KFAC(model, CE, fisher="exact", split=None, momentum=0.0, kl_clip=None, **options),
        "split": lambda: pb.optim.KFAC(model, CE, fisher="exact", momentum=0.0, kl_clip=None, **options),
        "ekfac": lambda: pb.optim.EKFAC(model, CE, fisher="exact", momentum=0.0, kl_clip=None, **options),
        "kflr": lambda: pb.optim.Preconditioned(model, CE, curvature="kflr", **options),
    }[optimiser]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_operator = pb.EKFAC if optimiser == "ekfac" else pb.KFAC
        twin = copy.deepcopy(model)
        inverse = make_operator(twin, CE, (x, y), fisher="exact", max_factor=LIMIT).inverse(
            1e-2, **({"split": "pi"} if optimiser == "split" else {})
        )
    parameters = dict(model.named_parameters())
    before = torch.cat([p.detach().flatten() for p in parameters.values()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(2):
            opt.zero_grad()
            CE(model(x), y).backward()
            if t == 0:
                g = torch.cat([p.grad.flatten() for p in parameters.values()])
            opt.step()
            if t == 0:
                after = torch.cat([p.detach().flatten() for p in parameters.values()])
    assert len([w for w in caught if "longer than max_factor=5" in str(w.message)]) == 1
    close(before - after, inverse @ g)


def test_the_default_leaves_ordinary_layers_alone():
    model, x = models.make("gpt")
    f = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pb.statistics(model, nn.MSELoss(), (x, torch.zeros_like(f)), "kfac")
    with pytest.raises(ValueError, match="max_factor is 0; expected an integer of at least 1"):
        pb.quantities.KFAC(max_factor=0)


def test_a_vocabulary_is_a_diagonal_by_default():
    model = Tied(words=6000, d=3).double()
    x = torch.randint(6000, (2, 4), generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="'table.weight' has a side of 6000 rows, longer than max_factor=5000"):
        stats = pb.statistics(model, CE, (x, x), ["kfac"])
    assert stats["kfac"]["table.weight"].left.shape == (6000,)
    opt = pb.optim.KFAC(model, CE)
    CE(model(x), x).backward()
    with pytest.warns(UserWarning, match="longer than max_factor"):
        opt.step()
    assert opt.diagnostics()["layers"]["table.weight"]["structure"] == "kronecker"
