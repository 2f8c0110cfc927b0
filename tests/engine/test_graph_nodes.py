"""Nodes of one graph as samples: each term of the loss is pulled back by itself, through all rows."""

import warnings

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import close
from torch import nn

import paraboloid as pb

CE = nn.CrossEntropyLoss()
NODES, EDGES, FEATURES, HIDDEN, CLASSES = 8, 20, 4, 3, 3
MEANT = "ignore:the .* samples see each other"
pytestmark = pytest.mark.filterwarnings(MEANT)


def graph():
    g = torch.Generator().manual_seed(0)
    edges = torch.randint(NODES, (2, EDGES), generator=g)
    x = torch.randn(NODES, FEATURES, generator=g, dtype=torch.float64)
    A = torch.eye(NODES, dtype=torch.float64).index_put((edges[1], edges[0]), torch.ones(EDGES, dtype=torch.float64))
    return x, edges, A, torch.arange(NODES) % CLASSES


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, CLASSES)


class IndexAdd(Net):
    """As in Kipf & Welling 2017: loops, normalised by the degrees of both ends."""

    def pass_on(self, h, edges):
        loops = torch.arange(len(h))
        row, col = torch.cat([edges[0], loops]), torch.cat([edges[1], loops])
        degree = torch.zeros(len(h), dtype=h.dtype).scatter_add(0, col, torch.ones(len(col), dtype=h.dtype))
        weight = degree[row].rsqrt() * degree[col].rsqrt()
        return torch.zeros_like(h).index_add(0, col, weight[:, None] * h[row])

    def forward(self, x, edges):
        return self.pass_on(self.last(torch.tanh(self.pass_on(self.first(x), edges))), edges)


class Scatter(IndexAdd):
    def pass_on(self, h, edges):
        sent = h.index_select(0, edges[0])
        return h + torch.zeros_like(h).scatter_add(0, edges[1].view(-1, 1).expand_as(sent), sent)


class Largest(IndexAdd):
    def pass_on(self, h, edges):
        at = edges[..., None].expand(-1, -1, h.shape[1])
        return h.scatter_reduce(0, at[1], h.gather(0, at[0]), "amax")


class Attention(IndexAdd):
    """A softmax over the edges that arrive at a node (Velickovic et al. 2018)."""

    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Linear(HIDDEN, 1, bias=False), nn.Linear(HIDDEN, 1, bias=False)

    def forward(self, x, edges):
        row, col = edges
        h = self.first(x)
        score = F.leaky_relu(self.source(h)[row] + self.target(h)[col]).exp()
        total = torch.zeros(len(h), 1, dtype=h.dtype).index_add(0, col, score)
        return self.last(torch.tanh(h + torch.zeros_like(h).index_add(0, col, score / total[col] * h[row])))


class OfEdges(Net):
    """A layer on pairs of nodes: as many rows as edges; one weight on nodes and edges."""

    def __init__(self):
        super().__init__()
        self.pair, self.both = nn.Linear(2 * HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x, edges):
        row, col = edges
        h = torch.tanh(self.both(self.first(x)))
        return self.last(h.index_add(0, col, self.both(torch.tanh(self.pair(torch.cat([h[row], h[col]], 1))))))


class Matrix(Net):
    def forward(self, x, A):
        return A @ self.last(torch.tanh(A @ self.first(x)))


class Normalised(Net):
    def forward(self, x, A):
        scale = A.sum(1).rsqrt()
        return Matrix.forward(self, x, scale[:, None] * A * scale)


class Kept(Net):
    """The matrix is a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("A", graph()[2])

    def forward(self, x):
        return Matrix.forward(self, x, self.A)


x, edges, A, y = graph()
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
    CSR = A.to_sparse_csr()
MODELS = {
    "index_add": (IndexAdd, (x, edges)), "scatter_add": (Scatter, (x, edges)), "scatter_reduce": (Largest, (x, edges)),
    "attention": (Attention, (x, edges)), "edges": (OfEdges, (x, edges)), "dense": (Matrix, (x, A)),
    "normalised": (Normalised, (x, A)), "sparse": (Matrix, (x, A.to_sparse())), "csr": (Matrix, (x, CSR)),
    "buffer": (Kept, x), "by name": (IndexAdd, {"x": x, "edges": edges}),
}  # fmt: skip
CHOSEN = {"all": slice(None), "indices": torch.tensor([5, 0, 2]), "mask": torch.arange(NODES) % 2 == 0}
FIRST = ["grad", "sample_grads", "square_norms", "variance", "second_moment", "gram"]
SECOND = ["diag_ggn", "sqrt_ggn", "sample_diag_ggn", "kflr", "kfac_empirical", "kfac", "diag_ggn_mc"]


def made(name):
    cls, inputs = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls().double(), inputs


def run(model, inputs):
    return (
        model(**inputs) if isinstance(inputs, dict) else model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    )


def rows(f, parameters):
    """J, [N, C, D], by one backward pass for each output."""
    parameters = list(parameters)
    flat = [torch.cat([g.flatten() for g in torch.autograd.grad(
        e, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)]) for e in f.flatten()]  # fmt: skip
    return torch.stack(flat).view(*f.shape, -1)


@pytest.mark.parametrize("chosen", CHOSEN)
@pytest.mark.parametrize("name", MODELS)
def test_every_quantity_of_nodes_is_that_of_loops(name, chosen):
    model, inputs = made(name)
    at = CHOSEN[chosen]
    batch, parameters = (inputs, y[at]), dict(model.named_parameters())
    stats = pb.statistics(model, CE, batch, FIRST + SECOND, output=lambda f: f[at])
    f = run(model, inputs)[at]
    N, blocks = len(f), oracle.ggn_blocks(CE, f, y[at], parameters)
    for k, g in oracle.sample_grads(CE, f, y[at], parameters).items():
        close(stats["sample_grads"][k], g, k)
        close(stats["grad"][k], g.mean(0), k)
        close(stats["variance"][k], g.var(0, unbiased=False), k)
        close(stats["second_moment"][k], g.square().mean(0), k)
        close(stats["square_norms"][k], g.flatten(1).square().sum(1), k)
        close(stats["gram"][k], g.flatten(1) @ g.flatten(1).T, k)
        close(stats["diag_ggn"][k].flatten(), blocks[k].diagonal(), k)
        close(stats["sample_diag_ggn"][k].sum(0).flatten() / N, blocks[k].diagonal(), k)
        S = stats["sqrt_ggn"][k].flatten(2).flatten(0, 1)
        close(S.T @ S / N, blocks[k], k)
        if g.dim() == 2:  # a bias: its block is exact
            close(stats["kflr"][k].left, blocks[k], k)
            close(stats["kfac_empirical"][k].left, g.T @ g / N, k)


def test_kronecker_factors_are_over_every_pair_of_an_output_and_a_row():
    model, inputs = made("dense")
    stats = pb.statistics(model, CE, (inputs, y), ["kflr"])["kflr"]
    z = model.first(x)
    f = A @ model.last(torch.tanh(A @ z))
    H = oracle.output_hessians(CE, f, y).reshape(NODES, CLASSES, CLASSES)
    J = rows(f, [z]).view(NODES, CLASSES, NODES, HIDDEN)  # at every row of the layer's output
    left = torch.einsum("ncmp,nce,nemq->pq", J, H, J) / NODES
    close(stats["first.weight"].left, left)
    close(stats["first.weight"].right, x.T @ x / NODES)


@pytest.mark.parametrize("name", ["index_add", "edges", "dense"])
def test_pieces_do_not_change_the_result(name):
    model, inputs = made(name)
    names = [q for q in FIRST + SECOND if q != "gram"]
    whole = pb.statistics(model, CE, (inputs, y), names)
    for memory in (1, 7000):
        pieces = pb.statistics(model, CE, (inputs, y), names, max_memory=memory)
        for q in names:
            for k, value in whole[q].items():
                other = pieces[q][k]
                if hasattr(value, "left"):
                    value, other = value.diagonal(), other.diagonal()
                close(other, value, f"{q} {k}")


def test_the_gradient_alone_takes_one_pull():
    model, inputs = made("index_add")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = pb.statistics(model, CE, (inputs, y), ["grad"])
    expected = torch.autograd.grad(CE(run(model, inputs), y), list(model.parameters()))
    for k, g in zip(stats["grad"], expected, strict=True):
        close(stats["grad"][k], g, k)


def test_it_is_said_once_what_it_costs():
    model, inputs = made("index_add")
    with pytest.warns(UserWarning) as caught:
        pb.statistics(model, CE, (inputs, y), ["variance", "kflr"])
    (said,) = [str(w.message) for w in caught]
    assert f"the {NODES} samples see each other" in said
    assert f"in {NODES} backward passes for every vector" in said


MIXED = {
    "a mean over the nodes": lambda m, h: h - h.mean(0), "a softmax over the nodes": lambda m, h: h.softmax(0),
    "attention among all": lambda m, h: (h @ h.T).softmax(1) @ h, "the next row": lambda m, h: h + h.roll(1, 0),
    "the rows in reverse": lambda m, h: h + h.flip(0), "sums so far": lambda m, h: h.cumsum(0),
    "a layer along the nodes": lambda m, h: m.along(h.T).T, "batch statistics": lambda m, h: m.norm(h),
    "an order of its own": lambda m, h: h + h[h[:, 0].detach().argsort()],
    "an order by the inputs": lambda m, h: h + h.index_select(0, m.inputs[:, 0].argsort()),
    "a random order": lambda m, h: h + h[torch.randperm(len(h))],
    "likeness of inputs": lambda m, h: (m.inputs @ m.inputs.T).softmax(1) @ h,
    "some rows' mean": lambda m, h: h - h[m.inputs[:, 0] > 0].mean(0),
}  # fmt: skip


@pytest.mark.parametrize("before", [True, False], ids=["below", "above"])
@pytest.mark.parametrize("name", MIXED)
def test_what_nobody_asked_for_is_refused_in_a_graph_too(name, before):
    class Mixed(IndexAdd):
        def __init__(self):
            super().__init__()
            self.along, self.norm = nn.Linear(NODES, NODES), nn.BatchNorm1d(HIDDEN)

        def forward(self, x, edges):
            self.inputs = x
            h = torch.tanh(self.first(x))
            h = self.pass_on(MIXED[name](self, h), edges) if before else MIXED[name](self, self.pass_on(h, edges))
            return self.last(h)

    model = Mixed().double()
    with pytest.raises(ValueError, match=r"does not separate into the 8 samples.*adjacency matrix among the inputs"):
        pb.statistics(model, CE, ((x, edges), y), ["variance"])


@pytest.mark.parametrize("verify", ["auto", "once", "always", False])
def test_edges_that_change_are_followed(verify):
    model, _ = made("index_add")
    for seed in range(4):
        other = torch.randint(NODES, (2, EDGES), generator=torch.Generator().manual_seed(seed))
        stats = pb.statistics(model, CE, ((x, other), y), ["sample_grads"], verify=verify)
        truth = oracle.sample_grads(CE, model(x, other), y, dict(model.named_parameters()))
        for k, g in truth.items():
            close(stats["sample_grads"][k], g, k)


def test_diagonal_of_the_hessian_and_the_recursion():
    model, inputs = made("index_add")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="diag_hessian: the parameters")
        found = pb.statistics(model, CE, (inputs, y), ["diag_hessian"])["diag_hessian"]
    close(torch.cat([t.flatten() for t in found.values()]), pb.Hessian(model, CE, (inputs, y)).diagonal())
    with pytest.raises(NotImplementedError, match="the samples see each other"):
        pb.statistics(model, CE, (inputs, y), ["kfra"])


@pytest.mark.parametrize(
    "make",
    [
        lambda m: pb.optim.KFAC(m, CE, lr=0.05, damping=0.1),
        lambda m: pb.optim.EKFAC(m, CE, lr=0.05, damping=0.1),
        lambda m: pb.optim.Preconditioned(m, CE),
        lambda m: pb.optim.Preconditioned(m, CE, curvature="kfac", lr=0.01),
    ],
    ids=["kfac", "ekfac", "diagonal", "preconditioned"],
)
@pytest.mark.parametrize("chosen", ["all", "mask"])
def test_optimisers_take_the_rows_of_layers_for_samples_in_one_pull(make, chosen):
    model, inputs = made("index_add")
    at, losses = CHOSEN[chosen], []
    opt = make(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            opt.zero_grad()
            loss = CE(run(model, inputs)[at], y[at])
            loss.backward()
            opt.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("structure", ["full", "diag", "kron", "ekfac", "lowrank", "functional"])
@pytest.mark.parametrize("chosen", ["all", "mask"])
def test_posteriors_of_nodes(structure, chosen):
    model, inputs = made("index_add")
    at = CHOSEN[chosen]
    N = len(y[at])
    posterior = pb.laplace(model, CE, (inputs, y[at]), structure=structure, output=lambda f: f[at])
    mean, covariance = posterior.functional(inputs)
    f = run(model, inputs)[at]
    close(mean, f.detach())
    J, H = rows(f, model.parameters()).detach(), oracle.output_hessians(CE, f, y[at]).reshape(N, CLASSES, CLASSES)
    G = torch.einsum("ncd,nce,nef->df", J, H, J)
    D = len(G)
    if structure in ("full", "functional"):
        close(covariance, J @ torch.linalg.inv(G + torch.eye(D, dtype=G.dtype)) @ J.mT)
    if structure == "diag":
        close(covariance, (J / (G.diagonal() + 1)) @ J.mT)
    posterior.max_memory = 1
    close(posterior.functional(inputs)[1], covariance)
    assert posterior.predict(inputs).shape == (N, CLASSES)


class Batch:
    """An object of its own, as graph libraries have them."""

    def __init__(self, x, edges):
        self.x, self.edges = x, edges


class OfBatch(IndexAdd):
    def forward(self, batch):
        return super().forward(batch.x, batch.edges)


def test_inputs_may_be_an_object_and_nodes_without_a_label_are_left_out():
    model, ignored = OfBatch().double(), y.clone()
    ignored[[1, 4]] = -100
    graph, f = Batch(x, edges), model(Batch(x, edges))
    stats = pb.statistics(model, CE, (graph, ignored), ["sample_grads"])
    for k, g in oracle.sample_grads(CE, f, ignored, dict(model.named_parameters())).items():
        close(stats["sample_grads"][k], g, k)
    posterior = pb.laplace(model, CE, (graph, y))
    assert posterior.predict(graph).shape == (NODES, CLASSES)


def test_a_batch_in_place_of_a_dataset_is_told():
    model, inputs = made("index_add")
    with pytest.raises(
        ValueError, match=r"the dataset is a batch of inputs and targets, tuple and Tensor.*pb\.noise\.measures"
    ):
        pb.noise.compare(model, CE, (inputs, y), batch_size=2, draws=2)
    assert pb.noise.measures(model, CE, (inputs, y)).total.samples == NODES


def test_the_prior_of_a_larger_graph_is_tuned():
    """Nodes cannot be left out of a graph, so that no fold of them is looked at."""
    g, N = torch.Generator().manual_seed(0), 70
    x, edges = torch.randn(N, FEATURES, generator=g).double(), torch.randint(N, (2, 140), generator=g)
    model, y = IndexAdd().double(), torch.arange(N) % CLASSES
    posterior = pb.laplace(model, CE, ((x, edges), y), "diag")
    posterior.tune_prior()
    assert posterior.predict((x, edges)).shape == (N, CLASSES)
