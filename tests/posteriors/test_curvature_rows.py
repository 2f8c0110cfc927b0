"""Rows of the curvature's root: a bounded number at a time, the same whatever the bound, refused before they are formed."""

from dataclasses import replace

import pytest
import torch
from posteriors.dense import close, curvature
from torch import nn

import paraboloid as pb
from paraboloid.passes.memory import DENSE, Limit
from paraboloid.posteriors import curvature_rows

BOUNDS = [None, 8, 2000]  # bytes: 8 is one column of the root at a time


class Words(nn.Module):
    """Outputs [N, classes, positions]."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, x):
        return self.head(self.table(x).tanh()).transpose(1, 2)


@pytest.fixture
def words():
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    return Words().double(), torch.randint(7, (5, 3), generator=g), torch.randint(7, (5, 3), generator=g)


def fit(problem, **options):
    model, x, y = problem
    return pb.laplace(model, nn.CrossEntropyLoss(), (x, y), **options)


@pytest.mark.parametrize("structure", ["full", "functional"])
@pytest.mark.parametrize("max_memory", BOUNDS)
def test_any_bound_gives_the_dense_curvature(words, structure, max_memory):
    model, x, y = words
    found = fit(words, structure=structure, max_memory=max_memory).curvature.to_dense()
    close(found, curvature(model, nn.CrossEntropyLoss(), x, y))


@pytest.mark.parametrize("options", [
    {"fisher": "mc", "samples": 4}, {"fisher": "empirical"}, {"tol": 1e-2}, {"curvature": "jacobian"}, {"subset": 3},
    {"weights": ["head.bias"]},
], ids=str)  # fmt: skip
def test_the_bound_changes_no_option_s_rows(words, options):
    rows = [fit(words, structure="functional", max_memory=m, **options).curvature.A for m in BOUNDS]
    for other in rows[1:]:
        close(other.T @ other, rows[0].T @ rows[0])


def test_several_batches_keep_their_samples_rows(words):
    """What each sample's others leave of it needs to know which rows are whose."""
    model, x, y = words
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    found = [
        pb.laplace(model, nn.CrossEntropyLoss(), data, structure="functional", weights=["head.weight"], max_memory=m)
        for data in (batches, (x, y)) for m in BOUNDS
    ]  # fmt: skip
    D = found[0].curvature.A.shape[1]
    assert all(sum(V * N for V, N in p.curvature.batches) in (0, len(p.curvature.A)) for p in found)
    assert all(len(p.curvature.A) <= 2 * D for p in found)
    for p in found[1:]:
        close(p.curvature.to_dense(), found[0].curvature.to_dense())


@pytest.mark.parametrize("max_memory", BOUNDS[:2])
def test_no_more_rows_are_formed_than_the_bound_says(words, max_memory, monkeypatch):
    monkeypatch.setattr(curvature_rows, "ROWS", Limit("rows", 5 * 7 * 8 * 63 * 2, 1))
    formed, joined = [], curvature_rows._joined

    def seen(parts, columns):
        formed.append(joined(parts, columns))
        return formed[-1]

    monkeypatch.setattr(curvature_rows, "_joined", seen)
    fit(words, structure="full", max_memory=max_memory)
    assert len(formed) > 1 and sum(map(len, formed)) == 5 * 6 * 3
    assert max(map(len, formed)) == (5 if max_memory else 5 * 14)


def test_what_would_not_fit_is_refused_before_it_is_formed(words, monkeypatch):
    """7 x 3 outputs of 5 samples, of which 18 have curvature: 63 rows are as many as weights."""
    monkeypatch.setattr(curvature_rows, "DENSE", replace(DENSE, default=40_000))
    monkeypatch.setattr(curvature_rows, "_joined", lambda *a: pytest.fail("rows were formed"))
    with pytest.raises(ValueError, match=r"structure='functional' with the 63 rows of 5 samples \(18 for each\) for 63 "
                       r"weights.*expected at most 0\. Give subset=1, fewer weights.*'kron'"):  # fmt: skip
        fit(words, structure="functional")


def test_one_sample_that_would_not_fit_is_told_so(words, monkeypatch):
    monkeypatch.setattr(curvature_rows, "DENSE", replace(DENSE, default=10_000))
    with pytest.raises(ValueError, match=r"18 rows of 1 samples.*One sample alone would not fit: take fewer weights"):
        fit(words, structure="functional", subset=1)
