"""Every form of a parameter's outer products against the samples written out in float64."""

import pytest
import torch

from paraboloid.reductions.contractions import times, weighted_gram, weighted_squares
from paraboloid.reductions.outer import Derived, Several, Whole, known, zero
from paraboloid.reductions.products import Lookup, OnePosition, Products, Vector, merge, product
from paraboloid.reductions.right import Right
from paraboloid.reductions.sums import PARTS, formed, reduce

V, N, T, P, Q = 2, 5, 3, 4, 6
CLOSE = {"rtol": 1e-11, "atol": 1e-12}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sums(T, G=1, flip=False, seed=0):
    """A form, and J_n^T v by the definition."""
    left, right = draw(V, N, G, T, P, seed=seed), draw(N, G, T, Q, seed=seed + 1)
    J = torch.einsum("vngtp,ngtq->vngpq", left, right)
    shape = torch.Size((G * Q, P) if flip else (G * P, Q))
    form = product(left, Right(lambda n: right[n], (1, N, 1), torch.float64), shape, Q, flip)
    return form, (J.mT if flip else J).reshape(V, N, *shape)


def lookup(seed=0):
    left = draw(V, N, 1, T, P, seed=seed)
    index = torch.randint(-1, Q, (N, 1, T), generator=torch.Generator().manual_seed(seed))
    left = left * (index >= 0).unsqueeze(-1)
    rows = torch.nn.functional.one_hot(index + 1, Q + 1)[..., 1:].double()
    J = torch.einsum("vngtp,ngtq->vnqp", left, rows)
    return Lookup(left, Right(lambda n: index[n], (1, N, 1)), torch.Size((Q, P)), Q, flip=True), J


def vector():
    left = draw(V, N, 1, 1, P)
    return Vector(left, torch.Size((2, 2))), left.view(V, N, 2, 2)


def derived():
    form, J = sums(T)
    M = draw(P * Q, 7)
    return Derived(form, lambda J: J.flatten(1) @ M, torch.Size((7,))), J.flatten(2) @ M


def several():
    (one, J), (other, K) = lookup(), sums(T, flip=True, seed=5)
    uses = [one, Whole(K.reshape(V, N, 1, 1, -1), K.shape[2:])]
    return Several([*uses, other]), J + 2 * K


def merged(first, second):
    (one, J), (other, K) = first, second
    return merge([one, other]), J + K


FORMS = {
    "many positions": lambda: sums(T),
    "so many that the Gram trick does not pay": lambda: sums(40),
    "groups": lambda: sums(T, G=2),
    "one position": lambda: sums(1),
    "one position, groups, flipped": lambda: sums(1, G=2, flip=True),
    "a table": lookup,
    "a vector": vector,
    "known by itself": lambda: (known(draw(V, N, P, Q)), draw(V, N, P, Q)),
    "zero": lambda: (zero(draw(P, Q), V, N), torch.zeros(V, N, P, Q, dtype=torch.float64)),
    "through a derived tensor": derived,
    "several forms": several,
    "merged positions": lambda: merged(sums(1), sums(T, seed=9)),
    "merged tables": lambda: merged(lookup(), lookup(9)),
    "a table and a matrix": lambda: merged(lookup(), sums(T, flip=True, seed=9)),
    "merged vectors": lambda: merged(vector(), vector()),
}


@pytest.mark.parametrize("max_memory", [None, 1])
@pytest.mark.parametrize("name", FORMS)
def test_sums_and_contractions_of_every_form(name, max_memory):
    o, J = FORMS[name]()
    flat = J.flatten(2)
    expected = {
        "total": J.sum((0, 1)), "squares": J.square().sum((0, 1)), "norms": flat.square().sum((0, 2)),
        "gram": torch.einsum("vnd,vmd->nm", flat, flat), "samples": J,
    }  # fmt: skip
    for wanted in (PARTS, {"total", "norms"}, {"squares"}, {"total", "squares"}, {"gram"}, set()):
        found = reduce(o, wanted, max_memory)
        assert set(found) == set(wanted)
        for part, value in found.items():
            torch.testing.assert_close(value, expected[part], **CLOSE)
    torch.testing.assert_close(o.total(), J.sum(1), **CLOSE)
    torch.testing.assert_close(o.samples(slice(1, 3)), J[:, 1:3], **CLOSE)
    torch.testing.assert_close(o.of(slice(1, 4)).samples(), J[:, 1:4], **CLOSE)
    torch.testing.assert_close(torch.cat(list(o.rows(max_memory))), flat.transpose(0, 1), **CLOSE)
    torch.testing.assert_close(o.finish(formed(o, max_memory).movedim(2, 0), (V, N)), J, **CLOSE)
    W, rows, weights = draw(*o.shape, seed=3), draw(3, o.shape.numel(), seed=4), draw(V, N, seed=5)
    gram = torch.einsum("knd,d,lnd->nkl", flat, W.flatten(), flat)
    torch.testing.assert_close(weighted_gram(o, W, False, max_memory), gram, **CLOSE)
    torch.testing.assert_close(weighted_gram(o, W, True, max_memory), gram.diagonal(dim1=1, dim2=2), **CLOSE)
    torch.testing.assert_close(times(o, rows), torch.einsum("vnd,rd->nvr", flat, rows), **CLOSE)
    torch.testing.assert_close(
        weighted_squares(o, weights, max_memory), torch.einsum("vn,vn...->...", weights, J**2), **CLOSE
    )


def test_samples_are_in_memory_of_their_own():
    for name in FORMS:
        o, J = FORMS[name]()
        o.samples().zero_()
        torch.testing.assert_close(o.samples(), J, **CLOSE)


def test_forms_are_chosen_and_merged_by_what_they_are():
    assert type(sums(1)[0]) is OnePosition
    assert type(sums(2)[0]) is Products
    assert type(FORMS["merged positions"]()[0]) is Products
    assert type(FORMS["merged tables"]()[0]) is Lookup
    assert type(FORMS["a table and a matrix"]()[0]) is Products
    assert type(merge([sums(1)[0], sums(1, flip=True)[0]])) is Several
    assert len(merge([sums(1)[0], sums(1, flip=True)[0]]).products) == 2
    assert not merge([sums(1)[0], derived()[0]]).products
    assert not merge([derived()[0], derived()[0]]).lasting
