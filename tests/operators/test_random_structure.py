"""Structured operators of randomly drawn networks: exact traces, sums over a loader, and the better approximation."""

import warnings

import losses_table
import pytest
import torch
from architectures import images, mixes, sequences
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import paraboloid as pb
from paraboloid.data.batches import call

LOSSES = sorted(name for name in losses_table.LOSSES if "soft" not in name)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    drawn=st.one_of(images(), sequences()),
    n=st.integers(3, 5),
    loss_name=st.sampled_from(LOSSES),
    sharing=st.sampled_from(["expand", "reduce"]),
    seed=st.integers(0, 99),
)
def test_random_networks(drawn, n, loss_name, sharing, seed):
    model, shape = drawn
    model = model.double().eval()
    if mixes(model):
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for p in model.parameters():
            p.data.normal_(0, 0.5)
        x = torch.randn(n, *shape).double()
    f = call(model, x)
    loss_fn, y = losses_table.make(loss_name, f, seed)
    stats = pb.statistics(model, loss_fn, (x, y), ["sqrt_ggn", "diag_ggn"])
    parts = [(x[:2], y[:2]), (x[2:], y[2:])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        K = pb.KFLR(model, loss_fn, parts, sharing=sharing)
        E = pb.EKFAC(model, loss_fn, parts, fisher="exact", sharing=sharing)
    big = pb.KFLR(model, loss_fn, (x, y), sharing=sharing)
    size = max(max(d.abs().max().item() for d in stats["diag_ggn"].values()), 1e-30)
    for name, form in zip(K.parameters, E.forms, strict=True):
        kfac = K.krons[name].to_dense()
        torch.testing.assert_close(kfac, big.krons[name].to_dense(), rtol=1e-9, atol=1e-10 * size)
        root = stats["sqrt_ggn"][name].flatten(2).flatten(0, 1)
        exact = root.T @ root / stats.normalizer
        assert form.trace().item() == pytest.approx(exact.trace().item(), rel=1e-9, abs=1e-10 * size)
        assert (form.to_dense() - exact).norm() <= (kfac - exact).norm() + 1e-8 * size
    v = torch.ones(E.shape[0]).double()
    for A in (K, E):
        solved = A.inverse(size) @ v
        torch.testing.assert_close(A @ solved + size * solved, v, rtol=1e-7, atol=1e-8)
