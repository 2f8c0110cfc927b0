"""Variances of outputs W h + b of many classes from the covariance of the few features h: as many pulls as features.

Where the head's weights are independent of all others under the posterior, at every position

    var[c] = W_c Cov(h) W_c^T + h^T Cov(W_c) h + var(b_c),      Cov(h) = J_h Sigma J_h^T  [q, q]

with J_h the Jacobian of the features in the weights before them: T q vectors are pulled back for a sample of T
positions, not T C.  A language model has far more words than features.

Under a low-rank precision Sigma is the prior's less C^T C: to the prior's variance, which is as above, come products
with the R rows of C, J C^T = W (J_h C^T) + those of the head's own weights, [N, C, R].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paraboloid.data.batches import device_of
from paraboloid.data.cutting import Cut, tensors
from paraboloid.engine.recorder import Call
from paraboloid.engine.tape import Tape
from paraboloid.passes.memory import JACOBIANS
from paraboloid.posteriors.precision import Precision
from paraboloid.posteriors.prediction.jacobian import Jacobian, pull_outputs, recorded
from paraboloid.posteriors.prediction.last_layer import Head, head_of
from paraboloid.posteriors.prediction.moments import PROBE, element_bytes
from paraboloid.posteriors.structures.eigenbasis import InEigenbasis, Mixture, diagonal_of
from paraboloid.posteriors.structures.rows import Woodbury

if TYPE_CHECKING:
    from paraboloid.data.batches import Inputs
    from paraboloid.posteriors.posterior import Posterior

ROWS = 256  # of a low-rank curvature, up to which it is taken
FEWER = 2  # times as many outputs as features, from which on it is taken


def variances(
    posterior: Posterior, inputs: Inputs, precision: Precision, cut: Cut, known: dict[Any, Any]
) -> tuple[Tensor, Tensor] | None:
    """Mean and variance of the outputs, chunked over samples; None where the last layer is of another kind, shares a
    weight, or has no fewer features than outputs, where a sample's features do not fit into the memory, and of none."""
    few = isinstance(precision, Woodbury) and precision.formed <= ROWS
    if not (few or isinstance(precision, InEigenbasis | Mixture)) or cut.samples == 0:
        return None
    limit = JACOBIANS.of(posterior.max_memory, device_of(inputs))
    like = ("head", tuple((t.shape[1:], t.dtype) for t in tensors(inputs)))
    means, found, start = [], [], 0
    least = 1 if cut.possible else cut.samples
    while start < cut.samples:
        if known.get(like, 0) is None:
            return None
        planned = like in known
        step = max(least, min(cut.samples, limit // known[like] if planned else min(PROBE, cut.samples)))
        piece = cut.take(inputs, slice(start, start + step)) if cut.possible and step < cut.samples else inputs
        with recorded(posterior.model, list(posterior.weights), piece, posterior.output) as (tape, f):
            features = _features(tape, f, posterior)
            if features is None:
                known[like] = None
                return None
            if not planned:
                J = pull_outputs(tape, features.h, range(features.size))
                beside = precision.formed * len(tape.parameters[features.head.weight]) if few else 0
                formed = features.size + beside // features.size
                bytes_each = features.size * element_bytes(J, len(f) * features.size, formed)
                known[like] = max(1, int(bytes_each)) if bytes_each * least <= limit else None
                if known[like] is None or len(f) != min(cut.samples, max(least, limit // known[like])):
                    continue  # from the start: the chunks, and with them the rounding, are those of every later call
            found.append(features.variances(tape, precision, posterior.max_memory))
        means.append(f.detach())
        start += len(f)
    return torch.cat(means), torch.cat(found)


class Features:
    """What the last layer of a recorded pass multiplies with its weight, h [N, T.., q], for outputs f."""

    def __init__(self, f: Tensor, head: Head, h: Tensor):
        self.f, self.head, self.h = f, head, h
        self.size = h.shape[-1]

    def variances(self, tape: Tape, precision: Any, memory: int | None) -> Tensor:
        N, own = len(self.h), {self.head.weight, self.head.bias}
        W = tape.parameters[self.head.weight].detach()
        below = {k: p for k, p in tape.parameters.items() if k not in own}
        taken = None
        if isinstance(precision, Woodbury):  # the prior's variance, less what the rows take away
            taken = dict(zip(tape.parameters, precision.determined.split(_sizes(tape.parameters), 1), strict=True))
            nothing = {k: torch.zeros_like(p) for k, p in tape.parameters.items()}
            precision = InEigenbasis(diagonal_of(tape.parameters, nothing), precision.prior, precision.strength)
        parts = []
        for first in range(0, self.h[0].numel(), self.size):
            J = pull_outputs(tape, self.h, range(first, first + self.size))
            others = Jacobian(J.outputs, {k: o for k, o in J.uses.items() if k in below}, below)
            with torch.no_grad():
                covariance = precision.covariance(others, False, memory)  # [N, q, q]
                found = ((W @ covariance) * W).sum(2)
                if taken is not None:
                    own_part = self._of_head(taken, first // self.size)
                    rows = torch.cat([taken[k] for k in below], 1)
                    found -= (W @ others.times(rows) + own_part).square().sum(2)
                parts.append(found)
        with torch.no_grad():
            each = torch.stack(parts, 1).flatten(0, 1) + self.head.variances(precision)
            return self.head.put(self.f, each.view(N * len(parts), -1))

    def _of_head(self, rows: dict[str, Tensor], position: int) -> Tensor:
        """J r of the head's own weights for rows [R, ..] of each, [N, C, R]."""
        phi = self.head.phi.unflatten(0, (len(self.h), -1))[:, position]  # [N, F]
        W = rows[self.head.weight].unflatten(1, (-1, phi.shape[1]))  # [R, C, F]
        found = torch.einsum("nf,rcf->ncr", phi, W)
        return found if self.head.bias is None else found + rows[self.head.bias].T


def _sizes(parameters: Mapping[str, Tensor]) -> list[int]:
    return [p.numel() for p in parameters.values()]


def _features(tape: Tape, f: Tensor, posterior: Posterior) -> Features | None:
    """None where f is not the result of a linear layer whose weights are used there alone."""
    if f.dtype not in (torch.float32, torch.float64) or len(tape.calls) < 2:
        return None
    call: Call = tape.calls[-1]
    names = {name for w in call.weights if (name := tape.names.get(id(w))) is not None}
    if len(names) != len({id(w) for w in call.weights}) or (head := head_of(tape, f, call, names)) is None:
        return None
    h = next((u.input for u in call.uses() if u.right is not None), None)
    if h is None or not h.requires_grad or h.dim() < 2 or len(h) != len(f) or h.dtype != f.dtype:
        return None
    if f[0].numel() < FEWER * h[0].numel() or tape.reached(h, tape.calls).found & names:
        return None  # a tied embedding moves with the head
    return Features(f, head, h)
