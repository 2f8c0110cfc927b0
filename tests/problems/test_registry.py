"""Problems by name and by module:factory, and one clear message for every way that fails."""

import random
import sys
import textwrap

import numpy as np
import pytest
import torch

from paraboloid import problems

MODULE = """
    import torch
    from torch import nn
    from paraboloid.problems import Problem

    def good(seed=0, hidden=3):
        x = torch.randn(8, 3)
        data = (x, x.argmax(1) % 2)
        return Problem(nn.Sequential(nn.Linear(3, hidden), nn.Linear(hidden, 2)), nn.CrossEntropyLoss(), data, data)

    made = good()

    class Group:
        plain = staticmethod(lambda: good(hidden=5))

    def fails():
        raise KeyError("no such\\n    file")

    def silent():
        raise RuntimeError

    def nothing():
        return None

    def untrainable():
        data = (torch.ones(2, 2), torch.zeros(2).long())
        return Problem(nn.ReLU(), nn.CrossEntropyLoss(), data, data)

    number = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "own_problems.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("own_problems", "needs_more", "broken"):
        sys.modules.pop(name, None)


def test_names():
    assert problems.names() == [
        "digits-mlp", "digits-tanh", "digits-cnn", "digits-autoencoder", "curves-autoencoder", "faces-autoencoder",
        "random-features", "shapes-cnn", "sequence-transformer",
    ]  # fmt: skip


def test_a_factory_in_the_current_directory(here):
    problem = problems.load("own_problems:good", hidden=4)
    assert problem.name == "own_problems:good"
    assert problem.model[0].out_features == 4
    assert problems.load("own_problems:Group.plain").model[0].out_features == 5
    assert problems.load("own_problems:made").model[0].out_features == 3


def test_a_factory_is_seeded(here):
    a, b, c = (problems.load("own_problems:good", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(a.model[0].weight, b.model[0].weight)
    assert not torch.equal(a.model[0].weight, c.model[0].weight)
    assert torch.equal(a.train[0][0], b.train[0][0])


@pytest.mark.parametrize(
    "name, message",
    [
        ("digits-cn", r"unknown problem 'digits-cn'. Did you mean 'digits-cnn'.* Expected one of .*, or module:"),
        ("zzz", r"unknown problem 'zzz'. Expected one of"),
        ("", r"unknown problem ''."),
        ("own_problems:", "is incomplete; expected module:factory"),
        (":good", "is incomplete; expected module:factory"),
        ("not_there:good", "names the module 'not_there', which is neither in .* nor installed"),
        ("own_problems.py:good", "Write own_problems:good, without .py"),
        ("needs_more:good", "the module 'needs_more' raised ModuleNotFoundError: .*a_package_that_is_not_there"),
        ("broken:f", "importing the module 'broken' raised SyntaxError"),
        ("own_problems:goood", "has no 'goood'. Did you mean 'good'"),
        ("own_problems:number", "own_problems:number is a int; expected a function"),
        ("own_problems:fails", r"its factory raised KeyError: 'no such\\n file'"),
        ("own_problems:silent", r"its factory raised RuntimeError\."),
        ("own_problems:nothing", "returned a NoneType; expected a pb.Problem"),
        ("own_problems:untrainable", "its factory raised ValueError: ReLU has no parameter"),
    ],
)  # fmt: skip
def test_errors_are_one_line(here, name, message):
    with pytest.raises(ValueError, match=message) as caught:
        problems.load(name)
    assert "\n" not in str(caught.value)


def test_the_cause_is_chained(here):
    with pytest.raises(ValueError, match="KeyError") as caught:
        problems.load("own_problems:fails")
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("name, takes", [("digits-mlp", r"\[\]"), ("shapes-cnn", r"\['samples', 'width', 'depth'\]")])
def test_unknown_options(name, takes):
    with pytest.raises(ValueError, match=rf"with the options \['layers'\].*its factory takes {takes}"):
        problems.load(name, layers=2)


def test_global_random_states_are_left_alone(here):
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    for name in ("digits-tanh", "random-features", "own_problems:good"):
        problems.load(name, seed=1)
    with pytest.raises(ValueError, match="KeyError"):
        problems.load("own_problems:fails")
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    assert random.getstate() == python_state
