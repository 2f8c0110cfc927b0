"""Kronecker factors and options of quantities against their definitions, written out with hooks and loops."""

import warnings

import losses_table
import models
import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import close, positions
from torch import nn

import paraboloid as pb
from paraboloid.data.batches import call

CE = nn.CrossEntropyLoss()


def sequential_cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.Tanh(), nn.Flatten(),
        nn.Linear(3 * 4, 3),
    )  # fmt: skip


def sequence_mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2), nn.Flatten(), nn.Linear(6, 3))


CASES = {"mlp": (models.mlp, (4,)), "cnn": (sequential_cnn, (2, 6, 6)), "sequence": (sequence_mlp, (3, 4))}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("loss_name", ["ce", "ce weights, ignored, smoothed", "mse sum", "bce"])
@pytest.mark.parametrize("case", CASES)
def test_exact_factors_are_those_of_the_definition(case, loss_name, sharing):
    torch.manual_seed(0)
    build, shape = CASES[case]
    model, x = build().double(), torch.randn(3, *shape).double()
    f = model(x)
    loss_fn, y = losses_table.make(loss_name, f)
    a, N = oracle.factor(loss_fn, f, y), len(f)
    quantity = pb.quantities.KFAC("exact", sharing=sharing)
    factors = pb.statistics(model, loss_fn, (x, y), quantity)["kflr"]
    for k, (right, left) in positions(model, x, loss_fn, y).items():
        T = right.shape[2]
        if sharing == "reduce":
            right, left = right.mean(2, keepdim=True), left.sum(3, keepdim=True)
            T = 1
        G = a * torch.einsum("vngti,vngtj->gij", left, left)
        A = torch.einsum("ngti,ngtj->gij", right, right) / (N * T)
        weight = factors[f"{k}.weight"]
        if len(G) == 1:
            close(weight.left, G[0], k)
            close(weight.right, A[0], k)
            close(weight.to_dense(), torch.kron(G[0], A[0]))
        else:
            close(weight.left, G, k)
            close(weight.right, A, k)
            close(weight.to_dense(), torch.block_diag(*(torch.kron(g, r) for g, r in zip(G, A, strict=True))))
        bias = left.sum(3).flatten(2)
        close(factors[f"{k}.bias"].left, a * torch.einsum("vni,vnj->ij", bias, bias), f"{k}.bias")
        close(factors[f"{k}.bias"].right, torch.ones(1, 1).double())


@pytest.mark.parametrize("model_name", ["mlp", "residual cnn", "class token", "conv1d", "transformer layer"])
def test_the_block_of_a_bias_like_parameter_is_the_ggn_block(model_name):
    model, inputs = models.make(model_name)
    f = call(model, inputs)
    loss_fn, y = losses_table.make("mse", f)
    params = {k: p for k, p in model.named_parameters() if p.dim() == 1 or k == "token"}
    blocks = oracle.ggn_blocks(loss_fn, f, y, params)
    factors = pb.statistics(model, loss_fn, (inputs, y), "kflr")["kflr"]
    for k in params:
        close(factors[k].to_dense(), blocks[k], k)


@pytest.mark.parametrize("build", [lambda: nn.Linear(4, 3), lambda: nn.Conv2d(4, 3, 1)])
def test_one_datum_and_one_layer_are_exact(build):
    torch.manual_seed(0)
    layer = build().double()
    x = torch.randn(1, 4, *[1] * (layer.weight.dim() - 2)).double()
    model = nn.Sequential(layer, nn.Flatten())
    y = torch.tensor([1])
    params = dict(model.named_parameters())
    blocks = oracle.ggn_blocks(CE, model(x), y, params)
    factors = pb.statistics(model, CE, (x, y), "kflr")["kflr"]
    for k in params:
        close(factors[k].to_dense(), blocks[k], k)


def test_a_deep_linear_network_with_squared_error_is_exact():
    """H and every layer's Jacobian are the same for all samples, so the block is a Kronecker product exactly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5), nn.Linear(5, 2)).double()
    x, y = torch.randn(6, 4).double(), torch.randn(6, 2).double()
    params = dict(model.named_parameters())
    blocks = oracle.ggn_blocks(nn.MSELoss(), model(x), y, params)
    factors = pb.statistics(model, nn.MSELoss(), (x, y), "kflr")["kflr"]
    for k in params:
        scaled = factors[k]  # expand's scaling: gradient factor summed over N, input factor averaged
        close(scaled.to_dense(), blocks[k], k)


@pytest.mark.parametrize("case", CASES)
def test_empirical_factors_use_the_given_labels(case):
    torch.manual_seed(0)
    build, shape = CASES[case]
    model, x = build().double(), torch.randn(3, *shape).double()
    y = torch.tensor([0, 2, 1]) if case != "mlp" else torch.tensor([0, 1, 2])
    g = oracle.sample_grads(CE, model(x), y, dict(model.named_parameters()))
    factors = pb.statistics(model, CE, (x, y), ["kfac_empirical", "sample_grads"])["kfac_empirical"]
    for k, (right, left) in positions(model, x, CE, y, empirical=True).items():
        weight, bias = factors[f"{k}.weight"], g[f"{k}.bias"]
        G = torch.einsum("vngti,vngtj->gij", left, left) / 3
        A = torch.einsum("ngti,ngtj->gij", right, right) / (3 * right.shape[2])
        close(weight.left, G if len(G) > 1 else G[0], k)
        close(weight.right, A if len(A) > 1 else A[0], k)
        close(factors[f"{k}.bias"].left, bias.T @ bias / 3, k)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_monte_carlo_factors_average_to_the_exact_ones_whatever_the_samples(sharing):
    model, x = models.make("mlp")
    y = torch.tensor([0, 1, 2])
    exact = pb.statistics(model, CE, (x, y), pb.quantities.KFAC("exact", sharing=sharing))["kflr"]
    for samples in (1, 5):
        draws = [
            pb.statistics(model, CE, (x, y), pb.quantities.KFAC(samples=samples, sharing=sharing), seed=s)["kfac"]
            for s in range(300 // samples)
        ]
        for k in exact:
            values = torch.stack([d[k].left for d in draws])
            trace, truth = values.diagonal(dim1=1, dim2=2).sum(1), exact[k].left.trace()
            assert (trace.mean() - truth).abs() < 4.5 * trace.std() / len(draws) ** 0.5, (k, samples)
            close(draws[0][k].right, exact[k].right, k)


def test_two_groups_of_vectors_give_the_same_factors():
    for name in ("residual cnn", "gpt"):
        model, inputs = models.make(name)
        f = call(model, inputs)
        loss_fn, y = losses_table.make("ce", f)
        large = pb.statistics(model, loss_fn, (inputs, y), ["kflr", "kfac"])
        small = pb.statistics(model, loss_fn, (inputs, y), ["kflr", "kfac"], max_memory=1)
        for quantity in large:
            for k, kron in large[quantity].items():
                close(small[quantity][k].left, kron.left, k)
                close(small[quantity][k].right, kron.right, k)


def test_embeddings_have_a_diagonal_input_factor():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 3, padding_idx=0), nn.Flatten(), nn.Linear(12, 2)).double()
    idx, y = torch.tensor([[1, 2, 2, 0], [3, 1, 1, 6]]), torch.tensor([0, 1])
    kron = pb.statistics(model, CE, (idx, y), "kflr")["kflr"]["0.weight"]
    words = idx[idx != 0]  # padding is no position, of either factor
    close(kron.left, torch.bincount(words, minlength=7).double() / len(words))
    assert kron.right.shape == (3, 3)
    assert kron.to_dense().shape == (21, 21)
    reduced = pb.statistics(model, CE, (idx, y), pb.quantities.KFAC("exact", sharing="reduce"))["kflr"]["0.weight"]
    ones = F.one_hot(idx, 7).double() * (idx != 0).unsqueeze(2)
    mean = ones.sum(1) / (idx != 0).sum(1, keepdim=True)
    close(reduced.left if reduced.left.dim() == 2 else reduced.left.diag(), mean.T @ mean / 2)


def test_a_tied_embedding_adds_both_uses_in_the_parameters_own_order():
    model, idx = models.make("gpt")
    y = torch.randint(6, (3, 3), generator=torch.Generator().manual_seed(0))
    tied = pb.statistics(model, CE, (idx, y), "kflr")["kflr"]["tokens.weight"]

    class Untied(models.GPT):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Parameter(torch.zeros(6, 4))

        def decode(self, x):
            return F.linear(x, self.decoder)

    untied = Untied().double()
    untied.load_state_dict({**model.state_dict(), "decoder": model.tokens.weight.detach()})
    apart = pb.statistics(untied, CE, (idx, y), "kflr")["kflr"]
    table, decoder = apart["tokens.weight"], apart["decoder"]  # each input factor is a mean over its own positions
    close(tied.left, decoder.left + table.left.diag() / 2)
    close(tied.right, decoder.right / 2 + table.right)


def test_large_bias_like_parameters_keep_a_diagonal(monkeypatch):
    from paraboloid.reductions import kronecker_factors as kronecker

    monkeypatch.setattr(kronecker, "EXACT_VECTOR", 2)
    model, x = models.make("mlp")
    y = torch.tensor([0, 1, 2])
    stats = pb.statistics(model, CE, (x, y), ["kflr", "diag_ggn"])
    for k in ("0.bias", "2.bias"):
        close(stats["kflr"][k].left, stats["diag_ggn"][k])
        close(stats["kflr"][k].to_dense().diagonal(), stats["diag_ggn"][k])


@pytest.mark.parametrize("model_name", ["reparametrised", "low rank"])
def test_derived_weights_alone_have_their_diagonal_and_it_is_said_once(model_name):
    model, x = models.make(model_name)
    y = torch.zeros_like(call(model, x))
    batches = [(t[:2], u[:2]) for t, u in [(x, y)]] + [(x[2:], y[2:])]
    for data in ((x, y), batches):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            stats = pb.statistics(model, nn.MSELoss(), data, ["kflr", "diag_ggn"])
        assert len(caught) == 1
        assert "no Kronecker factors" in str(caught[0].message)
        alone = 0
        for k, kron in stats["kflr"].items():
            if repr(k) in str(caught[0].message):
                alone += 1
                close(kron.left, stats["diag_ggn"][k].flatten())
                assert kron.right.shape == (1, 1)
        assert alone


def test_transposed_tying_keeps_its_factors():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return F.linear(torch.tanh(F.linear(x, self.weight)), self.weight.t())

    torch.manual_seed(0)
    model, x = Tied().double(), torch.randn(5, 4).double()
    kron = pb.statistics(model, nn.MSELoss(), (x, x), "kflr")["kflr"]["weight"]
    assert kron.left.shape == (3, 3)
    assert kron.right.shape == (4, 4)
    hidden = torch.tanh(x @ model.weight.T).detach()
    f = F.linear(hidden, model.weight.t())
    outer_right = 2 / f.numel() * 5 * torch.eye(4).double()  # sum over v, n of the squared-error root at the output
    J = (1 - hidden.square()).unsqueeze(2) * model.weight.detach()
    inner_left = 2 / f.numel() * torch.einsum("nio,njo->ij", J, J)
    close(kron.left, inner_left + hidden.T @ hidden / 10)
    close(kron.right, outer_right + x.T @ x / 10)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: pb.quantities.KFAC("true"), "fisher is 'true'; expected one of"),
        (lambda: pb.quantities.KFAC(sharing="sum"), "sharing is 'sum'; expected"),
        (lambda: pb.quantities.KFAC(samples=0), "samples is 0; expected an integer of at least 1"),
        (lambda: pb.quantities.DiagGGN(samples=-1), "samples is -1; expected"),
        (lambda: pb.quantities.resolve([3]), "a quantity is 3; expected a name or an object"),
    ],
)
def test_wrong_options(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("q", [383, 384, 901, 1537])
def test_a_wide_input_factor_is_halved_by_symmetry_and_whole(q):
    torch.manual_seed(0)
    model, x = nn.Linear(q, 2).double(), torch.randn(3, q).double()
    kron = pb.statistics(model, CE, (x, torch.tensor([0, 1, 0])), "kflr")["kflr"]["weight"]
    close(kron.right, x.T @ x / 3)
