"""KFAC, KFLR, EKFAC and the diagonal GGN of a batch and of a loader, against dense definitions in float64."""

import gc
import weakref

import numpy as np
import pytest
import torch
from operators.oracle import LOSSES, MODELS, dense_ggn, make_inputs, make_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paraboloid as pb
from paraboloid.operators import Diagonalised, KroneckerFactored

WITH_FACTORS = [name for name in MODELS if name != "weight norm"]
CE = nn.CrossEntropyLoss()


def close(actual, expected, scale=None):
    scale = max(expected.abs().max().item(), 1e-30) if scale is None else scale
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10 * scale)


def batches(name, targets, sizes=(4, 2)):
    return [(make_inputs(name, n, n), targets(n, n)) for n in sizes]


def joined(parts):
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def trainable(model):
    return {k: p for k, p in model.named_parameters() if p.requires_grad}


def blocks_of(dense, model):
    """The diagonal block of each parameter in a dense matrix."""
    found, at = {}, 0
    for k, p in trainable(model).items():
        found[k] = dense[at : at + p.numel(), at : at + p.numel()]
        at += p.numel()
    return found


def check(model, loss_fn, parts, sharing="expand"):
    """All of it on two unequal batches and on one joined batch: the same, and what the definitions say."""
    big = joined(parts)
    quantity = pb.quantities.KFAC("exact", sharing=sharing)
    factors = pb.statistics(model, loss_fn, big, quantity)["kflr"]  # tested against hooks and loops elsewhere
    kfac = torch.block_diag(*(factors[k].to_dense() for k in trainable(model)))
    exact = blocks_of(dense_ggn(model, loss_fn, parts), model)
    ggn = torch.block_diag(*exact.values())
    size = ggn.abs().max().item()
    for data in (parts, big):
        K = pb.KFLR(model, loss_fn, data, sharing=sharing)
        E = pb.EKFAC(model, loss_fn, data, fisher="exact", sharing=sharing)
        assert isinstance(K, KroneckerFactored)
        assert isinstance(E, Diagonalised)
        close(K.to_dense(), kfac, size)
        close(K.eigenform.to_dense(), kfac, size)
        for k, block in exact.items():
            assert E.traces()[k] == pytest.approx(block.trace().item(), rel=1e-10, abs=1e-12 * size)
        dense = E.to_dense()
        assert (dense - ggn).norm() <= (kfac - ggn).norm() + 1e-10 * size
        # the definition: KFAC's eigenvectors, and the GGN's quadratic forms along them
        for (k, block), form in zip(exact.items(), E.forms, strict=True):
            full = form.completed()
            Q = full.restored(torch.eye(full.size, dtype=block.dtype).view(-1, *full.values.shape))
            close((Q @ block * Q).sum(1), full.values.flatten(), size)
            turned = Q @ factors[k].to_dense() @ Q.T
            close(turned, turned.diagonal().diag(), size)
    close(pb.KFLR(model, loss_fn, parts, sharing=sharing, measure_on=parts).to_dense(), kfac, size)
    measured = pb.EKFAC(model, loss_fn, parts, fisher="exact", sharing=sharing, measure_on=big)
    close(
        torch.tensor(list(measured.traces().values()), dtype=torch.float64),
        torch.stack([b.trace() for b in exact.values()]),
        size,
    )


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", WITH_FACTORS)
def test_models(name, sharing):
    loss_fn, targets = LOSSES["cross-entropy"]
    check(make_model(name), loss_fn, batches(name, targets), sharing)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss):
    loss_fn, targets = LOSSES[loss]
    check(make_model("mlp"), loss_fn, batches("mlp", targets, (4, 3)))


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_fishers_are_those_of_the_statistics(fisher):
    model = make_model("residual")
    batch = make_inputs("residual", 5, 1), torch.tensor([0, 1, 2, 0, 1])
    name = {"mc": "kfac", "exact": "kflr", "empirical": "kfac_empirical"}[fisher]
    options = {"samples": 3} if fisher == "mc" else {}
    expected = pb.statistics(model, CE, batch, pb.quantities.KFAC(fisher, **options), seed=7)[name]
    K = pb.KFAC(model, CE, batch, fisher=fisher, seed=7, **options)
    assert list(K.krons) == list(trainable(model))
    for k, kron in K.krons.items():
        close(kron.to_dense(), expected[k].to_dense())
        assert kron.left.shape == expected[k].left.shape
    E = pb.EKFAC(model, CE, batch, fisher=fisher, seed=7, **options)
    forms = {k: kron.eigenform(k) for k, kron in expected.items()}
    scale = pb.statistics(model, CE, batch, pb.quantities.EigenScale(forms, fisher, **options), seed=7)["eigen_scale"]
    for k, form in zip(expected, E.forms, strict=True):
        assert form.trace().item() == pytest.approx(scale[k].sum().item(), rel=1e-10)
    # the same labels on one batch and on a loader of one batch: kept vectors and those of a second pass
    close(pb.EKFAC(model, CE, [batch], fisher=fisher, seed=7, **options).to_dense(), E.to_dense())


@pytest.mark.parametrize("make", [pb.KFAC, pb.EKFAC])
def test_monte_carlo_is_unbiased_whatever_the_number_of_samples(make):
    model, (x, y) = make_model("mlp"), (make_inputs("mlp", 6, 1), torch.tensor([0, 1, 2, 0, 1, 1]))
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    exact = make(model, CE, data, fisher="exact").trace()
    for samples in (1, 8):
        draws = torch.tensor([make(model, CE, data, samples=samples, seed=s).trace() for s in range(160 // samples)])
        assert abs(draws.mean() - exact) < 4 * draws.std() / len(draws) ** 0.5
    assert make(model, CE, data, seed=3).trace() == make(model, CE, data, seed=3).trace()
    assert make(model, CE, data, seed=3).trace() != make(model, CE, data, seed=4).trace()


@pytest.mark.parametrize("fisher", ["exact", "mc"])
def test_a_layer_at_one_position_is_decomposed_once_with_its_bias(fisher, monkeypatch):
    from paraboloid.linalg import eigenform

    sizes, original = [], eigenform.eigh
    monkeypatch.setattr(eigenform, "eigh", lambda m: sizes.append(len(m)) or original(m))
    model, data = make_model("mlp"), batches("mlp", LOSSES["cross-entropy"][1], (4, 3))
    pb.KFAC(model, CE, data, fisher=fisher).inverse(0.1)
    assert len(sizes) == 4  # left and right of both layers; none for the biases
    for make in (pb.KFAC, pb.EKFAC):
        plain = make(model, CE, data, fisher=fisher, seed=7)
        close(make(model, CE, data, fisher=fisher, seed=7, measure_on=data).to_dense(), plain.to_dense())


def test_one_datum_and_deep_linear_networks_are_exact():
    model, x = make_model("mlp"), make_inputs("mlp", 1, 3)
    dense = dense_ggn(model, CE, [(x, torch.tensor([1]))])
    expected = torch.block_diag(*blocks_of(dense, model).values())
    close(pb.KFLR(model, CE, (x, torch.tensor([1]))).to_dense(), expected)
    close(pb.EKFAC(model, CE, (x, torch.tensor([1])), fisher="exact").to_dense(), expected)
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5), nn.Linear(5, 2)).double()
    parts = [(torch.randn(n, 4).double(), torch.randn(n, 2).double()) for n in (5, 2)]
    expected = torch.block_diag(*blocks_of(dense_ggn(linear, nn.MSELoss(), parts), linear).values())
    close(pb.KFLR(linear, nn.MSELoss(), parts).to_dense(), expected)
    close(pb.EKFAC(linear, nn.MSELoss(), parts, fisher="exact").to_dense(), expected)


def test_eigenvalues_measured_on_other_data():
    """The definition, with dense factors and full eigenvectors of the first data."""
    model = make_model("mlp")
    first = make_inputs("mlp", 12, 1), torch.arange(12) % 3
    other = make_inputs("mlp", 9, 2), torch.arange(9) % 3
    here, there = (pb.statistics(model, CE, batch, "kflr")["kflr"] for batch in (first, other))
    exact = blocks_of(dense_ggn(model, CE, [other]), model)
    K = pb.KFLR(model, CE, first, measure_on=[other])
    E = pb.EKFAC(model, CE, first, fisher="exact", measure_on=other)
    for i, k in enumerate(trainable(model)):
        U, W = (torch.linalg.eigh(side)[1] for side in (here[k].left, here[k].right))
        values = torch.outer((U * (there[k].left @ U)).sum(0), (W * (there[k].right @ W)).sum(0)).flatten()
        Q = torch.kron(U, W)
        close(K.forms[i].to_dense(), Q @ values.diag() @ Q.T)
        close(E.forms[i].to_dense(), Q @ (Q.T @ exact[k] @ Q).diagonal().diag() @ Q.T)
    for A in (K, E):
        v = torch.ones(A.shape[0]).double()
        close(A.inverse(0.1) @ v, torch.linalg.solve(A.to_dense() + 0.1 * torch.eye(len(v)).double(), v))
    mixed = pb.EKFAC(model, CE, other, fisher="exact") + E
    with pytest.raises(NotImplementedError, match="the sum of Diagonalised and Diagonalised has no inverse"):
        mixed.inverse(0.1)
    shared = E + pb.EKFAC(model, CE, first, fisher="exact", measure_on=first)
    close(shared.inverse(0.1).to_dense(), torch.linalg.inv(shared.to_dense() + 0.1 * torch.eye(E.shape[0]).double()))


@pytest.mark.parametrize("samples", [None, 200])
@pytest.mark.parametrize("name", MODELS)
def test_diagonals(name, samples):
    model = make_model(name)
    loss_fn, targets = LOSSES["cross-entropy"]
    parts = batches(name, targets)
    expected = dense_ggn(model, loss_fn, parts).diagonal()
    for data in (parts, joined(parts)):
        A = pb.DiagonalGGN(model, loss_fn, data, samples=samples)
        if samples is None:
            close(A.to_dense(), expected.diag())
            close(A.diagonal(), expected)
            close(A.logdet(0.1), (expected + 0.1).log().sum())
            close(A.inverse(0.1) @ torch.ones_like(expected), 1 / (expected + 0.1))
        else:
            assert A.trace() == pytest.approx(expected.sum().item(), rel=0.4)


def test_ignored_batches_and_class_weights():
    model = make_model("mlp")
    weighted = nn.CrossEntropyLoss(torch.tensor([1.0, 2, 5]).double(), ignore_index=-1)
    parts = [
        (make_inputs("mlp", n, n), y)
        for n, y in ((3, torch.tensor([0, 1, -1])), (2, torch.tensor([-1, -1])), (4, torch.tensor([2, 2, -1, 0])))
    ]
    check(model, weighted, parts)
    nothing = make_inputs("mlp", 2, 1), torch.tensor([-1, -1])
    for make in (pb.KFAC, pb.EKFAC, pb.DiagonalGGN):
        with pytest.raises(
            ValueError, match=r"every target of every batch is ignored.*expected at least one target that counts"
        ):
            make(model, weighted, [nothing, nothing])


def test_sums_of_losses_over_a_loader():
    model = make_model("mlp")
    loss = pb.losses.CrossEntropy() + 0.5 * pb.losses.CrossEntropy(label_smoothing=0.2, reduction="sum")
    parts = batches("mlp", LOSSES["cross-entropy"][1], (4, 2))
    close(pb.KFLR(model, loss, parts).to_dense(), pb.KFLR(model, loss, joined(parts)).to_dense())
    close(
        pb.EKFAC(model, loss, parts, fisher="exact").trace() * torch.ones(1),
        pb.GGN(model, loss, parts).trace() * torch.ones(1),
    )


def test_a_shuffled_loader_is_one_big_batch():
    model = make_model("residual")
    x, y = make_inputs("residual", 11, 1), torch.arange(11) % 3
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    state = torch.get_rng_state()
    K, E = pb.KFLR(model, CE, loader), pb.EKFAC(model, CE, loader, fisher="exact")
    pb.EKFAC(model, CE, loader)
    assert torch.equal(torch.get_rng_state(), state)
    close(K.to_dense(), pb.KFLR(model, CE, (x, y)).to_dense())
    close(E.to_dense(), pb.EKFAC(model, CE, (x, y), fisher="exact").to_dense())


def test_a_matrix_without_influence_has_no_rows():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(2000, 3), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(x)

    torch.manual_seed(0)
    model = Unused().double()
    parts = batches("mlp", LOSSES["cross-entropy"][1])
    for A in (pb.KFAC(model, CE, parts), pb.EKFAC(model, CE, parts[0])):
        assert A.traces()["table.weight"] == 0
        step = A.inverse(0.5) @ {k: torch.ones_like(p) for k, p in model.named_parameters()}
        close(step["table.weight"], torch.full((2000, 3), 2.0).double())
        assert A.frobenius_norm() > 0
    assert pb.KFAC(model, CE, parts).krons["table.weight"].sides[0].data.numel() == 0


class Counted(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, x):
        self.calls += 1
        return self.model(x)


def test_passes_over_the_data():
    model = Counted(make_model("mlp"))
    parts = batches("mlp", LOSSES["cross-entropy"][1], (4, 2))
    for make, data, calls in (
        (pb.KFAC, parts, 2), (pb.KFAC, iter(parts), 2), (pb.DiagonalGGN, parts, 2),
        (pb.EKFAC, parts, 4), (pb.EKFAC, parts[0], 1), (pb.KFAC, parts[0], 1),
    ):  # fmt: skip
        model.calls = 0
        make(model, CE, data)
        assert model.calls == calls
    small = pb.EKFAC(model, CE, parts[0], fisher="exact", max_memory=1)
    close(small.to_dense(), pb.EKFAC(model, CE, parts[0], fisher="exact").to_dense())
    with pytest.raises(ValueError, match="data is a list_iterator, which can be read only once, but two passes"):
        pb.EKFAC(model, CE, iter(parts))


def test_batch_norm_and_dropout_in_training_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    parts = [(torch.randn(n, 5).double(), torch.arange(n) % 3) for n in (6, 4)]
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    K = pb.KFAC(model, CE, parts, fisher="exact", seed=1)
    E = pb.EKFAC(model, CE, parts, fisher="exact", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    close(torch.tensor(K.traces()["4.bias"]), torch.tensor(E.traces()["4.bias"]))
    assert K.trace() != pb.KFAC(model, CE, parts, fisher="exact", seed=2).trace()
    assert K.trace() == pb.KFAC(model, CE, parts, fisher="exact", seed=1).trace()
    with pytest.raises(ValueError, match="BatchNorm in training mode"):
        pb.DiagonalGGN(model, CE, parts)


def test_data_that_change_between_the_passes():
    class Moving:
        def __init__(self):
            self.passes = 0

        def __iter__(self):
            self.passes += 1
            yield make_inputs("mlp", 4, self.passes), torch.tensor([0, 1, 2, 0])

    with pytest.raises(RuntimeError, match=r"the summed loss moved from .* to .* between two passes"):
        pb.EKFAC(make_model("mlp"), CE, Moving())


def test_counts_may_be_numpys():
    model, batch = make_model("mlp"), (make_inputs("mlp", 3, 1), torch.tensor([0, 1, 2]))
    for make in (pb.KFAC, pb.EKFAC, pb.DiagonalGGN):
        found, expected = (make(model, CE, batch, samples=n).diagonal() for n in (np.int64(2), 2))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for samples in (0, True, 2.0):
        with pytest.raises(ValueError, match=f"samples is {samples}; expected an integer of at least 1"):
            pb.DiagonalGGN(model, CE, batch, samples)


def test_wrong_options():
    model, batch = make_model("mlp"), (make_inputs("mlp", 3, 1), torch.tensor([0, 1, 2]))
    for make in (pb.KFAC, pb.EKFAC):
        with pytest.raises(ValueError, match="fisher is 'true'; expected one of"):
            make(model, CE, batch, fisher="true")
        with pytest.raises(ValueError, match="sharing is 'sum'; expected 'expand' or 'reduce'"):
            make(model, CE, batch, sharing="sum")
        for samples in (0, True, 2.0):
            with pytest.raises(ValueError, match=f"samples is {samples}; expected an integer of at least 1"):
                make(model, CE, batch, samples=samples)
        with pytest.raises(TypeError, match="is not one that paraboloid knows"):
            make(model, lambda f, y: f.sum(), batch)
    with pytest.raises(ValueError, match="fisher is 'mc'; KFLR is KFAC with fisher='exact'"):
        pb.KFLR(model, CE, batch, fisher="mc")
    with pytest.raises(ValueError, match="the loss is nan; expected a finite number"):
        pb.KFAC(model, CE, (torch.full((3, 5), float("nan")).double(), batch[1]))


def test_structured_outputs_and_single_precision():
    model, (x, y) = make_model("residual"), (make_inputs("residual", 4, 1), torch.tensor([0, 1, 2, 0]))

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, inputs):
            return {"logits": self.model(inputs)}

    plain = pb.EKFAC(model, CE, (x, y))
    wrapped = pb.EKFAC(Wrapped(), CE, {"inputs": x, "labels": y}, output=lambda o: o["logits"])
    close(plain.to_dense(), wrapped.to_dense())
    single = pb.EKFAC(model.float(), CE, (x.float(), y), fisher="exact")
    model.double()
    assert single.dtype == torch.float32
    double = pb.EKFAC(model, CE, (x, y), fisher="exact")
    torch.testing.assert_close(single.to_dense().double(), double.to_dense(), rtol=1e-3, atol=1e-5)


def test_half_precision_parameters_have_single_precision_factors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).bfloat16()
    x, y = torch.randn(6, 5).bfloat16(), torch.arange(6) % 3
    for A in (pb.KFAC(model, CE, (x, y)), pb.EKFAC(model, CE, (x, y)), pb.DiagonalGGN(model, CE, (x, y))):
        assert A.dtype == torch.float32
        step = A.solve({k: torch.ones_like(p) for k, p in model.named_parameters()}, damping=0.1)
        assert {t.dtype for t in step.values()} == {torch.bfloat16}
        assert all(torch.isfinite(t).all() for t in step.values())


def test_nothing_of_the_model_is_kept_alive():
    model = make_model("mlp")
    batch = make_inputs("mlp", 4, 1), torch.tensor([0, 1, 2, 0])
    kept = [pb.KFAC(model, CE, batch), pb.EKFAC(model, CE, batch), pb.DiagonalGGN(model, CE, batch)]
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert all(torch.isfinite(A @ torch.ones(A.shape[0]).double()).all() for A in kept)


@pytest.mark.parametrize("make", [pb.KFAC, pb.EKFAC, pb.DiagonalGGN])
def test_under_autocast_only_the_model_runs_in_short_numbers(make):
    model, (x, y) = make_model("residual").float(), (make_inputs("residual", 6, 1).float(), torch.arange(6) % 3)
    options = {} if make is pb.DiagonalGGN else {"fisher": "exact"}
    for data in ((x, y), [(x[:4], y[:4]), (x[4:], y[4:])]):
        expected = make(model, CE, data, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            A = make(model, CE, data, **options)
            step = A.inverse(0.1) @ torch.ones(A.shape[0])
        assert A.dtype == step.dtype == torch.float32
        assert A.trace() == pytest.approx(expected.trace(), rel=0.05)
        assert A.trace() != expected.trace()
        torch.testing.assert_close(step, A.inverse(0.1) @ torch.ones(A.shape[0]))
    with torch.inference_mode():
        close(make(model, CE, data, **options).to_dense(), expected.to_dense())
    compiled = make(torch.compile(model, backend="eager"), CE, data, **options)
    close(compiled.to_dense(), expected.to_dense())
    assert list(compiled.parameters) == list(expected.parameters)


def test_nothing_hangs_on_the_graph():
    """A factor kept by its rows may be a layer's input itself, which belongs to the recorded graph."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 4
    for Operator in (pb.KFAC, pb.EKFAC):
        A = Operator(model, nn.CrossEntropyLoss(), (x, y))
        for found in (A.to_dense(), A.inverse(1.0).to_dense(), A.diagonal(), A.logdet(1.0)):
            assert not found.requires_grad
