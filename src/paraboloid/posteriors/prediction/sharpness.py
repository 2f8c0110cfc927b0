"""One exponent for the predicted probabilities: how sure a posterior is on the whole, apart from where it is sure.

A linearised posterior tells well *where* its network knows little, and badly how sure to be overall: tuned by evidence
it spreads the predictions at the training data too, where the network's own are calibrated better.  Raised to a power s
and normalised again, p^s / sum p^s (for the probit approximation: its logits times s), they are as sure as the network
on the data it was fitted to, and less sure elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Data
from paraboloid.passes.modes import evaluating
from paraboloid.passes.random_state import isolated
from paraboloid.passes.wrappers import unwrapped

if TYPE_CHECKING:
    from paraboloid.posteriors.posterior import Posterior

SAMPLES = 10_000  # of the data, the first ones, by which the exponent is chosen
LOWEST, HIGHEST, HALVINGS = 1e-3, 1e3, 60


def sharpened(p: Tensor, sharpness: float, kind: str) -> Tensor:
    """p^s, normalised over the classes: axis 1 of [N, C, ...], or each number and its complement ("bernoulli")."""
    return p if sharpness == 1 else _probabilities(_logits(p, kind) * sharpness, kind)


def matched(posterior: Posterior, data: Data | None) -> float:
    """The exponent with which the mean entropy of the predictions on the data is that of the network's own."""
    kind = posterior.likelihood.kind
    predicted, own, seen = [], 0.0, 0
    for inputs, _ in batch_data.batches(data):
        device = next(iter(posterior.weights.values())).device
        with torch.no_grad(), evaluating(posterior.model), isolated(posterior.model, device, 0):
            f = batch_data.call(unwrapped(posterior.model), inputs, posterior.output)
        predicted.append(_logits(posterior.predict(inputs), kind))
        own += _entropy(f, kind).sum().item()
        seen += len(f)
        if seen >= SAMPLES:
            break
    return _crossing(lambda s: sum(_entropy(s * z, kind).sum().item() for z in predicted) - own)


def best(posterior: Posterior, validation: Data) -> float:
    """The exponent with the lowest negative log-likelihood on labelled data, which is convex in it."""
    kind, loss = posterior.likelihood.kind, posterior.likelihood.loss
    batches = [(_logits(posterior.predict(x), kind), y) for x, y in batch_data.batches(validation)]

    def slope(s: float) -> float:
        """d/ds of the loss, turned around: it falls where s is too large."""
        return -sum((loss.gradient(s * z, y) * z).sum().item() for z, y in batches)

    return _crossing(slope)


def _crossing(falling: Callable[[float], float]) -> float:
    """Where a function of s, positive below and negative above, crosses zero."""
    low, high = LOWEST, HIGHEST
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low * high) ** 0.5


def _logits(p: Tensor, kind: str) -> Tensor:
    tiny = torch.finfo(p.dtype).tiny
    logarithm = p.clamp(min=tiny).log()
    return logarithm if kind == "categorical" else logarithm - (1 - p).clamp(min=tiny).log()


def _probabilities(z: Tensor, kind: str) -> Tensor:
    return z.softmax(1) if kind == "categorical" else z.sigmoid()


def _entropy(z: Tensor, kind: str) -> Tensor:
    """Of the probabilities with these logits, for each sample (and position)."""
    if kind == "categorical":
        return torch.special.entr(z.softmax(1)).sum(1)
    p = z.sigmoid()
    return torch.special.entr(p) + torch.special.entr(1 - p)
