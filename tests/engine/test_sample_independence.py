"""The certificate by numbers: where it must not be fooled by the arithmetic itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import paraboloid as pb

CE = nn.CrossEntropyLoss()


class Last(nn.Module):
    """The last output of a recurrent layer, classified."""

    def __init__(self, layer, hidden=8):
        super().__init__()
        self.layer, self.head = layer(4, hidden, batch_first=True), nn.Linear(hidden, 3)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


def sigmoids(depth):
    return nn.Sequential(*[part for _ in range(depth) for part in (nn.Linear(4, 4), nn.Sigmoid())], nn.Linear(4, 3))


def agree(model, x):
    """Float32 gradients of the single samples, next to loops of autograd."""
    y = torch.arange(len(x)) % 3
    stats = pb.statistics(model, CE, (x, y), ["sample_grads"])
    for n in range(len(x)):
        expected = torch.autograd.grad(CE(model(x[n : n + 1]), y[n : n + 1]), list(model.parameters()))
        for k, g in zip(stats["sample_grads"], expected, strict=True):
            torch.testing.assert_close(
                stats["sample_grads"][k][n], g, rtol=1e-4, atol=1e-6, msg=lambda m, k=k: f"{k} {m}"
            )


@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: Last(nn.LSTM), (4, 300, 4)),
        (lambda: Last(nn.RNN), (4, 200, 4)),
        (lambda: Last(nn.GRU), (4, 300, 4)),
        (lambda: sigmoids(60), (4, 4)),
    ],
    ids=["lstm", "rnn", "gru", "sigmoids"],
)
def test_gradients_that_vanish_in_float32_are_no_leak(make, shape):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = make(), torch.randn(shape)
    with pytest.warns(UserWarning, match=r"calls have vanished: at torch\.nn\.functional\.linear"):
        agree(model, x)


def test_a_leak_is_found_however_small_the_gradients_are():
    class Leaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            z = torch.tanh(self.first(x))
            return 1e-25 * self.last(z + 1e-3 * z.mean(0))

    with pytest.raises(ValueError, match="does not separate into the 6 samples"):
        pb.statistics(Leaky(), CE, (torch.randn(6, 4), torch.arange(6) % 3), ["variance"])


class Standardised(nn.Module):
    """A convolution whose weight is standardised by batch norm of the weight itself (NFNet, BiT)."""

    def __init__(self):
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(6, 3, 3, 3)), nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        rows = self.weight.reshape(1, 6, -1)
        w = F.batch_norm(rows, None, None, weight=0.1 * self.gain, training=True, eps=1e-6)
        return self.head(F.conv2d(x, w.reshape(self.weight.shape)).relu().mean((2, 3)))


def test_a_weight_standardised_by_batch_norm_mixes_no_samples():
    model, x, y = Standardised().double(), torch.randn(4, 3, 8, 8).double(), torch.arange(4) % 3
    expected = torch.autograd.grad(CE(model(x), y), list(model.parameters()))
    for quantities in (["grad"], ["grad", "sample_grads"]):
        stats = pb.statistics(model, CE, (x, y), quantities)
        for k, g in zip(stats["grad"], expected, strict=True):
            torch.testing.assert_close(stats["grad"][k], g, rtol=1e-10, atol=1e-12, msg=k)
    for k, g in zip(stats["grad"], expected, strict=True):
        torch.testing.assert_close(stats["sample_grads"][k].mean(0), g, rtol=1e-10, atol=1e-12, msg=k)


@pytest.mark.filterwarnings("ignore:the gradients at")
def test_rounding_of_denormal_gradients_is_no_wrong_rule():
    torch.manual_seed(0)
    layers = [part for _ in range(60) for part in (nn.Linear(5, 5), nn.Sigmoid())]
    model, x, y = nn.Sequential(*layers, nn.Linear(5, 3)), torch.randn(6, 5), torch.randint(0, 3, (6,))
    found = pb.statistics(model, nn.CrossEntropyLoss(), (x, y), ["sample_grads", "kfac", "diag_ggn"])
    weight = model[-1].weight
    losses = F.cross_entropy(model(x), y, reduction="none")
    rows = torch.stack([torch.autograd.grad(each, weight, retain_graph=True)[0] for each in losses])
    torch.testing.assert_close(found["sample_grads"]["120.weight"], rows)
