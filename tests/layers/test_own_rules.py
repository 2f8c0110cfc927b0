"""Rules as a user writes them, in the test: what they make of everything that is fed by rules."""

import re
import warnings
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from oracle import close
from torch import nn

import paraboloid as pb
from paraboloid.layers import RULES, Use, matrix, spread

CE = nn.CrossEntropyLoss()


def own(function):
    """A function of the user's, in the eyes of `torch.overrides`."""

    def op(*args):
        if torch.overrides.has_torch_function(args):
            return torch.overrides.handle_torch_function(op, args, *args)
        return function(*args)

    return op


def einsum_rule(equation, x, weight):
    if equation in ("nd,pd->np", "ntd,pd->ntp"):
        yield matrix(x, weight)


def left_alone_rule(x, weight):
    yield Use(
        weight, tuple(range(x.dim() - 1)), lambda g: g.reshape(len(g), -1, 1, 1, len(weight)),
        lambda rows: x.reshape(-1, 1, 1, x.shape[-1])[rows], q=x.shape[-1],
    )  # fmt: skip


def stored_sideways_rule(x, weight, bias):
    yield matrix(x, weight, flip=True)
    yield spread(bias)


def twice_rule(x, y, weight):
    """z = (x + y) W^T as two positions, which meet the same elements of z."""
    rows = torch.stack([x, y], 1).unsqueeze(1)
    yield Use(
        weight, (0,), right=lambda n: rows[n], q=x.shape[1], arrange=lambda g: g[:, :, None, None].expand(-1, -1, 1, 2, -1)
    )  # fmt: skip


product = own(lambda x, weight: x @ weight.T)
affine = own(lambda x, weight, bias: x @ weight + bias)
summed = own(lambda x, y, weight: (x + y) @ weight.T)


def einsum(x, weight, bias):
    return torch.einsum("nd,pd->np" if x.dim() == 2 else "ntd,pd->ntp", x, weight)


LAYERS = {
    "einsum": (torch.einsum, einsum_rule, einsum, False, False),
    "own function": (affine, stored_sideways_rule, affine, True, True),
}
LAYERS_OF_LEFT = {"left alone": (product, left_alone_rule, lambda x, weight, bias: product(x, weight), False, False)}


class Net(nn.Module):
    """Three layers, each `layer(x, weight, bias)` on a weight that is stored sideways or not."""

    def __init__(self, layer, biased, sideways, act=torch.tanh):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        sizes = [4, 6, 5, 3]
        W = [torch.randn(p, q, generator=g, dtype=torch.float64) / q**0.5 for q, p in pairwise(sizes)]
        self.weight = nn.ParameterList([w.T.contiguous() if sideways else w for w in W])
        self.bias = nn.ParameterList([torch.randn(len(w), generator=g).double() for w in W] if biased else [])
        self.layer, self.act = layer, act

    def forward(self, x):
        for i, w in enumerate(self.weight):
            x = self.layer(self.act(x) if i else x, w, self.bias[i] if len(self.bias) else None)
        return x.flatten(1) if x.dim() == 2 else x.mean(1)


def plain(x, weight, bias):
    return F.linear(x, weight, bias)


def pair(name, act=torch.tanh):
    """The net with the user's layers, and the same with F.linear."""
    _, _, layer, biased, sideways = (LAYERS | LAYERS_OF_LEFT)[name]
    return Net(layer, biased, sideways, act), Net(plain, biased, False, act), sideways


def batch(*shape):
    g = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=g, dtype=torch.float64), torch.arange(shape[0]) % 3


@pytest.fixture(autouse=True)
def no_fallback(monkeypatch):
    for op, rule, *_ in (LAYERS | LAYERS_OF_LEFT).values():
        monkeypatch.setitem(RULES, op, rule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("memory", [None, 1])
@pytest.mark.parametrize("shape", [(5, 4), (5, 2, 4)], ids=str)
@pytest.mark.parametrize("name", LAYERS | LAYERS_OF_LEFT)
def test_statistics_with_a_rule_of_ones_own(name, shape, memory):
    """Everything that F.linear has, kfra with its matrix whole or in blocks and diag_hessian included."""
    model, same, sideways = pair(name)
    wanted = ["variance", "kfac", "kflr", "diag_ggn", "diag_hessian"] + ["kfra"] * (name in LAYERS or memory is None)
    found, expected = (pb.statistics(m, CE, batch(*shape), wanted, max_memory=memory, seed=0) for m in (model, same))
    for quantity in wanted:
        for k, value in expected[quantity].items():
            turned = sideways and k.startswith("weight")
            got = found[quantity][k]
            if isinstance(value, torch.Tensor):
                close(got, value.T if turned else value, (quantity, k))
            else:
                close(got.right if turned else got.left, value.left, (quantity, k))
                close(got.left if turned else got.right, value.right, (quantity, k))


def test_without_an_input_in_the_rule_kfra_needs_the_whole_matrix():
    model, _, _ = pair("left alone")
    with pytest.raises(NotImplementedError, match="mixes channels and positions; kfra passes it with the whole matrix"):
        pb.statistics(model, CE, batch(5, 2, 4), "kfra", max_memory=1)


@pytest.mark.parametrize("name", LAYERS)
def test_kbfgs_with_a_rule_of_ones_own(name):
    """The same steps as with F.linear."""
    model, same, sideways = pair(name, torch.relu)
    x, y = batch(6, 4)
    for m in (model, same):
        opt = pb.optim.KBFGS(m, CE, lr=0.1)
        opt.warm_start([(x, y)])
        for _ in range(4):

            def closure(m=m, opt=opt):
                opt.zero_grad()
                loss = CE(m(x), y)
                loss.backward()
                return loss

            opt.step(closure)
        assert set(opt.diagnostics()["layers"]) >= {f"weight.{i}" for i in range(3)}
    for got, value in zip(model.weight, same.weight, strict=True):
        close(got.detach().T if sideways else got.detach(), value.detach())


def dense_diagonal(model, x, y):
    params = dict(model.named_parameters())
    grads = torch.autograd.grad(CE(model(x), y), list(params.values()), create_graph=True)
    return {
        k: torch.stack(
            [torch.autograd.grad(e, p, retain_graph=True)[0].flatten()[i] for i, e in enumerate(g.flatten())]
        ).view_as(p)
        for (k, p), g in zip(params.items(), grads, strict=True)
    }


def power_rule(x, p):
    yield spread(p, factor=lambda: x**p * x.log())


def division_rule(x, p):
    yield spread(p, factor=lambda: -x / p.square())


def scaling_rule(x, p):
    yield spread(p, factor=lambda: 3 * x)


SHAPED = {
    "power": (own(lambda x, p: x**p), power_rule),
    "division": (own(lambda x, p: x / p), division_rule),
    "scaling": (own(lambda x, p: 3 * x * p), scaling_rule),
}


@pytest.mark.parametrize("name", SHAPED)
def test_a_rule_that_is_not_affine_is_found_out(name, monkeypatch):
    """Wherever the rule lies: it used to be the folder of the rule that decided, and x ** p in the wrong one gave a
    silently wrong diag_hessian."""
    op, rule = SHAPED[name]
    rule.__module__ = "paraboloid.layers.elementwise"
    monkeypatch.setitem(RULES, op, rule)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.p, self.head = nn.Linear(4, 5), nn.Parameter(torch.rand(5) + 0.5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(op(self.inner(x).sigmoid(), self.p))

    torch.manual_seed(0)
    model, (x, y) = Model().double(), batch(4, 4)
    if name == "scaling":
        found = pb.statistics(model, CE, (x, y), "diag_hessian")["diag_hessian"]
    else:
        with pytest.warns(UserWarning, match=re.escape("the parameters ['p'] are used several times")):
            found = pb.statistics(model, CE, (x, y), "diag_hessian")["diag_hessian"]
    for k, value in dense_diagonal(model, x, y).items():
        close(found[k], value, k)


def test_positions_that_meet_in_one_output(monkeypatch):
    """The diagonal of an activation behind it is not enough: both positions reach the same outputs."""
    monkeypatch.setitem(RULES, summed, twice_rule)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(5, 4)), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(torch.tanh(summed(x, x.square(), self.weight)))

    torch.manual_seed(0)
    model, (x, y) = Model().double(), batch(3, 4)
    found = pb.statistics(model, CE, (x, y), "diag_hessian")["diag_hessian"]
    for k, value in dense_diagonal(model, x, y).items():
        close(found[k], value, k)


def test_a_weight_vector_between_layers():
    """z = x w: each output belongs to all of w."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.w, self.head = nn.Linear(4, 5), nn.Parameter(torch.randn(5)), nn.Linear(2, 3)

        def forward(self, x):
            return self.head(torch.tanh(torch.tanh(self.inner(x)) @ self.w))

    torch.manual_seed(0)
    model, (x, y) = Model().double(), batch(3, 2, 4)
    found = pb.statistics(model, CE, (x, y), "diag_hessian")["diag_hessian"]
    for k, value in dense_diagonal(model, x, y).items():
        close(found[k], value, k)
    with pytest.raises(NotImplementedError, match="several of 5 weights reach one output"):
        pb.statistics(model, CE, (x, y), "kfra")
