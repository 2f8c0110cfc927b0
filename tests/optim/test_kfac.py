"""KFAC and EKFAC as optimisers: their steps are those of the operators, and averages are the documented ones."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import paraboloid as pb
from paraboloid.linalg.operand import LinAlgError
from paraboloid.optim.acceptance import adapted
from paraboloid.optim.curvature import due

LOSS = nn.CrossEntropyLoss()
BOTH = [(pb.optim.KFAC, pb.KFAC), (pb.optim.EKFAC, pb.EKFAC)]


def cnn():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 10), nn.Tanh(), nn.Linear(10, 4)
    ).double()  # fmt: skip


def batch(N=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, 1, 8, 8, generator=g, dtype=torch.float64), torch.randint(4, (N,), generator=g)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradient(model, x, y, loss=LOSS):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss(model(x), y), list(model.parameters()))])


def train_step(model, opt, x, y, loss=LOSS):
    opt.zero_grad()
    value = loss(model(x), y)
    value.backward()
    opt.step()
    return value.detach()


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("optimiser, operator", BOTH)
def test_the_first_step_is_that_of_the_operator(optimiser, operator, fisher):
    model, (x, y) = cnn(), batch()
    before, g = flat(model), gradient(model, x, y)
    want = operator(model, LOSS, (x, y), fisher=fisher).inverse(1e-2) @ g
    train_step(model, optimiser(model, LOSS, lr=0.5, damping=1e-2, fisher=fisher, split=None, kl_clip=None), x, y)
    torch.testing.assert_close(before - flat(model), 0.5 * want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("optimiser, operator", BOTH)
def test_the_step_with_coupled_weight_decay(optimiser, operator):
    model, (x, y) = cnn(), batch()
    before, g = flat(model), gradient(model, x, y)
    want = operator(model, LOSS, (x, y), fisher="exact").inverse(0.11) @ (g + 0.1 * before)
    opt = optimiser(model, LOSS, lr=1.0, damping=1e-2, weight_decay=0.1, fisher="exact", split=None,
                    kl_clip=None)  # fmt: skip
    train_step(model, opt, x, y)
    torch.testing.assert_close(before - flat(model), want, rtol=1e-10, atol=1e-12)


def test_split_damping_is_the_operators_with_exact_biases():
    model, (x, y) = cnn(), batch()
    grads = dict(zip([n for n, _ in model.named_parameters()],
                     torch.autograd.grad(LOSS(model(x), y), list(model.parameters())), strict=True))  # fmt: skip
    krons = pb.statistics(model, LOSS, (x, y), ["kflr"])["kflr"]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train_step(model, pb.optim.KFAC(model, LOSS, lr=1.0, damping=1e-2, fisher="exact", kl_clip=None), x, y)
    for name, p in model.named_parameters():
        split = "pi" if p.dim() > 1 else None
        want = krons[name].inverse(1e-2, split=split) @ grads[name]
        torch.testing.assert_close(before[name] - p.detach(), want, rtol=1e-10, atol=1e-12)


def test_decoupled_decay_momentum_and_nesterov():
    x, y = batch()
    for nesterov in (False, True):
        model = cnn()
        opt = pb.optim.KFAC(model, LOSS, lr=0.1, damping=1e-1, momentum=0.8, nesterov=nesterov, weight_decay=0.3,
                            decoupled=True, fisher="exact", split=None, factor_interval=1, inverse_interval=1,
                            factor_decay=0.0, kl_clip=None)  # fmt: skip
        buffer = torch.zeros_like(flat(model))
        for _ in range(3):
            before, g = flat(model), gradient(model, x, y)
            d = pb.KFAC(model, LOSS, (x, y), fisher="exact").inverse(1e-1) @ g
            buffer = 0.8 * buffer + d
            train_step(model, opt, x, y)
            want = (1 - 0.03) * before - 0.1 * (d + 0.8 * buffer if nesterov else buffer)
            torch.testing.assert_close(flat(model), want, rtol=1e-9, atol=1e-12)


def test_averages_and_intervals_by_hand():
    """Factors are averaged as documented, at the documented steps, and inverted at theirs."""
    model = cnn()
    opt = pb.optim.KFAC(model, LOSS, lr=0.05, damping=1e-1, momentum=0.0, fisher="empirical", split=None,
                        factor_decay=0.7, factor_interval=2, inverse_interval=4, kl_clip=None)  # fmt: skip
    average, inverse, count = None, None, 0
    for t in range(9):
        x, y = batch(seed=t)
        before, g = flat(model), gradient(model, x, y)
        if due(t, 2):
            count += 1
            new = pb.statistics(model, LOSS, (x, y), ["kfac_empirical"])["kfac_empirical"]
            w = max(1 / count, 0.3)
            average = new if average is None else {
                k: pb.Kron(a.left + w * (new[k].left - a.left), a.right + w * (new[k].right - a.right))
                for k, a in average.items()
            }  # fmt: skip
        if due(t, 4):
            inverse = pb.operators.KroneckerFactored(dict(model.named_parameters()), average).inverse(1e-1)
        train_step(model, opt, x, y)
        torch.testing.assert_close(before - flat(model), 0.05 * (inverse @ g), rtol=1e-8, atol=1e-12)
    assert [t for t in range(9) if due(t, 4)] == [0, 1, 2, 4, 8]


def test_ekfac_averages_its_eigenvalues_and_carries_them_over():
    model = cnn()
    opt = pb.optim.EKFAC(model, LOSS, lr=0.05, damping=1e-1, momentum=0.0, fisher="empirical", factor_decay=0.6,
                         factor_interval=1, inverse_interval=3, kl_clip=None)  # fmt: skip
    for t in range(6):
        x, y = batch(seed=t)
        forms = {k: b.form for k, b in opt._blocks.items()}
        measured = None
        if t in (3,):  # renewed eigenvectors: the old matrix's diagonal along them, then the new measurement
            old = forms["3.weight"]
            truth = pb.statistics(model, LOSS, (x, y), ["sample_grads"])["sample_grads"]["3.weight"]
        train_step(model, opt, x, y)
        new = opt._blocks["3.weight"].form
        if t == 3:
            U = torch.kron(new.left.vectors[0], new.right.vectors[0])
            carried = (U.T @ old.to_dense() @ U).diagonal().reshape(new.values.shape)
            measured = (truth.flatten(1) @ U).square().mean(0).reshape(new.values.shape)
            torch.testing.assert_close(new.values, carried.lerp(measured, 0.4), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("optimiser", [pb.optim.KFAC, pb.optim.EKFAC])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_accumulation_is_one_big_batch(optimiser, reduction):
    loss, (x, y) = nn.CrossEntropyLoss(reduction=reduction), batch(24)
    x = x.flatten(1)[:, :5]  # more samples than inputs: no eigenvectors that only rounding chooses
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    parts = copy.deepcopy(one)
    options = {"lr": 0.1, "damping": 1e-1, "fisher": "empirical", "inverse_interval": 2, "factor_interval": 1}
    first, second = optimiser(one, loss, **options), optimiser(parts, loss, **options)
    for _ in range(4):
        train_step(one, first, x, y, loss)
        second.zero_grad()
        for part in (slice(0, 8), slice(8, 24)):
            share = 1 if reduction == "sum" else len(y[part]) / len(y)
            (share * loss(parts(x[part]), y[part])).backward()
        second.step()
        torch.testing.assert_close(flat(one), flat(parts), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimiser, operator", BOTH)
def test_halves_and_other_batches_measure_the_eigenvalues(optimiser, operator):
    (x, y), other = batch(), batch(seed=5)
    options = {"lr": 1.0, "damping": 1e-2, "fisher": "exact", "kl_clip": None}
    for how in ("half", "batch"):
        model = cnn()
        before, g = flat(model), gradient(model, x, y)
        if how == "half":
            want = operator(model, LOSS, (x[:6], y[:6]), fisher="exact", measure_on=(x[6:], y[6:]))
            train_step(model, optimiser(model, LOSS, measure_on="half", **options), x, y)
        else:
            want = operator(model, LOSS, (x, y), fisher="exact", measure_on=other)
            opt = optimiser(model, LOSS, split=None, **options)
            LOSS(model(x), y).backward()
            opt.step(measure_on=other)
        torch.testing.assert_close(before - flat(model), want.inverse(1e-2) @ g, rtol=1e-9, atol=1e-12)


def test_a_parameter_without_kronecker_structure_has_its_diagonal():
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.randint(3, (8,))
    names = [n for n, _ in model.named_parameters()]
    grads = dict(zip(names, torch.autograd.grad(LOSS(model(x), y), list(model.parameters())), strict=True))
    diagonal = pb.statistics(model, LOSS, (x, y), ["diag_ggn"])["diag_ggn"]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for optimiser in (pb.optim.KFAC, pb.optim.EKFAC):
        model.load_state_dict(before)
        opt = optimiser(model, LOSS, lr=1.0, damping=1e-2, fisher="exact", kl_clip=None)
        train_step(model, opt, x, y)
        opt.remove()
        weights = [n for n in names if n.endswith(("original0", "original1"))]
        assert len(weights) == 2
        for name in weights:
            want = grads[name] / (diagonal[name] + 1e-2)
            torch.testing.assert_close(before[name] - dict(model.named_parameters())[name].detach(), want)
            assert opt.diagnostics()["layers"][name]["structure"] == "diagonal"


def test_kl_and_trust_region_clipping():
    x, y = batch()
    exact = {"lr": 1.0, "damping": 1e-2, "fisher": "exact", "split": None}
    for options in ({"kl_clip": 1e-3}, {"max_step": 1e-2}):
        model, free = cnn(), cnn()
        before = flat(model)
        train_step(free, pb.optim.KFAC(free, LOSS, kl_clip=None, **exact), x, y)
        train_step(model, pb.optim.KFAC(model, LOSS, **{"kl_clip": None} | exact | options), x, y)
        step, full = before - flat(model), before - flat(free)
        torch.testing.assert_close(step / step.norm(), full / full.norm())
        if "kl_clip" in options:
            reference = cnn()
            size = float(step @ step / (full @ step)) ** 2 * float(full @ gradient(reference, x, y))
            assert size == pytest.approx(1e-3, rel=1e-6)
        else:
            assert float(step.norm()) == pytest.approx(1e-2, rel=1e-9)


@pytest.mark.parametrize("graft", ["sgd", "adam"])
def test_grafting_takes_the_length_of_the_other_step(graft):
    model, (x, y) = cnn(), batch()
    other = cnn()
    before = [p.detach().clone() for p in model.parameters()]
    train_step(model, pb.optim.KFAC(model, LOSS, lr=0.1, momentum=0.0, graft=graft, kl_clip=None), x, y)
    rival = torch.optim.SGD(other.parameters(), lr=0.1) if graft == "sgd" else torch.optim.Adam(other.parameters(), 0.1)
    train_step(other, rival, x, y)
    for p, q, b in zip(model.parameters(), other.parameters(), before, strict=True):
        torch.testing.assert_close((p.detach() - b).norm(), (q.detach() - b).norm(), rtol=1e-6, atol=0)


def test_the_quadratic_model_chooses_step_and_momentum():
    model, (x, y) = cnn(), batch()
    opt = pb.optim.KFAC(model, LOSS, lr=1.0, damping=1e-1, step_size="quadratic", fisher="exact", split=None,
                        factor_interval=1, inverse_interval=1, factor_decay=0.0, kl_clip=None)  # fmt: skip
    last = None
    for _ in range(3):
        before, g = flat(model), gradient(model, x, y)
        A = pb.GGN(model, LOSS, (x, y)).to_dense() + 0.1 * torch.eye(len(g), dtype=g.dtype)
        d = pb.KFAC(model, LOSS, (x, y), fisher="exact").inverse(1e-1) @ g
        S = d.unsqueeze(1) if last is None else torch.stack([d, last], 1)
        want = -S @ torch.linalg.solve(S.T @ A @ S, S.T @ g)
        train_step(model, opt, x, y)
        last = flat(model) - before
        torch.testing.assert_close(last, want, rtol=1e-7, atol=1e-11)


def closure_of(model, opt, x, y):
    def closure():
        opt.zero_grad()
        loss = LOSS(model(x), y)
        loss.backward()
        return loss

    return closure


def test_damping_adapts_to_the_reduction_ratio():
    model, (x, y) = cnn(), batch()
    opt = pb.optim.KFAC(model, LOSS, lr=0.1, damping=1.0, adapt_damping=True, damping_interval=1, momentum=0.0,
                        fisher="exact", split=None, kl_clip=None)  # fmt: skip
    before, g = flat(model), gradient(model, x, y)
    K = pb.KFAC(model, LOSS, (x, y), fisher="exact")
    old = LOSS(model(x), y).item()
    opt.step(closure_of(model, opt, x, y))
    delta = flat(model) - before
    ratio = (LOSS(model(x), y).item() - old) / float(g @ delta + delta @ (K @ delta) / 2)
    found = opt.diagnostics()
    assert found["reduction_ratio"] == pytest.approx(ratio, rel=1e-8)
    assert found["damping"] == [adapted(1.0, ratio, 0.95, 1 / 0.95)]
    assert [adapted(1.0, r, 0.5, 2.0) for r in (0.9, 0.5, 0.1, float("nan"))] == [0.5, 1.0, 2.0, 2.0]
    with pytest.raises(ValueError, match=r"expected step\(closure\)"):
        opt.step()


def test_a_step_that_raises_the_loss_is_taken_back():
    model, (x, y) = cnn(), batch()
    opt = pb.optim.KFAC(model, LOSS, lr=1e4, damping=1e-3, reject=True, kl_clip=None)
    before = flat(model)
    opt.step(closure_of(model, opt, x, y))
    assert torch.equal(flat(model), before)
    assert opt.diagnostics()["rejected"] == 1
    assert all(float(opt.state[p]["momentum_buffer"].norm()) >= 0 for p in model.parameters())


def test_a_failing_decomposition_is_retried_and_never_loses_the_run(monkeypatch):
    from paraboloid.linalg import eigenform

    (x, y), original = batch(120), eigenform.eigh
    model = cnn().float()
    opt = pb.optim.EKFAC(model, LOSS, lr=0.01, inverse_interval=1, factor_interval=1)
    train_step(model, opt, x.float(), y)

    def fails_in_single(matrix, *args, **kwargs):
        if matrix.dtype == torch.float32 and matrix.shape[-1] == 108:
            raise LinAlgError("no convergence.")
        return original(matrix, *args, **kwargs)

    monkeypatch.setattr(eigenform, "eigh", fails_in_single)
    train_step(model, opt, x.float(), y)  # float64 saves it
    assert opt.diagnostics()["layers"]["3.weight"]["failures"] == 0

    def fails(matrix, *args, **kwargs):
        if matrix.shape[-1] == 108:
            raise LinAlgError("no convergence.")
        return original(matrix, *args, **kwargs)

    monkeypatch.setattr(eigenform, "eigh", fails)
    kept = opt._blocks["3.weight"].form.left.vectors.clone()
    with pytest.warns(UserWarning, match=r"'3.weight'.*could not be inverted.*last good inverse is kept"):
        train_step(model, opt, x.float(), y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_step(model, opt, x.float(), y)  # warned once
    assert opt.diagnostics()["layers"]["3.weight"]["failures"] == 2
    assert torch.equal(opt._blocks["3.weight"].form.left.vectors, kept)
    monkeypatch.setattr(eigenform, "eigh", original)
    train_step(model, opt, x.float(), y)
    assert flat(model).isfinite().all()


def test_a_factor_that_is_not_positive_keeps_the_plain_gradient_at_first(monkeypatch):
    model, (x, y) = cnn(), batch()
    opt = pb.optim.KFAC(model, LOSS, lr=1.0, momentum=0.0, kl_clip=None)
    from paraboloid.optim import preconditioner

    def fails(kron, damping, name):
        raise LinAlgError("singular.")

    monkeypatch.setattr(preconditioner, "_split", fails)
    before, g = flat(model), gradient(model, x, y)
    with pytest.warns(UserWarning, match="plain gradient is used"):
        train_step(model, opt, x, y)
    torch.testing.assert_close(before - flat(model), g)


def test_options_out_of_range():
    model, loss = cnn(), nn.CrossEntropyLoss()
    for options, message in [
        ({"lr": -1.0}, "lr is -1.0; expected a number of at least 0"),
        ({"damping": 0.0}, "damping is 0.0; expected a number above 0"),
        ({"momentum": 1.0}, r"momentum is 1.0; expected a number in \[0, 1\)"),
        ({"fisher": "true"}, "fisher is 'true'; expected one of"),
        ({"split": "half"}, "split is 'half'; expected one of"),
        ({"graft": "lion"}, "graft is 'lion'; expected one of"),
        ({"step_size": 3}, "step_size is 3; expected one of"),
        ({"measure_on": "all"}, "measure_on is 'all'; expected one of"),
        ({"factor_interval": 0}, "factor_interval is 0; expected an integer of at least 1"),
        ({"sharing": "both"}, "sharing is 'both'"),
        ({"kl_clip": 0.0}, "kl_clip is 0.0; expected a number above 0"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov is True and momentum 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            pb.optim.KFAC(model, loss, **options)
    assert not model._forward_hooks and not model._forward_pre_hooks and not loss._forward_hooks
    opt = pb.optim.KFAC(model, LOSS)
    with pytest.raises(ValueError, match="which split='pi' does not use"):
        opt.step(measure_on=batch())
    opt.remove()


def test_a_loss_that_cannot_be_sampled():
    class Robust(pb.Loss):
        def sample_losses(self, f, y):
            return ((f - y).square() + 1).sqrt().flatten(1).sum(1)

    model = nn.Linear(3, 2)
    with pytest.raises(NotImplementedError, match=r"Robust does not say how to draw labels.*fisher='exact'"):
        pb.optim.KFAC(model, Robust())
    loss = Robust()
    opt = pb.optim.KFAC(model, loss, fisher="exact")  # a pb.Loss is watched too
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    before = flat(model)
    train_step(model, opt, x, y, loss)
    assert not torch.equal(before, flat(model))
    opt.remove()
    assert not loss._hooks


def test_a_vector_behind_another_tensor_keeps_its_dense_block():
    """A bias that enters through a product: its pulled-back vectors need the graph, which is gone when step() comes."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.bias = nn.Linear(5, 4, bias=False), nn.Parameter(torch.randn(4))
            self.register_buffer("mix", torch.randn(4, 4))

        def forward(self, x):
            return self.linear(x) + self.mix @ self.bias

    torch.manual_seed(0)
    model = Scaled().double()
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.randint(4, (8,))
    before, g = flat(model), gradient(model, x, y)
    want = pb.EKFAC(model, LOSS, (x, y), fisher="exact").inverse(1e-2) @ g
    train_step(model, pb.optim.EKFAC(model, LOSS, lr=1.0, damping=1e-2, fisher="exact", kl_clip=None), x, y)
    torch.testing.assert_close(before - flat(model), want, rtol=1e-9, atol=1e-12)


def test_a_warm_start_is_the_mean_over_the_loader():
    model, batches = cnn(), [batch(8, seed) for seed in range(3)]
    opt = pb.optim.KFAC(model, LOSS, fisher="exact", factor_decay=0.5, factor_interval=1)
    opt.warm_start(batches)
    krons = [pb.statistics(model, LOSS, b, ["kflr"])["kflr"]["3.weight"] for b in batches]
    mean = torch.stack([k.left for k in krons]).mean(0)
    torch.testing.assert_close(opt._blocks["3.weight"].kron.left, mean)
    after = pb.statistics(model, LOSS, batches[0], ["kflr"])["kflr"]["3.weight"].right
    before = opt._blocks["3.weight"].kron.right.clone()
    train_step(model, opt, *batches[0])
    torch.testing.assert_close(opt._blocks["3.weight"].kron.right, before.lerp(after, 0.5))
    with pytest.raises(ValueError, match="the data is empty"):
        opt.warm_start([])


WIDE = {
    "split": {},
    "small damping": {"damping": 1e-3},
    "reduce": {"sharing": "reduce"},
    "decay": {"factor_decay": 0.5},
}


@pytest.mark.parametrize("name", WIDE)
def test_factors_of_few_rows_make_the_steps_of_whole_ones(name):
    """Batches of 4 on sides of up to 108: by their rows at first, as matrices once these are many."""
    makes = {"factor_interval": 1, "inverse_interval": 3, "kl_clip": None, "lr": 1e-2, **WIDE[name]}
    models = [cnn(), cnn()]
    rows, whole = (pb.optim.KFAC(model, LOSS, **makes) for model in models)
    whole._curvature._factors.kept = replace(whole._curvature._factors.kept, thin=False)
    kinds = set()
    for step in range(9):
        for model, opt in zip(models, (rows, whole), strict=True):
            train_step(model, opt, *batch(4, seed=step))
        torch.testing.assert_close(flat(models[0]), flat(models[1]), rtol=1e-9, atol=1e-11)
        kinds |= {(name, side.kind) for name in ("kron", "inverse") for block in rows._blocks.values()
                  if getattr(block, name) is not None for side in getattr(block, name).sides}  # fmt: skip
    assert kinds >= {("kron", "rows"), ("kron", "matrix"), ("inverse", "complement"), ("inverse", "matrix")}
    assert {side.kind for block in whole._blocks.values() for side in block.kron.sides} == {"matrix"}
    state = rows.state_dict()
    other, model = copy.deepcopy(models[0]), models[0]
    resumed = pb.optim.KFAC(other, LOSS)
    resumed.load_state_dict(copy.deepcopy(state))
    for step in range(9, 12):
        train_step(model, rows, *batch(4, seed=step))
        train_step(other, resumed, *batch(4, seed=step))
    assert torch.equal(flat(model), flat(other))
    assert {layer["structure"] for layer in rows.diagnostics()["layers"].values()} == {"kronecker", "dense"}


def test_eigenvectors_of_few_rows_are_complete():
    """EKFAC measures along whatever is left out too; in the span of the rows its basis is that of the whole factors."""
    options = {"factor_interval": 1, "inverse_interval": 3, "kl_clip": None, "lr": 1e-2, "fisher": "exact"}
    models = [cnn(), cnn()]
    rows, whole = (pb.optim.EKFAC(model, LOSS, **options) for model in models)
    whole._curvature._factors.kept = replace(whole._curvature._factors.kept, thin=False)
    for step in range(4):
        for model, opt in zip(models, (rows, whole), strict=True):
            train_step(model, opt, *batch(4, seed=step))
        for name, block in rows._blocks.items():
            form, other = block.form, whole._blocks[name].form
            assert form.full
            if (U := form.left.vectors) is not None:
                torch.testing.assert_close(U.mT @ U, torch.eye(U.shape[1]).double().expand_as(U), rtol=0, atol=1e-12)
            torch.testing.assert_close(form.trace(), other.trace(), rtol=0.1, atol=1e-12)
        if step == 0:  # all that was measured lies in the span
            torch.testing.assert_close(flat(models[0]), flat(models[1]), rtol=1e-9, atol=1e-11)
    assert {side.kind for side in rows._blocks["3.weight"].kron.sides} == {"rows", "matrix"}
    before, state = [flat(model) for model in models], rows.state_dict()
    again = cnn()
    again.load_state_dict(models[0].state_dict())
    resumed = pb.optim.EKFAC(again, LOSS)
    resumed.load_state_dict(copy.deepcopy(state))
    for step in range(4, 8):
        train_step(models[0], rows, *batch(4, seed=step))
        train_step(again, resumed, *batch(4, seed=step))
    assert torch.equal(flat(models[0]), flat(again))
    assert (before[0] - before[1]).norm() < 0.1 * (before[1] - flat(cnn())).norm()
