"""Which single weights a posterior is over: by their places, by a mask, or by what is largest of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from paraboloid.linalg.operand import check_count
from paraboloid.passes import trees

if TYPE_CHECKING:
    from paraboloid.posteriors.posterior import Posterior


def largest_magnitude(model: nn.Module, k: int) -> Tensor:
    """The places of the k weights of largest absolute value among all trainable ones, int64 [k], ascending.

    For ``pb.laplace(..., "full", weights=largest_magnitude(model, 100))``.
    """
    return _largest(torch.cat([p.detach().abs().flatten() for p in trees.parameters(model).values()]), k)


def largest_variance(posterior: Posterior, k: int) -> Tensor:
    """The places of the k weights of largest marginal variance under a posterior over all weights (a "diag" one say),
    int64 [k], ascending.  Source: Daxberger et al. 2021, arXiv:2010.14689."""
    size = sum(p.numel() for p in trees.parameters(posterior.model).values())
    variances = posterior.precision().variances()
    if len(variances) != size:
        raise ValueError(f"the posterior is over {len(variances)} of the model's {size} weights; expected one over all "
                         "of them (weights='all').")  # fmt: skip
    return _largest(variances, k)


def _largest(scores: Tensor, k: int) -> Tensor:
    check_count("k", k, most=len(scores))
    return scores.topk(k).indices.sort().values


def is_elementwise(weights: Any) -> bool:
    """Whether `weights` says which single weights: a tensor (or array) of places or a mask, or masks by name."""
    by_name = isinstance(weights, Mapping)
    return by_name or (hasattr(weights, "dtype") and hasattr(weights, "shape"))


def chosen_elements(model: nn.Module, weights: Any) -> tuple[list[str], Tensor]:
    """The names of the parameters that hold chosen weights, and the places of these among the elements of those.

    weights: int64 places [S] or a bool mask [D] in the order of `named_parameters`, of the trainable parameters; or
    masks of the parameters' shapes by name (others: none of theirs).  Raises ValueError where they do not fit.
    """
    parameters = trees.parameters(model)
    sizes = [p.numel() for p in parameters.values()]
    mask = _mask(parameters, weights, sum(sizes))
    if not mask.any():
        raise ValueError("`weights` chooses none of the weights; expected at least one.")
    by_name = dict(zip(parameters, mask.split(sizes), strict=True))
    names = [name for name, part in by_name.items() if part.any()]
    return names, torch.cat([by_name[name] for name in names]).nonzero().flatten()


def _mask(parameters: Mapping[str, Tensor], weights: Any, size: int) -> Tensor:
    first = next(iter(parameters.values()))
    mask = torch.zeros(size, dtype=torch.bool, device=first.device)
    if isinstance(weights, Mapping):
        if unknown := [k for k in weights if k not in parameters]:
            raise ValueError(f"weights has masks of {unknown}; expected names of {list(parameters)}.")
        parts = []
        for name, p in parameters.items():
            part = torch.as_tensor(weights.get(name, torch.zeros_like(p, dtype=torch.bool)), device=p.device)
            if part.dtype != torch.bool or part.shape != p.shape:
                raise ValueError(f"the mask of {name!r} is {part.dtype} of shape {tuple(part.shape)}; expected bool of "
                                 f"shape {tuple(p.shape)}.")  # fmt: skip
            parts.append(part.flatten().to(first.device))
        return torch.cat(parts)
    given = torch.as_tensor(weights, device=first.device)
    if given.dtype == torch.bool:
        if given.shape != (size,):
            raise ValueError(f"the mask has shape {tuple(given.shape)}; expected [{size}], one for each weight.")
        return given
    wrong = given.dim() != 1 or given.is_floating_point() or not len(given)
    if wrong or given.min() < 0 or given.max() >= size or len(given.unique()) != len(given):
        raise ValueError(f"the places of weights are {given.dtype} of shape {tuple(given.shape)}; expected different "
                         f"int64 numbers in 0..{size - 1}.")  # fmt: skip
    mask[given.long()] = True
    return mask
