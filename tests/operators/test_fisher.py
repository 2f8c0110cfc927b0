"""The Fishers against sums of outer products of gradients, sample by sample and label by label."""

import pytest
import torch
from losses_table import LOSSES
from losses_table import make as make_loss
from operators.oracle import MODELS, classes, dense_ggn, make_inputs, make_model, outputs, rows_of_jacobian, trainable
from oracle import factor, sample_grads
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paraboloid as pb

CE = nn.CrossEntropyLoss()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_batches(name="mlp", sizes=(4, 3)):
    return [(make_inputs(name, n, n), classes(n, n)) for n in sizes]


def dense_empirical(model, loss_fn, batches):
    f, y = outputs(model, batches)
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    rows = torch.cat([g.reshape(len(f), -1) for g in sample_grads(loss_fn, f, y, params).values()], 1)
    return factor(loss_fn, f, y) * rows.T @ rows


def dense_of_vectors(model, operator, batches):
    """a sum_{v,n} (J_n^T s_vn)(J_n^T s_vn)^T for the vectors that the operator drew."""
    total = 0.0
    for graph, (x, _) in zip(operator.replay.kept, batches, strict=True):
        f = model(x)
        J = rows_of_jacobian(f, trainable(model)).view(len(f), f[0].numel(), -1)
        for s in graph.vectors:
            rows = torch.einsum("nc,ncd->nd", s.flatten(1), J)
            total = total + rows.T @ rows
    return total / operator.replay.normalizer


def check(A, expected):
    V = random(len(expected), 2, seed=3)
    close(A.to_dense(), expected)
    close(A @ V, expected @ V)
    close(A.quadratic_forms(V.T), (V * (expected @ V)).sum(0))
    close(A.diagonal(), expected.diagonal())


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, memory):
    model, batches = make_model(name), two_batches(name)
    for data, own in ((batches, batches), (batches[0], batches[:1])):
        check(pb.EmpiricalFisher(model, CE, data, max_memory=memory), dense_empirical(model, CE, own))
        expected = dense_of_vectors(model, pb.Fisher(model, CE, data, samples=2, seed=5), own)
        check(pb.Fisher(model, CE, data, samples=2, seed=5, max_memory=memory), expected)


def with_targets(loss, model, sizes=(4, 3)):
    xs = [make_inputs("mlp", n, n) for n in sizes]
    loss_fn, y = make_loss(loss, torch.cat([model(x) for x in xs]))
    return loss_fn, list(zip(xs, y.split(sizes), strict=True))


@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss):
    model = make_model("mlp")
    loss_fn, batches = with_targets(loss, model)
    for data, own in ((batches, batches), (batches[0], batches[:1])):
        check(pb.EmpiricalFisher(model, loss_fn, data), dense_empirical(model, loss_fn, own))
        check(pb.Fisher(model, loss_fn, data), dense_of_vectors(model, pb.Fisher(model, loss_fn, data), own))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_mean_of_the_fisher_is_the_ggn(loss):
    """Within five standard errors of the mean over seeds, entry by entry."""
    model = nn.Linear(5, 2).double()
    with torch.no_grad():
        model.weight.copy_(random(2, 5) / 2)
        model.bias.zero_()
    xs = [make_inputs("mlp", n, n) for n in (3, 2)]
    loss_fn, y = make_loss(loss, torch.cat([model(x) for x in xs]))
    batches = list(zip(xs, y.split((3, 2)), strict=True))
    draws = torch.stack([pb.Fisher(model, loss_fn, batches, samples=20, seed=seed).to_dense() for seed in range(40)])
    error = draws.std(0) / len(draws) ** 0.5
    expected = dense_ggn(model, loss_fn, batches)
    assert ((draws.mean(0) - expected).abs() <= 5 * error + 1e-12).all()
    assert error.max() < 0.2 * expected.abs().max()


def test_the_labels_are_those_of_one_class_each():
    """sqrt(samples) s = p - e_label: what is drawn is a label."""
    model, batch = make_model("mlp"), two_batches()[0]
    A = pb.Fisher(model, CE, batch, samples=3)
    p = model(batch[0]).softmax(1)
    for s in A.replay.kept[0].vectors:
        one_hot = p - 3**0.5 * s
        torch.testing.assert_close(one_hot.sort(1).values, torch.tensor([[0.0, 0, 1]] * 4).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("memory", [None, 0])
def test_repeated_products_agree_and_follow_the_seed(memory):
    model, batches, v = make_model("mlp"), two_batches(), random(57)
    A, same, other = (pb.Fisher(model, CE, batches, seed=seed, max_memory=memory) for seed in (0, 0, 1))
    first = A @ v
    torch.manual_seed(3)
    assert torch.equal(A @ v, first)
    assert torch.equal(same @ v, first)
    assert not torch.allclose(other @ v, first)


def test_labels_do_not_use_the_stream_of_dropout():
    """With p = 1/2 masks and labels from one stream would go together."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Dropout(0.5), nn.Linear(1, 2)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    x = torch.ones(200, 1, dtype=torch.float64)
    A = pb.Fisher(model, CE, (x, torch.zeros(200, dtype=torch.int64)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kept = nn.functional.dropout(x, 0.5).flatten() > 0
    label = A.replay.kept[0].vectors[0][:, 0] < 0
    assert 60 < (kept == label).sum() < 140


def test_a_changed_order_is_an_error_where_labels_are_drawn_again():
    x, y = make_inputs("mlp", 11, 0), classes(11, 0)
    own = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(x, y), batch_size=11, shuffle=True, generator=own)
    A = pb.Fisher(make_model("mlp"), CE, loader, max_memory=0)
    with pytest.raises(RuntimeError, match="batch 0 does not hold the samples of the first pass in their order"):
        A @ random(57)
    pb.Fisher(make_model("mlp"), CE, loader) @ random(57)
    loader = DataLoader(TensorDataset(x[:5], y[:5]), batch_size=1, shuffle=True, generator=own)
    with pytest.raises(RuntimeError, match="does not hold the samples of the first pass"):
        pb.Fisher(make_model("mlp"), CE, loader, max_memory=0) @ random(57)
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)  # follows the operator's own seed
    pb.Fisher(make_model("mlp"), CE, loader, max_memory=0) @ random(57)


@pytest.mark.parametrize("Operator", [pb.Fisher, pb.EmpiricalFisher, pb.GGN])
@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_a_loader_that_shuffles_anew_does_not_change_what_was_kept(name, Operator):
    """Diagonal and root read the data again; a Fisher's labels then belong to other samples."""
    own = torch.Generator().manual_seed(3)
    loader = DataLoader(
        TensorDataset(make_inputs(name, 7, 0), classes(7, 0)), batch_size=4, shuffle=True, generator=own
    )
    A = Operator(make_model(name), CE, loader)
    columns, A.root.columns = A.root.columns, 0
    expected = A.to_dense()
    close(A.diagonal(), expected.diagonal())
    A.root.columns = columns
    close(A.to_dense(), expected)
    close(A.diagonal(), expected.diagonal())


@pytest.mark.parametrize("Operator", [pb.Fisher, pb.EmpiricalFisher])
def test_blocks_and_a_mask(Operator):
    model, batches = make_model("partly"), two_batches()
    whole = Operator(model, CE, batches).to_dense()
    A = Operator(model, CE, batches, blocks="parameter")
    sizes = [p.numel() for p in trainable(model)]
    expected = torch.block_diag(*[B.split(sizes, 1)[i] for i, B in enumerate(whole.split(sizes, 0))])
    check(A, expected)
    assert A.inverse(damping=0.1).shape == A.shape
    model.body.requires_grad_(False)
    assert Operator(model, CE, batches).shape[0] == sum(p.numel() for p in trainable(model))


@pytest.mark.parametrize("sizes", [(5,), (3, 2)])
def test_sums_of_losses(sizes):
    """Each term divides by a number of its own; over a loader as over one batch."""
    model = make_model("mlp")
    loss = pb.losses.BCEWithLogits(reduction="sum") + 2 * pb.losses.MSE()
    x, y = make_inputs("mlp", 5, 0), torch.rand(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    g = loss.gradient(model(x).detach(), y)
    J = rows_of_jacobian(model(x), trainable(model)).view(5, 3, -1)
    rows = torch.einsum("nc,ncd->nd", g, J)
    expected = rows.T @ rows / loss.normalizer(model(x), y)
    data = list(zip(x.split(sizes), y.split(sizes), strict=True))
    close(pb.EmpiricalFisher(model, loss, data).to_dense(), expected)
    close(pb.EmpiricalFisher(model, loss, (x, y)).to_dense(), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_plain_callable_has_an_empirical_fisher(reduction):
    model, batch = make_model("mlp"), two_batches()[0]
    module = nn.CrossEntropyLoss(reduction=reduction)
    expected = dense_empirical(model, module, [batch])
    close(pb.EmpiricalFisher(model, lambda f, y: module(f, y), batch).to_dense(), expected)


def test_losses_that_have_none():
    model, batch = make_model("mlp"), two_batches()[0]
    with pytest.raises(ValueError, match=r"plain callable that gives .*; expected a sum or a mean over samples"):
        pb.EmpiricalFisher(model, lambda f, y: f.square().sum().sqrt(), batch)
    with pytest.raises(NotImplementedError, match="a plain callable, which does not say how to draw labels"):
        pb.Fisher(model, lambda f, y: CE(f, y), batch)
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"samples is {wrong!r}; expected an integer of at least 1"):
            pb.Fisher(model, CE, batch, samples=wrong)


def test_quadratics_and_biases_of_a_fisher():
    model, batch = make_model("mlp"), two_batches()[0]
    q = pb.quadratic(model, CE, batch, curvature="fisher", seed=4)
    close(q.curvature.to_dense(), pb.Fisher(model, CE, batch, seed=4).to_dense())
    close(torch.cat([g.flatten() for g in q.gradient.values()]), torch.cat(
        [g.flatten() for g in torch.autograd.grad(CE(model(batch[0]), batch[1]), trainable(model))]
    ))  # fmt: skip
    dataset = TensorDataset(make_inputs("mlp", 12, 0), classes(12, 0))
    assert pb.bias(model, CE, dataset, batch_size=4, k=2, repeats=2, curvature="fisher").curvature["same"].shape == (
        2,
        2,
    )


def test_kronecker_factors_of_the_given_labels_know_it_too():
    """A sum of losses over a loader is settled: its gradients are squared in the unit of the unreduced loss."""
    model = make_model("mlp")
    loss = pb.losses.BCEWithLogits(reduction="sum") + 2 * pb.losses.MSE()
    x, y = make_inputs("mlp", 5, 0), torch.rand(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole, parts = (
        pb.KFAC(model, loss, data, fisher="empirical").to_dense()
        for data in ((x, y), list(zip(x.split(3), y.split(3), strict=True)))
    )
    close(parts, whole)
