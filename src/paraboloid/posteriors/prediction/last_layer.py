"""Variances of a linear last layer's outputs in closed form: J is the features, and is never formed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paraboloid.data.batches import Inputs
from paraboloid.data.cutting import Cuts, tensors
from paraboloid.engine.recorder import Call
from paraboloid.engine.tape import Tape
from paraboloid.passes.memory import JACOBIANS
from paraboloid.posteriors.precision import Precision
from paraboloid.posteriors.prediction.jacobian import recorded
from paraboloid.posteriors.prediction.moments import PROBE
from paraboloid.posteriors.structures.eigenbasis import InEigenbasis, Mixture

if TYPE_CHECKING:
    from paraboloid.posteriors.posterior import Posterior

CHUNK = 1024  # samples at a time, of outputs that are not large
DIGITS = 4096  # of numbers of places, which half of the bits of a float32 hold exactly


def variances(
    posterior: Posterior, inputs: Inputs, precision: Precision, cuts: Cuts | None = None,
    known: dict[Any, Any] | None = None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Mean and variance of f = W phi + b at every position under a posterior over W and b alone, features phi [F]:

    diagonal     var[c] = sum_j phi[j]^2 var(W)[c, j] + var(b)[c]
    Kronecker    sum_i U[c, i]^2 sum_j (phi V)[j]^2 / (h + lambda)[i, j], with the factors' eigenvectors U and V

    f may be a view of that, its axes in any order.  In as many numbers as the outputs and features have.  None where
    the posterior is over something else, or has another structure, and of no samples.  `cuts` and `known` remember, for
    the caller, where the samples of such inputs lie and how large their outputs are, which else a few have to tell.
    """
    if not isinstance(precision, InEigenbasis | Mixture) or len(posterior.weights) > 2:
        return None
    cut = (Cuts() if cuts is None else cuts).of(posterior.model, inputs, posterior.output)
    if cut.samples == 0:
        return None
    known, like = {} if known is None else known, tuple((t.shape[1:], t.dtype) for t in tensors(inputs))
    means, found, start = [], [], 0
    while start < cut.samples:
        step = _samples(posterior, *known[like]) if (planned := like in known) else min(PROBE, cut.samples)
        piece = cut.take(inputs, slice(start, start + step)) if cut.possible and step < cut.samples else inputs
        with recorded(posterior.model, list(posterior.weights), piece, posterior.output, verify=False) as (tape, f):
            pair = _of_batch(tape, f, list(posterior.weights), precision)
        if pair is None:
            return None
        known[like] = f[0].numel(), f.element_size(), f.device
        if not planned and len(f) < min(_samples(posterior, *known[like]), cut.samples):
            continue  # from the start: the chunks, and with them the rounding, are those of every later call
        means.append(pair[0])
        found.append(pair[1])
        start += len(f)
    return (means[0], found[0]) if len(means) == 1 else (torch.cat(means), torch.cat(found))


def _samples(posterior: Posterior, size: int, bytes_each: int, device: torch.device) -> int:
    """How many to take at a time, by the elements of an output."""
    fitting = JACOBIANS.count(4 * size * bytes_each, posterior.max_memory, device)
    return max(1, min(CHUNK, fitting, DIGITS**2 // size))


def _of_batch(
    tape: Tape, f: Tensor, weights: list[str], precision: InEigenbasis | Mixture
) -> tuple[Tensor, Tensor] | None:
    if len(tape.calls) != 1 or f.dtype not in (torch.float32, torch.float64):
        return None
    head = head_of(tape, f, tape.calls[0], set(weights))
    if head is None:
        return None
    with torch.no_grad():
        return f.detach(), head.put(f, head.variances(precision))


@dataclass(frozen=True)
class Head:
    """f = W phi + b at every position, or a re-indexing of that: features phi [R, F], and for each row of them the
    places in f, [R, C], of what they make."""

    weight: str
    bias: str | None
    phi: Tensor
    at: Tensor

    def variances(self, precision: InEigenbasis | Mixture) -> Tensor:
        """Of f under a posterior over W and b, for features that are certain: [R, C]."""
        return _of(precision, self.phi, self.weight, self.bias)

    def put(self, f: Tensor, each: Tensor) -> Tensor:
        """Numbers [R, C] in their places in a tensor of f's shape."""
        return torch.empty_like(f.detach()).flatten().scatter_(0, self.at.flatten(), each.flatten()).view_as(f)


def head_of(tape: Tape, f: Tensor, call: Call, weights: set[str]) -> Head | None:
    """The call as a `Head` over exactly these weights; None where it is something else, or f is made of it otherwise
    than by re-indexing."""
    uses: dict[str, Any] = {}
    weight = bias = None
    for use in call.uses():
        if (name := tape.names.get(id(use.weight))) is not None:
            uses[name] = use
            if use.right is None:
                bias = bias or name
            else:
                weight = weight or name
    if weight is None or uses.keys() != weights or False in [use.is_plain for use in uses.values()]:
        return None
    use = uses[weight]
    if use.right is None or use.flip or use.lookup or use.q_axes is not None or use.groups > 1:
        return None
    if (places := _places(f, call)) is None:
        return None
    at = use.arranged(places[None])[0]  # [R 1 T p], with the row of features that makes each of them
    phi = use.right(slice(None)).flatten(0, -2)
    if at.numel() != f.numel() or phi.shape != (at.numel() // at.shape[-1], use.q):
        return None
    added = None if bias is None else uses[bias]
    if added is not None and added.arrange is not None and added.arranged(places[None]).unique().numel() < f.numel():
        return None  # an element has it twice, or not at all
    return Head(weight, bias, phi.detach(), at)


def _places(f: Tensor, call: Call) -> Tensor | None:
    """For each element of the call's output its flat place in f, where f is a re-indexing of it; else None.

    The transpose of a re-indexing, which a pull applies, takes numbers to where they came from.
    """
    numbers = torch.arange(f.numel(), device=f.device)
    if call.edge.node is f.grad_fn:
        return numbers.view(call.shape) if f.shape == call.shape else None
    if f.numel() > DIGITS**2:
        return None
    parts = [numbers // DIGITS, numbers % DIGITS, torch.ones_like(numbers)]
    pulled = [
        torch.autograd.grad(f, call.edge, t.to(f.dtype).view_as(f), retain_graph=True, allow_unused=True)[0]
        for t in parts
    ]
    if any(t is None for t in pulled) or not (pulled[2] == 1).all():
        return None
    places = pulled[0].long() * DIGITS + pulled[1].long()
    return places if torch.equal(places.flatten().sort().values, numbers) else None


def _of(precision: InEigenbasis | Mixture, phi: Tensor, weight: str, bias: str | None) -> Tensor:
    if isinstance(precision, Mixture):
        first, second = (_of(part, phi, weight, bias) for part in precision.parts)
        return (first + second) / 2
    sigma = precision.sigma[weight]
    U, V, full = sigma.left, sigma.right, sigma.full
    shift = sigma.values[0] if full else sigma.values[0] - sigma.rest
    turned = phi if V.vectors is None else phi @ V.vectors[0]
    inner = turned.square() @ shift.T  # [N, i]
    found = inner if U.vectors is None else inner @ U.vectors[0].square().T
    if not full:
        found = found + sigma.rest * phi.square().sum(1, keepdim=True)
    return found if bias is None else found + precision.variances_of(bias)
