"""A posterior in a file: tensors and plain data only, so that loading one runs no code."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid import data as batch_data
from paraboloid import factors, trees
from paraboloid.eigenform import Basis, Eigenform
from paraboloid.posteriors.diagonal import Diagonal
from paraboloid.posteriors.full import Full
from paraboloid.posteriors.kronecker import CrossFitted, Kronecker
from paraboloid.posteriors.likelihood import Likelihood
from paraboloid.posteriors.rows import Rows

VERSION = 2
PLAIN = (
    "structure", "loss", "constant", "count", "elements", "target", "noise_variance", "temperature", "sharpness",
    "max_memory", "options",
)  # fmt: skip


# What a curvature consists of; classes of equal name are told apart by their places.
CLASSES = (Full, Diagonal, Rows, Kronecker, CrossFitted, Eigenform, Basis, factors.Factors, factors.Rows)
NAMES = {c: f"{c.__module__}.{c.__name__}" for c in CLASSES}


def _packed(value: Any) -> Any:
    """Dataclasses as dicts with their class's name; the parameters, which are saved as the weights, are left out."""
    if type(value) in NAMES:
        inside = {f.name: _packed(getattr(value, f.name)) for f in fields(value) if f.name != "parameters"}
        return {"class": NAMES[type(value)], "fields": inside}
    if isinstance(value, dict):
        return {"dict": {k: _packed(v) for k, v in value.items()}}
    if isinstance(value, tuple | list):
        return [_packed(v) for v in value]
    return value


def _unpacked(value: Any, weights: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(v, weights) for v in value]
    if not isinstance(value, dict):
        return value
    if "dict" in value:
        return {k: _unpacked(v, weights) for k, v in value["dict"].items()}
    found = next(c for c, name in NAMES.items() if name == value["class"])
    inside = {k: _unpacked(v, weights) for k, v in value["fields"].items()}
    if any(f.name == "parameters" for f in fields(found)):
        inside["parameters"] = weights
    return found(**inside)


def save(posterior: Any, path: str | Path) -> None:
    curvature = posterior.curvature
    state = {
        "version": VERSION,
        "kind": posterior.likelihood.kind,
        "weights": posterior.weights,
        "prior_precision": posterior.prior_precision,
        "curvature": _packed(curvature),
        **{name: getattr(posterior, name) for name in PLAIN},
    }
    torch.save(state, path)


def load_posterior(path: str | Path, model: nn.Module, loss_fn: Any, *, output: batch_data.Output | None = None) -> Any:
    """A posterior that `Posterior.save` wrote, bit for bit, for the same model at the same weights.

    Raises ValueError where the model's parameters have other names, shapes or values than those that the posterior was
    fitted at, where the loss is of another kind, and for a file of another origin.
    """
    from paraboloid.posteriors.posterior import Posterior

    state = torch.load(path, weights_only=True, map_location=next(iter(model.parameters())).device)
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise ValueError(f"{path} holds no posterior of version {VERSION}; expected a file written by Posterior.save.")
    likelihood = Likelihood.of(loss_fn)
    if likelihood.kind != state["kind"]:
        raise ValueError(f"the posterior was fitted with a {state['kind']} likelihood, but loss_fn is a "
                         f"{likelihood.kind} one; expected the same.")  # fmt: skip
    weights = state["weights"]
    current = {trees.plain_name(k): p.detach() for k, p in trees.unwrapped(model).named_parameters()}
    shapes = {k: tuple(w.shape) for k, w in weights.items()}
    found = {k: tuple(current[k].shape) if k in current else None for k in weights}
    if shapes != found:
        wrong = {k: (shape, found[k]) for k, shape in shapes.items() if shape != found[k]}
        raise ValueError(f"the posterior is over other parameters than the model has: name -> (saved, found) shapes "
                         f"{wrong}; expected the model that it was fitted to.")  # fmt: skip
    moved = [k for k, w in weights.items() if not torch.equal(w, current[k])]
    if moved:
        raise ValueError(f"the model's parameters {moved} have other values than those that the posterior was fitted "
                         "at; load the model's weights first.")  # fmt: skip
    curvature = _unpacked(state["curvature"], weights)
    plain = {name: state[name] for name in PLAIN}
    return Posterior(
        model, likelihood, plain.pop("structure"), curvature, weights, output=output, **plain,
        _prior=state["prior_precision"],
    )  # fmt: skip
