"""Unrolled recurrent layers give the fused operation's numbers, its random masks, and say what they do not do."""

import pytest
import torch
from layers.cases import Around, dense
from torch import nn
from torch.overrides import TorchFunctionMode

import paraboloid as pb

KINDS = {"rnn": nn.RNN, "relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k), "lstm": nn.LSTM, "gru": nn.GRU}


def layer(kind, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return KINDS[kind](3, 4, **options).double(), dense(5, 3)(2).double()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_numbers_and_the_same_masks_of_dropout(kind, train):
    model, x = layer(kind, num_layers=3, bidirectional=True, batch_first=True, dropout=0.5)
    model.train(train)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        z, last = model(x)
        torch.manual_seed(3)
        with pb.record(model) as tape:
            z2, last2 = model(x)
    assert len(tape.calls) == 3 * 2 * (1 + 5)  # the inputs at once, the hidden state step by step
    torch.testing.assert_close(z2, z, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(last2, last, rtol=1e-10, atol=1e-12)


class Seen(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_function__(self, op, types, args=(), kwargs=None):
        self.operations.append(op)
        return op(*args, **(kwargs or {}))


def test_a_frozen_layer_stays_fused():
    model, x = layer("lstm")
    head = nn.Linear(4, 2).double()
    for frozen in (True, False):
        model.requires_grad_(not frozen)
        with Seen() as seen, pb.record(nn.Sequential(model, head)):
            head(model(x)[0])
        assert (torch.lstm in seen.operations) == frozen


def test_a_sequence_without_a_batch_is_refused():
    """Axis 0 of its output is time, and every step feels the ones before it."""
    model = Around(nn.GRU(3, 4), lambda m, x: m.layer(x)[0]).double()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
    with pytest.raises(ValueError, match="does not separate into the 5 samples"):
        pb.statistics(model, nn.MSELoss(), (x, torch.zeros(5, 4).double()), "sample_grads")


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_packed_sequence_takes_the_net_and_has_diagonals_for_factors(kind):
    recurrent, x = layer(kind, batch_first=True)

    def forward(m, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, [5, 3], batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(m.layer(packed)[0], batch_first=True)[0]

    model = Around(recurrent, forward)
    with (
        pytest.warns(UserWarning, match="could not be recorded"),
        pytest.warns(UserWarning, match=r"parameters 'layer\.weight_ih_l0', .* have no Kronecker factors"),
    ):
        stats = pb.statistics(model, nn.MSELoss(), (x, torch.zeros(2, 5, 4).double()), ["kflr", "diag_ggn"])
    torch.testing.assert_close(
        stats["kflr"]["layer.weight_ih_l0"].left, stats["diag_ggn"]["layer.weight_ih_l0"].flatten()
    )
