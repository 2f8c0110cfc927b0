"""Multiples and sums of losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from paraboloid.losses.loss import Loss


class Scaled(Loss):
    """scale * loss: the unreduced loss is scaled, the normalizer is the loss's own unless another one is given."""

    def __init__(self, loss: Loss, scale: float, normalizer: float | None = None):
        if not scale > 0:
            raise ValueError(f"a loss is multiplied by {scale}; expected a positive number, so that it stays convex.")
        self.loss, self.scale, self.divisor = loss, scale, normalizer
        self.reduction = loss.reduction if normalizer is None else "sum"
        self.exact_root = loss.exact_root

    @property
    def terms(self):
        own = self.loss.terms
        return [self] if len(own) == 1 else [Scaled(term, self.scale) for term in own]

    def sample_losses(self, f, y):
        return self.scale * self.loss.sample_losses(f, y)

    def normalizer(self, f, y):
        return self.loss.normalizer(f, y) if self.divisor is None else self.divisor

    def gradient(self, f, y):
        return self.scale * self.loss.gradient(f, y)

    def hessian_product(self, f, y, u):
        return self.scale * self.loss.hessian_product(f, y, u)

    def curvature_product(self, f, y, u):
        return self.scale * self.loss.curvature_product(f, y, u)

    def root_columns(self, f):
        return self.loss.root_columns(f)

    def hessian_root(self, f, y):
        return (self.scale**0.5 * s for s in self.loss.hessian_root(f, y))

    def sampled_gradients(self, f, y, samples, generator):
        return (self.scale**0.5 * s for s in self.loss.sampled_gradients(f, y, samples, generator))

    def check(self, f, y):
        self.loss.check(f, y)


class Sum(Loss):
    """loss + other, on the same output and target; each term keeps the factor of its own reduction.

    Where all terms divide by the same number m, the unreduced loss is the sum of theirs and its normalizer is m.  Where
    they differ (cross-entropy's mean over N targets, squared error's over N C elements, a "sum" over nothing), the
    loss counts as a mean over the N samples: l_n = N sum_i l_{i,n} / m_i and its normalizer is N, so that the mean of
    l_n is the loss as reduced.

    `unit` is what l_n is divided by in a sum that has been settled for several batches: their l_n is `unit` times this.
    """

    unit = 1.0

    def __init__(self, *losses: Loss):
        self.losses = [term for loss in losses for term in loss.terms]
        self.exact_root = all(loss.exact_root for loss in self.losses)
        kinds = {loss.reduction for loss in self.losses}
        self.reduction = kinds.pop() if len(kinds) == 1 else "mixed"

    @property
    def terms(self):
        return self.losses

    def weights(self, f, y) -> list[float]:
        """What each term's unreduced loss is multiplied by in this one's: [1, 1, ...], or N / m_i where they differ."""
        each = [loss.normalizer(f, y) for loss in self.losses]
        return [1.0] * len(each) if len(set(each)) == 1 else [len(f) / m for m in each]

    def normalizer(self, f, y):
        each = {loss.normalizer(f, y) for loss in self.losses}
        return each.pop() if len(each) == 1 else float(len(f))

    def _combined(self, f, y, method: str, *args) -> Any:
        weighted = zip(self.weights(f, y), self.losses, strict=True)
        return sum(w * getattr(loss, method)(f, y, *args) for w, loss in weighted)

    def sample_losses(self, f, y):
        return self._combined(f, y, "sample_losses")

    def gradient(self, f, y):
        return self._combined(f, y, "gradient")

    def hessian_product(self, f, y, u):
        return self._combined(f, y, "hessian_product", u)

    def curvature_product(self, f, y, u):
        return self._combined(f, y, "curvature_product", u)

    def root_columns(self, f):
        return sum(loss.root_columns(f) for loss in self.losses)

    def hessian_root(self, f, y):
        for w, loss in zip(self.weights(f, y), self.losses, strict=True):
            for s in loss.hessian_root(f, y):
                yield s if w == 1 else w**0.5 * s

    def sampled_gradients(self, f, y, samples, generator):
        """Each vector is a sum with random signs over the terms: cross terms vanish in expectation."""
        roots = [w**0.5 for w in self.weights(f, y)]
        streams = [loss.sampled_gradients(f, y, samples, generator) for loss in self.losses]
        for parts in zip(*streams, strict=True):
            signs = torch.randint(2, (len(parts),), generator=generator, device=f.device).mul(2).sub(1)
            yield sum(sign * root * part for sign, root, part in zip(signs, roots, parts, strict=True))

    def check(self, f, y):
        for loss in self.losses:
            loss.check(f, y)


def settled(loss: Loss, normalizers: Sequence[float], samples: int) -> Sum:
    """The terms of a loss divided by given numbers (their totals over several batches), with the factor one."""
    result = Sum(*(Scaled(t, 1 / m, normalizer=1.0) for t, m in zip(loss.terms, normalizers, strict=True)))
    result.unit = normalizers[0] if len(set(normalizers)) == 1 else float(samples)
    return result
