"""A saved state brings everything that says what is computed; parameters may come later; schedules act."""

import inspect
import io
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import paraboloid as pb

LOSS = nn.CrossEntropyLoss()
KRONECKER = [
    {}, {"fisher": "exact"}, {"fisher": "empirical", "sharing": "reduce"}, {"samples": 3}, {"split": None},
    {"factor_decay": 0.5, "factor_interval": 1}, {"inverse_interval": 2, "factor_interval": 1},
    {"adapt_damping": True, "damping_interval": 1}, {"adapt_damping": True, "damping_interval": 2, "split": None},
    {"reject": True, "lr": 3.0}, {"kl_clip": 1e-3}, {"max_step": 1e-2}, {"graft": "sgd"}, {"graft": "adam"},
    {"step_size": "quadratic", "lr": 0.7}, {"measure_on": "half", "factor_interval": 1},
    {"momentum": 0.5, "nesterov": True, "weight_decay": 0.1}, {"decoupled": True, "weight_decay": 0.1},
    {"damping": 0.3, "seed": 5},
]  # fmt: skip
DIAGONAL = [{}, {"curvature": "second_moment", "decay": 0.5}, {"curvature": "kfac", "momentum": 0.9},
            {"curvature": "diag_hessian", "weight_decay": 0.1}, {"damping": 0.5, "seed": 3}]  # fmt: skip
QUASI_NEWTON = [{}, {"lr": 0.05, "damping": 0.1}, {"momentum": 0.5, "decay": 0.5, "weight_decay": 0.1}]
FREE = [
    {"max_iterations": 4}, {"curvature": "fisher", "seed": 3, "debias": True}, {"curvature": "hessian"},
    {"progress": 1e-2, "damping": 0.3}, {"backtrack": False, "line_search": False, "adapt_damping": False, "lr": 0.5},
    {"warm_start": 0.5, "preconditioner": "second_moment", "weight_decay": 0.1},
]  # fmt: skip
POLAR = [{}, {"graft": None, "nesterov": False}, {"momentum": 0.5, "weight_decay": 0.1, "decoupled": True}]
CASES = [
    *((pb.optim.KFAC, options) for options in KRONECKER),
    *((pb.optim.EKFAC, options) for options in KRONECKER if "split" not in options),
    *((pb.optim.Preconditioned, options) for options in DIAGONAL),
    *((pb.optim.KBFGS, options) for options in QUASI_NEWTON),
    *((pb.optim.KBFGSL, options) for options in [*QUASI_NEWTON, {"memory": 2}]),
    *((pb.optim.HessianFree, options) for options in FREE),
    *((pb.optim.Polar, options) for options in POLAR),
]
EVERY = [pb.optim.KFAC, pb.optim.EKFAC, pb.optim.Preconditioned, pb.optim.KBFGS, pb.optim.KBFGSL, pb.optim.HessianFree,
         pb.optim.Polar]  # fmt: skip
SAVED, STEPS = 4, 8


def mlp(seed=0, hidden=8):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, hidden), nn.Tanh(), nn.Dropout(0.1), nn.Linear(hidden, 3)).double()


def batch(seed, N=16):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 6, generator=g, dtype=torch.float64)
    return x, (x[:, :3] + 0.1 * torch.randn(N, 3, generator=g, dtype=torch.float64)).argmax(1)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def take_step(model, opt, seed):
    """One step of any optimiser; dropout masks follow the seed."""
    torch.manual_seed(seed)
    x, y = batch(seed)

    def closure():
        opt.zero_grad()
        loss = LOSS(model(x), y)
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was not warmed up")
        return opt.step((x, y)) if isinstance(opt, pb.optim.HessianFree) else opt.step(closure)


def schedule(opt):
    return torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t // 2))


def train(model, opt, scheduler, steps):
    for t in steps:
        take_step(model, opt, t)
        scheduler.step()


@pytest.mark.parametrize("make, options", CASES, ids=lambda it: getattr(it, "__name__", str(it)))
def test_a_resume_takes_the_options_of_the_state(make, options):
    """Into an optimiser that was built with none of them, schedules acting before and after."""
    model = mlp()
    opt = make(model, LOSS, **options)
    scheduler, file = schedule(opt), io.BytesIO()
    train(model, opt, scheduler, range(SAVED))
    torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "schedule": scheduler.state_dict()}, file)
    train(model, opt, scheduler, range(SAVED, STEPS))

    state, other = torch.load(io.BytesIO(file.getvalue()), weights_only=True), mlp(seed=9)
    fresh = make(other, LOSS)
    scheduler = schedule(fresh)
    other.load_state_dict(state["model"])
    fresh.load_state_dict(state["opt"])
    scheduler.load_state_dict(state["schedule"])
    train(other, fresh, scheduler, range(SAVED, STEPS))
    assert torch.equal(flat(other), flat(model))
    assert repr(fresh.diagnostics()) == repr(opt.diagnostics())
    assert fresh.param_groups[0] | {"params": 0} == opt.param_groups[0] | {"params": 0}


@pytest.mark.parametrize("make", EVERY)
def test_every_option_is_in_the_state(make):
    """By group, among the optimiser's own, or (the seed) as its generator's; but for those about this run's machine."""
    opt = make(mlp(), LOSS)
    here = {"model", "loss_fn", "params", "verify", "max_memory", "all_reduce", "output", "options"}
    saved = set(opt.defaults) | set(opt.state_dict()["paraboloid"]["options"]) | {"seed"}
    saved |= {"measure_on"} if "half" in saved else set()
    assert set(inspect.signature(make).parameters) - here <= saved


@pytest.mark.parametrize("make", EVERY)
def test_schedules_act_after_a_resume(make):
    model, other = mlp(), mlp(seed=1)
    opt, fresh = make(model, LOSS), make(other, LOSS)
    take_step(model, opt, 0)
    fresh.load_state_dict(opt.state_dict())
    for group in fresh.param_groups:
        group["lr"] = 0.0
    before = flat(other)
    take_step(other, fresh, 1)
    assert torch.equal(flat(other), before)


@pytest.mark.parametrize("make", EVERY)
def test_a_state_of_other_shapes_is_refused(make):
    model, wide = mlp(), mlp(hidden=9)
    opt, other = make(model, LOSS), make(wide, LOSS)
    take_step(model, opt, 0)
    before = repr(other.state_dict())
    with pytest.raises(ValueError, match=r"parameter '0.weight' has shape \(8, 6\); expected \(9, 6\)"):
        other.load_state_dict(opt.state_dict())
    assert repr(other.state_dict()) == before


@pytest.mark.parametrize("make", EVERY)
def test_parameters_that_come_later(make):
    """Gradual unfreezing: the head alone, then all; and resumed right after the new group came."""
    model = mlp()
    model[0].requires_grad_(False)
    opt = make(model, LOSS, lr=0.05)
    first = model[0].weight.detach().clone()
    for t in range(3):
        take_step(model, opt, t)
    assert torch.equal(model[0].weight, first)
    model[0].requires_grad_(True)
    opt.add_param_group({"params": list(model[0].parameters()), "lr": 0.01})
    state = {"model": {k: v.clone() for k, v in model.state_dict().items()}, "opt": opt.state_dict()}
    file = io.BytesIO()
    torch.save(state, file)
    for t in range(3, 6):
        take_step(model, opt, t)
    assert not torch.equal(model[0].weight, first)

    state, other = torch.load(io.BytesIO(file.getvalue()), weights_only=True), mlp(seed=2)
    fresh = make(other, LOSS, params=[{"params": other[3].parameters()}, {"params": other[0].parameters()}])
    other.load_state_dict(state["model"])
    fresh.load_state_dict(state["opt"])
    for t in range(3, 6):
        take_step(other, fresh, t)
    assert torch.equal(flat(other), flat(model))
    with pytest.raises(ValueError, match="no trainable parameter of Sequential"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(opt.param_groups) == 2


def test_the_curvature_of_a_parameter_that_comes_later_is_measured_at_once():
    model = mlp().eval()
    model[0].requires_grad_(False)
    opt = pb.optim.KFAC(model, LOSS, lr=0.1, damping=1e-2, fisher="exact", split=None, momentum=0.0,
                        kl_clip=None)  # fmt: skip
    for t in range(3):
        take_step(model, opt, t)
    model[0].requires_grad_(True)
    opt.add_param_group({"params": list(model[0].parameters())})
    x, y = batch(3)
    g = torch.autograd.grad(LOSS(model(x), y), list(model.parameters()))
    want = pb.KFAC(model, LOSS, (x, y), fisher="exact").inverse(1e-2) @ torch.cat([each.flatten() for each in g])
    before = model[0].weight.detach().clone()
    take_step(model, opt, 3)
    torch.testing.assert_close((before - model[0].weight.detach()).flatten(), 0.1 * want[: before.numel()])


def test_a_group_that_comes_between_the_pass_and_the_step():
    model, (x, y) = mlp().eval(), batch(0)
    model[0].requires_grad_(False)
    opt = pb.optim.KFAC(model, LOSS)
    for t in range(3):
        take_step(model, opt, t)
    LOSS(model(x), y).backward()
    model[0].requires_grad_(True)
    opt.add_param_group({"params": list(model[0].parameters())})
    opt.step()
    assert opt.diagnostics()["layers"]["0.weight"]["structure"] == "none"
    take_step(model, opt, 3)
    assert opt.diagnostics()["layers"]["0.weight"]["structure"] == "kronecker"


def test_the_quadratic_model_with_its_defaults_sees_every_batch():
    model = mlp().eval()
    opt = pb.optim.KFAC(model, LOSS, step_size="quadratic", lr=1.0)
    losses = [take_step(model, opt, t % 3).item() for t in range(14)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("make", EVERY)
def test_distributed_checkpoints_hold_everything(make, tmp_path):
    """get_state_dict keeps `state` and `param_groups` alone, and set_state_dict begins with a fresh optimiser."""
    model = mlp()
    options = {} if make is pb.optim.HessianFree else {"momentum": 0.7}
    given = {} if make is pb.optim.Polar else {"damping": 0.2}
    opt = make(model, LOSS, **given, **options)
    train(model, opt, schedule(opt), range(SAVED))
    own, states = get_state_dict(model, opt)
    before = flat(model).clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it saves without a process group
        dcp.save({"model": own, "opt": states}, checkpoint_id=tmp_path)
        other = mlp(seed=3)
        fresh = make(other, LOSS, **options)
        own, states = get_state_dict(other, fresh)
        found = {"model": own, "opt": states}
        dcp.load(found, checkpoint_id=tmp_path)
    set_state_dict(other, fresh, model_state_dict=found["model"], optim_state_dict=found["opt"])
    assert torch.equal(flat(other), before)
    assert fresh.counters == opt.counters
    for t in range(SAVED, STEPS):
        take_step(model, opt, t)
        take_step(other, fresh, t)
    assert torch.equal(flat(other), flat(model))


@pytest.mark.parametrize("make", EVERY)
def test_a_fresh_optimiser_has_a_distributed_state_without_a_step(make):
    model = mlp()
    opt, before = make(model, LOSS), flat(model).clone()
    _, states = get_state_dict(model, opt, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert set(states["state"]) == {name for name, _ in model.named_parameters()}
    assert torch.equal(flat(model), before)
    assert opt.diagnostics()["steps"] == opt.diagnostics()["skipped"] == 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("make", EVERY)
def test_a_loaded_state_is_not_shared_with_the_optimiser_that_it_is_of(make):
    model, other = mlp(), mlp()
    opt, fresh = make(model, LOSS), make(other, LOSS)
    for t in range(3):
        take_step(model, opt, t)
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(opt.state_dict())
    take_step(model, opt, 3)
    take_step(other, fresh, 3)
    assert torch.equal(flat(other), flat(model))
