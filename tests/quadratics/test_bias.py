"""The bias of mini-batch quadratics: what is known exactly, what digits show, and the result's own arithmetic."""

import itertools
import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from operators.oracle import classes, make_inputs, make_model
from torch import nn
from torch.utils.data import TensorDataset

from paraboloid import problems
from paraboloid.operators import GGN, Fisher, Hessian
from paraboloid.passes.memory import MEASURED
from paraboloid.quadratics.local_model import quadratic
from paraboloid.quadratics.measure_bias import Bias, bias

CE = nn.CrossEntropyLoss()
BETA = 0.01


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data(n):
    return make_inputs("mlp", n, 0), classes(n, 1)


def fit(model, x, y, indices, **options):
    return quadratic(model, CE, (x[indices], y[indices]), weight_decay=BETA, **options)


def directions(k=4):
    d = random(k, 57)
    return d / d.norm(dim=1, keepdim=True)


# --- what is known exactly ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_directions_independent_of_the_batch_have_unbiased_slopes_and_curvatures(curvature):
    """The mean over all batches of three out of six samples is the full data's value."""
    model, (x, y) = make_model("mlp"), data(6)
    found = [
        fit(model, x, y, list(b), curvature=curvature).along(directions()) for b in itertools.combinations(range(6), 3)
    ]
    slopes, curvatures = (torch.stack(values).mean(0) for values in zip(*found, strict=True))
    expected_slopes, expected_curvatures = fit(model, x, y, slice(None), curvature=curvature).along(directions())
    torch.testing.assert_close(slopes, expected_slopes, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(curvatures, expected_curvatures, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("k", [1, 3, 10, 57])
def test_top_eigenvalues_are_overstated_on_the_batch_and_understated_on_all_data(k):
    """On an equal partition, mean sum of lambda_i(C_B) >= sum of lambda_i(C_D) >= mean sum of u_i.C_D u_i."""
    model, (x, y) = make_model("mlp"), data(12)
    full = fit(model, x, y, slice(None))
    top = full.along(full.eigen_directions(k))[1].sum()
    own, seen = [], []
    for indices in torch.randperm(12, generator=torch.Generator().manual_seed(0)).split(4):
        q = fit(model, x, y, indices)
        U = q.eigen_directions(k)
        own.append(q.along(U)[1].sum())
        seen.append(full.along(U)[1].sum())
    slack = 1e-10 * top
    assert torch.stack(own).mean() >= top - slack
    assert top >= torch.stack(seen).mean() - slack
    if k < 57:
        assert torch.stack(own).mean() > 1.01 * torch.stack(seen).mean()


def test_the_full_curvature_is_the_weighted_mean_of_the_batch_and_the_rest():
    """u.C_D u = (m/N) u.C_B u + (1 - m/N) u.C_{D without B} u, along eigenvectors of C_B."""
    model, (x, y) = make_model("mlp"), data(11)
    batch, rest, full = (fit(model, x, y, i) for i in (slice(0, 4), slice(4, 11), slice(None)))
    U = batch.eigen_directions(5)
    expected = 4 / 11 * batch.along(U)[1] + 7 / 11 * rest.along(U)[1]
    torch.testing.assert_close(full.along(U)[1], expected, rtol=1e-10, atol=0)


def test_the_slope_along_the_gradient_is_overstated_by_the_gradients_variance():
    """E||g_B||^2 = ||g||^2 + (1 - m/N) S/m over all batches; -||g_B|| is the slope along CG's first direction."""
    model, (x, y) = make_model("mlp"), data(7)
    m, N = 3, 7

    def gradient(indices):
        q = fit(model, x, y, indices)
        return torch.cat([g.reshape(-1) for g in q.gradient.values()]), q

    squares = []
    for batch in itertools.combinations(range(N), m):
        g, q = gradient(list(batch))
        squares.append(g.square().sum())
        slope = q.along(q.conjugate_directions(1))[0]
        torch.testing.assert_close(slope.square().squeeze(), squares[-1], rtol=1e-10, atol=0)
    g = gradient(slice(None))[0]
    S = sum((gradient([n])[0] - g).square().sum() for n in range(N)) / (N - 1)
    expected = g.square().sum() + (1 - m / N) * S / m
    torch.testing.assert_close(torch.stack(squares).mean(), expected, rtol=1e-10, atol=0)


def test_gaussian_rows_follow_marchenko_and_pastur():
    """Linear regression on white inputs: the top same-batch eigenvalue tends to (1 + sqrt(d/m))^2, the other to 1."""
    d, m = 60, 120
    x = random(6000, d)
    model = nn.Linear(d, 1, bias=False).double()
    found = bias(model, nn.MSELoss(), (x, torch.zeros(6000, 1).double()), batch_size=m, k=1, repeats=8)
    limit = (1 + math.sqrt(d / m)) ** 2  # 2.91
    full = found.curvature["full"].mean().item() / 2  # the MSE's Hessian is 2
    assert full == pytest.approx(1, abs=0.1)
    assert 0.88 * limit < found.ratio("same").item() * full < limit
    assert found.ratio("other").item() == pytest.approx(1, abs=0.1)


# --- what digits show --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    problem = problems.load("digits-tanh")
    problems.train(problem, evaluations=1)
    return problem


def test_the_top_curvature_of_digits_is_overstated_less_with_larger_batches(digits):
    same, other = [], []
    for m in (32, 64, 128, 256, 512):
        found = bias(digits.model, digits.loss_fn, digits.train, m, k=5, weight_decay=1e-3)
        same.append((found.total_ratio("same", 1), found.total_ratio("same", 5)))
        other.append(found.total_ratio("other", 5))
    first, five = zip(*same, strict=True)
    assert all(a > b for a, b in itertools.pairwise(first))
    assert first[1] > 1.2
    assert 1.6 < first[0] < 2.8
    assert five[0] > 1.2 > five[2]
    assert 0.99 < five[4] < first[4] < 1.15
    assert all(0.8 < ratio < 1.07 for ratio in other)


def test_at_initialisation_the_bias_of_digits_is_small():
    problem = problems.load("digits-tanh")
    found = bias(problem.model, problem.loss_fn, problem.train, 64, k=5)
    assert 1.0 < found.total_ratio("same") < 1.15


def test_slopes_along_cg_directions_of_digits_are_overstated(digits):
    found = bias(digits.model, digits.loss_fn, digits.train, 64, k=5, directions="cg", damping=0.01, weight_decay=1e-3)
    assert (found.slope["same"][:, 0] < 0).all()
    assert found.ratio("same", "slope")[0] > 1.1
    assert abs(found.ratio("other", "slope")[0].item() - 1) < 0.2
    assert found.total_ratio("same") > 1.1


# --- what is measured --------------------------------------------------------------------------------------------


def chosen(q, kind):
    if kind in ("kfac", "ekfac"):
        return q.kron_directions(3, corrected=kind == "ekfac")
    return q.eigen_directions(3) if kind == "eigen" else q.conjugate_directions(3, 0.1)


@pytest.mark.parametrize("kind", ["eigen", "cg", "kfac", "ekfac"])
@pytest.mark.parametrize("curvature, Operator", [("ggn", GGN), ("hessian", Hessian), ("fisher", Fisher)])
def test_the_numbers_are_those_of_the_three_quadratics(kind, curvature, Operator):
    model, (x, y) = make_model("mlp"), data(20)
    found = bias(
        model, CE, (x, y), batch_size=6, k=3, repeats=2, directions=kind, curvature=curvature,
        weight_decay=BETA, seed=4, damping=0.1, overlap=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(4)
    eye = torch.eye(57, dtype=torch.float64)
    for repeat in range(2):
        order = torch.randperm(20, generator=generator)
        sets = {"same": order[:6], "other": order[6:12], "full": torch.arange(20)}
        fits = {w: fit(model, x, y, i, curvature=curvature, seed=4) for w, i in sets.items()}
        options = {"seed": 4} if curvature == "fisher" else {}
        C = {w: Operator(model, CE, (x[i], y[i]), **options).to_dense() + BETA * eye for w, i in sets.items()}
        D = chosen(fits["same"], kind)
        Q, V = (torch.linalg.qr(chosen(fits[w], kind).T).Q for w in ("same", "full"))
        torch.testing.assert_close(found.overlap[repeat], (Q.T @ V).square().sum() / 3, rtol=1e-3, atol=1e-6)
        g = {w: torch.cat([t.reshape(-1) for t in q.gradient.values()]) for w, q in fits.items()}
        D = torch.where(D @ g["same"] > 0, -1.0, 1.0).unsqueeze(1) * D
        for which in sets:
            curvatures = torch.stack([d @ C[which] @ d for d in D])
            torch.testing.assert_close(found.curvature[which][repeat], curvatures, rtol=1e-5, atol=1e-8)
            torch.testing.assert_close(found.slope[which][repeat], D @ g[which], rtol=1e-3, atol=1e-6)


def test_directions_of_all_data_that_are_known_need_not_be_found():
    model, options = make_model("mlp"), {"batch_size": 6, "k": 3, "repeats": 2}
    x, y = data(20)
    known = quadratic(model, CE, (x, y)).eigen_directions(3)
    one, two = (bias(model, CE, (x, y), overlap=o, **options) for o in (True, 2 * known))
    torch.testing.assert_close(one.overlap, two.overlap, rtol=1e-3, atol=0)


def test_a_subset_stands_for_all_data_with_its_standard_error():
    """Over seeds, the subset's curvature is off by as much as it says; all samples have no error and no difference."""
    model, options = make_model("mlp"), {"batch_size": 10, "k": 2, "repeats": 1}
    z = []
    for seed in range(40):
        part, whole = (bias(model, CE, data(120), seed=seed, full_samples=n, **options) for n in (48, None))
        assert torch.equal(part.curvature["same"], whole.curvature["same"])
        for of in ("curvature", "slope"):
            z.append((getattr(part, of)["full"] - getattr(whole, of)["full"]) / part.full_error[of])
    z = torch.stack(z)
    assert z.square().mean().sqrt().item() == pytest.approx(1.1, abs=0.25)  # Student's t with 15 degrees: 1.07
    assert part.full_samples == part.to_json()["full_samples"] == 48
    every = bias(model, CE, data(120), seed=39, full_samples=120, **options)
    torch.testing.assert_close(every.curvature["full"], whole.curvature["full"])
    assert every.full_error["curvature"].abs().max() == 0


def test_datasets_of_every_kind_give_the_same_numbers():
    model, (x, y) = make_model("mlp"), data(20)

    class Items(torch.utils.data.Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, i):
            return x[i], int(y[i])

    results = [bias(model, CE, d, batch_size=5, k=2, repeats=2) for d in ((x, y), TensorDataset(x, y), Items())]
    for other in results[1:]:
        for which in ("same", "other", "full"):
            assert torch.equal(other.curvature[which], results[0].curvature[which])


def test_the_full_data_may_be_read_for_each_measurement(monkeypatch):
    """With no memory for graphs the numbers are the same, and directions wait for one common pass."""
    model = make_model("mlp")
    module = sys.modules["paraboloid.quadratics.measure_bias"]
    monkeypatch.setattr(module, "CHUNK", 7)
    passes = []

    class Chunks(module.Chunks):
        def __iter__(self):
            passes.append(1)
            return super().__iter__()

    monkeypatch.setattr(module, "Chunks", Chunks)
    kept, anew = (bias(model, CE, data(20), batch_size=5, k=2, repeats=3, max_memory=m) for m in (None, 0))
    assert len(passes) == 1 + 3  # kept: once; anew: the check, the gradient, all directions together
    for which in ("same", "other", "full"):
        torch.testing.assert_close(anew.curvature[which], kept.curvature[which])
    monkeypatch.setattr(MEASURED, "default", 1)
    apart = bias(model, CE, data(20), batch_size=5, k=2, repeats=3, max_memory=0)
    assert len(passes) == 4 + 5
    torch.testing.assert_close(apart.curvature["full"], kept.curvature["full"])


def test_the_seed_decides_and_nothing_else_is_touched():
    model = make_model("mlp")
    state, order = torch.get_rng_state(), []
    one, two, other = (
        bias(model, CE, data(20), batch_size=5, k=2, repeats=3, seed=s, progress=lambda *a: order.append(a))
        for s in (0, 0, 1)
    )
    assert torch.equal(one.curvature["same"], two.curvature["same"])
    assert not torch.equal(one.curvature["same"], other.curvature["same"])
    assert torch.equal(torch.get_rng_state(), state)
    assert order[:3] == [(1, 3), (2, 3), (3, 3)]
    assert all(p.grad is None for p in model.parameters())


# --- the result's own arithmetic ---------------------------------------------------------------------------------


def result(repeats=3):
    full = torch.tensor([[2.0, 1.0], [4.0, 2.0], [6.0, 3.0]], dtype=torch.float64)[:repeats]
    curvature = {"same": 2 * full, "other": full + torch.tensor([1.0, 0.0]), "full": full}
    slope = {"same": -full, "other": -full / 2, "full": torch.zeros_like(full)}
    return Bias(curvature, slope, 8, 100, "eigen", "ggn", 0.0, 0)


def test_ratios_are_ratios_of_sums():
    found = result()
    assert found.ratio("same").tolist() == [2.0, 2.0]
    assert found.ratio("other").tolist() == [15 / 12, 1.0]
    assert found.ratio("full").tolist() == [1.0, 1.0]
    assert found.total_ratio("other") == pytest.approx(21 / 18)
    assert found.total_ratio("other", 1) == pytest.approx(15 / 12)
    assert (found.k, found.repeats) == (2, 3)


def test_standard_errors_are_those_of_a_ratio_of_means():
    """Against the spread of the ratio over many results."""
    generator = torch.Generator().manual_seed(0)
    ratios, errors = [], []
    for _ in range(400):
        full = 3 + torch.rand(15, 1, generator=generator, dtype=torch.float64)
        same = 1.5 * full + torch.randn(15, 1, generator=generator, dtype=torch.float64)
        found = Bias({"same": same, "other": same, "full": full}, {}, 8, 100, "eigen", "ggn", 0.0, 0)
        ratios.append(found.ratio("same").item())
        errors.append(found.standard_error("same").item())
        assert found.total_standard_error("same") == pytest.approx(errors[-1])
    assert sum(errors) / 400 == pytest.approx(torch.tensor(ratios).std().item(), rel=0.1)


def test_a_single_repeat_has_no_standard_error():
    assert result(1).standard_error("same").isnan().all()
    assert math.isnan(result(1).total_standard_error("same"))
    result(1).plot()


def test_the_table_and_the_record():
    found = result()
    lines = found.table().splitlines()
    assert len(lines) == 2 + 2 + 1
    assert lines[0].endswith("| step same/full | step other/full |")
    assert lines[2].startswith("| 1 | 2.000 ± 0.000 | 1.250 ±")
    assert lines[2].count("– ± –") == 4  # slopes and steps over zero
    record = found.to_json()
    text = json.dumps(record, allow_nan=False)  # slopes over zero are null
    assert json.loads(text)["ratio"]["slope"]["same"]["value"] == [None, None]
    assert found.step("same").tolist() == [[0.5, 0.5]] * 3
    assert record["step"]["same"] == [[0.5, 0.5]] * 3
    assert [record[key] for key in ("overlap", "full_error", "full_samples", "predicted")] == [None, None, 100, None]
    assert record["curvature"]["full"] == [[2.0, 1.0], [4.0, 2.0], [6.0, 3.0]]
    assert {record[key] for key in ("batch_size", "samples", "k", "repeats")} == {8, 100, 2, 3}


def test_the_prediction_and_the_overlap_stand_beside_what_was_measured():
    found = replace(result(), overlap=torch.tensor([0.5, 0.75, 1.0]))
    predicted = found.predicted(torch.tensor([3.0, 2.0, 1.0, 0.5]))
    lines = found.table(predicted).splitlines()
    assert lines[0].endswith("| curvature same/full, predicted | curvature other/full, predicted |")
    same = predicted["same"]
    assert lines[3].split(" | ")[-2] == f"{same[1]:.3f}"
    assert lines[4].split(" | ")[-2] == f"{(2 * same[0] + same[1]) / 3:.3f}"  # full curvatures are 2 to 1
    assert lines[-1] == "Overlap with the directions of all data: 0.750 ± 0.144."
    assert found.to_json(predicted)["predicted"]["same"] == same.tolist()
    figure = found.plot(predicted)
    curvature, _, step = figure.axes
    assert [line.get_linestyle() for line in curvature.lines].count("--") == 2
    assert len(step.lines) == 3
    assert "overlap with those of all data 0.750 ± 0.144" in figure.get_suptitle()
    for wrong in ({"same": same}, {"same": same[:1], "other": same[:1]}):
        with pytest.raises(ValueError, match=r"the prediction has the shapes \{'same': .*expected 'same' and 'other'"):
            found.table(wrong)


def test_the_figure_is_drawn_without_pyplot():
    import matplotlib

    before = set(sys.modules)
    figure = result().plot()
    assert isinstance(figure, matplotlib.figure.Figure)
    assert "matplotlib.pyplot" not in set(sys.modules) - before
    assert {axes.get_xlabel() for axes in figure.axes} == {"direction (top first)"}
    names = ["directional curvature", "directional slope", "length of the Newton step"]
    assert [axes.get_ylabel() for axes in figure.axes] == names
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["the same batch", "another batch", "all data"]
    figure.canvas.draw()


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"batch_size": 11},
            "batch_size is 11 for 20 samples; expected at most 10, so that two disjoint batches exist",
        ),
        ({"batch_size": 0}, "batch_size is 0; expected an integer of at least 1"),
        ({"repeats": 0}, "repeats is 0; expected an integer of at least 1"),
        ({"k": 58}, r"k is 58; expected an integer in 1\.\.57"),
        ({"directions": "kron"}, r"directions is 'kron'; expected one of \['eigen', 'cg', 'kfac', 'ekfac'\]"),
        ({"curvature": "kfac"}, r"curvature is 'kfac'; expected one of \['ggn', 'hessian', 'fisher'\]"),
        ({"full_samples": 21}, r"full_samples is 21; expected an integer in 16\.\.20, the number of samples"),
        (
            {"overlap": torch.ones(2, 56)},
            r"overlap has shape \(2, 56\); expected the directions of all data, \[2, 57\]",
        ),
        ({"weight_decay": -1.0}, "weight_decay is -1.0; expected a number of at least 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        bias(make_model("mlp"), CE, data(20), **{"batch_size": 5, "k": 2, "repeats": 2} | options)


def test_there_is_no_prediction_for_other_directions():
    found = replace(result(), directions="cg")
    with pytest.raises(ValueError, match="the directions are 'cg'; the prediction is for 'eigen' directions"):
        found.predicted(torch.ones(3))


def test_bad_questions():
    with pytest.raises(ValueError, match=r"which is 'all'; expected one of \('same', 'other', 'full'\)"):
        result().ratio("all")
    with pytest.raises(ValueError, match=r"of is 'length'; expected one of \('curvature', 'slope', 'step'\)"):
        result().ratio("same", "length")
    with pytest.raises(ValueError, match=r"k is 3; expected an integer in 1\.\.2"):
        result().total_ratio("same", 3)
    with pytest.raises(ValueError, match="the dataset is a generator; expected a map-style dataset"):
        bias(make_model("mlp"), CE, (d for d in [data(5)]))
