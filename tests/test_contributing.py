"""The walks of CONTRIBUTING.md run as they stand, in order, and their checks see a slip."""

import re
from pathlib import Path

import pytest
import torch

import paraboloid as pb
from paraboloid.layers import RULES, matrix
from paraboloid.operators.saving import KINDS

PAGE = Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)


@pytest.fixture
def walked():
    """What the walks define; the library is as before afterwards."""
    rules, kinds, namespace = dict(RULES), dict(KINDS), {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in BLOCKS:
            exec(compile(block, str(PAGE), "exec"), namespace)
        yield namespace
    for table, kept in ((RULES, rules), (KINDS, kinds)):
        table.clear()
        table.update(kept)


def test_the_walks_run(walked):
    assert {"einsum", "GGNTrace", "Isotropic"} <= set(walked)
    assert RULES[torch.einsum] is walked["einsum"]


def test_a_slip_in_the_walks_is_seen(walked):
    def half(equation, x, weight):
        yield matrix(x, weight, scale=0.5)

    RULES[torch.einsum] = half
    with pytest.raises(AssertionError, match=r"`weight`: left times right .* Everywhere 0.5 times the expected"):
        pb.testing.check_rule(torch.einsum, walked["cases"][:1])
    unscaled = type("Unscaled", (walked["GGNTrace"],), {"finish": lambda self, value, scale: value})()
    with pytest.raises(AssertionError, match=r"Unscaled of '0.weight': entry \[\] .* Everywhere 8 times the expected"):
        pb.testing.check_quantity(unscaled, *(walked[k] for k in ("model", "loss_fn", "batch")),
                                  expected=lambda J, scale: scale.a * J.square().sum())  # fmt: skip
