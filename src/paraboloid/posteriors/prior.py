"""The prior N(0, diag(precision)^-1) over the chosen weights: one number, one per parameter or one per weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Prior = dict[str, Tensor]  # name -> [] or [*shape]


def as_prior(value: Any, parameters: Mapping[str, Tensor]) -> Prior:
    """`prior_precision` as one tensor for each parameter: [] where its elements share one precision, else its shape.

    value: a number or [] tensor for all; [D] in the order of the parameters, or [number of parameters]; or a dict by
    parameter name of numbers and tensors.  Raises ValueError for other shapes or names, and for a precision that is not
    positive.  Gradients flow through tensors.
    """
    first = next(iter(parameters.values()))
    size = sum([p.numel() for p in parameters.values()])
    if isinstance(value, Mapping):
        unknown, missing = [k for k in value if k not in parameters], [k for k in parameters if k not in value]
        if unknown or missing:
            raise ValueError(f"prior_precision has the unknown names {unknown} and misses {missing}; expected "
                             f"{list(parameters)}.")  # fmt: skip
        prior = {k: _tensor(value[k], p) for k, p in parameters.items()}
    else:
        t = _tensor(value, first)
        if t.dim() == 0:
            prior = dict.fromkeys(parameters, t)
        elif t.shape == (size,):
            pieces = t.split([p.numel() for p in parameters.values()])
            prior = {k: piece.view_as(p) for (k, p), piece in zip(parameters.items(), pieces, strict=True)}
        elif t.shape == (len(parameters),):
            prior = dict(zip(parameters, t, strict=True))
        else:
            raise ValueError(f"prior_precision has shape {tuple(t.shape)}; expected a number, [{size}] (one for each "
                             f"weight), [{len(parameters)}] (one for each parameter), or a dict by name.")  # fmt: skip
    for name, t in prior.items():
        if t.dim() and t.shape != parameters[name].shape:
            raise ValueError(f"prior_precision of {name!r} has shape {tuple(t.shape)}; expected a number or "
                             f"{tuple(parameters[name].shape)}.")  # fmt: skip
        if not (t.isfinite() & (t > 0)).all():
            wrong = t.detach().flatten()[int((~(t.isfinite() & (t > 0))).flatten().nonzero()[0])]
            raise ValueError(f"prior_precision of {name!r} is {wrong.item():.4g}; expected positive finite numbers.")
    return prior


def _tensor(value: Any, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor | int | float):
        raise ValueError(f"prior_precision is a {type(value).__name__}; expected a number, a tensor or a dict by name.")
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def flat(prior: Prior, parameters: Mapping[str, Tensor]) -> Tensor:
    """[D], one precision for each weight."""
    return torch.cat([prior[k].expand(p.shape).reshape(-1) for k, p in parameters.items()])


def scalars(prior: Prior, structure: str) -> Prior:
    """The prior if it has one precision for each parameter; raises ValueError otherwise.

    A Kronecker-factored block plus a diagonal that varies within it has no eigenbasis of Kronecker form.
    """
    for name, t in prior.items():
        if t.dim() and not (t == t.flatten()[0]).all():
            raise ValueError(
                f"prior_precision of {name!r} differs from weight to weight ({t.min().item():.4g} to "
                f"{t.max().item():.4g}); expected one number for each parameter with structure={structure!r}. Use "
                "structure='diag', 'full', 'lowrank' or 'functional'."
            )
    return {name: t.flatten()[0] if t.dim() else t for name, t in prior.items()}


def square(prior: Prior, weights: Mapping[str, Tensor]) -> Tensor:
    """theta . Lambda theta."""
    return torch.stack([(prior[k] * w.square()).sum() for k, w in weights.items()]).sum()
