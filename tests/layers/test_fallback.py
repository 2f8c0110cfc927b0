"""What has no rule is exact all the same, one sample at a time, and says so; what is random or mutating is right too."""

from contextlib import nullcontext

import oracle
import pytest
import torch
import torch.nn.functional as F
from layers.cases import around, dense, ids
from layers.test_kronecker import double, draw
from layers.test_rules import SUM
from oracle import close
from torch import nn
from torch.nn.utils import parametrizations

import paraboloid as pb

FALLBACK = {
    "einsum": (around(lambda m, x: torch.einsum("nti,oi->nto", x, m.w), w=(3, 4)), dense(2, 4), "einsum"),
    "tensordot": (around(lambda m, x: torch.tensordot(x, m.w, dims=2), w=(2, 4, 3)), dense(2, 4), "tensordot"),
    "centres": (around(lambda m, x: torch.cdist(x, m.w), w=(3, 4)), dense(4), "cdist"),
    "a power": (around(lambda m, x: (x**2 + 1) ** m.w, w=(4,)), dense(4), "pow"),
    "a choice": (around(lambda m, x: torch.where(x > 0, x, m.w), w=(4,)), dense(4), "where"),
    "a maximum": (around(lambda m, x: torch.maximum(x, m.w), w=(4,)), dense(4), "maximum"),
    "an interpolation": (around(lambda m, x: torch.lerp(x, x**2, m.w), w=(4,)), dense(4), "lerp"),
    "the weight on the left": (around(lambda m, x: m.w @ x.mT, w=(3, 4)), dense(2, 4), "matmul"),
    "keys and values that all samples share": (
        around(lambda m, x: F.scaled_dot_product_attention(x, m.k[None], m.k[None]), k=(5, 4)), dense(2, 4),
        "scaled_dot_product_attention",
    ),
    "the largest of a bag": (lambda: nn.EmbeddingBag(6, 3, mode="max"), ids(4), "embedding_bag"),
    "weights of a bag": (
        around(lambda m, x: m.layer(x, per_sample_weights=m.w[x]), lambda: nn.EmbeddingBag(6, 3, mode="sum"), w=(6,)),
        ids(4), "getitem",
    ),
}  # fmt: skip


def make(name):
    build, inputs, _ = FALLBACK[name]
    model = double(build)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        x = inputs(3)
    return model, x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("name", FALLBACK)
def test_exact_with_one_warning_for_each_call(name):
    model, x = make(name)
    params = dict(model.named_parameters())
    y = torch.zeros_like(model(x))
    wanted = ["sample_grads", "square_norms", "variance", "diag_ggn", "gram"]
    with pytest.warns(UserWarning, match="has no rule for these arguments; falling back") as caught:
        stats = pb.statistics(model, SUM, (x, y), wanted)
    assert len(caught) == 1
    assert FALLBACK[name][2] in str(caught[0].message)
    g, d = oracle.sample_grads(SUM, model(x), y, params), oracle.sample_diag_ggn(SUM, model(x), y, params)
    for k in params:
        flat = g[k].flatten(1)
        close(stats["sample_grads"][k], g[k], k)
        close(stats["square_norms"][k], flat.square().sum(1), k)
        close(stats["gram"][k], flat @ flat.T, k)
        close(stats["variance"][k], g[k].var(0, unbiased=False), k)
        close(stats["diag_ggn"][k], d[k].sum(0), k)


@pytest.mark.parametrize("name", ["einsum", "centres", "the largest of a bag"])
def test_matrices_have_their_diagonal_there(name):
    model, x = make(name)
    with (
        pytest.warns(UserWarning, match="falling back"),
        pytest.warns(UserWarning, match=r"parameter.* no Kronecker factors.*the diagonal of its block is kept"),
    ):
        stats = pb.statistics(model, SUM, (x, torch.zeros_like(model(x))), ["kflr", "diag_ggn"])
    for k, kron in stats["kflr"].items():
        close(kron.diagonal(), stats["diag_ggn"][k].flatten(), k)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}], ids=str)
def test_tables_that_touch_more_than_their_rows(options):
    """Renormalised in place while looked up, or scaled by counts over the batch: autograd's own gradients add up."""
    model, idx = (
        double(lambda: nn.Sequential(nn.Embedding(5, 3, **options), nn.Linear(3, 2))),
        torch.tensor([[1, 2], [1, 1]]),
    )
    y = torch.zeros(2, 2, 2).double()
    before = model[0].weight.detach().clone()
    with nullcontext() if "max_norm" in options else pytest.warns(UserWarning, match=r"falling back"):
        g = pb.statistics(model, SUM, (idx, y), ["sample_grads", "grad"])
    assert torch.equal(model[0].weight, before)
    truth = torch.autograd.grad(SUM(model(idx), y), list(model.parameters()))
    for (k, _), t in zip(model.named_parameters(), truth, strict=True):
        close(g["grad"][k], t, k)
        close(g["sample_grads"][k].sum(0), t, k)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.4, batch_first=True),
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.GELU(), nn.Linear(5, 2)),
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 2)),
        lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 2)),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.RReLU(), nn.Dropout1d(0.3), nn.Linear(4, 2)),
    ],
    ids=["transformer", "mlp", "spectral norm", "spectral norm by hooks", "random slopes"],
)
def test_training_mode_is_exact_on_the_graph_that_was_recorded(build):
    """Masks are drawn and power iterations made in the forward pass, and never again."""
    model, x = double(build).train(), draw(3, 2, 4)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        with pb.record(model, verify="always") as tape:
            f = model(x)
    y = torch.zeros_like(f)
    params = dict(model.named_parameters())
    g = tape.statistics(SUM, f, y, "sample_grads")["sample_grads"]
    expected = oracle.sample_grads(SUM, f, y, params)
    for k in params:
        close(g[k], expected[k], k)


def test_one_image_without_an_axis_of_samples():
    model, x = double(lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.Unflatten(0, (1, 3)))), draw(2, 4, 4)
    y = torch.zeros(1, 3, 3, 3).double()
    with pytest.warns(UserWarning, match="conv2d on 0.weight, 0.bias has no rule for these arguments"):
        g = pb.statistics(model, SUM, (x, y), "sample_grads")["sample_grads"]
    expected = oracle.sample_grads(SUM, model(x), y, dict(model.named_parameters()))
    for k in expected:
        close(g[k], expected[k], k)
