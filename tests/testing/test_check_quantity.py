"""A user's quantity by `pb.testing.check_quantity`: right ones pass, each wrong one is caught with the right words."""

import pytest
import torch
from torch import nn

import paraboloid as pb
from paraboloid.quantities import GRADIENT, QUANTITIES, ROOT, Quantity
from paraboloid.quantities.quantity import PerSample

LOSS = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))


def batch(n=5):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 3, 3, generator=generator), torch.randint(3, (n,), generator=generator)


def check(quantity, **options):
    return pb.testing.check_quantity(quantity, net(), LOSS, batch(), **options)


EXPECTED = {
    "grad": lambda J, s: s.a * J[0].sum(0),
    "sample_grads": lambda J, s: J[0],
    "square_norms": lambda J, s: J[0].flatten(1).square().sum(1),
    "gram": lambda J, s: J[0].flatten(1) @ J[0].flatten(1).T,
    "second_moment": lambda J, s: J[0].square().mean(0),
    "variance": lambda J, s: J[0].var(0, correction=0),
    "diag_ggn": lambda J, s: s.a * J.square().sum((0, 1)),
    "diag_ggn_mc": lambda J, s: s.a * J.square().sum((0, 1)),
    "sample_diag_ggn": lambda J, s: J.square().sum(0),
    "sqrt_ggn": lambda J, s: J,
}


@pytest.mark.parametrize("name", QUANTITIES)
def test_every_quantity_of_the_library(name):
    assert check(name, expected=EXPECTED.get(name)) is None


@pytest.mark.parametrize("name", ["diag_ggn", "sample_diag_ggn", "sqrt_ggn"])
def test_a_quantity_with_a_tolerance(name):
    assert check(type(QUANTITIES[name]())(tol=0.3), expected=EXPECTED[name]) is None


class Largest(Quantity):
    """max_n |g_n|, entry by entry."""

    name, source, needs = "largest", GRADIENT, frozenset({"samples"})

    def add(self, value, group):
        return group.parts["samples"][0].abs().amax(0)

    def merge(self, a, b):
        return torch.maximum(a, b)


class Trace(Quantity):
    """Trace of the GGN's block."""

    name, source, needs, over_ranks = "trace", ROOT, frozenset({"norms"}), "running"

    def add(self, value, group):
        part = group.parts["norms"].sum()
        return part if value is None else value + part

    def finish(self, value, scale):
        return scale.a * value


def test_quantities_of_a_user():
    check(Largest(), expected=lambda J, s: J[0].abs().amax(0))
    check(Trace(), expected=lambda J, s: s.a * J.square().sum())


def test_a_wrong_definition_is_caught():
    class Doubled(Trace):
        def finish(self, value, scale):
            return 2 * scale.a * value

    with pytest.raises(AssertionError, match=r"Doubled of '0.weight': entry \[\] is .*, expected .* by `expected` of "
                       r"autograd's vectors: off by .*, 100.00%; 1 of 1 entries differ. Everywhere 2 times"):  # fmt: skip
        check(Doubled(), expected=lambda J, s: s.a * J.square().sum())


class OneGroup(Trace):
    """Forgets the groups of vectors before the last one."""

    def add(self, value, group):
        return group.parts["norms"].sum()


class OfOneBatch(Trace):
    """Divides by the number of samples before the batches are merged."""

    def add(self, value, group):
        norms = group.parts["norms"]
        return norms.mean() if value is None else value + norms.mean()


class Counting(Trace):
    """Depends on how often it was asked for."""

    count = 0

    def finish(self, value, scale):
        self.count += 1
        return self.count * value


class Shared(Trace):
    """One tensor for all parameters."""

    def finish(self, value, scale):
        self.kept = getattr(self, "kept", None)
        self.kept = torch.zeros(()).to(value) if self.kept is None else self.kept.zero_()
        return self.kept


class Single(Trace):
    def finish(self, value, scale):
        return value.float()


class Wrong(Trace):
    """Says that its running values add up; those of samples do not."""

    name, source, needs = "wrong", GRADIENT, frozenset({"norms"})

    def add(self, value, group):
        return group.parts["norms"]

    def finish(self, value, scale):
        return value


class Unmerged(PerSample):
    """Of samples, joined along the wrong axis."""

    name, source, needs, axis = "unmerged", GRADIENT, frozenset({"samples"}), 0

    def add(self, value, group):
        return group.parts["samples"]


WRONG = [
    (OneGroup(), r"OneGroup of '0.weight' in chunks \(max_memory=1\): entry \[\] .* by all at once: off by"),
    (
        OfOneBatch(),
        r"OfOneBatch of '0.weight' of two batches, merged: entry \[\] .* by one batch of all samples: off by",
    ),
    (Counting(), r"Counting of '0.weight' asked for again: entry \[\] .* by the first time"),
    (Shared(), r"Shared of '0.bias' shares memory with the value of '0.weight'; expected a tensor of its own"),
    (Wrong(), r"Wrong: two batches cannot be merged \(.*\); expected that `merge` and `finish` make the value"),
    (
        Unmerged(),
        r"Unmerged: two batches cannot be merged .*; expected that `merge` and `finish` make the value",
    ),
]


@pytest.mark.parametrize("quantity, message", WRONG, ids=[type(q).__name__ for q, _ in WRONG])
def test_a_wrong_quantity_is_caught(quantity, message):
    with pytest.raises(AssertionError, match=message):
        check(quantity)


def test_wrong_fields_are_caught():
    def changed(**fields):
        return type("Changed", (Trace,), fields)()

    with pytest.raises(AssertionError, match=r"'trace' needs \['nrms'\]; the parts that a quantity may need are"):
        check(changed(needs=frozenset({"nrms"})))
    with pytest.raises(AssertionError, match=r"Changed.source is 'root'; expected a Source"):
        check(changed(source="root"))
    with pytest.raises(AssertionError, match=r"Changed.over_ranks is 'all'; expected 'running', 'local' or None"):
        check(changed(over_ranks="all"))
    with pytest.raises(
        AssertionError, match=r"Changed has no tensor for any parameter; expected that `add` returns one"
    ):
        check(changed(add=lambda self, value, group: None, finish=lambda self, value, scale: None))


def test_what_cannot_be_checked_is_refused():
    with pytest.raises(ValueError, match=r"the batch has 1 samples; expected at least 2"):
        pb.testing.check_quantity("grad", net(), LOSS, batch(1))
    with pytest.raises(ValueError, match=r"batch is a Tensor; expected \(inputs, targets\)"):
        pb.testing.check_quantity("grad", net(), LOSS, batch()[0])
    with pytest.raises(ValueError, match=r"DiagHessian pulls no vectors back .*expected= is for those that do"):
        check("diag_hessian", expected=lambda J, s: J)


def test_nothing_of_the_users_is_changed():
    model, state = net(), torch.get_rng_state()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    state = torch.get_rng_state()
    pb.testing.check_quantity("kfac", model, LOSS, batch())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, before[k]) and t.dtype == before[k].dtype for k, t in model.state_dict().items())
    assert model[0].weight.grad is None
