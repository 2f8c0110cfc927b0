"""With `tol`, samples that need many columns are copied: the same sums as from every sample's own columns, one by one."""

import warnings

import pytest
import torch
from torch import nn

import paraboloid as pb
from paraboloid.losses import CrossEntropy
from paraboloid.quantities import KFAC, DiagGGN, SqrtGGN, copies
from paraboloid.quantities import recording as door

CLASSES, N, TOL = 40, 12, 0.02


def mlp():
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, CLASSES))


def cnn():
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(24, CLASSES)
    )


def case(build=mlp):
    """Two samples think of many classes, the others of few."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().double()
    model[-1].weight.data *= 8
    x = 3 * torch.randn(N, 6, generator=generator, dtype=torch.float64)
    x[:2] *= 0.01
    return model, x, torch.arange(N)


@pytest.fixture
def plans(monkeypatch):
    """The copies that calls make."""
    made, planned = [], copies.planned
    monkeypatch.setattr(copies, "planned", lambda *args: made.append(planned(*args)) or made[-1])
    return made


def own_root(model, x, y):
    """S [V N C] of each sample's own columns, and what they leave out, relatively."""
    f = model(x).detach()
    root = CrossEntropy().leading_root(f, y, TOL)
    columns = root.own.of(torch.arange(N))
    return torch.stack([columns(torch.full((N,), k)) for k in range(CLASSES)]), root.own.left / root.total


@pytest.mark.parametrize("build", [mlp, cnn])
def test_sums_are_those_of_each_samples_own_columns(build, plans):
    model, x, y = case(build)
    stats = pb.statistics(model, nn.CrossEntropyLoss(), (x, y), ["diag_ggn", "kflr"], tol=TOL)
    assert len(plans) == 1 and plans[0] is not None and len(plans[0].samples) > 0
    S, left = own_root(model, x, y)
    assert left <= TOL
    assert stats.left_out["diag_ggn"] == stats.left_out["kflr"] == pytest.approx(left)
    with pb.record(model) as tape:
        f = model(x)
    diagonal, factors = tape.of_vectors(f, S, DiagGGN()), tape.of_vectors(f, S, KFAC("exact"))
    for name in diagonal:
        torch.testing.assert_close(stats["diag_ggn"][name], diagonal[name] / N, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(stats["kflr"][name].left, factors[name].left / N, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(stats["kflr"][name].right, factors[name].right, rtol=1e-10, atol=1e-14)
    exact = pb.statistics(model, nn.CrossEntropyLoss(), (x, y), ["diag_ggn"])["diag_ggn"]
    assert all((exact[k] - v >= -1e-12).all() for k, v in stats["diag_ggn"].items())
    head = list(exact)[-1]  # the last bias, whose block is the Hessian itself
    missing = float((exact[head] - stats["diag_ggn"][head]).sum() / exact[head].sum())
    assert missing == pytest.approx(stats.left_out["diag_ggn"])


def test_operators_fits_and_loaders_take_copies_too(plans):
    model, x, y = case()
    loss = nn.CrossEntropyLoss()
    S, left = own_root(model, x, y)
    with pb.record(model) as tape:
        f = model(x)
    expected = torch.cat([v.flatten() / N for v in tape.of_vectors(f, S, DiagGGN()).values()])
    A = pb.DiagonalGGN(model, loss, (x, y), tol=TOL)
    torch.testing.assert_close(A.diagonal(), expected, rtol=1e-10, atol=1e-14)
    assert A.left_out == pytest.approx(left)
    halves = pb.statistics(model, loss, [(x[:6], y[:6]), (x[6:], y[6:])], ["diag_ggn"], tol=TOL)
    assert halves.left_out["diag_ggn"] <= TOL
    assert len(plans) >= 3


class Watched(nn.Module):
    """A model that is another one, or counts, when it runs again."""

    def __init__(self, inner, change=None):
        super().__init__()
        self.inner, self.change, self.passes = inner, change, []

    def forward(self, x):
        self.passes.append(len(x))
        f = self.inner(x)
        return f if self.change is None or len(self.passes) % 2 else self.change(f)


@pytest.mark.parametrize("change", [lambda f: f + 1e-3, lambda f: f.roll(1, 0), lambda f: f[:-1]],
                         ids=["other values", "other places", "fewer"])  # fmt: skip
def test_where_copies_are_other_samples_all_take_the_same_columns(change, plans):
    model, x, y = case()
    watched = Watched(model, change)
    found = pb.statistics(watched, nn.CrossEntropyLoss(), (x, y), ["diag_ggn"], tol=TOL)
    assert len(watched.passes) == 2
    with pb.record(model) as tape:  # the recording alone cannot run the model again
        f = model(x)
    alone = tape.statistics(nn.CrossEntropyLoss(), f, y, ["diag_ggn"], tol=TOL)
    assert len(plans) == 1
    for name, value in alone["diag_ggn"].items():
        torch.testing.assert_close(found["diag_ggn"][f"inner.{name}"], value, rtol=1e-12, atol=1e-15)
    assert found.left_out == alone.left_out


def test_dropout_draws_other_masks_for_copies():
    model, x, y = case()
    model = nn.Sequential(model[0], nn.Dropout(0.5), *model[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pb.statistics(model, nn.CrossEntropyLoss(), (x, y), ["diag_ggn", "sqrt_ggn"], tol=TOL, seed=3)
        alone = pb.statistics(model, nn.CrossEntropyLoss(), (x, y), ["diag_ggn"], tol=TOL, seed=3)
    root = found["sqrt_ggn"]["0.weight"]
    torch.testing.assert_close(alone["diag_ggn"]["0.weight"], root.square().sum((0, 1)) / N)


def test_what_keeps_samples_apart_takes_no_copies(plans):
    model, x, y = case()
    pb.statistics(model, nn.CrossEntropyLoss(), (x, y), ["diag_ggn", "sqrt_ggn"], tol=TOL)
    assert plans == [] and not SqrtGGN.takes_copies


def test_without_a_tolerance_the_model_runs_once():
    model, x, y = case()
    watched = Watched(model)
    pb.statistics(watched, nn.CrossEntropyLoss(), (x, y), ["diag_ggn", "kflr"])
    assert watched.passes == [N]


def test_a_plan_has_every_column_once():
    generator = torch.Generator().manual_seed(0)
    for largest in (1, 3, 50, 400):
        counts = (largest * torch.rand(20, generator=generator) ** 4).long()
        uniform = max(1, int(counts.max()))
        plan = copies.planned(counts, uniform, 10_000)
        if plan is None:
            continue
        taken = [(n, k) for ranks in plan.ranks.tolist() for n, k in zip(plan.samples.tolist(), ranks, strict=True)]
        needed = {(n, k) for n in range(20) for k in range(plan.shared, int(counts[n]))}
        assert needed <= set(taken) and len([pair for pair in taken if pair in needed]) == len(needed)
        assert all(k >= int(counts[n]) or (n, k) in needed for n, k in taken)
    assert copies.planned(torch.full((20,), 9), 9, 1000) is None  # all alike
    assert copies.planned(torch.tensor([400] + [1] * 30), 200, 8) is not None
    assert (
        copies.planned(torch.tensor([400] * 10 + [1] * 30), 200, 8) is None
        or len(copies.planned(torch.tensor([400] * 10 + [1] * 30), 200, 8).samples) <= 8
    )


def test_the_door_gives_every_recording_a_way_to_run_again():
    model, x, _ = case()
    with door.forward(model, x, x.device, 0) as (tape, f):
        pass
    assert tape.again is not None
    with tape.again(torch.tensor([3, 3, 1])) as (again, g):
        torch.testing.assert_close(g, f[[3, 3, 1]])
    assert again.calls
