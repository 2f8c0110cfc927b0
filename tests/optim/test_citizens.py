"""Optimisers in a user's own loop: everything that torch.optim promises, and nothing left behind."""

import copy
import gc
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import paraboloid as pb

LOSS = nn.CrossEntropyLoss()
MAKERS = {
    "kfac": lambda m, loss=LOSS, **o: pb.optim.KFAC(m, loss, **{"lr": 0.05, "damping": 1e-2, **o}),
    "ekfac": lambda m, loss=LOSS, **o: pb.optim.EKFAC(m, loss, **{"lr": 0.05, "damping": 1e-2, **o}),
    "diag": lambda m, loss=LOSS, **o: pb.optim.Preconditioned(m, loss, **{"lr": 0.05, "damping": 1e-2, **o}),
    "kron": lambda m, loss=LOSS, **o: pb.optim.Preconditioned(m, loss, curvature="kfac", **{"lr": 0.05, **o}),
}
ALL = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(N=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 6, generator=g)
    return x, (x[:, :3] + 0.1 * torch.randn(N, 3, generator=g)).argmax(1)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train_step(model, opt, x, y, loss=LOSS):
    opt.zero_grad()
    value = loss(model(x), y)
    value.backward()
    opt.step()
    return value.item()


@ALL
def test_the_loss_falls_and_torch_random_state_is_untouched(make):
    model, (x, y) = mlp(), batch(64)
    opt = make(model)
    state = torch.get_rng_state()
    losses = [train_step(model, opt, x, y) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert opt.diagnostics()["steps"] == 40


@ALL
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(make):
    batches = [batch(seed=i) for i in range(12)]
    model = mlp()
    opt = make(model, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 4, 0.5)
    saved = None
    for t, (x, y) in enumerate(batches):
        if t == 7:
            file = io.BytesIO()
            torch.save({"m": model.state_dict(), "o": opt.state_dict(), "s": schedule.state_dict()}, file)
            saved = file.getvalue()
        train_step(model, opt, x, y)
        schedule.step()
    state = torch.load(io.BytesIO(saved), weights_only=True)
    other = mlp(seed=9)
    fresh = make(other, momentum=0.9, seed=77)
    other.load_state_dict(state["m"])
    fresh.load_state_dict(state["o"])
    schedule = torch.optim.lr_scheduler.StepLR(fresh, 4, 0.5)
    schedule.load_state_dict(state["s"])
    for x, y in batches[7:]:
        train_step(other, fresh, x, y)
        schedule.step()
    assert torch.equal(flat(model), flat(other))
    assert fresh.diagnostics() == opt.diagnostics()


@ALL
def test_a_state_of_another_optimiser_or_model_is_refused(make):
    opt = make(mlp())
    with pytest.raises(ValueError, match="the state is that of no such optimiser"):
        opt.load_state_dict(torch.optim.SGD(mlp().parameters(), lr=0.1).state_dict())
    other = nn.Sequential(nn.Linear(6, 8))
    with pytest.raises(ValueError, match=r"a model with parameters \['0.weight', '0.bias'\]"):
        opt.load_state_dict(make(other).state_dict())


@ALL
def test_nan_gradients_skip_the_step_and_never_reach_the_curvature(make):
    model, twin, (x, y) = mlp(), mlp(), batch()
    opt, clean = make(model), make(twin)
    train_step(model, opt, x, y)
    train_step(twin, clean, x, y)
    before = flat(model)
    with pytest.warns(UserWarning, match="step 2 was skipped: the loss is NaN or infinite"):
        train_step(model, opt, x * float("nan"), y)
    opt.zero_grad()
    LOSS(model(x), y).backward()
    model[0].weight.grad[0, 0] = float("inf")
    opt.generator.set_state(clean.generator.get_state())  # this pass drew labels
    opt.step()  # warned once
    opt.generator.set_state(clean.generator.get_state())
    assert torch.equal(flat(model), before)
    assert opt.diagnostics()["skipped"] == 2
    for _ in range(3):
        train_step(model, opt, x, y)
        train_step(twin, clean, x, y)
    assert torch.equal(flat(model), flat(twin))


@ALL
def test_parameter_groups_and_frozen_parameters(make):
    model, (x, y) = mlp(), batch()
    model[0].bias.requires_grad_(False)
    opt = make(model, params=[{"params": [model[0].weight], "lr": 0.0}, {"params": [model[2].weight, model[2].bias]}])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train_step(model, opt, x, y)
    model[2].bias.requires_grad_(False)  # frozen later
    bias = model[2].bias.detach().clone()
    train_step(model, opt, x, y)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"2.weight", "2.bias"}
    assert torch.equal(model[2].bias, bias)
    with pytest.raises(ValueError, match="no trainable parameter of Sequential"):
        make(model, params=[nn.Parameter(torch.zeros(3))])


@ALL
def test_closures(make):
    model, (x, y) = mlp(), batch()
    opt = make(model)

    def closure():
        opt.zero_grad()
        loss = LOSS(model(x), y)
        loss.backward()
        return loss

    first = opt.step(closure)
    assert opt.step(closure) < first
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="the closure left no gradient"):
        opt.step(lambda: LOSS(model(x), y))


@ALL
def test_gradient_clipping_and_scaler(make):
    model, (x, y) = mlp(), batch()
    opt = make(model, momentum=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    opt.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = LOSS(model(x), y)
    scaler.scale(loss).backward()
    scaler.unscale_(opt)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    before = flat(model)
    scaler.step(opt)
    scaler.update()
    assert 0 < float((flat(model) - before).norm()) < 0.1
    assert all(p.dtype == torch.float32 for p in model.parameters())
    opt.zero_grad()
    scaler.scale(LOSS(model(x), y) * 1e38).backward()  # overflows: the scaler leaves the step out
    before = flat(model)
    scaler.step(opt)
    assert torch.equal(flat(model), before)


@ALL
def test_passes_without_gradients_are_ignored(make):
    model, twin, (x, y) = mlp(), mlp(), batch()
    opt, alone = make(model), make(twin)
    for _ in range(3):
        with torch.no_grad():
            LOSS(model(x * 7), y)
        with torch.inference_mode():
            model(x)
        LOSS(torch.randn(4, 3, requires_grad=True), y[:4])  # not the model's output
        loss = LOSS(model(x), y)
        assert loss.item() > 0
        opt.zero_grad()
        loss.backward()
        opt.step()
        train_step(twin, alone, x, y)
    assert torch.equal(flat(model), flat(twin))


@ALL
def test_two_models_with_one_loss(make):
    one, two, (x, y) = mlp(0), mlp(1), batch()
    alone = [mlp(0), mlp(1)]
    first, second = make(one), make(two)
    rivals = [make(m) for m in alone]
    for _ in range(3):
        for opt in (first, second):
            opt.zero_grad()
        (LOSS(one(x), y) + LOSS(two(x), y)).backward()
        first.step()
        second.step()
        for m, o in zip(alone, rivals, strict=True):
            train_step(m, o, x, y)
    for m, twin in zip((one, two), alone, strict=True):
        torch.testing.assert_close(flat(m), flat(twin), rtol=0, atol=0)


@ALL
def test_batch_norm_in_training_mode(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))
    if make in (MAKERS["diag"],):
        pytest.skip("a diagonal needs the samples' own gradients; see the next test")
    x, y = torch.randn(16, 1, 6, 6), torch.randint(3, (16,))
    opt = make(model)
    losses = [train_step(model, opt, x, y) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    assert int(model[1].num_batches_tracked) == 20


def test_a_diagonal_with_batch_norm_in_training_mode_is_refused():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    opt = MAKERS["diag"](model)
    with pytest.raises(ValueError, match="no per-sample gradients"):
        LOSS(model(batch()[0]), batch()[1])
    opt.remove()


@ALL
def test_functional_losses_are_observed(make):
    model, twin, (x, y) = mlp(), mlp(), batch()
    opt, rival = make(model), make(twin)
    for _ in range(3):
        opt.zero_grad()
        output = model(x)
        opt.observe(output, y)
        F.cross_entropy(output, y).backward()
        opt.step()
        train_step(twin, rival, x, y)
    assert torch.equal(flat(model), flat(twin))


@ALL
def test_what_was_forgotten_is_named(make):
    model, (x, y) = mlp(), batch()
    opt = make(model)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(
        RuntimeError, match=rf"^{type(opt).__name__} saw no training pass.*opt.observe\(output, target\)"
    ):
        opt.step()
    with pytest.raises(RuntimeError, match="no forward pass of the model was recorded"):
        opt.observe(model[2](torch.randn(16, 8)), y)
    loss = LOSS(model(x), y)
    with pytest.raises(RuntimeError, match="called twice on one forward pass"):
        output = model(x)
        LOSS(output, y)
        LOSS(2 * output, y)
    loss.backward()


@ALL
def test_a_changed_model_and_an_empty_layer(make):
    model, (x, y) = mlp(), batch()
    make_opt = make(model)
    model[2] = nn.Linear(8, 3)
    with pytest.raises(RuntimeError, match=r"the model changed: its parameter '2.weight' is \(3, 8\)"):
        LOSS(model(x), y)
    make_opt.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of it too
        empty = nn.Sequential(nn.Linear(6, 0), nn.Linear(0, 3))
    with pytest.raises(ValueError, match=r"parameter '0.weight' has shape \(0, 6\), which holds nothing"):
        make(empty)


@pytest.mark.parametrize("name", ["KFAC", "EKFAC", "Preconditioned", "KBFGS", "KBFGSL", "HessianFree", "Polar"])
def test_a_model_that_is_cast_after_a_step(name):
    """Its parameters are the same objects, whose numbers are of another type."""
    model, (x, y) = mlp().double(), batch()
    opt = getattr(pb.optim, name)(model, LOSS)

    def step(opt, x):
        def closure():
            opt.zero_grad()
            loss = LOSS(model(x), y)
            loss.backward()
            return loss

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*was not warmed up")
            return opt.step((x, y)) if name == "HessianFree" else opt.step(closure)

    step(opt, x.double())
    model.float()
    if name == "HessianFree":  # it keeps nothing of a parameter's type
        step(opt, x)
        return
    message = (
        r"parameter '0.weight' is torch.float32 on cpu, but what this \w+ keeps of it is torch.float64 on cpu: the"
    )
    with pytest.raises(RuntimeError, match=message):
        step(opt, x)
    state = opt.state_dict()
    other = getattr(pb.optim, name)(model, LOSS)
    other.load_state_dict(state)
    before = flat(model)
    for _ in range(3):
        step(other, x)
    assert flat(model).isfinite().all()
    assert not torch.equal(flat(model), before)


@ALL
def test_compiled_models(make):
    model, twin, (x, y) = mlp(), mlp(), batch()
    compiled = torch.compile(model, backend="eager")
    opt, rival = make(compiled), make(twin)
    for _ in range(3):
        train_step(compiled, opt, x, y)
        train_step(twin, rival, x, y)
    assert torch.equal(flat(model), flat(twin))
    inner = mlp()
    opt = make(inner)
    with pytest.raises(RuntimeError, match=r"torch.compile"):
        LOSS(torch.compile(inner, backend="eager")(x), y).backward()
        opt.step()
    opt.remove()
    inner.compile(backend="eager")
    with pytest.raises(ValueError, match=r"compiled in place by model.compile\(\)"):
        make(inner)


@ALL
def test_activation_checkpoints(make):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    model, twin, (x, y) = Checkpointed(), mlp(), batch()
    opt, rival = make(model), make(twin)
    for _ in range(3):
        train_step(model, opt, x, y)
        train_step(twin, rival, x, y)
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-5, atol=1e-6)


@ALL
def test_hooks_go_with_the_optimiser(make):
    model, loss = mlp(), nn.CrossEntropyLoss()
    opt = make(model, loss)
    assert model._forward_hooks and model._forward_pre_hooks and loss._forward_hooks
    opt.remove()
    assert not (model._forward_hooks or model._forward_pre_hooks or loss._forward_hooks)
    opt = make(model, loss)
    train_step(model, opt, *batch(), loss)
    del opt  # at once, without waiting for the garbage collector
    assert not (model._forward_hooks or model._forward_pre_hooks or loss._forward_hooks)


@ALL
def test_copies_of_a_model_are_their_own_business(make):
    """Teachers, averages and files of a model that has an optimiser, trained in between."""
    model, twin, loss, (x, y) = mlp(), mlp(), nn.CrossEntropyLoss(), batch()
    opt, rival = make(model, loss), make(twin)
    file = io.BytesIO()
    torch.save(model, file)
    copies = [copy.deepcopy(model), copy.copy(model), torch.optim.swa_utils.AveragedModel(model),
              torch.load(io.BytesIO(file.getvalue()), weights_only=False)]  # fmt: skip
    other = copy.deepcopy(loss)
    for each in copies:
        output = model(x)
        for criterion in (loss, other):
            criterion(each(3 * x), y).backward()
        opt.zero_grad()  # a shallow copy has the same parameters
        loss(output, y).backward()
        opt.step()
        train_step(twin, rival, x, y)
    assert torch.equal(flat(model), flat(twin))


@pytest.mark.parametrize("name", pb.optim.__all__)
def test_an_optimiser_is_not_copied(name):
    opt = getattr(pb.optim, name)(mlp(), LOSS)
    for copying in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match=f"a {name} is bound to its model.*load_state_dict"):
            copying(opt)


@ALL
def test_an_exception_in_the_forward_pass_leaves_nothing_active(make):
    class Fragile(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.broken = mlp(), True

        def forward(self, x):
            if self.broken:
                raise KeyError("no luck")
            return self.inner(x)

    from torch.overrides import _get_current_function_mode

    model, (x, y) = Fragile(), batch()
    opt = make(model)
    for _ in range(2):
        with pytest.raises(KeyError, match="no luck"):
            model(x)
        assert _get_current_function_mode() is None
    model.broken = False
    train_step(model, opt, x, y)


@ALL
def test_an_interrupted_forward_pass_is_cleaned_up_at_the_next(make):
    class Interrupted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.stop = mlp(), True

        def forward(self, x):
            if self.stop:
                raise KeyboardInterrupt  # no Exception: torch does not call forward hooks
            return self.inner(x)

    from torch.overrides import _get_current_function_mode

    model, (x, y) = Interrupted(), batch()
    opt = make(model)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    model.stop = False
    before = flat(model)
    train_step(model, opt, x, y)
    assert not torch.equal(flat(model), before)
    assert _get_current_function_mode() is None


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens):
        return self.head(self.block(self.embed(tokens)))


@pytest.mark.parametrize("name", ["kfac", "ekfac", "diag"])
def test_a_flattened_sequence_output_is_the_same_as_one_by_sample(name):
    """Language models flatten [N, T, C] for the loss; the samples are found again."""
    torch.manual_seed(0)
    model = Sequence()
    twin = copy.deepcopy(model)
    tokens = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(0))
    options = {} if name == "diag" else {"fisher": "exact"}
    curvature = {"curvature": "diag_ggn"} if name == "diag" else {}
    opt, rival = MAKERS[name](model, **options, **curvature), MAKERS[name](twin, **options, **curvature)
    for _ in range(2):
        opt.zero_grad()
        LOSS(model(tokens)[:, :-1].reshape(-1, 11), tokens[:, 1:].reshape(-1)).backward()
        opt.step()
        rival.zero_grad()
        LOSS(twin(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:]).backward()
        rival.step()
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-4, atol=1e-5)


def test_structured_outputs_and_keyword_inputs():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, *, inputs):
            return {"logits": self.inner(inputs), "extra": None}

    model, twin, (x, y) = Wrapped(), mlp(), batch()
    opt, rival = MAKERS["kfac"](model, fisher="exact"), MAKERS["kfac"](twin, fisher="exact")
    opt.zero_grad()
    LOSS(model(inputs=x)["logits"], target=y).backward()
    opt.step()
    train_step(twin, rival, x, y)
    assert torch.equal(flat(model), flat(twin))


def test_dropout_trains_and_reduced_precision_parameters_work():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3)).to(torch.bfloat16)
    x, y = batch(64)
    opt = MAKERS["kfac"](model, lr=0.02)
    losses = [train_step(model, opt, x.to(torch.bfloat16), y) for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert opt._blocks["0.weight"].kron.left.dtype == torch.float32


@pytest.mark.slow
@ALL
def test_memory_stays_flat_over_5000_steps(make):
    import resource

    model, (x, y) = mlp(), batch()
    opt = make(model)
    for _ in range(500):
        train_step(model, opt, x, y)
    gc.collect()
    objects, peak = len(gc.get_objects()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(5000):
        train_step(model, opt, x, y)
    gc.collect()
    assert len(gc.get_objects()) < objects + 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + 16 * 1024  # KiB


@pytest.mark.parametrize("make", [pb.optim.KFAC, pb.optim.EKFAC, pb.optim.Preconditioned])
def test_jagged_inputs_are_refused_in_a_sentence(make):
    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return torch.stack([rows.mean(0) for rows in self.layer(x).unbind()])

    model = Bags()
    opt = make(model, LOSS)
    x = torch.nested.nested_tensor([torch.randn(k, 4) for k in (2, 3, 1)], layout=torch.jagged)
    with pytest.raises(ValueError, match=r"nested \(jagged\) tensor.*expected padded inputs"):
        model(x)
    opt.remove()
    model(x)
