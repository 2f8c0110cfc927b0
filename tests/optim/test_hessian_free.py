"""Hessian-free steps next to dense solves, and debiased ones next to their definition."""

import copy
import io

import pytest
import torch
from torch import nn

import paraboloid as pb
from paraboloid.linalg import cg_iterates
from paraboloid.linalg.measured_cg import measured_iterates
from paraboloid.optim.hessian_free import ARMIJO, halves

LOSS = nn.CrossEntropyLoss()


def mlp(seed=0, inputs=4, outputs=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 3), nn.Tanh(), nn.Linear(3, outputs)).double()


def batch(N=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 4, generator=g, dtype=torch.float64)
    return x, (x[:, :3] + torch.randn(N, 3, generator=g, dtype=torch.float64)).argmax(1)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradient(model, x, y, loss=LOSS):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss(model(x), y), list(model.parameters()))])


PLAIN = {"line_search": False, "backtrack": False, "adapt_damping": False, "progress": 1e-12}


def test_one_step_solves_a_quadratic():
    torch.manual_seed(0)
    model = nn.Linear(5, 2).double()
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    opt = pb.optim.HessianFree(model, nn.MSELoss(), damping=0.0)
    opt.step((x, y))
    X = torch.cat([x, torch.ones(30, 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(X, y).solution
    torch.testing.assert_close(torch.cat([model.weight.T, model.bias.unsqueeze(0)]).detach(), solution)
    assert opt.diagnostics()["reduction_ratio"] == pytest.approx(1.0)


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("preconditioner", [None, "second_moment"])
def test_the_step_is_the_dense_solution(curvature, preconditioner):
    model, (x, y) = mlp(), batch()
    operator = {"ggn": pb.GGN, "hessian": pb.Hessian}[curvature]
    A = operator(model, LOSS, (x, y)).to_dense() + 2.1 * torch.eye(len(flat(model)), dtype=torch.float64)
    before = flat(model)
    want = torch.linalg.solve(A, -(gradient(model, x, y) + 0.1 * before))
    opt = pb.optim.HessianFree(model, LOSS, curvature=curvature, damping=2.0, weight_decay=0.1,
                               preconditioner=preconditioner, **PLAIN)  # fmt: skip
    value = opt.step((x, y))
    assert value == pytest.approx(LOSS(mlp()(x), y).item())
    torch.testing.assert_close(flat(model) - before, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"preconditioner": "second_moment"}, {"warm_start": 0.9}])
def test_measured_on_the_same_batch_the_step_is_the_plain_one(options):
    models = [mlp(), mlp()]
    opts = [pb.optim.HessianFree(m, LOSS, damping=0.5, **options) for m in models]
    for t in range(4):
        x, y = batch(seed=t)
        opts[0].step((x, y))
        opts[1].step((x, y), measure_on=(x.clone(), y.clone()))
        torch.testing.assert_close(flat(models[0]), flat(models[1]), rtol=1e-7, atol=1e-9)
    assert opts[0].diagnostics()["damping"] == opts[1].diagnostics()["damping"] != 0.5


@pytest.mark.parametrize(
    "blocks, places",
    [("layer", [range(15), range(15, 27)]), ("parameter", [range(12), range(12, 15), range(15, 24), range(24, 27)]),
     ([["0.weight", "2.bias"], ["0.bias", "2.weight"]], [[*range(12), 24, 25, 26], range(12, 24)])],
    ids=["layer", "parameter", "lists"],
)  # fmt: skip
def test_a_step_by_blocks_solves_each_of_them(blocks, places):
    model, (x, y) = mlp(), batch()
    A, g, before = pb.GGN(model, LOSS, (x, y)).to_dense(), gradient(model, x, y), flat(model)
    want = torch.zeros_like(g)
    for at in map(list, places):
        block = A[at][:, at] + 0.5 * torch.eye(len(at), dtype=torch.float64)
        want[at] = torch.linalg.solve(block, -g[at])
    opt = pb.optim.HessianFree(model, LOSS, damping=0.5, blocks=blocks, **PLAIN)
    opt.step((x, y))
    torch.testing.assert_close(flat(model) - before, want, rtol=1e-8, atol=1e-10)
    fresh = pb.optim.HessianFree(mlp(), LOSS)
    fresh.load_state_dict(opt.state_dict())
    assert fresh.blocks == blocks


def test_a_debiased_step_is_the_sum_of_newton_steps_measured_elsewhere():
    model, one, two = mlp(), batch(seed=1), batch(seed=2)
    before = flat(model)
    q, other = (pb.quadratic(model, LOSS, b) for b in (one, two))
    directions = q.conjugate_directions(6, damping=0.3)
    want = other.step_along(directions, damping=0.3)
    opt = pb.optim.HessianFree(model, LOSS, damping=0.3, max_iterations=6, **PLAIN)
    opt.step(one, measure_on=two)
    torch.testing.assert_close(flat(model) - before, want, rtol=1e-6, atol=1e-9)


def test_debias_takes_even_samples_for_directions_and_odd_ones_to_measure():
    models, (x, y) = [mlp(), mlp()], batch()
    pb.optim.HessianFree(models[0], LOSS, debias=True).step((x, y))
    pb.optim.HessianFree(models[1], LOSS).step((x[::2], y[::2]), measure_on=(x[1::2], y[1::2]))
    assert torch.equal(flat(models[0]), flat(models[1]))
    first, second = halves(({"a": x, "b": 3}, y))
    assert torch.equal(first[0]["a"], x[::2]) and first[0]["b"] == 3 and torch.equal(second[1], y[1::2])
    with pytest.raises(ValueError, match="it has 1 sample; expected at least 2"):
        pb.optim.HessianFree(mlp(), LOSS, debias=True).step((x[:1], y[:1]))


def test_measured_iterates_of_one_system_are_those_of_conjugate_gradients():
    g = torch.Generator().manual_seed(0)
    R = torch.randn(12, 12, generator=g, dtype=torch.float64)
    A, (b, x0) = R @ R.T + torch.eye(12, dtype=torch.float64), torch.randn(2, 12, generator=g, dtype=torch.float64)
    M = torch.rand(12, generator=g, dtype=torch.float64) + 0.5
    for start in (None, x0):
        ours = measured_iterates(A, b, A, b, x0=start, preconditioner=M, max_iterations=9)
        theirs = cg_iterates(A, b, x0=start, preconditioner=M, max_iterations=9)
        assert ours.steps == theirs.steps and ours.iterations == theirs.iterations
        torch.testing.assert_close(ours.x, theirs.x)
        torch.testing.assert_close(ours.values, theirs.values)
    flat_run = measured_iterates(A, b, -A, b)
    assert flat_run.iterations == 0 and flat_run.flat < 0 and not flat_run.x.any()


def test_line_search_backtracking_and_damping():
    model, (x, y) = mlp(), batch()
    before, start = flat(model), LOSS(model(x), y).item()
    opt = pb.optim.HessianFree(model, LOSS, damping=1e-4, lr=50.0)  # far too long
    g = gradient(model, x, y)
    opt.step((x, y))
    said, moved = opt.diagnostics(), flat(model) - before
    assert 0 < said["rate"] < 1
    assert LOSS(model(x), y).item() <= start + ARMIJO * float(g @ moved)
    assert said["damping"] == pytest.approx(1.5e-4)  # the quadratic was no good there
    model = mlp()
    opt = pb.optim.HessianFree(model, LOSS, damping=1.0)
    opt.step((x, y))
    assert opt.diagnostics()["damping"] == pytest.approx(2 / 3) and opt.diagnostics()["rate"] == 1.0


def test_a_step_that_never_helps_is_rejected():
    class Uphill(pb.Loss):
        """Its gradient points the wrong way."""

        def sample_losses(self, f, y):
            return (f - y).square().flatten(1).sum(1)

        def gradient(self, f, y):
            return -2 * (f - y)

        def check(self, f, y):
            pass

    model = nn.Linear(3, 2).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    opt = pb.optim.HessianFree(model, Uphill(), damping=1.0)
    q = pb.quadratic(model, Uphill(), (x, y))
    (g,) = torch.autograd.grad(Uphill()(model(x), y), model.weight)
    assert (q.gradient["weight"] * g).sum() < 0
    before = flat(model)
    opt.step((x, y))
    assert torch.equal(flat(model), before) and opt.diagnostics()["rejected"] == 1


def test_it_trains_with_negative_curvature_and_small_batches():
    for options in (
        {"curvature": "hessian"},
        {"debias": True},
        {"warm_start": 0.95, "preconditioner": "second_moment"},
    ):
        model, (x, y) = mlp(), batch(200)
        opt = pb.optim.HessianFree(model, LOSS, damping=1.0, **options)
        start = LOSS(model(x), y).item()
        for t in range(12):
            pick = torch.arange(64) * (t + 1) % 199
            opt.step((x[pick], y[pick]))
        assert LOSS(model(x), y).item() < 0.8 * start
        assert flat(model).isfinite().all()


def test_groups_and_frozen_parameters():
    model, (x, y) = mlp(), batch()
    opt = pb.optim.HessianFree(model, LOSS, params=[{"params": [model[0].weight], "lr": 0.5}, {"params": [model[2].bias]}],
                               damping=0.1, **PLAIN)  # fmt: skip
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    A = pb.GGN(model, LOSS, (x, y)).to_dense()
    g = gradient(model, x, y)
    mine = torch.cat([torch.full((p.numel(),), n in ("0.weight", "2.bias")) for n, p in model.named_parameters()])
    inner = A[mine][:, mine] + 0.1 * torch.eye(int(mine.sum()), dtype=torch.float64)
    want = torch.linalg.solve(inner, -g[mine])
    opt.step((x, y))
    moved = {n: p.detach() - before[n] for n, p in model.named_parameters()}
    assert not moved["0.bias"].any() and not moved["2.weight"].any()
    torch.testing.assert_close(moved["0.weight"].flatten(), 0.5 * want[:12], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(moved["2.bias"], want[12:], rtol=1e-6, atol=1e-9)


def test_batch_norm_dropout_and_global_randomness():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)).double()
    x, y = batch(64)
    opt = pb.optim.HessianFree(model, LOSS, damping=1.0)
    before = torch.get_rng_state()
    for _ in range(3):
        opt.step((x, y))
    assert torch.equal(torch.get_rng_state(), before)
    assert int(model[1].num_batches_tracked) == 3
    with pytest.raises(ValueError, match=r"does not separate into the 64 samples.*BatchNorm in training mode"):
        pb.optim.HessianFree(model, LOSS, preconditioner="second_moment").step((x, y))
    model.eval()
    assert LOSS(model(x), y).item() < 1.1


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit():
    model = mlp()
    opt = pb.optim.HessianFree(model, LOSS, warm_start=0.9)
    saved = None
    for t in range(6):
        if t == 3:
            file = io.BytesIO()
            torch.save((model.state_dict(), opt.state_dict()), file)
            saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        opt.step(batch(seed=t))
    other = mlp(seed=4)
    fresh = pb.optim.HessianFree(other, LOSS, warm_start=0.9)
    other.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    for t in range(3, 6):
        fresh.step(batch(seed=t))
    assert torch.equal(flat(model), flat(other))
    assert fresh.diagnostics() == opt.diagnostics()


def test_nan_skips_the_step():
    model, (x, y) = mlp(), batch()
    opt = pb.optim.HessianFree(model, LOSS)
    before = flat(model)
    with pytest.warns(UserWarning, match="step 1 was skipped: the loss is NaN or infinite"):
        assert opt.step((x * float("nan"), y)) is None
    assert torch.equal(flat(model), before)
    assert opt.diagnostics()["skipped"] == 1 and opt.diagnostics()["damping"] == 1.0


def test_a_model_on_several_ranks_is_refused(monkeypatch):
    monkeypatch.setattr("paraboloid.optim.base.distributed_group", lambda *_: "a group")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)
    with pytest.raises(ValueError, match="DistributedDataParallel one over 2 ranks; expected a model on one"):
        pb.optim.HessianFree(mlp(), LOSS)


def test_errors():
    model, (x, _) = mlp(), batch()
    opt = pb.optim.HessianFree(model, LOSS)
    for wrong in (None, lambda: None, x, [x]):
        with pytest.raises(ValueError, match=r"step got a .*; expected a batch \(inputs, targets\)"):
            opt.step(wrong)
    with pytest.raises(ValueError, match="curvature is 'kfac'; expected one of"):
        pb.optim.HessianFree(model, LOSS, curvature="kfac")
    with pytest.raises(ValueError, match="max_iterations is 0; expected an integer"):
        pb.optim.HessianFree(model, LOSS, max_iterations=0)
    with pytest.raises(TypeError, match="cross_entropy is not one that paraboloid knows"):
        pb.optim.HessianFree(model, nn.functional.cross_entropy)


def test_a_step_that_another_batch_does_not_like_is_taken_back():
    torch.manual_seed(0)
    x, up, down = torch.randn(8, 3).double(), torch.ones(8, 1).double(), -torch.ones(8, 1).double()
    model = nn.Linear(3, 1).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    twin = copy.deepcopy(model)
    opt = pb.optim.HessianFree(model, nn.MSELoss(), damping=1.0)
    opt.step((x, up))
    damping = opt.param_groups[0]["damping"]
    assert model.bias.item() > 0.1
    opt.step((x, down))
    other = pb.optim.HessianFree(twin, nn.MSELoss(), damping=4 * damping)
    other.step((x, down))
    assert opt.diagnostics()["taken_back"] == 1
    assert torch.equal(model.weight, twin.weight) and torch.equal(model.bias, twin.bias)
    opt.step((x, down))  # the same data: nothing to take back
    assert opt.diagnostics()["taken_back"] == 1
    model.bias.data.fill_(0.5)  # somebody else's parameters
    opt.step((x, up))
    assert opt.diagnostics()["taken_back"] == 1
