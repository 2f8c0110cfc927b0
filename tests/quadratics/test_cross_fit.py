"""Cross-fitting against the quadratics of its folds, and its standard errors against dense single samples."""

import pytest
import torch
from operators.oracle import classes, make_inputs, make_model
from torch import nn

from paraboloid.operators import GGN, Fisher
from paraboloid.quadratics.cross_fitting import cross_fit
from paraboloid.quadratics.local_model import quadratic

CE = nn.CrossEntropyLoss()
BETA = 0.01


def data(n):
    return make_inputs("mlp", n, 0), classes(n, 1)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("loss_fn", [CE, nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(ignore_index=1)])
@pytest.mark.parametrize("memory", [None, 0])
def test_the_quadratic_forms_of_single_samples(loss_fn, memory):
    model, (x, y) = make_model("mlp"), data(9)
    C = GGN(model, loss_fn, [(x[:4], y[:4]), (x[4:], y[4:])], max_memory=memory)
    rows = random(3, 57)
    found = C.sample_quadratic_forms(rows)
    torch.testing.assert_close(found.mean(1), C.quadratic_forms(rows), rtol=1e-10, atol=1e-14)
    summed = nn.CrossEntropyLoss(reduction="sum", ignore_index=loss_fn.ignore_index)
    for n in range(9):
        if y[n] == loss_fn.ignore_index:
            assert (found[:, n] == 0).all()
            continue
        dense = GGN(model, summed, (x[n : n + 1], y[n : n + 1])).to_dense()
        scale = 9 / C.replay.normalizer
        expected = scale * torch.stack([d @ dense @ d for d in rows])
        torch.testing.assert_close(found[:, n], expected, rtol=1e-10, atol=1e-14)


def test_the_forms_of_samples_need_a_loss_that_says_how_it_divides():
    model, batch = make_model("mlp"), data(5)
    with pytest.raises(NotImplementedError, match="found Opaque and blocks None"):
        GGN(model, lambda f, y: CE(f, y), batch).sample_quadratic_forms(random(1, 57))
    with pytest.raises(NotImplementedError, match="found CrossEntropy"):
        Fisher(model, CE, batch, blocks="layer").sample_quadratic_forms(random(1, 57))


@pytest.mark.parametrize("kind", ["eigen", "cg", "kfac", "ekfac"])
@pytest.mark.parametrize("curvature", ["ggn", "hessian", "fisher"])
@pytest.mark.parametrize("chosen_by", ["fold", "rest"])
def test_folds_choose_and_the_others_measure(kind, curvature, chosen_by):
    model, (x, y) = make_model("mlp"), data(12)
    found = cross_fit(
        model, CE, (x, y), k=2, folds=3, directions=kind, curvature=curvature, weight_decay=BETA, seed=5,
        chosen_by=chosen_by, damping=0.1,
    )  # fmt: skip
    parts = torch.randperm(12, generator=torch.Generator().manual_seed(5)).tensor_split(3)
    steps = []
    for i in range(3):
        one, rest = parts[i], torch.cat([p for j, p in enumerate(parts) if j != i])
        if chosen_by == "rest":
            one, rest = rest, one
        a, b = (quadratic(model, CE, (x[s], y[s]), curvature=curvature, weight_decay=BETA, seed=5) for s in (one, rest))
        if kind == "eigen":
            rows = a.eigen_directions(2, seed=5)
        elif kind == "cg":
            rows = a.conjugate_directions(2, 0.1, seed=5)
        else:
            rows = a.kron_directions(2, corrected=kind == "ekfac")
        torch.testing.assert_close(found.directions[i], rows)
        C = b.curvature.to_dense()
        torch.testing.assert_close(found.curvature[i], torch.stack([d @ C @ d for d in rows]), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.same_curvature[i], a.along(rows)[1], rtol=1e-9, atol=1e-12)
        steps.append(b.step_along(rows, 0.1))
    torch.testing.assert_close(found.step(0.1), torch.stack(steps).mean(0), rtol=1e-9, atol=1e-12)
    assert (found.standard_error is None) == (curvature == "hessian")


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Along fixed many-sample batches: the truth is the curvature of the population that the batches are drawn from."""
    model, (x, y) = make_model("mlp"), data(600)
    everything = quadratic(model, CE, (x, y))
    inside = []
    for seed in range(12):
        chosen = torch.randperm(600, generator=torch.Generator().manual_seed(100 + seed))[:60]
        found = cross_fit(model, CE, (x[chosen], y[chosen]), k=3, seed=seed)
        truth = everything.along(found.directions.flatten(0, 1))[1].view(2, 3)
        low, high = found.interval()
        inside.append(((low <= truth) & (truth <= high)).double().mean())
    assert 0.8 < torch.stack(inside).mean() < 1.0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"folds": 1}, "folds is 1; expected at least 2"),
        ({"folds": 13}, r"folds is 13; expected an integer in 1\.\.12"),
        ({"directions": "newton"}, r"directions is 'newton'; expected one of \['eigen', 'cg', 'kfac', 'ekfac'\]"),
        ({"curvature": "kfac"}, r"curvature is 'kfac'; expected one of \['ggn', 'hessian', 'fisher'\]"),
        ({"chosen_by": "half"}, r"chosen_by is 'half'; expected one of \['fold', 'rest'\]"),
        ({"batch": [data(12)]}, "the batch is a list; expected one batch of two tensors"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        cross_fit(make_model("mlp"), CE, **{"batch": data(12), "k": 2} | options)


def test_bad_questions():
    found = cross_fit(make_model("mlp"), CE, data(12), k=2, curvature="hessian")
    with pytest.raises(ValueError, match="the curvature is the Hessian's, which is not known sample by sample"):
        found.interval()
    flat = cross_fit(make_model("mlp"), CE, data(12), k=2)
    flat.curvature[1, 0] = -0.5
    with pytest.raises(ValueError, match="the curvature \\+ damping is 0 along direction 0 of fold 1"):
        flat.step(0.5)
