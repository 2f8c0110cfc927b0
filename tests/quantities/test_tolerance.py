"""`tol`: what exact curvature of many classes leaves out is known for certain, in every quantity, operator and fit."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import paraboloid as pb
from paraboloid.quantities import KFAC, DiagGGN, SqrtGGN

CLASSES, TOL = 30, 0.02
NAMES = ["diag_ggn", "sample_diag_ggn", "sqrt_ggn", "kflr"]


@pytest.fixture(scope="module")
def case():
    """A network trained for a while, so that each sample has its mass in few classes."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (60,), generator=generator)
    x = centres[y] + 0.7 * torch.randn(60, 8, generator=generator, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, CLASSES)).double()
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        opt.zero_grad()
        cross_entropy(model(x), y).backward()
        opt.step()
    return model, x, y


def batches(x, y):
    return [(x[:10], y[:10]), (x[10:45], y[10:45]), (x[45:], y[45:])]


def relative_trace(f, kept):
    """Left out of the trace of the loss's Hessians, by dense matrices."""
    H = torch.stack([torch.diag(p) - torch.outer(p, p) for p in f.softmax(1)])
    total = H.diagonal(dim1=1, dim2=2).sum()
    return float((total - kept.square().sum()) / total)


def test_what_is_left_out_is_positive_and_in_the_result(case):
    model, x, y = case
    loss = nn.CrossEntropyLoss()
    exact = pb.statistics(model, loss, (x, y), NAMES)
    found = pb.statistics(model, loss, (x, y), NAMES, tol=TOL)
    columns = torch.stack(list(pb.losses.CrossEntropy().leading_root(exact.output, y, TOL).columns))
    expected = relative_trace(exact.output, columns)
    assert 0 < expected <= TOL
    for name in NAMES:
        assert found.left_out[name] == pytest.approx(expected, rel=1e-9) and exact.left_out[name] == 0.0
    for k, p in model.named_parameters():
        assert len(found["sqrt_ggn"][k]) == len(columns) < CLASSES / 2
        assert (found["diag_ggn"][k] <= exact["diag_ggn"][k] * (1 + 1e-12)).all()
        assert found["diag_ggn"][k].sum() >= (1 - 2 * TOL) * exact["diag_ggn"][k].sum()
        rows = found["sqrt_ggn"][k].flatten(2)
        torch.testing.assert_close(rows.square().sum((0, 1)).view(p.shape) / len(x), found["diag_ggn"][k])
        torch.testing.assert_close(found["sample_diag_ggn"][k].sum(0) / len(x), found["diag_ggn"][k])
        left = exact["kflr"][k].left - found["kflr"][k].left
        assert torch.linalg.eigvalsh(left).min() > -1e-12
        torch.testing.assert_close(found["kflr"][k].right, exact["kflr"][k].right)


def test_the_last_layer_leaves_out_exactly_that_part_where_inputs_have_one_norm(case):
    """Of a bias of the last layer the block is the sum of the loss's own Hessians."""
    model, x, y = case
    exact, found = (pb.statistics(model, nn.CrossEntropyLoss(), (x, y), ["diag_ggn"], tol=tol) for tol in (0, TOL))
    left = 1 - found["diag_ggn"]["2.bias"].sum() / exact["diag_ggn"]["2.bias"].sum()
    assert float(left) == pytest.approx(found.left_out["diag_ggn"], rel=1e-9)


def test_without_a_tolerance_it_is_bit_for_bit_what_it_was(case):
    model, x, y = case
    plain = pb.statistics(model, nn.CrossEntropyLoss(), (x, y), NAMES)
    zero = pb.statistics(model, nn.CrossEntropyLoss(), (x, y), NAMES, tol=0)
    for name in NAMES:
        for k in plain[name]:
            one, other = plain[name][k], zero[name][k]
            pairs = [(one, other)] if isinstance(one, torch.Tensor) else [(one.left, other.left)]
            assert all(torch.equal(a, b) for a, b in pairs)


def test_batches_each_keep_to_it_and_add_up(case):
    model, x, y = case
    found = pb.statistics(model, nn.CrossEntropyLoss(), batches(x, y), NAMES, tol=TOL)
    parts = [pb.statistics(model, nn.CrossEntropyLoss(reduction="sum"), b, NAMES, tol=TOL) for b in batches(x, y)]
    for k, value in found["diag_ggn"].items():
        torch.testing.assert_close(value, sum(part["diag_ggn"][k] for part in parts) / len(x))
        assert found["sqrt_ggn"][k].shape[:2] == (max(len(part["sqrt_ggn"][k]) for part in parts), len(x))
        torch.testing.assert_close(found["sqrt_ggn"][k].square().sum((0, 1)) / len(x), value)
    assert 0 < found.left_out["diag_ggn"] <= TOL


def test_objects_have_their_own_tolerance_and_share_pulls_where_it_is_the_same(case):
    model, x, y = case
    wanted = [DiagGGN(tol=0.3), KFAC("exact", tol=0.3), SqrtGGN()]
    stats = pb.statistics(model, nn.CrossEntropyLoss(), (x, y), wanted)
    assert stats.left_out["diag_ggn"] == stats.left_out["kflr"] > TOL and stats.left_out["sqrt_ggn"] == 0.0
    with pb.record(model) as tape:
        f = model(x)
    inside = tape.statistics(nn.CrossEntropyLoss(), f, y, ["kflr"], tol=0.3)
    torch.testing.assert_close(inside["kflr"]["0.weight"].left, stats["kflr"]["0.weight"].left)


@pytest.mark.parametrize("data", ["batch", "loader"])
def test_operators(case, data):
    model, x, y = case
    given = (x, y) if data == "batch" else batches(x, y)
    loss = nn.CrossEntropyLoss()
    stats = pb.statistics(model, loss, given, ["diag_ggn", "kflr"], tol=TOL)
    D = pb.DiagonalGGN(model, loss, given, tol=TOL)
    torch.testing.assert_close(D.diagonal(), torch.cat([v.flatten() for v in stats["diag_ggn"].values()]))
    K = pb.KFAC(model, loss, given, fisher="exact", tol=TOL)
    traces = sum(v.left.trace() * v.right.trace() for v in stats["kflr"].values())
    assert K.trace() == pytest.approx(float(traces))
    E = pb.EKFAC(model, loss, given, fisher="exact", tol=TOL)
    assert E.trace() == pytest.approx(float(sum(v.sum() for v in stats["diag_ggn"].values())))
    for A in (D, K, E, pb.KFLR(model, loss, given, tol=TOL)):
        assert A.left_out == pytest.approx(stats.left_out["diag_ggn"], rel=1e-9)
    assert pb.KFAC(model, loss, given, fisher="exact").left_out == 0.0
    assert pb.KFAC(model, loss, given, fisher="exact", measure_on=(x[:20], y[:20]), tol=TOL).left_out <= TOL


@pytest.mark.parametrize("structure", ["diag", "kron", "ekfac", "full", "functional"])
def test_posteriors(case, structure, tmp_path):
    model, x, y = case
    options = {"data": (x[:40], y[:40]), "structure": structure, "prior_precision": 2.0}
    exact = pb.laplace(model, nn.CrossEntropyLoss(), **options)
    posterior = pb.laplace(model, nn.CrossEntropyLoss(), **options, tol=1e-3)
    assert exact.left_out == 0.0 and 0 < posterior.left_out <= 1e-3
    # less curvature is left out than a thousandth of it: the volume follows
    assert exact.log_evidence() <= posterior.log_evidence() <= exact.log_evidence() + 1.0
    posterior.update((x[40:], y[40:]))
    assert 0 < posterior.left_out <= 1e-3
    posterior.save(tmp_path / "posterior.pt")
    assert pb.load_posterior(tmp_path / "posterior.pt", model, nn.CrossEntropyLoss()).left_out == posterior.left_out


def test_where_no_tolerance_belongs(case):
    model, x, y = case
    loss = nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=r"tol is 1\.5; expected a number from 0"):
        pb.statistics(model, loss, (x, y), ["diag_ggn"], tol=1.5)
    with pytest.raises(ValueError, match=r"but none of .*'variance'.* takes it"):
        pb.statistics(model, loss, (x, y), ["variance"], tol=0.1)
    with pytest.raises(ValueError, match="samples=1; expected 0"):
        DiagGGN(samples=1, tol=0.1)
    with pytest.raises(ValueError, match="fisher='mc'; expected 0, or fisher='exact'"):
        pb.KFAC(model, loss, (x, y), tol=0.1)
    with pytest.raises(ValueError, match="fisher='empirical'"):
        pb.laplace(model, loss, (x, y), fisher="empirical", tol=0.1)
    with pytest.raises(ValueError, match="structure='lowrank'; expected 0"):
        pb.laplace(model, loss, (x, y), "lowrank", tol=0.1)
