"""The curvature section against the dense GGN, from Jacobians by autograd."""

import pytest
import torch
from torch import nn

import paraboloid as pb
from paraboloid.jobs.inspection import subject as subjects
from paraboloid.jobs.inspection.curvature import curvature, products
from paraboloid.jobs.inspection.subject import subject
from paraboloid.problems import Problem, Training


def problem(weight_decay=0.0):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 3, dtype=torch.float64, generator=generator)
    y = torch.tensor([0, 1, 2] * 3)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    settings = Training(weight_decay=weight_decay)
    return Problem(model, nn.CrossEntropyLoss(), (x, y), (x, y), name="tiny", training=settings)


def dense_ggn(p):
    parameters = list(p.model.parameters())
    x, _ = p.train.tensors
    total = 0
    for n in range(len(x)):
        f = p.model(x[n : n + 1])[0]
        rows = [torch.autograd.grad(out, parameters, retain_graph=True) for out in f]
        J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        probabilities = f.detach().softmax(0)
        total = total + J.T @ (probabilities.diag() - torch.outer(probabilities, probabilities)) @ J
    return total / len(x) + p.training.weight_decay * torch.eye(len(total), dtype=torch.float64)


@pytest.mark.parametrize("chunk", [100, 4])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_against_the_dense_matrix(weight_decay, chunk, monkeypatch):
    monkeypatch.setattr(subjects, "CHUNK", chunk)
    p = problem(weight_decay)
    G = dense_ggn(p)
    values, vectors = (t.flip(-1) for t in torch.linalg.eigh(G))
    found = curvature(subject(p, 100, 0), 3, 2, 60, 0, lambda: None)

    assert [item["value"] for item in found["eigenvalues"]] == pytest.approx(values[:3].tolist(), rel=1e-9)
    first = vectors[:, 0].square()
    shares = found["eigenvalues"][0]["layers"]
    assert shares == pytest.approx({"0": first[:16].sum().item(), "2": first[16:].sum().item()}, rel=1e-6)
    assert found["trace"]["value"] == pytest.approx(G.trace().item(), rel=1e-10)
    traces = [row["trace"] for row in found["layers"]]
    assert traces == pytest.approx([G.diagonal()[:16].sum().item(), G.diagonal()[16:].sum().item()], rel=1e-10)
    assert found["layers"][1]["mean_diagonal"] == pytest.approx(traces[1] / 15, rel=1e-12)
    density = found["density"]
    grid, height = torch.tensor(density["grid"]), torch.tensor(density["density"])
    assert torch.trapezoid(height, grid.log10()).item() == pytest.approx(1, abs=1e-6)


def test_more_directions_than_parameters_are_all_of_them():
    s = subject(problem(), 100, 0)
    assert len(curvature(s, 1000, 1, 10, 0, lambda: None)["eigenvalues"]) == 31


def test_progress_counts_what_was_announced():
    s, calls = subject(problem(), 100, 0), []
    curvature(s, 2, 3, 20, 0, lambda: calls.append(None))
    assert len(calls) == products(s, 3, 20)


def test_a_flat_loss_has_no_density():
    p = problem()
    for parameter in p.model.parameters():
        parameter.requires_grad_(False)
    p.model[0].weight.requires_grad_(True)
    with torch.no_grad():
        p.model[2].weight.zero_()
    found = curvature(subject(p, 100, 0), 2, 1, 10, 0, lambda: None)
    assert found["density"] is None
    assert found["trace"]["value"] == 0


def test_with_many_outputs_the_diagonal_is_estimated_within_its_error(monkeypatch):
    p = problem(weight_decay=0.1)
    exact = curvature(subject(p, 100, 0), 1, 1, 10, 0, lambda: None)["trace"]
    monkeypatch.setattr("paraboloid.jobs.inspection.matrices.EXACT_COLUMNS", 1)
    found = curvature(subject(p, 100, 0), 1, 1, 10, 0, lambda: None)
    trace = found["trace"]
    assert exact["standard_error"] is None
    assert 0 < trace["standard_error"] < 0.2 * trace["value"]
    assert abs(trace["value"] - exact["value"]) < 3 * trace["standard_error"]
    assert trace["method"].startswith("Estimated from 32 labels per sample")
    assert sum(row["trace"] for row in found["layers"]) == pytest.approx(trace["value"], rel=1e-12)
    assert all(0 < row["standard_error"] < row["trace"] for row in found["layers"])


def dense_hessian(p):
    parameters = list(p.model.parameters())
    x, y = p.train.tensors
    grads = torch.autograd.grad(p.loss_fn(p.model(x), y), parameters, create_graph=True)
    flat = torch.cat([g.flatten() for g in grads])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in flat]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def test_the_hessian(monkeypatch):
    p = problem(weight_decay=0.1)
    H = dense_hessian(p) + 0.1 * torch.eye(31).double()
    found, calls = {}, []
    s = subject(p, 100, 0)
    found = curvature(s, 3, 2, 60, 0, lambda: calls.append(None), "hessian")
    assert len(calls) == products(s, 2, 60, "hessian")
    assert found["operator"] == "Hessian"
    values = [item["value"] for item in found["eigenvalues"]]
    assert values == pytest.approx(torch.linalg.eigvalsh(H).flip(0)[:3].tolist(), rel=1e-8)
    trace = found["trace"]
    assert abs(trace["value"] - H.trace().item()) < 4 * trace["standard_error"]
    assert trace["method"].startswith("Estimated from 32 products with random vectors of signs")
    for row, at in zip(found["layers"], (slice(0, 16), slice(16, 31)), strict=True):
        assert abs(row["trace"] - H.diagonal()[at].sum().item()) < 4 * row["standard_error"]
    density = found["density"]
    assert (density["scale"], density["floor"]) == ("linear", None)
    assert density["grid"][0] < torch.linalg.eigvalsh(H)[0].item()


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
@pytest.mark.parametrize("columns", [128, 1])
def test_kronecker_factored_curvature(kind, columns, monkeypatch):
    monkeypatch.setattr("paraboloid.jobs.inspection.matrices.EXACT_COLUMNS", columns)
    monkeypatch.setattr(subjects, "CHUNK", 4)
    p = problem(weight_decay=0.1)
    s, calls = subject(p, 100, 0), []
    found = curvature(s, 3, 2, 60, 0, lambda: calls.append(None), kind)
    assert len(calls) == products(s, 2, 60, kind)
    fisher = {"fisher": "exact"} if columns > 1 else {"samples": 32}
    A = {"kfac": pb.KFAC, "ekfac": pb.EKFAC}[kind](p.model, p.loss_fn, list(s.batches), **fisher)
    assert found["operator"] == kind.upper()
    assert [item["value"] for item in found["eigenvalues"]] == pytest.approx((A.eigsh(3)[0] + 0.1).tolist())
    assert found["trace"]["value"] == pytest.approx(A.trace() + 3.1)
    assert found["trace"]["standard_error"] is None
    if columns > 1 and kind == "ekfac":
        assert found["trace"]["value"] == pytest.approx(dense_ggn(p).trace().item(), rel=1e-10)
    words = "the exact Hessian of the loss" if columns > 1 else "32 labels per sample drawn from the model"
    assert words in found["trace"]["method"]


def test_an_unknown_curvature():
    with pytest.raises(ValueError, match="curvature is 'fisher'; expected one of"):
        curvature(subject(problem(), 100, 0), 1, 1, 10, 0, lambda: None, "fisher")
