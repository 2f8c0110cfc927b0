"""Find a problem by its name, or by `module:factory`."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from functools import reduce
from typing import Any

from paraboloid.passes.random_state import seeded
from paraboloid.problems.problem import Problem

BUILT_IN = {
    "digits-mlp": "paraboloid.problems.digits:mlp",
    "digits-tanh": "paraboloid.problems.digits:tanh",
    "digits-cnn": "paraboloid.problems.digits:cnn",
    "digits-autoencoder": "paraboloid.problems.autoencoders:digits",
    "curves-autoencoder": "paraboloid.problems.autoencoders:curves",
    "faces-autoencoder": "paraboloid.problems.autoencoders:faces",
    "random-features": "paraboloid.problems.random_features:random_features",
    "shapes-cnn": "paraboloid.problems.shapes:cnn",
    "sequence-transformer": "paraboloid.problems.sequences:transformer",
}

# Those on data that is not shipped: they take `data`, the user's folder with it.
WITH_DATA = {
    "mnist-mlp": "paraboloid.problems.images:mnist_mlp",
    "mnist-cnn": "paraboloid.problems.images:mnist_cnn",
    "mnist-autoencoder": "paraboloid.problems.images:mnist_autoencoder",
    "cifar10-resnet8": "paraboloid.problems.images:cifar10_resnet8",
    "cifar10-resnet32": "paraboloid.problems.images:cifar10_resnet32",
    "cifar10-allcnnc": "paraboloid.problems.images:cifar10_allcnnc",
    "cifar100-resnet32": "paraboloid.problems.images:cifar100_resnet32",
    "cifar100-allcnnc": "paraboloid.problems.images:cifar100_allcnnc",
    "cifar100-wrn40-4": "paraboloid.problems.images:cifar100_wrn40_4",
    "imagenet-resnet18": "paraboloid.problems.images:imagenet_resnet18",
    "imagenet-resnet50": "paraboloid.problems.images:imagenet_resnet50",
}

# Options that make a short run of the generated problems; the digits are short as they are.
SHORT: dict[str, dict[str, Any]] = {
    "curves-autoencoder": {"samples": 5_000},
    "faces-autoencoder": {"samples": 2_000},
    "shapes-cnn": {"samples": 2_000},
    "sequence-transformer": {"samples": 2_000},
}


def names() -> list[str]:
    """Names of the built-in problems that need no data of the user's."""
    return list(BUILT_IN)


def load(name: str, seed: int = 0, *, short: bool = False, **options: Any) -> Problem:
    """The built-in problem of this name, its model untrained, or what the factory `module:factory` returns.

    `seed` seeds the model's initial parameters and generated data, and is passed to a factory that takes `seed`;
    `options` go to the factory: ``data=DIR`` is the folder of the problems on MNIST, CIFAR and ImageNet. `short` picks
    the smaller size of the generated problems. The module is looked for in the current directory first, which joins
    `sys.path`. Raises ValueError where there is no such problem, and where the factory fails or returns something else.
    """
    known = BUILT_IN | WITH_DATA
    if name in known:
        path = known[name]
        options = {**(SHORT.get(name, {}) if short else {}), **options}
    elif ":" in name:
        path = name
    else:
        close = difflib.get_close_matches(name, known, n=2)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(
            f"unknown problem {name!r}.{hint} Expected one of {', '.join(BUILT_IN)}, one on data of "
            "your own (see `paraboloid problems`), or module:factory for your own."
        )
    factory = _resolve(name, path, seed)
    problem = factory if isinstance(factory, Problem) else _call(factory, name, seed, options)
    return problem if problem.name else dataclasses.replace(problem, name=name)


def _resolve(name: str, path: str, seed: int) -> Callable[..., Any] | Problem:
    """The attribute that `module:factory` names."""
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ValueError(
            f"the problem {name!r} is incomplete; expected module:factory, for example my_module:my_problem."
        )
    if name not in BUILT_IN | WITH_DATA and (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        with seeded(seed):  # a module may draw at its top level
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            hint = f" Write {module_name[:-3]}:{attribute}, without .py." if module_name.endswith(".py") else ""
            raise ValueError(
                f"the problem {name!r} names the module {module_name!r}, which is neither in {os.getcwd()} nor "
                f"installed.{hint}"
            ) from error
        raise _failed(f"importing the module {module_name!r}", error) from error
    except Exception as error:
        raise _failed(f"importing the module {module_name!r}", error) from error
    try:
        found = reduce(getattr, attribute.split("."), module)
    except AttributeError as error:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        close = difflib.get_close_matches(attribute, public, n=2)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"the module {module_name!r} has no {attribute!r}.{hint} Expected a factory.") from error
    if not (callable(found) or isinstance(found, Problem)):
        raise ValueError(
            f"{name} is a {type(found).__name__}; expected a function without required arguments that returns a "
            "pb.Problem."
        )
    return found


def _call(factory: Callable[..., Any], name: str, seed: int, options: dict[str, Any]) -> Problem:
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some callables written in C have none
        signature = None
    if signature is not None:
        if "seed" in signature.parameters:
            options = {"seed": seed, **options}
        try:
            signature.bind(**options)
        except TypeError as error:
            takes = [key for key in signature.parameters if key != "seed"]
            raise ValueError(
                f"the problem {name!r} cannot be made with the options {sorted(set(options) - {'seed'})}: {error}; "
                f"its factory takes {takes}."
            ) from error
    try:
        with seeded(seed):
            problem = factory(**options)
    except Exception as error:
        raise _failed(f"the problem {name!r}: its factory", error) from error
    if not isinstance(problem, Problem):
        raise ValueError(
            f"the factory {name!r} returned a {type(problem).__name__}; expected a "
            "pb.Problem(model, loss_fn, train, test)."
        )
    return problem


def _failed(what: str, error: Exception) -> ValueError:
    """One line that names the exception; the cause is chained, so that its traceback is not lost."""
    message = " ".join(str(error).split())
    return ValueError(f"{what} raised {type(error).__name__}{': ' + message if message else '.'}")
