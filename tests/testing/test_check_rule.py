"""A user's rule by `pb.testing.check_rule`: a right one passes, each wrong one is caught with the right words."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

import paraboloid as pb
from paraboloid.layers import LOWERINGS, RULES, Use, channel, lowering, matrix, rule, spread


def x(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def w(*shape, seed=1):
    return nn.Parameter(x(*shape, seed=seed))


@contextmanager
def registered(op, function, register=rule):
    """For the time of a test."""
    table = RULES if register is rule else LOWERINGS
    kept = table.get(op)
    register(op)(function)
    try:
        yield
    finally:
        table.pop(op)
        if kept is not None:
            table[op] = kept


ADDCMUL = [(x(4, 3), w(3), x(4, 3, seed=2)), ((x(2, 4, 3), x(2, 4, 3, seed=3), w(4, 1)), {"value": 0.5})]
BADDBMM = [(x(4, 2, 5), x(4, 2, 3, seed=2), w(1, 3, 5).expand(4, -1, -1)), lambda n: (w(5), x(n, 2, 3), x(n, 3, 5))]
EINSUM = [("ntd,pd->ntp", x(4, 2, 3), w(5, 3)), ("nd,pd->np", x(4, 3), w(5, 3))]


def addcmul(x, scale, y, *, value=1):
    yield spread(x)
    yield spread(scale, factor=lambda: value * y)
    yield spread(y, factor=lambda: value * scale)


def einsum(equation, x, weight):
    if equation in ("nd,pd->np", "ntd,pd->ntp"):
        yield matrix(x, weight)


@pytest.mark.parametrize("op, function, cases", [(torch.addcmul, addcmul, ADDCMUL), (torch.einsum, einsum, EINSUM)])
def test_a_right_rule_passes(op, function, cases):
    with registered(op, function):
        pb.testing.check_rule(op, cases)


def wrong(message):
    """Register a wrong rule for einsum, and what is said of it."""
    return lambda function: WRONG.append((function, message))


WRONG: list = []


@wrong(r"`weight`: left times right .*: entry \[.*\] is .*, expected .* by autograd: off by .*, 50.00%; 240 of 240 "
       r"entries differ\. Everywhere 0.5 times the expected: a factor is missing")  # fmt: skip
def factor(equation, x, weight):
    yield matrix(x, weight, scale=0.5)


@wrong(r"`weight`: left times right .*expected .* by autograd")
def transposed(equation, x, weight):
    yield Use(
        weight, (0, 1), right=lambda rows: x.reshape(-1, 1, 1, 3)[rows], q=3,
        arrange=lambda g: g.transpose(1, 2).reshape(len(g), -1, 1, 1, 5),
    )  # fmt: skip


@wrong(r"`weight`: left times right .* entries differ")
def flipped(equation, x, weight):
    yield Use(
        weight, (0, 1), right=lambda rows: x.reshape(-1, 1, 1, 3)[rows], q=3, flip=True,
        arrange=lambda g: g.reshape(len(g), -1, 1, 1, 5),
    )  # fmt: skip


@wrong(r"`weight`: left times right .* entries differ")
def forgotten_position(equation, x, weight):
    yield Use(
        weight, (0,), right=lambda rows: x.unsqueeze(1)[rows], q=3,
        arrange=lambda g: torch.cat([g[:, :, :1], 0 * g[:, :, 1:]], 2).unsqueeze(2),
    )  # fmt: skip


@wrong(r"`weight`: right has shape \[4, 1, 1, 3\]; expected \[R = 4, G = 1, T = 2, q = 3\]")
def short_right(equation, x, weight):
    yield Use(weight, (0,), right=lambda rows: x[rows, None, :1], q=3, arrange=lambda g: g.unsqueeze(2))


@wrong(r"`weight`: right\(slice\(0, 1\)\) has shape \[4, 1, 2, 3\]; expected \[1, 1, 2, 3\] by the same rows of right")
def right_of_all_rows(equation, x, weight):
    yield Use(weight, (0,), right=lambda rows: x.unsqueeze(1), q=3, arrange=lambda g: g.unsqueeze(2))


@wrong(r"`weight`: left times right .* entries differ")
def wrong_right(equation, x, weight):
    yield replace(matrix(x.abs(), weight), input=None)


@wrong(r"`weight`: `arrange` changes numbers; expected views, copies and zeros only")
def arithmetic(equation, x, weight):
    yield Use(weight, (0,), right=lambda rows: x.unsqueeze(1)[rows] / 2, q=3, arrange=lambda g: 2 * g.unsqueeze(2))


@wrong(r"`weight`: factor \* arrange\(g\) has shape \[2, 4, 2, 5\]; expected \[V = 2, R = 4 rows, G = 1, T, p\]")
def no_group(equation, x, weight):
    yield Use(weight, (0,), right=lambda rows: x.unsqueeze(1)[rows], q=3)


@wrong(r"`weight` requires grad, but the rule yields no Use of it")
def nothing(equation, x, weight):
    yield from ()


@wrong(r"the weight of Use 0, \[3, 5\], is not an argument of the call; expected the argument itself")
def another_weight(equation, x, weight):
    yield matrix(x, weight.T, flip=True)


@wrong(r"the rule yields a Tensor; expected a Use")
def a_tensor(equation, x, weight):
    yield x


@wrong(
    r"the rule does not take the arguments of the operation .*expected a function of 3 arguments and the keywords \[\]"
)
def signature(equation, x):
    yield matrix(x, x)


@pytest.mark.parametrize("function, message", WRONG, ids=[f.__name__ for f, _ in WRONG])
def test_a_wrong_rule_is_caught(function, message):
    with registered(torch.einsum, function), pytest.raises(AssertionError, match=message) as e:
        pb.testing.check_rule(torch.einsum, EINSUM[:1])
    assert str(e.value).startswith("torch.functional.einsum, case 0 (")


def test_a_rule_that_is_not_affine_must_say_so():
    def power(x, weight):
        """x^weight, elementwise."""
        yield spread(weight, factor=lambda: x**weight * x.log(), affine=claimed)

    cases = [(x(4, 3).abs() + 0.5, w(3))]
    with registered(torch.pow, power):
        claimed = True
        with pytest.raises(AssertionError, match=r"`weight`: the rule takes the operation as affine in it, but its second "
                           r"derivative is .* at entry \[\d\]; expected affine=False"):  # fmt: skip
            pb.testing.check_rule(torch.pow, cases)
        claimed = False
        pb.testing.check_rule(torch.pow, cases)
        claimed = None
        pb.testing.check_rule(torch.pow, cases)


def test_a_wrong_input_is_caught_in_the_layer_below():
    """`input` says that z depends on it through W alone: then curvature passes.  Here it does not."""

    def gated(x, y, weight, bias=None):
        """z = x^T W y with y = x: not linear in what is multiplied."""
        p, q = len(weight), weight[0].numel()
        yield Use(
            weight, (0,), right=lambda rows: (x.unsqueeze(2) * y.unsqueeze(1)).flatten(1)[rows, None, None], q=q,
            arrange=lambda g: g.reshape(len(g), -1, 1, 1, p), input=x,
        )  # fmt: skip

    shared = x(4, 3)
    with (
        registered(torch.bilinear, gated),
        pytest.raises(AssertionError, match=r"`input` is `x`, but right has the entry .* Leave `input` out"),
    ):
        pb.testing.check_rule(torch.bilinear, [(shared, shared, w(5, 3, 3))])


def test_a_wrong_lookup_is_caught():
    def embedding(idx, weight, **options):
        yield Use(
            weight, (0, 1), right=lambda rows: (idx + 1).reshape(-1, 1, 1)[rows] % 6, flip=True, q=6, lookup=True,
            arrange=lambda g: g.reshape(len(g), -1, 1, 1, 2), affine=True,
        )  # fmt: skip

    idx = torch.tensor([[0, 3, 5], [1, 1, 2]])
    with (
        registered(torch.nn.functional.embedding, embedding),
        pytest.raises(AssertionError, match=r"`weight`: left times right .* entries differ"),
    ):
        pb.testing.check_rule(torch.nn.functional.embedding, [(idx, w(6, 2))])


def test_axes_that_are_confused_where_lengths_agree():
    """A rule that finds an axis by its length is right until positions and samples are as many."""

    def channel_by_length(x, weight):
        at = next(i for i, d in enumerate(x.shape) if i and d == len(weight)) if x.shape[0] != x.shape[1] else 0
        yield (
            channel(weight, factor=lambda: x.clamp(max=0))
            if at == 1
            else channel(weight, factor=lambda: x.mT.clamp(max=0))
        )

    with (
        registered(torch.prelu, channel_by_length),
        pytest.raises(AssertionError, match=r"N = 3: sample_grads of `weight`: entry"),
    ):
        pb.testing.check_rule(torch.prelu, [(x(4, 3, 3), w(3))])


def test_a_lowering_computes_what_its_operation_does():
    def cell(h, state, w_ih, w_hh, b_ih=None, b_hh=None):
        return torch.sigmoid(nn.functional.linear(h, w_ih, b_ih) + nn.functional.linear(state, w_hh, b_hh))

    arguments = (x(3, 2), x(3, 4), w(4, 2), w(4, 4), w(4), w(4))
    with (
        registered(torch.rnn_tanh_cell, cell, lowering),
        pytest.raises(AssertionError, match=r"output 0 of the lowering: entry .* by torch.rnn_tanh_cell"),
    ):
        pb.testing.check_rule(torch.rnn_tanh_cell, [arguments])
    with (
        registered(torch.rnn_tanh_cell, lambda *a: NotImplemented, lowering),
        pytest.raises(AssertionError, match="the lowering returns NotImplemented"),
    ):
        pb.testing.check_rule(torch.rnn_tanh_cell, [arguments])


def test_what_is_no_case_is_refused():
    with pytest.raises(AssertionError, match=r"torch.ldexp has no rule; expected one, registered with @paraboloid"):
        pb.testing.check_rule(torch.ldexp, [(x(3), w(3))])
    with pytest.raises(ValueError, match=r"case 0 is a Tensor; expected a tuple of the arguments of torch.mul"):
        pb.testing.check_rule(torch.mul, [x(3)])
    with pytest.raises(ValueError, match=r"\(x \[3\], y \[3\]\) has no weight; expected at least one tensor"):
        pb.testing.check_rule(torch.mul, [(x(3), x(3))])
    with pytest.raises(ValueError, match="cases is empty; expected at least one call"):
        pb.testing.check_rule(torch.mul, [])


def test_nothing_of_the_users_is_changed():
    given = (x(4, 3), w(3))
    before = [t.detach().clone() for t in given]
    state = torch.get_rng_state()
    pb.testing.check_rule(torch.Tensor.add_, [given])
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert given[1].grad is None
    assert torch.equal(state, torch.get_rng_state())


def test_keywords_that_torch_adds_are_named():
    def tensordot(a, b, dims=2):
        yield matrix(a, b, flip=True)

    with (
        registered(torch.tensordot, tensordot),
        pytest.raises(
            AssertionError,
            match=r"unexpected keyword argument 'out'.* expected a function of 2 arguments and the keywords",
        ),
    ):
        pb.testing.check_rule(torch.tensordot, [((x(4, 2, 3), w(3, 5)), {"dims": 1})])


def test_a_rule_for_what_torch_does_not_hand_on():
    def scaled(x, weight):
        return x * weight

    with (
        registered(scaled, lambda x, weight: iter([spread(weight, factor=x)])),
        pytest.raises(
            AssertionError,
            match=r"torch hands on \['torch.Tensor.mul'\] of this call, not scaled; expected a rule for what",
        ),
    ):
        pb.testing.check_rule(scaled, [(x(4, 3), w(3))])
