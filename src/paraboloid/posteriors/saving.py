"""A posterior in a file: tensors and plain data only, so that loading one runs no code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from paraboloid.linalg.eigenform import Basis, Eigenform
from paraboloid.linalg.kronecker import Side
from paraboloid.operators.structured.block_diagonal import BlockDiagonal
from paraboloid.operators.structured.diagonalised import Diagonalised
from paraboloid.passes.wrappers import plain_parameters
from paraboloid.posteriors.likelihood import Likelihood
from paraboloid.posteriors.prediction.confidence import Confidence
from paraboloid.posteriors.structures.eigenbasis import CrossFitted, Kronecker, diagonal_of
from paraboloid.posteriors.structures.rows import Rows
from paraboloid.posteriors.structures.subnetwork import Subnetwork
from paraboloid.reductions import kronecker_factors

if TYPE_CHECKING:
    from paraboloid.posteriors.posterior import Posterior

State = dict[str, Any]
VERSION = 5
READ = (2, 3, 4, VERSION)
PLAIN = (
    "structure", "loss", "constant", "count", "elements", "target", "noise_variance", "temperature", "sharpness",
    "spread", "max_memory", "options",
)  # fmt: skip


def _diagonal(c: Diagonalised) -> State:
    pairs = zip(c.parameters.items(), c.forms, strict=True)
    return {k: form.values.view_as(p) for (k, p), form in pairs}


def _fields(value: Any) -> State:
    return {f.name: getattr(value, f.name) for f in fields(value)}


# What a curvature consists of, by the kinds that files name: they outlive every move of a class.  A kind is a class,
# what it is made of besides the parameters (which are saved as the weights), and how it is made of that.
KINDS: dict[str, tuple[type, Callable[[Any], State], Callable[..., Any]]] = {
    "full": (BlockDiagonal, lambda c: {"H": c.matrices[0]}, lambda p, H: BlockDiagonal(p, [range(len(p))], [H])),
    "diagonal": (Diagonalised, lambda c: {"h": _diagonal(c)}, diagonal_of),
    "subnetwork": (Subnetwork, lambda c: {"at": c.at, "H": c.H}, Subnetwork),
    "rows": (Rows, lambda c: {"A": c.A, "rank": c.rank}, Rows),
    "kronecker": (Kronecker, lambda c: {"forms": c.by_name, "factors": c.factors}, Kronecker),
    "cross_fitted": (CrossFitted, lambda c: {"parts": list(c.parts)}, lambda p, parts: CrossFitted(parts)),
    "eigenform": (Eigenform, _fields, lambda p, **inside: Eigenform(**inside)),
    "basis": (Basis, _fields, lambda p, **inside: Basis(**inside)),
    "factors": (kronecker_factors.Factors, _fields, lambda p, **inside: kronecker_factors.Factors(**inside)),
    "factor_rows": (Side, lambda s: {"data": s.data}, lambda p, data: Side("rows", data)),
}
NAMES = {c: kind for kind, (c, _, _) in KINDS.items()}
# Files of version 2 name the places where the classes lay then.
PLACES_2 = {
    "paraboloid.posteriors.full.Full": "full",
    "paraboloid.posteriors.diagonal.Diagonal": "diagonal",
    "paraboloid.posteriors.rows.Rows": "rows",
    "paraboloid.posteriors.kronecker.Kronecker": "kronecker",
    "paraboloid.posteriors.kronecker.CrossFitted": "cross_fitted",
    "paraboloid.eigenform.Eigenform": "eigenform",
    "paraboloid.eigenform.Basis": "basis",
    "paraboloid.factors.Factors": "factors",
    "paraboloid.factors.Rows": "factor_rows",
}


def _packed(value: Any) -> Any:
    if type(value) in NAMES:
        kind = NAMES[type(value)]
        return {"class": kind, "fields": {k: _packed(v) for k, v in KINDS[kind][1](value).items()}}
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
    kind = str(value["class"])
    make = KINDS[PLACES_2.get(kind, kind)][2]
    return make(weights, **{k: _unpacked(v, weights) for k, v in value["fields"].items()})


def state_of(posterior: Posterior) -> State:
    unweighted = None if posterior.unweighted is posterior else posterior.unweighted
    return {
        "version": VERSION,
        "kind": posterior.likelihood.kind,
        "weights": posterior.weights,
        **_own(posterior),
        "unweighted": None if unweighted is None else _own(unweighted),
    }


def save(posterior: Posterior, path: str | Path) -> None:
    torch.save(state_of(posterior), path)


def _own(posterior: Posterior) -> State:
    """What a posterior has besides the weights."""
    return {
        "prior_precision": posterior.prior_precision,
        "curvature": _packed(posterior.curvature),
        "confidence": None if posterior.confidence is None else _fields(posterior.confidence),
        **{name: getattr(posterior, name) for name in PLAIN},
    }


def _read(state: State, weights: dict[str, Tensor]) -> State:
    found = {name: state[name] for name in PLAIN if name in state}  # files of before know no spread
    found["options"] = {"curvature": "ggn", **found["options"]}  # older files know no other
    matched = state.get("confidence")
    return {
        **found, "curvature": _unpacked(state["curvature"], weights), "weights": weights,
        "confidence": None if matched is None else Confidence(**matched), "_prior": state["prior_precision"],
    }  # fmt: skip


def read(path: str | Path, model: nn.Module, likelihood: Likelihood) -> tuple[State, State | None]:
    """What `Posterior` is made of, from a file that `save` wrote, and its `unweighted`; see `load_posterior`."""
    state = torch.load(path, weights_only=True, map_location=next(iter(plain_parameters(model).values())).device)
    return of_state(state, model, likelihood, path)


def of_state(state: Any, model: nn.Module, likelihood: Likelihood, path: Any) -> tuple[State, State | None]:
    """The same from what `state_of` gave; `path` is what messages call it."""
    if not isinstance(state, dict) or state.get("version") not in READ:
        raise ValueError(
            f"{path} holds no posterior of version {READ[0]} to {VERSION}; expected a file written by Posterior.save."
        )
    if likelihood.kind != state["kind"]:
        raise ValueError(f"the posterior was fitted with a {state['kind']} likelihood, but loss_fn is a "
                         f"{likelihood.kind} one; expected the same.")  # fmt: skip
    weights = state["weights"]
    current = {k: p.detach() for k, p in plain_parameters(model).items()}
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
    unweighted = state.get("unweighted")
    return _read(state, weights), None if unweighted is None else _read(unweighted, weights)
