"""Which weights a posterior is over: all, those of the last layer, names, a predicate, or single elements."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Data, Output
from paraboloid.passes import trees
from paraboloid.passes.modes import evaluating
from paraboloid.passes.parameter_layers import layer_of
from paraboloid.quantities.recording import forward

Weights = str | Sequence[str] | Callable[[str], bool]


def choose(
    model: nn.Module, weights: Weights, data: Data, output: Output | None = None,
    known: Mapping[str, nn.Parameter] | None = None,
) -> list[str]:  # fmt: skip
    """The names of the chosen parameters, in the order of `named_parameters`.

    weights: "all", "last_layer" (the module whose parameters the last recorded call uses), a list of names of
    parameters or of modules, or a predicate of a parameter's name.  `known`: the model's parameters, where they are at
    hand.  Raises ValueError where nothing fits.
    """
    parameters = trees.parameters(model) if known is None else known
    if weights == "all":
        return list(parameters)
    if weights == "last_layer":
        return _last_layer(model, parameters, data, output)
    if isinstance(weights, str):
        raise ValueError(f"weights is {weights!r}; expected 'all', 'last_layer', a list of names or a predicate.")
    if callable(weights):
        chosen = [name for name in parameters if weights(name)]
        if not chosen:
            raise ValueError(f"the predicate `weights` chose none of the parameters {list(parameters)}.")
        return chosen
    given = list(weights)
    unknown = [w for w in given if not any(_within(name, w) for name in parameters)]
    if unknown or not given:
        raise ValueError(f"weights names {unknown or given}, which is no trainable parameter and no module that has "
                         f"any; expected some of {list(parameters)}.")  # fmt: skip
    return [name for name in parameters if any(_within(name, w) for w in given)]


def _within(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.")


def _last_layer(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], data: Data, output: Output | None
) -> list[str]:
    inputs, target = next(batch_data.batches(data))
    with evaluating(model), forward(model, inputs, batch_data.device_of(target), 0, output, verify=False) as (tape, f):
        calls = tape.reached(f, tape.calls).calls if f.requires_grad else []
    if not calls:
        raise ValueError("no layer with trainable parameters was found between the inputs and the output; expected one "
                         "for weights='last_layer'. Name the parameters instead.")  # fmt: skip
    last = [call for call in tape.calls if any(call is c for c in calls)][-1]
    names = set().union(*(tape.leaves(w) for w in last.weights))
    layer = layer_of(min(names))
    return [name for name in parameters if name in names or (layer and name.startswith(f"{layer}."))]


@contextmanager
def only(
    model: nn.Module, names: Sequence[str], known: Mapping[str, nn.Parameter] | None = None
) -> Iterator[None]:  # fmt: skip
    """Inside, the other parameters are frozen, and the model is in evaluation mode: nothing is recorded below the first
    chosen layer, and no sample depends on the others.  `known`: the model's parameters, where they are at hand."""
    parameters = trees.parameters(model) if known is None else known
    wanted = set(names)
    frozen = [p for name, p in parameters.items() if name not in wanted] if len(wanted) < len(parameters) else []
    for p in frozen:
        p.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for p in frozen:
            p.requires_grad_(True)
