"""Derived weights that hold the samples are told apart from those that do not, on the first call and on later ones."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from layers.cases import Around
from layers.test_kronecker import double, draw
from layers.test_rules import SUM
from oracle import close
from torch import nn

import paraboloid as pb
from paraboloid.engine.derived_weights import promote, replay


def body(function):
    return double(lambda: Around(nn.Linear(4, 4), function, q=torch.randn(1, 2, 4), s=torch.randn(2, 4)))


def attend(q, x):
    return F.scaled_dot_product_attention(q, x, x)


MODELS = {
    "expanded behind a layer": lambda m, x: attend(m.layer(m.q).expand(len(x), -1, -1), x) * m.s,
    "expanded in front of a layer": lambda m, x: attend(m.layer(m.q.expand(len(x), -1, -1)), x) + m.s,
    "the layer used on data as well": lambda m, x: attend(m.layer(m.q.repeat(len(x), 1, 1)), m.layer(x)) + m.s,
    "one expanded tensor used twice": lambda m, x: (
        lambda e: torch.cat([e, attend(e, m.layer(x)), x + m.s[:1]], 1)
    )(m.layer(m.q).expand(len(x), -1, -1)),
    "expanded twice": lambda m, x: torch.cat(
        [m.layer(m.q).expand(len(x), -1, -1), attend((m.q * m.s).expand(len(x), -1, -1), x)], 1
    ),
    "two steps from zeros": lambda m, x: m.layer(
        torch.tanh(m.layer(torch.tanh(m.layer(torch.zeros(len(x), 4, dtype=x.dtype)) + x[:, 0])) + x[:, 1])
    ) + m.s[0] + m.q[0, 0],
}  # fmt: skip


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_exact_on_every_call_whether_certified_or_not(name, n):
    model, x = body(MODELS[name]), draw(n, 2, 4)
    params = dict(model.named_parameters())
    y = torch.zeros_like(model(x))
    g, d = oracle.sample_grads(SUM, model(x), y, params), oracle.sample_diag_ggn(SUM, model(x), y, params)
    for verify in ("auto", "auto", "auto", False, "always"):
        stats = pb.statistics(model, SUM, (x, y), ["sample_grads", "diag_ggn"], verify=verify)
        for k in params:
            close(stats["sample_grads"][k], g[k], f"{k} {verify}")
            close(stats["diag_ggn"][k], d[k].sum(0), f"{k} {verify}")


def test_factors_are_those_of_a_layer_on_data():
    """A query expanded in front of the layer gives the factors of the same rows given as inputs."""
    model, x = body(MODELS["expanded in front of a layer"]), draw(3, 2, 4)
    given = Around(model.layer, lambda m, q, x: attend(m.layer(q), x) + model.s.detach())
    y = torch.zeros(3, 2, 4).double()
    one = pb.statistics(model, SUM, (x, y), "kflr")["kflr"]["layer.weight"]
    rows = model.q.detach().expand(3, -1, -1).contiguous()
    other = pb.statistics(given, SUM, ((rows, x), y), "kflr")["kflr"]["layer.weight"]
    close(one.left, other.left)
    close(one.right, other.right)


def test_a_weight_without_samples_stays_one():
    """Nothing separates on the way to a scaled matrix: the call that consumes it falls back, and remembers it."""
    model, x = body(lambda m, x: torch.einsum("nti,oi->nto", x, m.layer.weight * m.s[0]) + m.q[0, 0]), draw(3, 2, 4)
    params = {k: p for k, p in model.named_parameters() if k != "layer.bias"}
    y = torch.zeros_like(model(x))
    g = oracle.sample_grads(SUM, model(x), y, params)
    for _ in range(3):
        with pytest.warns(UserWarning, match=r"einsum on a tensor derived from \['layer.weight', 's'\] has no rule"):
            found = pb.statistics(model, SUM, (x, y), "sample_grads")["sample_grads"]
        for k in params:
            close(found[k], g[k], k)


def test_steps_that_do_not_apply_are_taken_afresh():
    assert replay([], [], [], {}) is None
    assert replay([], [[]], [], {}) == ([], [])
    assert replay([], [[], []], [], {}) is None
    assert promote([], [], [], {}) is None
