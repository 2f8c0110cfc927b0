"""All vectors in one backward pass: what a device does by default, forced on the CPU here."""

import losses_table
import models
import pytest
import torch
from torch import nn

import paraboloid as pb
from paraboloid.engine import many_vectors


class Doubled(torch.autograd.Function):
    """2 x, whose backward pass looks at a number, which no vectorised pass has."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g if g.sum().item() < 1e9 else g


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 5), nn.Linear(5, 3), function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


@pytest.fixture
def everywhere(monkeypatch):
    monkeypatch.setattr(many_vectors, "wanted", lambda *_: True)


def roots(model, x, loss_fn, y):
    return pb.statistics(model, loss_fn, (x, y), ["sqrt_ggn"])["sqrt_ggn"]


@pytest.mark.parametrize("name", models.MODELS)
def test_the_same_rows_as_by_the_loop(name, monkeypatch):
    model, x = models.make(name, 4)
    f = model(*x) if isinstance(x, tuple) else model(x)
    loss_fn, y = losses_table.make("ce", f)
    expected = roots(model, x, loss_fn, y)
    monkeypatch.setattr(many_vectors, "wanted", lambda *_: True)
    for _ in range(2):  # compared with a single one, and trusted
        found = roots(model, x, loss_fn, y)
        for k, t in expected.items():
            torch.testing.assert_close(found[k], t, rtol=1e-12, atol=1e-12)
    if name != "flattened":  # whose two classes have a single vector
        assert many_vectors._found_right[model]


def double(x):
    return 2 * x


@pytest.mark.parametrize("fault", ["an operation", "a wrong rule"])
def test_what_cannot_be_vectorised_takes_the_loop(fault, everywhere, monkeypatch):
    torch.manual_seed(0)
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    plain, faulty = Net(double).double(), Net(Doubled.apply if fault == "an operation" else double).double()
    faulty.load_state_dict(plain.state_dict())
    expected = roots(plain, x, nn.CrossEntropyLoss(), y)
    assert many_vectors._found_right[plain]
    if fault == "a wrong rule":
        monkeypatch.setattr(many_vectors, "_agree", lambda together, single: False)
    for _ in range(2):
        found = roots(faulty, x, nn.CrossEntropyLoss(), y)
        assert many_vectors._found_right[faulty] is None
        for k, t in expected.items():
            torch.testing.assert_close(found[k], t)


def test_few_samples_of_large_dense_layers_are_pulled_together_on_a_cpu():
    torch.manual_seed(0)
    large, small = nn.Linear(300, 500), nn.Linear(3, 500)
    for model, N, together in [(large, 8, True), (large, 65, False), (small, 8, False)]:
        net = nn.Sequential(model, nn.Sigmoid(), nn.Linear(500, 6)).double()
        x, y = torch.randn(N, model.in_features, dtype=torch.float64), torch.arange(N) % 6
        found = pb.statistics(net, nn.CrossEntropyLoss(), (x, y), ["diag_ggn"])["diag_ggn"]
        assert bool(many_vectors._found_right.get(net)) == together
        J = torch.func.vmap(torch.func.jacrev(lambda p, x, net=net: torch.func.functional_call(net, p, x)), (None, 0))
        rows = J({k: p.detach() for k, p in net.named_parameters()}, x)
        p = net(x).detach().softmax(1)
        H = p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1)
        for k, t in found.items():
            j = rows[k].flatten(2)
            torch.testing.assert_close(t.flatten(), torch.einsum("nad,nab,nbd->d", j, H, j) / N, rtol=1e-9, atol=1e-12)
