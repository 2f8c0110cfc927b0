"""Several batches give what one big batch gives: every quantity, loss, and way of asking."""

import models
import numpy as np
import pytest
import torch
from losses_table import LOSSES
from losses_table import make as make_loss
from oracle import close
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paraboloid as pb
from paraboloid.data.batches import call
from paraboloid.linalg.kronecker import Kron
from paraboloid.quantities.over_data import OverData
from paraboloid.quantities.result import finished
from paraboloid.quantities.sums import merged

SAME = [name for name in pb.quantities.QUANTITIES if name not in ("diag_ggn_mc", "kfac", "kfra")]
SIZES = {"uneven": (3, 1, 4), "one batch": (8,), "one by one": (1,) * 8}
CE = nn.CrossEntropyLoss()


def parts(inputs, y, sizes):
    """The batch cut into consecutive ones."""
    cut = [t.split(sizes) for t in (inputs if isinstance(inputs, tuple) else (inputs,))]
    xs = zip(*cut, strict=True) if isinstance(inputs, tuple) else cut[0]
    return list(zip(xs, y.split(sizes), strict=True))


def same(found, expected):
    assert list(found) == list(expected)
    for q, values in expected.items():
        for k, value in values.items():
            if isinstance(value, Kron):
                close(found[q][k].left, value.left, f"{q} {k}")
                close(found[q][k].right, value.right, f"{q} {k}")
            else:
                close(found[q][k], value, f"{q} {k}")
    close(found.loss, expected.loss)
    close(found.output, expected.output)
    assert found.samples == expected.samples
    assert found.normalizer == pytest.approx(expected.normalizer, rel=1e-12)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("loss_name", LOSSES)
def test_uneven_batches_are_one_big_batch(loss_name, sizes):
    model, x = models.make("mlp", 8)
    loss, y = make_loss(loss_name, call(model, x))
    expected = pb.statistics(model, loss, (x, y), SAME)
    same(pb.statistics(model, loss, parts(x, y, SIZES[sizes]), SAME), expected)


@pytest.mark.parametrize("model_name", ["residual cnn", "gpt", "class token", "sequence first", "shared"])
def test_layers_of_all_kinds(model_name):
    """Positions, lookups, several uses, derived weights, and layouts with the samples on another axis."""
    wanted = [q for q in SAME if q not in ("diag_hessian", "sample_diag_hessian", "gram", "kflr", "kfac_empirical")]
    model, x = models.make(model_name, 8)
    loss, y = make_loss("ce", call(model, x))
    kron = ["kflr", "kfac_empirical"] if model_name in ("residual cnn", "gpt") else []
    expected = pb.statistics(model, loss, (x, y), [*wanted, *kron])
    same(pb.statistics(model, loss, parts(x, y, (3, 1, 4)), [*wanted, *kron]), expected)


def sums_of_losses():
    """name -> loss, whose terms divide by different numbers."""
    ce, squares = pb.losses.CrossEntropy, pb.Loss.from_torch(nn.MSELoss())
    soft = pb.losses.BCEWithLogits(reduction="batchmean")
    return {
        "two means": (2 * squares + soft, "real"),
        "mean and sum": (squares + pb.losses.BCEWithLogits(reduction="sum"), "real"),
        "weighted and batchmean": (ce(weight=torch.tensor([0.3, 2, 1.0]).double()) + ce(reduction="batchmean"), "classes"),
        "ignored": (ce() + 0.5 * ce(reduction="sum"), "ignored"),
    }  # fmt: skip


@pytest.mark.parametrize("name", sums_of_losses())
def test_a_sum_of_losses_is_that_of_the_big_batch(name):
    loss, kind = sums_of_losses()[name]
    model, x = models.make("mlp", 8)
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(3, (8,), generator=generator)
    if kind == "real":
        y = torch.rand(8, 3, generator=generator, dtype=torch.float64)
    elif kind == "ignored":
        y[:4] = -100  # a whole batch and more
    expected = pb.statistics(model, loss, (x, y), SAME, accumulate_grad=True)
    gradient = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    same(pb.statistics(model, loss, parts(x, y, (3, 1, 4)), SAME, accumulate_grad=True), expected)
    for k, p in model.named_parameters():
        close(p.grad, gradient[k], k)


@pytest.mark.parametrize("loss_name", ["ce weights, ignored, smoothed", "mse sum"])
def test_accumulate_grad_adds_what_backward_of_the_big_batch_would(loss_name):
    model, x = models.make("residual cnn", 8)
    loss, y = make_loss(loss_name, call(model, x))
    loss(call(model, x), y).backward()
    expected = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    for times in (1, 2):
        pb.statistics(model, loss, parts(x, y, (3, 1, 4)), "square_norms", accumulate_grad=True)
        for k, p in model.named_parameters():
            close(p.grad, times * expected[k], k)


def test_labels_are_drawn_batch_by_batch_from_the_one_generator():
    """One batch in a list draws those of the batch; several draw one after the other, as by hand."""
    model, x = models.make("mlp", 8)
    loss, y = make_loss("ce sum", call(model, x))
    q = "diag_ggn_mc"
    one = pb.statistics(model, loss, (x, y), [q, "kfac"], seed=3)
    listed = pb.statistics(model, loss, [(x, y)], [q, "kfac"], seed=3)
    generator = torch.Generator().manual_seed(3)
    each = [pb.statistics(model, loss, b, q, generator=generator) for b in parts(x, y, (3, 5))]
    for asked in ({"seed": 3}, {"generator": torch.Generator().manual_seed(3)}):
        several = pb.statistics(model, loss, parts(x, y, (3, 5)), q, **asked)
        for k in one[q]:
            assert torch.equal(one[q][k], listed[q][k]) and torch.equal(one["kfac"][k].left, listed["kfac"][k].left)
            close(several[q][k], each[0][q][k] + each[1][q][k], k)
    other = pb.statistics(model, loss, parts(x, y, (3, 5)), q, seed=4)
    assert not torch.equal(other[q]["0.weight"], several[q]["0.weight"])


def test_masks_and_shuffling_follow_the_seed_and_leave_torchs_own_state():
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.BatchNorm1d(50), nn.Linear(50, 3)).double()
    x, y = torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    losses = [pb.statistics(model, CE, loader, ["grad", "kfac"], seed=s).loss for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_generator_of_batches_is_read_once():
    model, x = models.make("mlp", 8)
    loss, y = make_loss("ce", call(model, x))
    batches = parts(x, y, (3, 5))
    expected = pb.statistics(model, loss, batches, ["variance", "kflr"])
    same(pb.statistics(model, loss, (b for b in batches), ["variance", "kflr"]), expected)
    both = pb.losses.CrossEntropy() + pb.losses.CrossEntropy(reduction="sum")
    with pytest.raises(ValueError, match="data is a generator, which can be read only once, but two passes count"):
        pb.statistics(model, both, (b for b in batches), "grad")


def test_dicts_and_structured_outputs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return {"logits": self.layer(x)}

    model, x, y = Model().double(), torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1])
    batches = [{"x": x[:2], "labels": y[:2]}, {"x": x[2:], "labels": y[2:]}]
    pick = lambda o: o["logits"]  # noqa: E731
    expected = pb.statistics(model, CE, {"x": x, "labels": y}, SAME, output=pick)
    same(pb.statistics(model, CE, batches, SAME, output=pick), expected)


def test_outputs_of_several_lengths_stay_a_list():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)).double()
    batches = [(torch.randint(5, (2, t)), torch.randn(2, t, 3).double()) for t in (3, 4)]
    stats = pb.statistics(model, nn.MSELoss(reduction="sum"), batches, ["grad", "square_norms"])
    assert [f.shape for f in stats.output] == [(2, 3, 3), (2, 4, 3)] and stats.samples == 4
    assert stats["square_norms"]["1.weight"].shape == (4,)
    with pytest.raises(ValueError, match=r"'sqrt_ggn': the batches have \[9, 12\] vectors for each sample"):
        pb.statistics(model, nn.MSELoss(reduction="sum"), batches, "sqrt_ggn")


class Mute(pb.quantities.Quantity):
    """Does not say how its values add up."""

    name, source, needs = "mute", pb.quantities.GRADIENT, frozenset({"total"})

    def add(self, value, group):
        return group.parts["total"]


class Largest(Mute):
    """Says it: the largest entry of the batches' summed gradients."""

    name = "largest"

    def merge(self, a, b):
        return torch.maximum(a, b)


def test_a_quantity_of_ones_own_says_how_batches_merge():
    model, x = models.make("mlp", 8)
    y = torch.arange(8) % 3
    batches = parts(x, y, (3, 5))
    each = [pb.statistics(model, CE, b, Mute()) for b in batches]
    found = pb.statistics(model, CE, batches, Largest())
    for k, value in found["largest"].items():
        close(value, torch.maximum(*(e["mute"][k] for e in each)))
    assert set(pb.statistics(model, CE, batches[:1], Mute())["mute"]) == set(each[0]["mute"])
    with pytest.raises(ValueError, match=r"'mute' does not say how the values of several batches make up one.*merge"):
        pb.statistics(model, CE, batches, Mute())


def batches_of(change):
    model, x = models.make("mlp", 6)
    return lambda: pb.statistics(model, CE, change(x, torch.arange(6) % 3), ["grad", "variance"])


ERRORS = {
    "the data is empty: it yielded no batch; expected at least one": lambda x, y: [],
    "the data yielded a Tensor; expected batches": lambda x, y: [x, y, x],
    "the data yielded a tuple of length 3; expected batches": lambda x, y: [(x, y, y)],
    "data is a NoneType; expected a batch": lambda x, y: None,
    "every target of every batch is ignored": lambda x, y: [(x[:3], y[:3] * 0 - 100), (x[3:], y[3:] * 0 - 100)],
    "'variance' needs a batch of at least 2 samples; found 1": lambda x, y: [(x[:1], y[:1])],
    "has 3 samples but the targets have shape": lambda x, y: [(x[:3], y[:3]), (x[3:], y[3:5])],
    "the loss is nan; expected a finite number": lambda x, y: [(x[:3], y[:3]), (x[3:] * float("nan"), y[3:])],
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError, match=message):
        batches_of(ERRORS[message])()


def test_kfra_is_of_one_batch():
    model, x = models.make("mlp", 6)
    y = torch.arange(6) % 3
    alone, listed = (pb.statistics(model, CE, b, "kfra")["kfra"] for b in ((x, y), [(x, y)]))
    for k, block in alone.items():
        close(listed[k].left, block.left, k)
    with pytest.raises(ValueError, match=r"'kfra' averages curvature over a batch.*Ask for 'kflr', which adds up"):
        pb.statistics(model, CE, parts(x, y, (3, 3)), "kfra")


def test_a_misspelt_part_is_named():
    class Misspelt(Mute):
        needs = {"sqares", "total"}  # noqa: RUF012

    model, x = models.make("mlp")
    with pytest.raises(
        ValueError, match=r"'mute' needs \['sqares'\]; the parts that a quantity may need are \['gram', "
    ):
        pb.statistics(model, CE, (x, torch.tensor([0, 1, 2])), Misspelt())


def test_numpy_integers_are_counts():
    model, x = models.make("mlp")
    batch = x, torch.tensor([0, 1, 2])
    three = [pb.statistics(model, CE, batch, pb.quantities.DiagGGN(samples=n))["diag_ggn_mc"] for n in (3, np.int64(3))]
    assert all(torch.equal(a, b) for a, b in zip(*(d.values() for d in three), strict=True))
    for wrong in (np.float64(3), np.bool_(True), True):
        with pytest.raises(ValueError, match=r"samples is .*; expected an integer of at least 1"):
            pb.quantities.DiagGGN(samples=wrong)


def test_a_second_pass_sees_the_same_function():
    """Masks and labels of the seed again; a loss that moved is refused; a single batch is run forward once."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    x, y = torch.randn(8, 4).double(), torch.arange(8) % 3
    quantity = pb.quantities.KFAC()
    passes = OverData(model, CE, parts(x, y, (3, 5)), seed=1, again=True)
    first, second = (passes.sums([quantity]).values["kfac"]["0.weight"].rows["gradient"] for _ in range(2))
    assert torch.equal(first, second) and passes.passes == 2
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"the summed loss moved from .* between two passes over the data"):
        passes.sums([quantity])
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    single = OverData(model, CE, (x, y), seed=1, again=True)
    first, second = (single.sums([quantity]).values["kfac"]["0.weight"].rows["gradient"] for _ in range(2))
    assert torch.equal(first, second) and len(forwards) == 1


def test_sums_merge_in_any_grouping():
    model, x = models.make("mlp", 8)
    loss, y = pb.losses.CrossEntropy(), torch.arange(8) % 3
    wanted = pb.quantities.resolve([q for q in SAME if q != "gram"])
    expected = pb.statistics(model, loss, (x, y), wanted)
    for left_first in (True, False):
        passes = OverData(model, loss, parts(x, y, (3, 1, 4)))
        a, b, c = (sums for sums, _, _ in passes.by_batch(wanted))
        join = lambda s, t: merged(wanted, loss, s, t)  # noqa: E731
        whole = join(join(a, b), c) if left_first else join(a, join(b, c))
        assert (whole.N, whole.normalizers) == (8, [8.0])
        for q in wanted:
            values = finished(q, whole.values[q.name], passes.parameters, pb.quantities.Scale(8, 1 / 8))
            for k, value in values.items():
                value, wanted_value = (v.to_dense() if isinstance(v, Kron) else v for v in (value, expected[q.name][k]))
                close(value, wanted_value, f"{q.name} {k}")
