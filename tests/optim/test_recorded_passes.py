"""Several forward passes before the losses: every pass belongs to the loss that its output enters."""

import gc
import weakref

import pytest
import torch
from torch import nn

import paraboloid as pb

LOSS = nn.CrossEntropyLoss()
MAKERS = {
    "kfac": lambda m, loss=LOSS, **o: pb.optim.KFAC(m, loss, fisher="exact", split=None, **o),
    "kfac-split": lambda m, loss=LOSS, **o: pb.optim.KFAC(m, loss, fisher="exact", **o),
    "ekfac": lambda m, loss=LOSS, **o: pb.optim.EKFAC(m, loss, fisher="exact", **o),
    "diag": lambda m, loss=LOSS, **o: pb.optim.Preconditioned(m, loss, curvature="diag_ggn", **o),
    "kflr": lambda m, loss=LOSS, **o: pb.optim.Preconditioned(m, loss, curvature="kflr", **o),
}
ALL = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(N=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, 6, generator=g, dtype=torch.float64), torch.randint(3, (N,), generator=g)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Siamese(nn.Module):
    """What a loop does with two passes, as one module."""

    def __init__(self, net, join):
        super().__init__()
        self.net, self.join = net, join

    def forward(self, a, b):
        return self.join(self.net(a), self.net(b))


JOINS = {"difference": lambda f, g: f - g, "product": lambda f, g: f * g.tanh(), "columns": lambda f, g: f + g[:, :1]}


@ALL
@pytest.mark.parametrize("order", ["passes first", "last pass first", "one by one"])
def test_two_passes_and_two_losses_are_one_big_batch(make, order):
    model, twin, (x, y) = mlp(), mlp(), batch(20)
    opt, alone = make(model), make(twin)
    for _ in range(2):
        opt.zero_grad()
        if order == "one by one":
            total = LOSS(model(x[:12]), y[:12]) * 12 / 20 + LOSS(model(x[12:]), y[12:]) * 8 / 20
        else:
            first, second = model(x[:12]), model(x[12:])
            losses = [(first, y[:12], 12 / 20), (second, y[12:], 8 / 20)]
            losses = losses[::-1] if order == "last pass first" else losses
            total = sum(LOSS(f, t) * w for f, t, w in losses)
        total.backward()
        opt.step()
        alone.zero_grad()
        LOSS(twin(x), y).backward()
        alone.step()
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-8, atol=1e-10)


@ALL
@pytest.mark.parametrize("later", [True, False])
def test_a_pass_without_a_loss_counts_for_nothing(make, later):
    """A target network's forward pass with gradients on, a consistency term by a function."""
    model, twin, (x, y) = mlp(), mlp(), batch()
    opt, alone = make(model), make(twin)
    for _ in range(3):
        extra = None if later else model(x * 2)
        f = model(x)
        if later:
            extra = model(x * 2)
        opt.zero_grad()
        loss = LOSS(f, y)
        (loss + 0.1 * (extra - f).square().mean()).backward()
        opt.step()
        alone.zero_grad()
        f = twin(x)
        (LOSS(f, y) + 0.1 * (twin(x * 2) - f).square().mean()).backward()
        alone.step()
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-9, atol=1e-12)


@ALL
@pytest.mark.parametrize("join", JOINS.values(), ids=JOINS.keys())
def test_a_loss_of_two_passes_is_that_of_one_module_that_makes_both(make, join):
    model, twin, (x, y) = mlp(), mlp(), batch()
    a, b = x, x.flip(1)
    pair = Siamese(twin, join)
    opt, alone = make(model), make(pair)
    for _ in range(3):
        opt.zero_grad()
        LOSS(join(model(a), model(b)), y).backward()
        opt.step()
        alone.zero_grad()
        LOSS(pair(a, b), y).backward()
        alone.step()
    assert torch.equal(flat(model), flat(twin))


@ALL
def test_passes_joined_along_the_samples(make):
    """Each recorded call has some of the samples, along no axis that has N: their rows are sorted to their owners."""
    model, twin, (x, y) = mlp(), mlp(), batch()
    opt, alone = make(model), make(twin)
    with pytest.warns(UserWarning, match="rows are sorted to the samples that own them"):
        LOSS(torch.cat([model(x[:6]), model(x[6:])]), y).backward()
    opt.step()
    LOSS(twin(x), y).backward()
    alone.step()
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-9, atol=1e-12)


@ALL
def test_a_second_loss_on_a_pass_is_refused_also_after_another_pass(make):
    model, (x, y) = mlp(), batch()
    opt = make(model)
    f = model(x)
    loss = LOSS(f, y)
    model(x)
    assert LOSS(f, y) == loss  # for a log
    with pytest.raises(RuntimeError, match="called twice on one forward pass"):
        LOSS(f, y.flip(0))
    assert opt._measured.passes == 1


@ALL
def test_the_advice_for_mixup_works(make):
    """One call on the mixture's probabilities: value, gradient and step are those of the sum."""
    model, (x, y) = mlp(), batch()
    opt = make(model)
    f = model(x)
    LOSS(f, y)
    with pytest.raises(RuntimeError, match=r"different targets \(mixup\).*probabilities lam \* one_hot\(a\)"):
        LOSS(f, y.flip(0))
    opt.zero_grad()
    a, b = (nn.functional.one_hot(t, f.shape[1]).to(f.dtype) for t in (y, y.flip(0)))
    f = model(x)
    mixed = LOSS(f, 0.3 * a + 0.7 * b)
    torch.testing.assert_close(
        mixed, 0.3 * nn.functional.cross_entropy(f, y) + 0.7 * nn.functional.cross_entropy(f, y.flip(0))
    )
    mixed.backward()
    before = flat(model)
    opt.step()
    assert not torch.equal(flat(model), before)


def test_what_was_measured_is_freed_before_the_next_pass():
    """Accumulation over many passes takes the memory of one."""
    model, (x, y) = mlp(), batch()
    opt, tapes = MAKERS["diag"](model), []
    for _ in range(3):
        f = model(x)
        tapes.append(weakref.ref(opt._measured._recorded.passes[-1].tape))
        LOSS(f, y).backward()
        del f
    assert opt._measured.passes == 3
    gc.collect()
    assert all(tape() is None for tape in tapes)


def test_passes_that_nothing_is_made_of_are_let_go():
    model, (x, y) = mlp(), batch()
    opt = MAKERS["diag"](model)
    for _ in range(50):
        model(x)  # an evaluation that forgot no_grad
    assert len(opt._measured._recorded.passes) <= 8
    held = [model(x) for _ in range(20)]
    LOSS(torch.stack(held).mean(0), y).backward()
    opt.step()
    assert opt.diagnostics()["steps"] == 1


def test_the_quadratic_model_of_several_passes_is_that_of_all_their_samples():
    model, twin, (x, y) = mlp(), mlp(), batch()
    opt, alone = (pb.optim.KFAC(m, LOSS, fisher="exact", step_size="quadratic", lr=1.0) for m in (model, twin))
    for _ in range(2):
        opt.zero_grad()
        first, second = model(x[:10]), model(x[10:])
        (LOSS(first, y[:10]) * 10 / 16 + LOSS(second, y[10:]) * 6 / 16).backward()
        opt.step()
        alone.zero_grad()
        LOSS(twin(x), y).backward()
        alone.step()
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-8, atol=1e-10)
    LOSS(model(x) - model(x * 2), y).backward()
    with pytest.raises(RuntimeError, match="a loss of several passes of the model"):
        opt.step()
