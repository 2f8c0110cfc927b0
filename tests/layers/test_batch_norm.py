"""Batch norm in training mode: the gradient and Kronecker factors accept it, whatever needs single samples refuses."""

import pytest
import torch
import torch.nn.functional as F
from layers.cases import Around
from layers.test_kronecker import double, draw
from oracle import close
from torch import nn

import paraboloid as pb

CE = nn.CrossEntropyLoss()
Y = torch.tensor([0, 2, 1, 2])


class Block(nn.Module):
    """A residual block, as in ResNets."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2)
        self.conv, self.norm2 = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2, affine=False)
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        x = F.relu_(self.norm1(self.stem(x)))
        x = F.relu_(x + self.norm2(self.conv(x)))
        return self.head(x.mean((2, 3)))


def block():
    return double(Block), draw(4, 1, 5, 5)


def test_the_gradient_and_the_factors_of_the_definition():
    """Rows of left are gradients at the layers' outputs of the summed loss, through the batch's statistics."""
    model, x = block()
    seen = {}
    hooks = [
        m.register_forward_hook(lambda _, x, z, k=k: seen.update({k: (x[0].detach(), z)}))
        for k, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)
    ]  # fmt: skip
    value = 4 * CE(model(x), Y)
    for h in hooks:
        h.remove()
    full = torch.autograd.grad(value / 4, dict(model.named_parameters()).values(), retain_graph=True)
    edges = {k: torch.autograd.graph.GradientEdge(seen[k][1].grad_fn, 0) for k in ("stem", "conv", "head")}
    rows = dict(zip(edges, torch.autograd.grad(value, list(edges.values())), strict=True))
    stats = pb.statistics(model, CE, (x, Y), ["grad", "kfac_empirical"])
    for (k, _), g in zip(model.named_parameters(), full, strict=True):
        close(stats["grad"][k], g, k)
    for k, g in rows.items():
        r, m = seen[k][0], model.get_submodule(k)
        if isinstance(m, nn.Conv2d):
            r, g = F.unfold(r, m.kernel_size, padding=m.padding).mT.flatten(0, 1), g.flatten(2).mT.flatten(0, 1)
        kron = stats["kfac_empirical"][f"{k}.weight"]
        close(kron.left, g.T @ g / 4, k)
        close(kron.right, r.T @ r / len(r), k)


def test_the_norms_own_weight_and_bias_take_the_rows_of_their_output():
    model = double(lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)))
    x = draw(4, 3)
    stats = pb.statistics(model, CE, (x, Y), "kfac_empirical")["kfac_empirical"]
    p = model(x).softmax(1).detach() - F.one_hot(Y, 3)
    g = p @ model[1].weight.detach()
    xhat = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    close(stats["0.bias"].left, g.T @ g / 4)
    close(stats["0.weight"].left, (g * xhat).T @ (g * xhat) / 4)


@pytest.mark.parametrize(
    "quantities", ["variance", "sample_grads", "square_norms", "diag_ggn", "diag_ggn_mc", ["kfac", "gram"]]
)
def test_quantities_of_single_samples_refuse(quantities):
    model, x = block()
    with pytest.raises(ValueError, match=r"does not separate into the 4 samples.*BatchNorm in training mode"):
        pb.statistics(model, CE, (x, Y), quantities)
    first = double(lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)))
    with pytest.raises(ValueError, match=r"batch_norm on 0.weight, 0.bias ran in training mode.*model\.eval\(\)"):
        pb.statistics(first, CE, (draw(4, 3), Y), quantities)


@pytest.mark.parametrize("quantity", ["kfac", "kflr", "kfac_empirical", "grad"])
def test_other_mixing_is_refused_all_the_same(quantity):
    for function in (lambda m, x: (z := m.layer(x)) + z.flip(0), lambda m, x: m.layer(x).softmax(0)):
        model = double(lambda function=function: Around(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), function))
        with pytest.raises(ValueError, match="does not separate into the 4 samples"):
            pb.statistics(model, CE, (draw(4, 3), Y), quantity)


@pytest.mark.parametrize("length", [4, 2])
def test_the_samples_axis_is_found_through_it(length):
    """A layer in front sees [T, N, D], with as many steps as samples."""

    class Sequence(nn.Module):
        def __init__(self, first):
            super().__init__()
            self.layer, self.norm, self.first = nn.Linear(3, 3), nn.BatchNorm1d(3), first

        def forward(self, x):
            z = self.layer(x.transpose(0, 1)).transpose(0, 1) if self.first else self.layer(x)
            return self.norm(torch.tanh(z).mT).square().sum(2)

    x = draw(4, length, 3)
    for sharing in ("expand", "reduce"):
        quantity = pb.quantities.KFAC("empirical", sharing=sharing)
        one, other = (
            pb.statistics(double(lambda first=first: Sequence(first)), CE, (x, Y), quantity)["kfac_empirical"]
            for first in (True, False)
        )
        close(one["layer.weight"].left, other["layer.weight"].left)
        close(one["layer.weight"].right, other["layer.weight"].right)


def test_a_training_step_goes_on_as_without_us():
    model, x = block()
    plain = double(Block)
    CE(plain(x), Y).backward()
    with pb.record(model) as tape:
        output = model(x)
    tape.statistics(CE, output, Y, ["kfac", "grad"], accumulate_grad=True)
    for (k, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        close(p.grad, q.grad, k)
        p.grad = None
    CE(output, Y).backward()
    for (k, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), k
    for (k, b), c in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(b, c), k  # the running statistics moved once


def test_statistics_leave_the_running_ones_alone():
    model, x = block()
    before = {k: b.clone() for k, b in model.named_buffers()}
    pb.statistics(model, CE, (x, Y), "kfac")
    assert all(torch.equal(before[k], b) for k, b in model.named_buffers())
    assert model.training


def test_sampled_factors_average_to_those_without_cross_terms():
    """Labels of different samples are independent, so what samples feel of each other drops out of the mean square."""
    model = double(lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 3)))
    x = draw(4, 3)
    z = model[0](x)
    f = model[2](model[1](z))
    p = f.softmax(1).detach()
    truth = torch.zeros(2, 2).double()
    for n in range(4):
        for c in range(3):
            v = torch.zeros_like(f)
            v[n] = (p[n] - F.one_hot(torch.tensor(c), 3)) * p[n, c].sqrt()
            (g,) = torch.autograd.grad(f, z, v, retain_graph=True)
            truth += g.T @ g / 4
    draws = torch.stack(
        [
            pb.statistics(model, CE, (x, Y), pb.quantities.KFAC(samples=5), seed=s)["kfac"]["0.weight"].left
            for s in range(80)
        ]
    )
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - truth).abs() < 4.5 * error).all()
