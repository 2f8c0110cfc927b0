"""Numbers that come from data or constants, and samples that are no axis of any layer: nodes of a graph."""

import warnings

import oracle
import pytest
import torch
from oracle import close
from torch import nn

import paraboloid as pb

CE = nn.CrossEntropyLoss()


class Scaled(nn.Module):
    """A magnitude over a number, as DoRA's over a norm of frozen weights."""

    def __init__(self, number):
        super().__init__()
        self.magnitude, self.head, self.number = nn.Parameter(torch.rand(6) + 0.5), nn.Linear(6, 3), number
        self.constant = torch.tensor(2.0, dtype=torch.float64)  # no buffer

    def forward(self, x):
        return self.head(x * (self.magnitude / self.number(self, x)))


NUMBERS = {
    "an attribute": lambda m, x: m.constant, "a norm of constants": lambda m, x: torch.arange(1, 7).double().norm(),
    "a literal": lambda m, x: torch.tensor(3.0).double(), "a mean over the batch": lambda m, x: x.abs().mean(),
}  # fmt: skip


def made(kind, *args):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(*args).double(), torch.randn(7, 6).double(), torch.arange(7) % 3


@pytest.mark.parametrize("name", NUMBERS)
def test_a_parameter_divided_by_a_number(name):
    model, x, y = made(Scaled, NUMBERS[name])
    stats = pb.statistics(model, CE, (x, y), ["grad", "sample_grads", "kflr", "diag_ggn"], verify="always")
    parameters = dict(model.named_parameters())
    f = model(x)
    for k, g in oracle.sample_grads(CE, f, y, parameters).items():
        close(stats["sample_grads"][k], g, k)
        close(stats["kflr"][k].diagonal(), stats["diag_ggn"][k].flatten(), k) if k == "magnitude" else None
    K = pb.optim.KFAC(model, CE)
    CE(model(x), y).backward()
    K.step()


class Graph(nn.Module):
    """Two layers of a graph convolution: a node sees its neighbours."""

    def __init__(self, nodes=7):
        super().__init__()
        self.first, self.head = nn.Linear(6, 4), nn.Linear(4, 3)
        self.register_buffer("A", torch.rand(nodes, nodes) / nodes)

    def forward(self, x):
        return self.A @ self.head((self.A @ self.first(x)).tanh())


@pytest.mark.parametrize("chosen", [[0, 2, 5], [1, 3, 4, 6, 0], [6, 2]], ids=str)
def test_the_loss_of_some_nodes_of_a_graph(chosen):
    model, x, y = made(Graph)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stats = pb.statistics(
            model, CE, (x, y[chosen]), ["grad", "sample_grads", "variance", "diag_ggn"], output=lambda f: f[chosen]
        )
    (said,) = [str(w.message) for w in caught]
    assert f"the {len(chosen)} samples see each other" in said
    assert f"in {len(chosen)} backward passes" in said
    f, parameters = model(x)[chosen], dict(model.named_parameters())
    blocks = oracle.ggn_blocks(CE, f, y[chosen], parameters)
    for k, g in oracle.sample_grads(CE, f, y[chosen], parameters).items():
        close(stats["sample_grads"][k], g, k)
        close(stats["grad"][k], g.mean(0), k)
        close(stats["variance"][k], g.var(0, unbiased=False), k)
        close(stats["diag_ggn"][k].flatten(), blocks[k].diagonal(), k)


@pytest.mark.filterwarnings("ignore:the 3 samples see each other")
@pytest.mark.parametrize("make", [pb.optim.KFAC, pb.optim.EKFAC, pb.optim.Preconditioned])
def test_optimisers_and_operators_of_some_nodes(make):
    model, x, y = made(Graph)
    chosen = torch.tensor([0, 2, 5])
    opt, losses = make(model, CE, lr=0.05, damping=0.1), []
    for _ in range(8):
        opt.zero_grad()
        loss = CE(model(x)[chosen], y[chosen])
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    K = pb.KFLR(model, CE, (x, y[chosen]), output=lambda f: f[chosen])
    G = pb.DiagonalGGN(model, CE, (x, y[chosen]), output=lambda f: f[chosen])
    close(G.diagonal(), pb.GGN(model, CE, (x, y[chosen]), output=lambda f: f[chosen]).diagonal())
    close(K.diagonal()[24:28], G.diagonal()[24:28])  # a bias, whose block is exact


def test_a_batch_of_one_says_what_to_leave_out():
    model, x, y = made(Scaled, NUMBERS["a literal"])
    with pytest.raises(ValueError, match=r"'variance' needs a batch of at least 2 samples; found 1\. Leave out 'variance'; "
                                         r"\['grad', 'square_norms'\] are defined"):  # fmt: skip
        pb.statistics(model, CE, (x[:1], y[:1]), ["grad", "variance", "square_norms"])
