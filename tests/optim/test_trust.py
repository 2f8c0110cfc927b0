"""Steps that go wrong are noticed, taken back or followed by shorter ones, and `diagnostics` says why."""

import copy
import io
import math
import warnings

import pytest
import torch
from torch import nn

import paraboloid as pb
from paraboloid.optim import foreach
from paraboloid.optim.trust import Trust

LOSS = nn.CrossEntropyLoss()
MEASURING = [pb.optim.KFAC, pb.optim.EKFAC, pb.optim.Preconditioned]
QUASI_NEWTON = [pb.optim.KBFGS, pb.optim.KBFGSL]


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(seed=0, N=32):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 6, generator=g, dtype=torch.float64)
    return x, x[:, :3].argmax(1)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def closure_of(model, opt, x, y):
    def closure():
        opt.zero_grad()
        loss = LOSS(model(x), y)
        loss.backward()
        return loss

    return closure


def take_step(model, opt, seed, closure=True):
    run = closure_of(model, opt, *batch(seed))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was not warmed up")
        if closure:
            return float(opt.step(run).detach())
        loss = float(run().detach())
        opt.step()
        return loss


def throw(model, size=30.0):
    """What a far too long step leaves."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.data.add_(size * torch.randn(p.shape, generator=g, dtype=p.dtype))


def test_slopes_of_a_parabola():
    """Along c t^2 / 2 from t = -1: a step of length a changes the loss by c (a^2 / 2 - a), whatever the slopes' size."""
    for c in (1.0, 1e6):
        for a, too_long in ((0.5, False), (1.9, False), (2.6, True), (5.0, True)):
            trust = Trust(2.0)
            trust.slope = -c * a
            assert trust.overshoots((trust.slope + c * (a - 1) * a) / 2) == too_long
    assert trust.overshoots(math.nan)


def test_a_rise_is_beyond_the_factor_and_the_spread():
    trust = Trust(2.0)
    assert not trust.rises(1e9)  # nothing to compare with
    for loss in (1.0, 1.2, 0.8, 1.0):
        trust.note(loss)
    assert not trust.rises(1.9) and trust.rises(3.0) and trust.rises(math.nan)
    assert not trust.rises(1.9, than=1.0) and trust.rises(2.2, than=1.0)
    negative = Trust(2.0)
    for loss in (-3.0, -3.0, -3.0):
        negative.note(loss)
    assert not negative.rises(-2.0) and negative.rises(1.0)
    assert negative.scale() == 3.0 and Trust(2.0).scale() is None


@pytest.mark.parametrize("make", MEASURING)
def test_with_a_closure_a_step_that_raised_the_loss_is_taken_back(make):
    model = mlp()
    opt = make(model, LOSS)
    for t in range(5):
        take_step(model, opt, t)
    good = [opt.state[p]["before"].clone() for p in model.parameters()]
    throw(model)
    loss = take_step(model, opt, 5)
    assert loss < 1.2  # of the parameters before the bad step: it was evaluated there
    for p, b in zip(model.parameters(), good, strict=True):
        torch.testing.assert_close(opt.state[p]["before"], b)  # and the step went on from them
    found = opt.diagnostics()["trust"]
    assert found["taken_back"] == 1 and found["rate"] < 0.6 and "was taken back" in found["why"]


@pytest.mark.parametrize("make", MEASURING)
def test_a_hard_batch_is_no_reason_to_go_back(make):
    model = mlp()
    opt = make(model, LOSS)
    for t in range(5):
        take_step(model, opt, t)
    before = flat(model)

    def hard():
        opt.zero_grad()
        loss = 20 * LOSS(model(batch(9)[0]), batch(9)[1])
        loss.backward()
        return loss

    opt.step(hard)
    found = opt.diagnostics()["trust"]
    assert found["taken_back"] == 0 and found["rose"] == 1
    assert float((flat(model) - before).norm()) < 1.0


def test_without_a_closure_steps_get_shorter_and_the_curvature_is_renewed():
    model = mlp()
    opt = pb.optim.KFAC(model, LOSS)
    for t in range(6):
        take_step(model, opt, t, closure=False)
    assert not opt._wanted()  # step 6 would measure nothing
    throw(model, 3.0)
    rate, good = opt.diagnostics()["trust"]["rate"], opt.state[model[0].weight]["before"].clone()
    take_step(model, opt, 6, closure=False)  # the slope along what happened is steep, upwards
    found = opt.diagnostics()["trust"]
    assert found["taken_back"] == 1 and found["rate"] == rate / 2 and "instead of lowering it" in found["why"]
    assert torch.equal(model[0].weight, good)  # this gradient tells nothing of it
    assert opt._wanted()
    updates = opt._blocks["0.weight"].updates["kron"]
    take_step(model, opt, 7, closure=False)
    assert opt._blocks["0.weight"].updates["kron"] == 2 and updates > 2  # the averages began anew
    assert opt.diagnostics()["trust"]["rate"] == rate / 2
    take_step(model, opt, 8, closure=False)
    assert opt.diagnostics()["trust"]["rate"] == pytest.approx(1.05 * rate / 2)


@pytest.mark.parametrize("closure", [True, False])
def test_parameters_that_somebody_else_changed_stay_so(closure):
    """New weights in the middle of a run, whatever their loss."""
    model = mlp()
    opt = pb.optim.KFAC(model, LOSS)
    for t in range(6):
        take_step(model, opt, t, closure)
    model.load_state_dict({k: 30 * v for k, v in mlp(seed=3).state_dict().items()})
    before = flat(model)
    take_step(model, opt, 6, closure)
    assert opt.diagnostics()["trust"]["taken_back"] == 0
    assert 0 < float((flat(model) - before).norm()) < 1.0


@pytest.mark.parametrize("make", QUASI_NEWTON)
def test_quasi_newton_steps_are_taken_back_at_once(make):
    model = mlp()
    opt = make(model, LOSS)
    for t in range(3):
        take_step(model, opt, t)
    opt.param_groups[0]["lr"] = 1e4
    before = flat(model)
    take_step(model, opt, 3)
    assert torch.equal(flat(model), before)
    found = opt.diagnostics()["trust"]
    assert found["taken_back"] == 1 and found["rate"] == 0.5 and "raised the loss of its batch" in found["why"]
    opt.param_groups[0]["lr"] = 0.3
    assert take_step(model, opt, 4) > take_step(model, opt, 4)


@pytest.mark.parametrize("make", QUASI_NEWTON)
def test_quasi_newton_steps_of_the_paper_stay(make):
    model = mlp()
    opt = make(model, LOSS, rise_factor=None, lr=1e4)
    before = flat(model)
    take_step(model, opt, 0)
    assert not torch.equal(flat(model), before) and opt.diagnostics()["trust"] is None


@pytest.mark.parametrize("make", MEASURING)
def test_parameters_from_which_nothing_finite_comes_are_left(make):
    model = mlp()
    opt = make(model, LOSS)
    for t in range(3):
        take_step(model, opt, t, closure=False)
    good = [opt.state[p]["before"].clone() for p in model.parameters()]
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    with pytest.warns(UserWarning, match="was skipped"):
        take_step(model, opt, 3, closure=False)
    for t in (4, 5):  # warned once
        take_step(model, opt, t, closure=False)
    for p, b in zip(model.parameters(), good, strict=True):
        assert torch.equal(p, b)
    assert "NaN or infinite" in opt.diagnostics()["trust"]["why"]
    assert take_step(model, opt, 6, closure=False) < 1.2


@pytest.mark.parametrize("make", [*MEASURING, *QUASI_NEWTON])
@pytest.mark.parametrize("at", [3, 4])
def test_a_resume_after_a_bad_step_is_bit_for_bit(make, at):
    """Saved right before and right after the bad step is noticed."""

    def go_on(model, opt, steps):
        for t in steps:
            if t == 3:
                throw(model, 3.0)
            opt.param_groups[0]["lr"] = 1e5 if t == 3 and make in QUASI_NEWTON else 0.1
            take_step(model, opt, t)

    model = mlp()
    opt, file = make(model, LOSS), io.BytesIO()
    go_on(model, opt, range(at))
    torch.save((model.state_dict(), opt.state_dict()), file)
    go_on(model, opt, range(at, 8))
    other = mlp(seed=5)
    fresh = make(other, LOSS)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    other.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    go_on(other, fresh, range(at, 8))
    assert torch.equal(flat(model), flat(other))
    assert fresh.diagnostics()["trust"] == opt.diagnostics()["trust"]
    assert opt.diagnostics()["trust"]["why"] != "no step was shortened"


@pytest.mark.parametrize("make, share", [(pb.optim.KFAC, 3e-4), (pb.optim.EKFAC, 1.5e-4)])
def test_the_default_clip_is_a_share_of_the_loss(make, share):
    """So that a multiple of the loss, with the same multiple of the damping, takes the same steps."""
    ends = []
    for scale in (1.0, 1000.0):
        model, loss_fn = mlp(), scale * pb.losses.CrossEntropy()
        opt = make(model, loss_fn, damping=0.1 * scale, fisher="exact")
        for t in range(4):
            x, y = batch(t)
            opt.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            opt.step()
            if t == 0:
                twin = mlp()  # trust is earned: a tenth of the step at first
                rival = make(twin, LOSS, lr=0.1, damping=0.1, fisher="exact", kl_clip=share * loss.item() / scale)
                take_step(twin, rival, 0)
                twin.load_state_dict(
                    {k: v.lerp(w, 0.1) for (k, v), w in zip(mlp().state_dict().items(), twin.parameters(), strict=True)}
                )
                torch.testing.assert_close(flat(model), flat(twin), rtol=1e-9, atol=1e-12)
        ends.append(flat(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-8)


def test_preconditioned_as_it_comes_takes_batch_norm_and_the_papers_is_one_argument_away():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)).double()
    opt = pb.optim.Preconditioned(model, LOSS)
    losses = [take_step(model, opt, t, closure=False) for t in range(30)]
    assert losses[-1] < 0.9 * losses[0]
    opt.remove()
    for options in ({"curvature": "diag_ggn_mc"}, {"damping": 1e-2}):
        paper = pb.optim.Preconditioned(mlp(), LOSS, **options)
        group = paper.param_groups[0]
        assert (paper.curvature, paper.decay, paper.kl_clip) == ("diag_ggn_mc", 0.0, None)
        assert (group["lr"], group["damping"], group["momentum"]) == (0.1, 1e-2, 0.0)


def test_options_out_of_range():
    for make in (pb.optim.KFAC, pb.optim.Preconditioned, pb.optim.KBFGS):
        with pytest.raises(ValueError, match=r"rise_factor is 1\.0; expected a number above 1"):
            make(mlp(), LOSS, rise_factor=1.0)
    with pytest.raises(ValueError, match="kl_clip is 'wide'; expected one of"):
        pb.optim.KFAC(mlp(), LOSS, kl_clip="wide")


def test_steps_that_keep_all_they_promise_grow_beyond_one_where_they_may():
    free, held = Trust(2.0, short=0.8), Trust(2.0)
    for trust in (free, held):
        for _ in range(40):
            trust.slope = -1.0
            trust.overshoots(-0.9)
            trust.grow()
    assert free.rate == 4.0
    assert held.rate == 1.0
    for _ in range(60):  # at the minimum along the step half of the promise is kept
        free.slope = -1.0
        free.overshoots(-0.5)
        free.grow()
    assert free.rate == 1.0


def eventful(kind, few, monkeypatch):
    """Steps in which parameters lose their gradients, are clamped from outside, or come back from a checkpoint."""
    monkeypatch.setattr(foreach, "FEW", few)
    model = mlp()
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "lr": 0.2}]
    wide = {} if kind is pb.optim.Preconditioned else {"kl_clip": 10.0}
    opt = kind(model, LOSS, params=groups, rise_factor=1.5, **wide, lr=0.3)
    rates = []
    for i in range(14):
        if i == 4:
            model[0].weight.requires_grad_(False)
        if i == 6:
            model[0].weight.requires_grad_(True)
        if i == 8:
            with torch.no_grad():
                model[2].weight.data.clamp_(-0.2, 0.2)  # no version tells of it
        if i == 10:
            state = copy.deepcopy(opt.state_dict())
            opt.remove()
            opt = kind(model, LOSS, params=groups, rise_factor=1.5, **wide, lr=0.3)
            opt.load_state_dict(state)
        if i == 12:
            throw(model, 3.0)
        take_step(model, opt, i, closure=False)
        rates.append((opt.trust.rate, opt.trust.slope, dict(opt.trust.events)))
    return flat(model), rates


@pytest.mark.parametrize("kind", MEASURING)
def test_steps_of_few_parameters_are_those_of_many(kind, monkeypatch):
    few, many = eventful(kind, 10**6, monkeypatch), eventful(kind, 0, monkeypatch)
    torch.testing.assert_close(few[0], many[0], rtol=1e-9, atol=1e-10)
    for a, b in zip(few[1], many[1], strict=True):
        assert (a[0], a[1] is None, a[2]) == (b[0], b[1] is None, b[2])
        assert a[1] is None or a[1] == pytest.approx(b[1], rel=1e-7)


def test_what_a_step_remembers_is_the_parameters_before_it():
    model = mlp()
    opt = pb.optim.KFAC(model, LOSS)
    for i in range(4):
        if i == 2:
            model[0].weight.data.mul_(1.001)  # no version tells of it
        before = [p.detach().clone() for p in model.parameters()]
        take_step(model, opt, i, closure=False)
        assert all(torch.equal(opt.state[p]["before"], b) for p, b in zip(model.parameters(), before, strict=True))
