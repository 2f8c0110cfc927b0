"""Variances of a linear last layer's outputs in closed form: J is the features, and is never formed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paraboloid.data.batches import Inputs
from paraboloid.passes.trees import mapped
from paraboloid.posteriors.precision import Precision
from paraboloid.posteriors.prediction.jacobian import recorded
from paraboloid.posteriors.prediction.moments import length
from paraboloid.posteriors.structures.eigenbasis import InEigenbasis, Mixture

if TYPE_CHECKING:
    from paraboloid.posteriors.posterior import Posterior

CHUNK = 1024  # samples at a time


def variances(posterior: Posterior, inputs: Inputs, precision: Precision) -> tuple[Tensor, Tensor] | None:
    """Mean and variance [N, C] of f = W phi + b under a posterior over W and b alone, features phi [F].

    diagonal     var[n, c] = sum_j phi[n, j]^2 var(W)[c, j] + var(b)[c]
    Kronecker    sum_i U[c, i]^2 sum_j (phi[n] V)[j]^2 / (h + lambda)[i, j], with the factors' eigenvectors U and V

    In C F + N (C + F) numbers.  None where the posterior is over something else, or has another structure.
    """
    if not isinstance(precision, InEigenbasis | Mixture) or len(posterior.weights) > 2:
        return None
    means, found = [], []
    for start in range(0, length(inputs), CHUNK):
        piece = mapped(lambda t, n=slice(start, start + CHUNK): t[n], inputs)
        with recorded(posterior.model, list(posterior.weights), piece, posterior.output, verify=False) as (tape, f):
            calls = tape.calls
            uses = calls[0].uses() if len(calls) == 1 and f.dim() == 2 and calls[0].edge.node is f.grad_fn else []
            uses = {name: u for u in uses if (name := tape.names.get(id(u.weight))) is not None}
        weight, bias = (next((k for k, u in uses.items() if (u.right is None) == b), None) for b in (False, True))
        if weight is None or set(uses) != set(posterior.weights) or not all(u.is_plain for u in uses.values()):
            return None
        use = uses[weight]
        if use.right is None or use.flip or use.lookup or use.q_axes is not None:
            return None
        if not all(torch.equal(u.arranged(f[None]).flatten(), f.flatten()) for u in uses.values()):
            return None
        phi = use.right(slice(None)).flatten(1)
        if phi.shape != (len(f), use.q):
            return None
        with torch.no_grad():
            means.append(f.detach())
            found.append(_of(precision, phi.detach(), weight, bias))
    return torch.cat(means), torch.cat(found)


def _of(precision: InEigenbasis | Mixture, phi: Tensor, weight: str, bias: str | None) -> Tensor:
    if isinstance(precision, Mixture):
        first, second = (_of(part, phi, weight, bias) for part in precision.parts)
        return (first + second) / 2
    sigma = precision.sigma[weight]
    U, V, shift = sigma.left, sigma.right, sigma.values[0] - sigma.rest
    turned = phi if V.vectors is None else phi @ V.vectors[0]
    inner = turned.square() @ shift.T  # [N, i]
    found = inner if U.vectors is None else inner @ U.vectors[0].square().T
    found = found + sigma.rest * phi.square().sum(1, keepdim=True)
    return found if bias is None else found + precision.sigma[bias].diagonal()
