"""Inputs that all samples share, behind trainable layers: derived weights, if the model confirms that they are shared."""

import warnings

import oracle
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
    with pytest.raises(ValueError, match="shared input that is no buffer"):
        pb.statistics(model, SQUARES, (inputs, y), ["variance"])
    assert not model._forward_hooks and not model._forward_pre_hooks


class Dora(nn.Module):
    """A low-rank update of a frozen weight, with magnitudes of its own; what is frozen are plain attributes."""

    def __init__(self, learned_magnitude):
        super().__init__()
        self.frozen = torch.randn(6, 4, dtype=F64)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(0.1 * torch.randn(6, 2))
        magnitude = self.frozen.norm(dim=1, keepdim=True)
        self.magnitude = nn.Parameter(magnitude) if learned_magnitude else magnitude

    def forward(self, x):
        W = self.frozen + self.up @ self.down
        return x @ (self.magnitude * W / W.norm(dim=1, keepdim=True)).T


@pytest.mark.parametrize("verify", ["auto", "always"])
@pytest.mark.parametrize("learned", [True, False])
def test_constants_may_be_plain_attributes(learned, verify):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Dora(learned), nn.Tanh(), nn.Linear(6, 3)).to(F64)
    x, y = torch.randn(5, 4, dtype=F64), torch.tensor([0, 2, 1, 1, 0])
    want = oracle.sample_grads(CE, model(x), y, dict(model.named_parameters()))
    for _ in range(3):
        found = pb.statistics(model, CE, (x, y), ["sample_grads"], verify=verify)["sample_grads"]
        for k, g in found.items():
            close(g, want[k], k)


@pytest.mark.parametrize("verify", ["auto", "always"])
def test_an_attribute_that_holds_the_batch_is_none(verify):
    torch.manual_seed(0)
    x, y = torch.randn(6, 4, dtype=F64), torch.tensor([0, 2, 1, 1, 0, 2])

    class Attends(nn.Module):
        """To all samples, which somebody has put there."""

        def __init__(self):
            super().__init__()
            self.key, self.last, self.context = nn.Linear(4, 4), nn.Linear(4, 3), x

        def forward(self, x):
            k = self.key(self.context)
            return self.last((x @ k.T)[:, : len(x)] @ k[: len(x)])

    with pytest.raises(ValueError, match="does not separate into the 6 samples"):
        pb.statistics(Attends().to(F64), CE, (x, y), ["variance"], verify=verify)


class Graph(nn.Module):
    def __init__(self, nodes):
        super().__init__()
        near = (torch.rand(nodes, nodes) > 0.5).to(F64) + torch.eye(nodes, dtype=F64)
        self.register_buffer("near", near / near.sum(1, keepdim=True))
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(self.near @ self.a(self.near @ x).tanh())


class Centred(Graph):
    def forward(self, x):
        h = super().forward(x)
        return h - h.mean(0)


@pytest.mark.parametrize("kind", [Graph, Centred])
def test_nodes_of_one_graph_and_the_advice_of_the_refusal(kind):
    torch.manual_seed(0)
    model, x, y = kind(9).to(F64), torch.randn(9, 4, dtype=F64), torch.randint(3, (9,))
    if kind is Centred:
        with pytest.raises(ValueError, match=r"for other mixing take output\[indices\] or pb.GGN"):
            pb.statistics(model, CE, (x, y), ["variance"])
    parameters, f = dict(model.named_parameters()), model(x)
    all_of_them = oracle.sample_grads(CE, f, y, parameters)
    J, H = oracle.jacobians(f, parameters), oracle.output_hessians(CE, f, y)
    J = torch.cat([t.flatten(2) for t in J.values()], 2)
    close(pb.GGN(model, CE, (x, y)).to_dense(), torch.einsum("nci,ncd,ndj->ij", J, H, J) / 9)
    for some in (torch.tensor([0, 3, 4]), torch.arange(8)):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the . samples see each other")
            found = pb.statistics(model, CE, (x, y[some]), ["sample_grads"], output=lambda o, i=some: o[i])
            posterior = pb.laplace(model, CE, (x, y[some]), "full", output=lambda o, i=some: o[i])
            covariance = posterior.functional(x)[1]
        for k, g in found["sample_grads"].items():
            close(g, all_of_them[k][some], k)
        precision = torch.einsum("nci,ncd,ndj->ij", J[some], H[some], J[some]) + torch.eye(J.shape[2], dtype=F64)
        close(covariance, torch.einsum("nci,ij,ndj->ncd", J[some], torch.linalg.inv(precision), J[some]))


class Scores(nn.Module):
    """Scores of every sample for every row of a table that all share."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(4, 5), nn.Linear(3, 5)

    def forward(self, x, table):
        return self.query(x) @ self.key(table.reshape(-1, 3)).T


@pytest.mark.filterwarnings("ignore:.*no rule for these arguments")
def test_a_table_with_as_many_rows_as_samples_and_the_advice_of_the_refusal():
    torch.manual_seed(0)
    model, x, table, y = Scores().to(F64), torch.randn(6, 4, dtype=F64), torch.randn(6, 3, dtype=F64), torch.arange(6)
    with pytest.raises(
        ValueError, match=r"shared input that is no buffer \(one of 6 rows may come as \[1, 6, \.\.\.\]"
    ):
        pb.statistics(model, CE, ((x, table), y), ["variance"])
    found = pb.statistics(model, CE, ((x, table[None]), y), ["sample_grads"])["sample_grads"]
    for k, g in oracle.sample_grads(CE, model(x, table), y, dict(model.named_parameters())).items():
        close(found[k], g, k)


def test_targets_that_are_no_tensor_are_told_what_to_do():
    model, x, y = nn.Linear(4, 3).to(F64), torch.randn(6, 4, dtype=F64), torch.arange(6) % 3

    def mixture(f, y):
        return 0.3 * CE(f, y[0]) + 0.7 * CE(f, y[1])

    with pytest.raises(TypeError, match="the loss mixture is not one that paraboloid knows"):
        pb.statistics(model, mixture, (x, (y, y.flip(0))), ["variance"])
    with pytest.raises(ValueError, match=r"the targets are a tuple; expected one tensor.*Stack them, \[N"):
        pb.statistics(model, CE, (x, (y, y.flip(0))), ["variance"])
