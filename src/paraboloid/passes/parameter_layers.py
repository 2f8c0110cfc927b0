"""Which parameters are one layer: those of one module, whatever a parametrization made of them."""

from __future__ import annotations

from collections.abc import Iterable

from paraboloid.passes.wrappers import plain_name


def layer_of(name: str) -> str:
    """The module that owns the parameter; "" for the model itself.

    `weight_norm`, `spectral_norm`, `orthogonal` and a user's own parametrization leave a weight with its module:
    `a.parametrizations.weight.original0` belongs to `a`.  A child module with weights of its own, such as the low-rank
    pair beside a layer, is a layer of its own; a weight used in several is where `named_parameters` finds it first.
    """
    path = f".{plain_name(name)}"
    owner, inside, _ = path.partition(".parametrizations.")
    return (owner if inside else path.rpartition(".")[0])[1:]


def layers_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Layer -> names of its parameters, in order; the model's own are one layer, called by their names."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(layer_of(name), []).append(name)
    return {layer or " + ".join(members): members for layer, members in found.items()}
