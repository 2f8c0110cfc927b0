"""Losses whose Hessian is diagonal in the elements of the output."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paraboloid.losses.guarded_logarithm import inverse, logarithm
from paraboloid.losses.leading_root import LeadingRoot, largest
from paraboloid.losses.loss import FROM_TORCH, Loss, check_lengths, check_not_negative, check_reduction, full


class Elementwise(Loss):
    """Losses whose curvature is diagonal in the output elements: one root column per element of a sample."""

    def _curvature(self, f: Tensor, y: Tensor) -> Tensor:
        """Diagonal of the curvature of the unreduced loss, shape of f; nowhere negative."""
        raise NotImplementedError

    def normalizer(self, f, y):
        return {"sum": 1.0, "mean": float(f.numel()), "batchmean": float(len(f))}[self.reduction]

    def hessian_product(self, f, y, u):
        return self._curvature(full(f), y) * u

    def curvature_product(self, f, y, u):
        return self._curvature(full(f), y) * u

    def root_columns(self, f):
        return f[0].numel()

    def hessian_root(self, f, y):
        return columns_of(self._curvature(full(f), y).sqrt())

    def leading_root(self, f, y, tol):
        if type(self).hessian_root not in (Elementwise.hessian_root, BCE.hessian_root):
            return super().leading_root(f, y, tol)
        squares = self._curvature(full(f), y).reshape(len(f), -1)
        order, root = largest(squares, tol), squares.sqrt()

        def columns():
            for place in order.kept.T.unsqueeze(2):
                yield torch.zeros_like(root).scatter_(1, place, root.gather(1, place)).view_as(f)

        def column(n, place):
            value = root[n, place].unsqueeze(1)
            return value.new_zeros(len(n), root.shape[1]).scatter_(1, place.unsqueeze(1), value).view(-1, *f.shape[1:])

        own = order.own(lambda n: partial(column, n))
        return LeadingRoot(columns(), order.count, order.left, order.total, own)

    def check(self, f, y):
        check_lengths(f, y)
        if f.shape != y.shape:
            raise ValueError(f"{type(self).__name__} needs targets of the output's shape {tuple(f.shape)}; found "
                             f"{tuple(y.shape)}.")  # fmt: skip
        if not y.is_floating_point():
            raise ValueError(f"{type(self).__name__} needs floating-point targets; found {y.dtype}.")


def columns_of(root: Tensor) -> Iterator[Tensor]:
    """One vector of root's shape for each element of a sample, zero elsewhere."""
    flat = root.reshape(len(root), -1)
    for j in range(flat.shape[1]):
        column = torch.zeros_like(flat)
        column[:, j] = flat[:, j]
        yield column.view_as(root)


class MSE(Elementwise):
    """`torch.nn.MSELoss`: l_n = ||f_n - y_n||^2, H = 2 I.  Sampled labels are those of N(f, I / 2)."""

    exact_root = True

    def __init__(self, reduction: str = "mean"):
        self.reduction = check_reduction(reduction)

    def sample_losses(self, f, y):
        return (f - y).square().reshape(len(f), -1).sum(1)

    def gradient(self, f, y):
        return 2 * (full(f) - y)

    def _curvature(self, f, y):
        return torch.full_like(f, 2.0)

    def sampled_gradients(self, f, y, samples, generator):
        f = full(f)
        for _ in range(samples):
            noise = torch.randn(f.shape, generator=generator, dtype=f.dtype, device=f.device)
            yield (2 / samples) ** 0.5 * noise


class BCEWithLogits(Elementwise):
    """`torch.nn.BCEWithLogitsLoss`, soft labels, `weight` and `pos_weight` included.

    With c = weight (pos_weight y + 1 - y), H = diag(c sigmoid(f) (1 - sigmoid(f))).
    """

    exact_root = True

    def __init__(self, weight: Tensor | None = None, pos_weight: Tensor | None = None, reduction: str = "mean"):
        self.weight, self.pos_weight = weight, pos_weight
        self.reduction = check_reduction(reduction)

    def _options(self, f: Tensor) -> dict[str, Tensor | None]:
        return {
            k: None if t is None else t.to(f) for k, t in (("weight", self.weight), ("pos_weight", self.pos_weight))
        }

    def _mass(self, f: Tensor, y: Tensor) -> Tensor:
        o = self._options(f)
        mass = torch.ones_like(f) if o["pos_weight"] is None else 1 + (o["pos_weight"] - 1) * y
        return mass if o["weight"] is None else mass * o["weight"]

    def sample_losses(self, f, y):
        o = self._options(f)
        losses = F.binary_cross_entropy_with_logits(
            f, y.to(f), o["weight"], pos_weight=o["pos_weight"], reduction="none"
        )
        return losses.reshape(len(f), -1).sum(1)

    def gradient(self, f, y):
        f, y = full(f), y.to(full(f))
        o = self._options(f)
        positive = y if o["pos_weight"] is None else o["pos_weight"] * y
        gradient = (positive + 1 - y) * f.sigmoid() - positive
        return gradient if o["weight"] is None else gradient * o["weight"]

    def _curvature(self, f, y):
        return self._mass(f, y.to(f)) * f.sigmoid() * (-f).sigmoid()  # 1 - p has no digits where p rounds to 1

    def sampled_gradients(self, f, y, samples, generator):
        f = full(f)
        p, scale = f.sigmoid(), (self._mass(f, y.to(f)) / samples).sqrt()
        for _ in range(samples):
            yield scale * (p - torch.bernoulli(p, generator=generator))

    def check(self, f, y):
        super().check(f, y)
        if ((y < 0) | (y > 1)).any():
            raise ValueError(f"BCEWithLogits needs targets in [0, 1]; found {y.min():.4g} to {y.max():.4g}.")
        check_not_negative(weight=self.weight, pos_weight=self.pos_weight)


class BCE(Elementwise):
    """`torch.nn.BCELoss` of probabilities f in [0, 1]: l = -weight (y log f + (1 - y) log(1 - f)), logarithms not below
    -100, and H = diag(weight (y / f^2 + (1 - y) / (1 - f)^2)).

    Written out because torch's own second derivative has the wrong sign near 0 and 1 (from a logit of 14 on, in
    torch 2.13).  Sampled labels are drawn from f.
    """

    exact_root = True

    def __init__(self, weight: Tensor | None = None, reduction: str = "mean"):
        self.weight = weight
        self.reduction = check_reduction(reduction)

    def value(self, f, y):
        value = F.binary_cross_entropy(f, y.to(f), self._weight(f), reduction="sum")
        return value / self.normalizer(f, y)

    def _weight(self, f: Tensor) -> Tensor | None:
        return None if self.weight is None else self.weight.to(f)

    def _weighted(self, t: Tensor, f: Tensor) -> Tensor:
        weight = self._weight(f)
        return t if weight is None else t * weight

    def sample_losses(self, f, y):
        y = y.to(f)
        losses = -(y * logarithm(f) + (1 - y) * logarithm(1 - f))
        return self._weighted(losses, f).reshape(len(f), -1).sum(1)

    def gradient(self, f, y):
        f = full(f)
        return self._weighted((f - y) / (f * (1 - f)).clamp(min=1e-12), f)  # as torch guards it, from a logit of 27 on

    def exact_gradient(self, f, y):
        f, y = full(f), y.to(full(f))
        return self._weighted((1 - y) * inverse(1 - f) - y * inverse(f), f)

    def _root(self, f: Tensor, y: Tensor) -> Tensor:
        """Square root of the Hessian's diagonal, whose square may exceed what the type holds."""
        y, weight = y.to(f), self._weight(f)
        root = torch.hypot(y.sqrt() * inverse(f), (1 - y).sqrt() * inverse(1 - f))
        return root if weight is None else weight.sqrt() * root

    def _curvature(self, f, y):
        return self._root(f, y).square()

    def hessian_product(self, f, y, u):
        root = self._root(full(f), y)
        return root * (root * u)

    def curvature_product(self, f, y, u):
        return self.hessian_product(f, y, u)

    def hessian_root(self, f, y):
        return columns_of(self._root(full(f), y))

    def predictive(self, f: Tensor) -> Tensor:
        """The probability that an output, possibly a linearised one, stands for."""
        return f.clamp(0, 1)

    def sampled_gradients(self, f, y, samples, generator):
        f = full(f)
        for _ in range(samples):
            drawn = torch.where(torch.bernoulli(f, generator=generator) > 0, -inverse(f), inverse(1 - f))
            scale = 1 / samples if self.weight is None else self.weight.to(f) / samples
            yield drawn * scale**0.5

    def check(self, f, y):
        super().check(f, y)
        for what, t in (("outputs", f), ("targets", y)):
            if ((t < 0) | (t > 1)).any():
                raise ValueError(f"BCE needs {what} in [0, 1]; found {t.min():.4g} to {t.max():.4g}. Logits belong to "
                                 "nn.BCEWithLogitsLoss.")  # fmt: skip
        check_not_negative(weight=self.weight)


FROM_TORCH[nn.BCELoss] = lambda m: BCE(m.weight, m.reduction)
FROM_TORCH[nn.MSELoss] = lambda m: MSE(m.reduction)
FROM_TORCH[nn.BCEWithLogitsLoss] = lambda m: BCEWithLogits(m.weight, m.pos_weight, m.reduction)
