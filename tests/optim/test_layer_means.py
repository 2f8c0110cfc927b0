"""Reading ordinary layers in their modules, without a recording and without gradients that nobody needs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import paraboloid as pb
from paraboloid.optim import layer_means, plain_layers


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 3, bias=False), nn.Flatten(),
        nn.Linear(48, 7), nn.Tanh(), nn.Linear(7, 6),
    ).double()  # fmt: skip


def data():
    g = torch.Generator().manual_seed(1)
    return torch.rand(5, 2, 6, 6, generator=g, dtype=torch.float64), torch.rand(5, 6, generator=g, dtype=torch.float64)


def plain(model, x, y):
    F.mse_loss(model(x), y).backward()


def in_two_parts(model, x, y):
    for part in (slice(3), slice(3, None)):
        (F.mse_loss(model(x[part]), y[part]) * len(x[part]) / len(x)).backward()


def checkpointed(model, x, y):
    F.mse_loss(torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False), y).backward()


def balanced_by_the_size_of_gradients(model, x, y):
    f = model(x)
    losses = F.mse_loss(f, y), f.square().mean()
    a, b = (torch.autograd.grad(loss, model[4].weight, retain_graph=True)[0].norm() for loss in losses)
    (losses[0] + a / b * losses[1]).backward()


def with_a_penalty_on_gradients(model, x, y):
    loss = F.mse_loss(model(x), y)
    grads = torch.autograd.grad(loss, [model[4].weight, model[6].weight], create_graph=True)
    (loss + sum(g.square().sum() for g in grads)).backward()


def clipped_by_hand(model, x, y):
    plain(model, x, y)
    for p in model.parameters():
        p.grad.clamp_(-0.01, 0.01)


def trained(backward, steps=6, make=pb.optim.KBFGS):
    model, (x, y) = network(), data()
    wrapped = nn.Sequential(model) if backward is checkpointed else model  # whose forward pass is all of it
    opt = make(model, nn.MSELoss())

    def closure():
        opt.zero_grad()
        backward(wrapped if backward is not checkpointed else model, x, y)
        return F.mse_loss(model(x), y).detach()

    opt.warm_start([(x, y)])
    for _ in range(steps):
        opt.step(closure)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), opt


CLOSURES = [plain, in_two_parts, checkpointed, balanced_by_the_size_of_gradients, with_a_penalty_on_gradients,
            clipped_by_hand]  # fmt: skip


@pytest.mark.parametrize("backward", CLOSURES, ids=lambda f: f.__name__)
def test_what_the_second_pass_leaves_out_changes_nothing(backward, monkeypatch):
    monkeypatch.setattr(plain_layers, "LARGE", 10**18)
    expected, _ = trained(backward)
    monkeypatch.setattr(plain_layers, "LARGE", 0)
    found, _ = trained(backward)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_the_second_pass_computes_no_gradient_of_large_weights(monkeypatch):
    monkeypatch.setattr(plain_layers, "LARGE", 0)
    model, (x, y), seen = network(), data(), []
    opt = pb.optim.KBFGS(model, nn.MSELoss())
    opt.warm_start([(x, y)])

    def closure():
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        seen.append({name: p.grad.clone() for name, p in model.named_parameters()})
        return loss

    opt.step(closure)
    assert all(g.any() for g in seen[0].values())
    assert {name for name, g in seen[1].items() if not g.any()} == {n for n in seen[1] if n.endswith("weight")}
    assert all(torch.equal(p.grad, seen[0][name]) for name, p in model.named_parameters())  # of the first pass


@pytest.mark.parametrize("make", [pb.optim.KBFGS, pb.optim.KBFGSL])
def test_a_step_without_a_recording_is_the_same(make, monkeypatch):
    found, opt = trained(plain, 8, make)
    assert opt._readings.settled
    monkeypatch.setattr(layer_means, "OFTEN", 1)
    expected, _ = trained(plain, 8, make)
    assert torch.equal(found, expected)


def test_ordinary_layers_read_as_their_rules_say(monkeypatch):
    found, opt = trained(in_two_parts)
    monkeypatch.setattr(plain_layers, "OPERATIONS", {})
    expected, other = trained(in_two_parts)
    assert opt._readings.plain and not other._readings.plain
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_another_use_of_a_weight_is_noticed_when_it_is_recorded_again(monkeypatch):
    monkeypatch.setattr(layer_means, "OFTEN", 5)
    x, y = data()

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.twice = network(), False

        def forward(self, x):
            f = self.inner(x)
            return f + F.linear(F.pad(f, (0, 1)), self.inner[6].weight) if self.twice else f

    model = Twice()
    opt = pb.optim.KBFGS(model, nn.MSELoss())
    opt.warm_start([(x, y)])

    def closure():
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    for model.twice in (False, True):
        for _ in range(5):
            opt.step(closure)
        assert ("inner.6.weight" in opt._readings.means()) is not model.twice


def test_a_forward_pass_of_the_users_own_stays():
    model, (x, y) = network(), data()
    opt = pb.optim.KBFGS(model, nn.MSELoss())
    opt.warm_start([(x, y)])
    model[4].forward = own = lambda x: F.linear(x, model[4].weight, model[4].bias).clamp(-1, 1)

    def closure():
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    opt.step(closure)
    assert model[4].forward is own


def test_a_module_has_its_own_forward_pass_outside():
    model, (x, y) = network(), data()
    opt = pb.optim.KBFGS(model, nn.MSELoss())
    opt.warm_start([(x, y)])

    def fails():
        model(x)
        assert not any("forward" in vars(m) for m in model.modules())
        raise KeyError

    with pytest.raises(KeyError):
        opt.step(fails)
    with pytest.raises(RuntimeError):
        opt.step(lambda: model(x[:, :1]))  # fails inside the forward pass
    assert not any("forward" in vars(m) for m in model.modules())
