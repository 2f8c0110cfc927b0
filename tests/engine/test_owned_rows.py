"""Samples that are apart, but along no axis of a call: rows are sorted to the samples that own them."""

import warnings

import pytest
import torch
from oracle import close, output_hessians
from torch import nn

import paraboloid as pb

CE = nn.CrossEntropyLoss()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


class Shuffled(Net):
    def forward(self, x):
        order = (x[:, 0] * 1e3).argsort()
        return super().forward(x[order])[order.argsort()]


class Sorted(Net):
    """Sample n is row n of the output, whichever input that comes from."""

    def forward(self, x):
        return super().forward(x[x[:, 1].argsort()])[x[:, 0].argsort()]


class Flipped(Net):
    def forward(self, x):
        return self.last(torch.tanh(self.first(x)).flip(0))


class Loop(Net):
    def forward(self, x):
        return torch.stack([self.last(torch.tanh(self.first(a))) for a in x])


class Chunks(Net):
    def forward(self, x):
        return torch.cat([super(Chunks, self).forward(a) for a in x.split([2, len(x) - 2])])


class Sets(Net):
    """A loop over samples that are sets of unequal sizes."""

    def forward(self, x):
        sets = [a.expand(1 + n % 3, 4) * torch.arange(1, 2 + n % 3)[:, None] for n, a in enumerate(x)]
        return torch.stack([self.last(torch.tanh(self.first(a)).mean(0)) for a in sets])


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 2), nn.ModuleList([Net(), Net()])

    def forward(self, x):
        gates = self.gate(x).softmax(1)
        found = torch.zeros(len(x), 3, dtype=x.dtype)
        for i, expert in enumerate(self.experts):
            rows = (gates.argmax(1) == i).nonzero()[:, 0]
            found = found.index_add(0, rows, gates[rows, i : i + 1] * expert(x[rows]))
        return found


class EarlyExit(Net):
    def __init__(self):
        super().__init__()
        self.early = nn.Linear(5, 3)

    def forward(self, x):
        z = torch.tanh(self.first(x))
        done = x[:, 0] > 0
        found = torch.zeros(len(x), 3, dtype=x.dtype)
        found[done], found[~done] = self.early(z[done]), self.last(z[~done])
        return found


class Graphs(Net):
    """Nodes of graphs of unequal sizes: messages within a graph, one output for each."""

    COUNTS = (3, 1, 4, 2, 2, 1)

    def forward(self, x):
        graph = torch.arange(6).repeat_interleave(torch.tensor(self.COUNTS))
        nodes = torch.cat([x[g].expand(c, 4) * (1 + torch.arange(c)[:, None]) for g, c in enumerate(self.COUNTS)])
        z = torch.tanh(self.first(nodes))
        z = z + torch.zeros(6, 5, dtype=z.dtype).index_add(0, graph, z)[graph]
        return torch.zeros(6, 3, dtype=z.dtype).index_add(0, graph, self.last(z))


class Convolved(nn.Module):
    """Images in another order than the samples."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(1, 3, 2), nn.Linear(3, 3)

    def forward(self, x):
        order = x[:, 0].argsort()
        z = torch.tanh(self.conv(x[order].reshape(-1, 1, 2, 2).repeat(1, 1, 2, 2))).mean((2, 3))
        return self.last(z[order.argsort()])


MODELS = [Shuffled, Sorted, Flipped, Loop, Chunks, Sets, Experts, EarlyExit, Graphs, Convolved]


def made(cls, n=6):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls().double()
        x = torch.randn(n, 4).double()
    return model, x, torch.arange(n) % 3


def rows(model, x, y):
    """The gradient of each sample's own loss at the output's row n, by masked backward passes; [N, D]."""
    f, p = model(x), list(model.parameters())
    each = nn.CrossEntropyLoss(reduction="none")(f, y)
    grads = [torch.autograd.grad(e, p, retain_graph=True, allow_unused=True, materialize_grads=True) for e in each]
    return [torch.stack([g[i] for g in grads]) for i in range(len(p))]


@pytest.mark.parametrize("cls", MODELS)
def test_every_first_order_quantity_is_right(cls):
    model, x, y = made(cls)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the samples lie along no axis")
        stats = pb.statistics(
            model, CE, (x, y), ["grad", "sample_grads", "square_norms", "variance", "gram", "diag_ggn"]
        )
        kron = pb.statistics(model, CE, (x, y), ["kfac_empirical"], seed=0)
    for k, g in zip(stats["grad"], rows(model, x, y), strict=True):
        close(stats["sample_grads"][k], g, k)
        close(stats["grad"][k], g.mean(0), k)
        close(stats["variance"][k], g.var(0, unbiased=False), k)
        close(stats["square_norms"][k], g.flatten(1).square().sum(1), k)
        close(stats["gram"][k], g.flatten(1) @ g.flatten(1).T, k)
        if g.dim() == 2:  # a bias: its block is exact
            close(kron["kfac_empirical"][k].left, g.T @ g / len(g), k)
    f = model(x)
    H = output_hessians(CE, f, y)
    for k, p in model.named_parameters():
        J = torch.stack([
            torch.autograd.grad(e, p, retain_graph=True, materialize_grads=True)[0] for e in f.flatten()
        ]).view(len(f), 3, -1)  # fmt: skip
        close(stats["diag_ggn"][k].flatten(), torch.einsum("ncd,nce,ned->d", J, H, J) / len(f), k)


@pytest.mark.parametrize("cls", [Shuffled, Experts, Graphs])
def test_second_derivatives_and_posteriors_work(cls):
    model, x, y = made(cls)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the samples lie along no axis")
        warnings.filterwarnings("ignore", message="diag_hessian: the parameters")
        diagonal = pb.statistics(model, CE, (x, y), ["diag_hessian"])["diag_hessian"]
        exact = pb.Hessian(model, CE, (x, y)).diagonal()
        close(torch.cat([t.flatten() for t in diagonal.values()]), exact)
        G = pb.KFAC(model, CE, (x, y), fisher="exact")
        assert torch.isfinite(G.logdet(damping=1e-2))
        with pytest.raises(NotImplementedError, match="the samples lie along no axis"):
            pb.statistics(model, CE, (x, y), ["kfra"])


def test_factors_count_the_rows_that_are_there():
    """The input factor of graphs is the mean over all nodes, not over padding."""
    model, x, y = made(Graphs)
    with pytest.warns(UserWarning, match=r"the samples lie along no axis of the outputs of 2 of 2 calls"):
        stats = pb.statistics(model, CE, (x, y), ["kflr"])
    nodes = torch.cat([x[g].expand(c, 4) * (1 + torch.arange(c)[:, None]) for g, c in enumerate(Graphs.COUNTS)])
    close(stats["kflr"]["first.weight"].right, nodes.T @ nodes / len(nodes))


@pytest.mark.parametrize("n", [60, 180])
def test_more_samples_than_weights_that_differ(n):
    model, x, y = made(Shuffled, n)
    with pytest.warns(UserWarning, match="the samples lie along no axis"):
        stats = pb.statistics(model, CE, (x, y), ["sample_grads"])
    for k, g in zip(stats["sample_grads"], rows(model, x, y), strict=True):
        close(stats["sample_grads"][k], g, k)


def test_each_batch_is_looked_at_for_itself():
    model, x, y = made(Experts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the samples lie along no axis")
        for seed in range(6):
            x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)).double()
            stats = pb.statistics(model, CE, (x, y), ["sample_grads"], verify=False if seed % 2 else "auto")
            for k, g in zip(stats["sample_grads"], rows(model, x, y), strict=True):
                close(stats["sample_grads"][k], g, k)


@pytest.mark.parametrize(
    "mix", [lambda z: z - z.mean(0), lambda z: z * z.softmax(0), lambda z: z + z.flip(0), lambda z: z.cumsum(0)]
)
def test_mixing_is_still_refused(mix):
    class Mixing(Net):
        def forward(self, x):
            return self.last(mix(torch.tanh(self.first(x))))

    for n in (6, 60):
        model, x, y = made(Mixing, n)
        with pytest.raises(ValueError, match="does not separate into the"):
            pb.statistics(model, CE, (x, y), ["variance"])


def test_a_refusal_in_half_precision_says_so():
    model, (x, y) = Shuffled(), (torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 3)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"In half precision .*use float32"):
        pb.statistics(model, CE, (x, y), "variance")
    with pytest.warns(UserWarning):
        pb.statistics(model, CE, (x, y), "variance")


class _EarlyExit(nn.Module):
    """Samples whose first answer is unsure go on; in some batches none does."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 4)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        first = self.b(h)
        unsure = x[:, 0] > 0
        output = first.clone()
        output[unsure] = self.b(torch.tanh(self.c(h[unsure])))
        return output


@pytest.mark.filterwarnings("ignore:the samples lie along no axis")
def test_a_layer_that_no_sample_of_a_batch_reaches():
    torch.manual_seed(0)
    model, x, y = _EarlyExit().double(), torch.randn(6, 5).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    x[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, -1.0])
    loader = [(x[:3], y[:3]), (x[3:], y[3:])]  # the second batch leaves at the first exit
    found = pb.statistics(model, nn.CrossEntropyLoss(), loader, ["sample_grads", "variance"])
    names, parameters = zip(*model.named_parameters(), strict=True)
    losses = nn.CrossEntropyLoss(reduction="none")(model(x), y)
    rows = [torch.autograd.grad(each, parameters, retain_graph=True, materialize_grads=True) for each in losses]
    for name, each in zip(names, zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(found["sample_grads"][name], torch.stack(each))
        torch.testing.assert_close(found["variance"][name], torch.stack(each).var(0, unbiased=False))
