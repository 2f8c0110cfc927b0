"""Optimisers where trainers make and step them, with torch's own options, schedules and memory formats."""

import copy
import warnings

import pytest
import torch
from torch import nn

import paraboloid as pb

LOSS = nn.CrossEntropyLoss()
EVERY = {
    "KFAC": pb.optim.KFAC, "EKFAC": pb.optim.EKFAC, "Preconditioned": pb.optim.Preconditioned,
    "KBFGS": pb.optim.KBFGS, "KBFGSL": pb.optim.KBFGSL, "HessianFree": pb.optim.HessianFree,
    "Polar": pb.optim.Polar,
}  # fmt: skip
ALL = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY.keys())
OPTIONS = [
    (pb.optim.KFAC, {}), (pb.optim.KFAC, {"split": None, "fisher": "exact"}), (pb.optim.KFAC, {"graft": "adam"}),
    (pb.optim.KFAC, {"sharing": "reduce", "kl_clip": 1e-3}), (pb.optim.KFAC, {"step_size": "quadratic"}),
    (pb.optim.KFAC, {"adapt_damping": True, "reject": True, "nesterov": True}), (pb.optim.EKFAC, {}),
    (pb.optim.EKFAC, {"graft": "sgd", "weight_decay": 0.1}), (pb.optim.Preconditioned, {"momentum": 0.9}),
    (pb.optim.Preconditioned, {"curvature": "kflr"}), (pb.optim.Preconditioned, {"curvature": "diag_hessian"}),
    (pb.optim.KBFGS, {}), (pb.optim.KBFGSL, {"memory": 2}), (pb.optim.Polar, {}), (pb.optim.Polar, {"graft": None}),
    (pb.optim.HessianFree, {"preconditioner": "second_moment", "warm_start": 0.5}),
]  # fmt: skip


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(N=16, dtype=torch.float32):
    x = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
    return x.to(dtype), x[:, :3].argmax(1)


def take_step(opt, model, x, y):
    def closure():
        opt.zero_grad()
        loss = LOSS(model(x), y)
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was not warmed up")
        return opt.step((x, y)) if isinstance(opt, pb.optim.HessianFree) else opt.step(closure)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@ALL
@pytest.mark.parametrize("kind", ["one cycle", "cyclic", "plateau", "cosine"])
def test_schedules_of_torch(make, kind):
    model, (x, y) = mlp(), batch()
    opt, schedulers = make(model, LOSS), torch.optim.lr_scheduler
    before = opt.param_groups[0]["lr"]
    schedule = {
        "one cycle": lambda: schedulers.OneCycleLR(opt, 0.1, total_steps=8),
        "cyclic": lambda: schedulers.CyclicLR(opt, 0.02, 0.1, step_size_up=3),
        "plateau": lambda: schedulers.ReduceLROnPlateau(opt, patience=0, threshold=1e9),
        "cosine": lambda: schedulers.CosineAnnealingLR(opt, 8),
    }[kind]()
    if kind == "one cycle" and isinstance(opt, pb.optim.Preconditioned):
        assert opt.param_groups[0]["momentum"] == 0.95
    for _ in range(4):
        loss = take_step(opt, model, x, y)
        schedule.step(*([float(loss.detach())] if kind == "plateau" else []))
    assert opt.param_groups[0]["lr"] != before
    assert torch.isfinite(flat(model)).all()


def test_momentum_of_the_groups_is_the_warm_start_of_hessian_free():
    model, twin, (x, y) = mlp(), mlp(), batch()
    opt, other = pb.optim.HessianFree(model, LOSS, warm_start=0.5), pb.optim.HessianFree(twin, LOSS)
    other.param_groups[0]["momentum"] = 0.5
    for _ in range(3):
        take_step(opt, model, x, y)
        take_step(other, twin, x, y)
    assert torch.equal(flat(model), flat(twin))


@ALL
def test_a_learning_rate_may_be_a_tensor(make):
    model, twin, (x, y) = mlp(), mlp(), batch()
    opt, other = make(model, LOSS, lr=torch.tensor(0.25)), make(twin, LOSS, lr=0.25)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    for _ in range(3):
        take_step(opt, model, x, y)
        take_step(other, twin, x, y)
        schedule.step()
        other.param_groups[0]["lr"] *= 0.5
    assert torch.equal(flat(model), flat(twin))
    with pytest.raises(ValueError, match="expected a number of at least 0"):
        make(mlp(), LOSS, lr=torch.tensor(-1.0))


@ALL
def test_torch_s_other_options_have_no_effect_or_a_reason(make):
    for options in ({"foreach": True}, {"foreach": None, "fused": False}, {"maximize": False}, {"capturable": False}):
        make(mlp(), LOSS, **options)
    with pytest.raises(ValueError, match=r"maximize is True; expected False, .* Minimise its negative"):
        make(mlp(), LOSS, maximize=True)
    model = mlp()
    with pytest.raises(ValueError, match="maximize is True"):
        make(model, LOSS, params=[{"params": model.parameters(), "maximize": True}])
    for option in ("fused", "capturable", "differentiable"):
        with pytest.raises(ValueError, match=f"{option} is True; expected False, for"):
            make(mlp(), LOSS, **{option: True})
    with pytest.raises(TypeError, match=r"got an unexpected option 'learning_rate'; see help"):
        make(mlp(), LOSS, learning_rate=0.1)


@ALL
def test_made_from_parameters_alone_it_says_how_trainers_give_model_and_loss(make):
    model = mlp()
    for wrong in (model.parameters(), list(model.parameters()), [{"params": model.parameters()}]):
        for args in ((wrong,), (wrong, LOSS)):
            with pytest.raises(TypeError, match=r"watches both for curvature.*def initialize_optimizer\(self"):
                make(*args, lr=0.1)
    with pytest.raises(TypeError, match="got no loss_fn; expected"):
        make(model)


@ALL
def test_output_is_taken_everywhere(make):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return {"logits": self.net(x)}

    model, (x, y) = Wrapped(), batch()
    opt = make(model, LOSS, output=lambda o: o["logits"])
    before = flat(model)

    def closure():
        opt.zero_grad()
        loss = LOSS(model(x)["logits"], y)
        loss.backward()
        return loss

    if hasattr(opt, "warm_start") and callable(opt.warm_start):
        opt.warm_start([(x, y)])
    opt.step((x, y)) if isinstance(opt, pb.optim.HessianFree) else opt.step(closure)
    assert not torch.equal(flat(model), before)


def test_hessian_free_says_what_a_trainer_is_to_do():
    model, (x, y) = mlp(), batch()
    opt = pb.optim.HessianFree(model, LOSS)
    for call in (lambda: opt.step(closure=lambda: LOSS(model(x), y)), lambda: opt.step(lambda: LOSS(model(x), y))):
        with pytest.raises(ValueError, match=r"step got a closure; .*automatic_optimization = False"):
            call()


@pytest.mark.parametrize("make, options", OPTIONS, ids=lambda it: getattr(it, "__name__", str(it)))
def test_channels_last_is_a_matter_of_memory(make, options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Conv2d(5, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    ).double()
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x, y = torch.randn(8, 3, 6, 6).double(), torch.arange(8) % 3
    opt, its = make(model, LOSS, **options), make(other, LOSS, **options)
    for _ in range(3):
        take_step(opt, model, x, y)
        take_step(its, other, x.to(memory_format=torch.channels_last), y)
    torch.testing.assert_close(flat(other), flat(model), rtol=1e-6, atol=1e-8)
    assert other[0].weight.is_contiguous(memory_format=torch.channels_last)


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_have_curvature_in_float32(make, dtype):
    model, (x, y) = mlp().to(dtype), batch(dtype=dtype)
    opt = make(model, LOSS, lr=0.05)
    losses = [float(take_step(opt, model, x, y).detach()) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert all(p.dtype == dtype for p in model.parameters())
    if isinstance(opt, pb.optim.KFAC):
        assert all(block.kron.dtype == torch.float32 for block in opt._blocks.values())


@ALL
def test_parameters_without_axes(make):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 3)
            self.log_scale, self.shift = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.1))

        def forward(self, x):
            return self.inner(x) * self.log_scale.exp() + self.shift

    torch.manual_seed(0)
    model, (x, y) = Scaled(), batch()
    opt = make(model, LOSS, lr=0.05)
    losses = [float(take_step(opt, model, x, y).detach()) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert model.log_scale.shape == () and model.log_scale != 0.5


@pytest.mark.parametrize("quantity", ["variance", "kfac", "diag_ggn", "grad"])
def test_batches_made_under_inference_mode_are_measured(quantity):
    """Those of a trainer's validation."""
    model, (x, y) = mlp(), batch()
    want = pb.statistics(model, LOSS, (x, y), [quantity])
    with torch.inference_mode():
        made = x.clone(), y.clone()
        found = [pb.statistics(model, LOSS, made, [quantity]), pb.statistics(model, LOSS, [made], [quantity])]
    found.append(pb.statistics(model, LOSS, made, [quantity]))
    for stats in found:
        for k, value in want[quantity].items():
            same = stats[quantity][k]
            pairs = [(same, value)] if isinstance(value, torch.Tensor) else [(same.left, value.left)]
            for a, b in pairs:
                torch.testing.assert_close(a, b)
    with torch.inference_mode():
        curvatures = [pb.GGN(model, LOSS, made), pb.Hessian(model, LOSS, made), pb.KFAC(model, LOSS, made)]
        for A in curvatures:
            assert torch.isfinite(A @ torch.ones(A.shape[0])).all()
        pb.quadratic(model, LOSS, made)
        pb.laplace(model, LOSS, made, "diag").predict(made[0])
    pb.optim.HessianFree(model, LOSS).step(made)


class _Forces(nn.Module):
    """The derivative of an energy: its last bias gets no gradient."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 8).double(), nn.Linear(8, 1).double()

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return -torch.autograd.grad(self.b(torch.tanh(self.a(x))).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("make", [pb.optim.KBFGS, pb.optim.KBFGSL])
@pytest.mark.filterwarnings("ignore:KBFGS")
def test_a_bias_without_a_gradient_stays(make):
    torch.manual_seed(0)
    model, x, y, loss = _Forces(), torch.randn(8, 3).double(), torch.randn(8, 3).double(), nn.MSELoss()
    opt, bias, first = make(model, loss), model.b.bias.clone(), loss(model(x), y)

    def closure():
        opt.zero_grad()
        value = loss(model(x), y)
        value.backward()
        return value

    for _ in range(5):
        opt.step(closure)
    assert model.b.bias.equal(bias) and loss(model(x), y) < first


def test_what_an_optimiser_cannot_take_is_said_when_it_is_made():
    class Call:
        net = nn.Linear(3, 2)
        named_parameters = net.named_parameters

    for make in (pb.optim.KFAC, pb.optim.KBFGS, pb.optim.KBFGSL):
        with pytest.raises(ValueError, match="a callable without hooks"):
            make(Call(), LOSS)


def test_a_default_device_that_is_not_the_models():
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2), torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0])
    torch.set_default_device("meta")
    try:
        for make in (pb.optim.KFAC, pb.optim.EKFAC, pb.optim.Preconditioned):
            opt = make(model, LOSS)
            for _ in range(3):
                opt.zero_grad()
                LOSS(model(x), y).backward()
                opt.step()
        pb.bias(model, LOSS, (x, y), batch_size=3, k=2, repeats=2)
        pb.gp.condition(pb.gp.RBF(), x.double(), y.double(), noise_variance=0.1, solver="cholesky").sample(x.double())
    finally:
        torch.set_default_device(None)
    assert all(p.isfinite().all() for p in model.parameters())
