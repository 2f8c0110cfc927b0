"""What other libraries of this kind get silently wrong or refuse, one test for each: right here, or a clear error.

The list is BackPACK's (version 1.7.1), found by comparing it with loops of autograd, and its users' requests.
"""

import oracle
import pytest
import torch
import torch.nn.functional as F
from layers.cases import Around, attention
from layers.test_kronecker import double, draw
from oracle import close
from torch import nn

import paraboloid as pb

CE = nn.CrossEntropyLoss()
Y = torch.tensor([0, 2, 1, 2])


def check(model, x, loss_fn=CE, y=Y, truth=None):
    """First- and second-order quantities and the whole exact factors against loops of autograd."""
    truth = loss_fn if truth is None else truth
    f, params = model(x), dict(model.named_parameters())
    stats = pb.statistics(
        model,
        loss_fn,
        (x, y),
        ["grad", "sample_grads", "square_norms", "second_moment", "variance", "diag_ggn", "kflr"],
    )
    g, d = oracle.sample_grads(truth, f, y, params), oracle.sample_diag_ggn(truth, f, y, params)
    full, a = oracle.grads(truth(f, y), params), oracle.factor(truth, f, y)
    for k in params:
        close(stats["grad"][k], full[k], k)
        close(stats["sample_grads"][k], g[k], k)
        close(stats["square_norms"][k], g[k].flatten(1).square().sum(1), k)
        close(stats["second_moment"][k], g[k].square().mean(0), k)
        close(stats["variance"][k], g[k].var(0, unbiased=False), k)
        close(stats["diag_ggn"][k], a * d[k].sum(0), k)
        assert stats["kflr"][k].to_dense().shape == (params[k].numel(),) * 2
    return stats


def images(*layers):
    """A convolutional net on [4, 2, 5, 5] inputs with a linear head, and the inputs."""
    x = draw(4, 2, 5, 5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trunk = nn.Sequential(*(build() for build in layers), nn.Flatten())
        head = nn.Linear(trunk(x.float()).shape[1], 3)
    return nn.Sequential(*trunk, head).double(), x


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_padding_modes(mode):
    """Silently wrong elsewhere: the inputs are unfolded as if padded with zeros."""
    check(*images(lambda: nn.Conv2d(2, 2, 3, padding=(1, 2), padding_mode=mode), nn.Tanh))


@pytest.mark.parametrize("kernel", [3, (3, 5)])
def test_padding_same(kernel):
    check(*images(lambda: nn.Conv2d(2, 2, kernel, padding="same", dilation=(1, 2)), nn.Tanh))


def test_tied_weights():
    """Overwritten elsewhere by the last use."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))

    check(double(Tied), draw(4, 4))


def test_a_functional_transpose_between_layers():
    """The next layer sees other positions than the last one's output shape suggests."""
    model = double(lambda: nn.ModuleList([nn.Linear(4, 5), nn.Linear(2, 3)]))
    check(Around(model, lambda m, x: m.layer[1](torch.tanh(m.layer[0](x)).transpose(1, 2)).sum(1)), draw(4, 2, 4))


@pytest.mark.parametrize("groups", [2, 4])
def test_norms_with_groups(groups):
    """Individual norms of grouped convolutions are 1.1 to 12 times too large elsewhere."""
    check(*images(lambda: nn.Conv2d(2, 4, 2), nn.Tanh, lambda: nn.Conv2d(4, 8, 3, groups=groups), nn.Tanh))


def test_a_multiple_of_a_loss():
    """Second order stays unscaled elsewhere."""
    model, x = double(lambda: nn.Linear(4, 3)), draw(4, 4)
    twice = check(model, x, 2 * pb.losses.CrossEntropy(), truth=oracle.Times(2.0, CE))
    once = check(model, x, CE)
    for name, power in {"grad": 1, "sample_grads": 1, "square_norms": 2, "variance": 2, "diag_ggn": 1}.items():
        for k in twice[name]:
            close(twice[name][k], 2**power * once[name][k], f"{name} {k}")
    for k in twice["kflr"]:
        close(twice["kflr"][k].to_dense(), 2 * once["kflr"][k].to_dense(), k)


def test_a_loss_that_is_not_known_is_refused():
    class Twice(nn.Module):
        def forward(self, f, y):
            return 2 * F.cross_entropy(f, y)

    model, x = double(lambda: nn.Linear(4, 3)), draw(4, 4)
    with pytest.raises(TypeError, match=r"Twice.*is not one that paraboloid knows; expected one of"):
        pb.statistics(model, Twice(), (x, Y), "diag_ggn")


def test_a_module_used_twice():
    model = double(lambda: nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 3)]))
    check(Around(model, lambda m, x: m.layer[1](torch.tanh(m.layer[0](torch.tanh(m.layer[0](x)))))), draw(4, 4))


def test_activations_in_place():
    check(*images(lambda: nn.Conv2d(2, 3, 2), lambda: nn.ReLU(True), lambda: nn.Conv2d(3, 2, 2), lambda: nn.SiLU(True)))


def test_autocast():
    """A crash elsewhere: left and right have different types."""
    model, x = images(lambda: nn.Conv2d(2, 4, 3), nn.ReLU, lambda: nn.GroupNorm(2, 4), lambda: nn.Conv2d(4, 2, 2))
    model, x = model.float(), x.float()
    quantities = ["sample_grads", "square_norms", "variance", "diag_ggn", "kfac"]
    exact = pb.statistics(model, CE, (x, Y), quantities)
    with torch.autocast("cpu", torch.bfloat16), pb.record(model) as tape:
        output = model(x)
    assert output.dtype == torch.bfloat16
    stats = tape.statistics(CE, output, Y, quantities)
    for name in quantities[:-1]:
        for k, value in stats[name].items():
            assert value.dtype == torch.float32
            assert (value - exact[name][k]).norm() < 0.25 * exact[name][k].norm() + 1e-3, (name, k)
    assert all(kron.right.dtype == torch.float32 for kron in stats["kfac"].values())


def test_layer_norm():
    check(double(lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3))), draw(4, 4))


def test_group_norm():
    check(*images(lambda: nn.Conv2d(2, 4, 2), lambda: nn.GroupNorm(2, 4), nn.ReLU))


def test_attention():
    build, draw_inputs = attention(batch_first=True)
    model = double(lambda: nn.Sequential(nn.Linear(4, 4), build(), nn.Flatten(), nn.Linear(8, 3)))
    check(model, draw_inputs(4).double())


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers(kind):
    model = double(lambda: nn.ModuleList([kind(3, 2, bidirectional=True, batch_first=True), nn.Linear(4, 3)]))
    check(Around(model, lambda m, x: m.layer[1](m.layer[0](x)[0][:, -1])), draw(4, 3, 3))


def test_bare_parameters():
    model = double(lambda: Around(nn.Linear(4, 3), lambda m, x: m.s * m.layer(x * m.s[:1] + m.t), s=torch.randn(3),
                                  t=torch.randn(4)))  # fmt: skip
    check(model, draw(4, 4))


def test_factors_on_a_residual_net():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(x + self.two(torch.tanh(self.one(x))))

    model, x = double(Residual), draw(1, 4)
    blocks = oracle.ggn_blocks(CE, model(x), Y[:1], dict(model.named_parameters()))
    for k, kron in pb.statistics(model, CE, (x, Y[:1]), "kflr")["kflr"].items():
        close(kron.to_dense(), blocks[k], k)  # one datum, one position: exact
    model, x = images(lambda: nn.Conv2d(2, 2, 3, padding=1), nn.Tanh)
    check(Around(model, lambda m, x: m.layer[2:](x + m.layer[:2](x))), x)


@pytest.mark.parametrize("options", [
    {"weight": torch.tensor([0.5, 1, 3]).double()}, {"ignore_index": 2}, {"label_smoothing": 0.2},
    {"weight": torch.tensor([0.5, 1, 3]).double(), "ignore_index": 1, "label_smoothing": 0.1, "reduction": "sum"},
], ids=lambda o: ", ".join(o))  # fmt: skip
def test_options_of_cross_entropy(options):
    """Ignored elsewhere without a word."""
    check(
        double(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))),
        draw(4, 4),
        nn.CrossEntropyLoss(**options),
    )


def test_squared_quantities_do_not_depend_on_the_reduction():
    """By a factor of N squared elsewhere.  Curvature is that of the loss as reduced."""
    model, x = double(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))), draw(4, 4)
    mean, total = check(model, x, CE), check(model, x, nn.CrossEntropyLoss(reduction="sum"))
    for name, factor in {
        "sample_grads": 1,
        "square_norms": 1,
        "second_moment": 1,
        "variance": 1,
        "diag_ggn": 4,
    }.items():
        for k in mean[name]:
            close(total[name][k], factor * mean[name][k], f"{name} {k}")


def test_embeddings_of_the_whole_vocabulary_are_not_made_dense():
    """A dense input factor over 50,000 rows would take 10 GB."""
    model = nn.Sequential(nn.Embedding(50_000, 4), nn.Flatten(), nn.Linear(12, 3))
    idx = torch.randint(50_000, (4, 3), generator=torch.Generator().manual_seed(0))
    stats = pb.statistics(model, CE, (idx, Y), ["square_norms", "kfac"])
    assert stats["kfac"]["0.weight"].left.shape == (50_000,)
    assert stats["square_norms"]["0.weight"].shape == (4,)


def test_a_parallel_wrapper():
    model, x = double(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))), draw(4, 4)
    expected = pb.statistics(model, CE, (x, Y), "sample_grads")["sample_grads"]
    found = pb.statistics(nn.DataParallel(model), CE, (x, Y), "sample_grads")["sample_grads"]
    assert list(found) == list(expected)
    for k in expected:
        close(found[k], expected[k], k)


def test_batch_norm_in_training_mode_is_refused_or_documented():
    """Individual gradients are silently those of a made-up loss elsewhere; see tests/layers/test_batch_norm.py."""
    model, x = images(lambda: nn.Conv2d(2, 3, 2), lambda: nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match=r"BatchNorm in training mode \(call model\.eval\(\)\)"):
        pb.statistics(model, CE, (x, Y), "sample_grads")
    assert set(pb.statistics(model, CE, (x, Y), "kfac")["kfac"]) == {k for k, _ in model.named_parameters()}
    check(model.eval(), x)
