"""A callable known only by its value: enough for matrix-free operators on whole batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paraboloid.losses.loss import Loss, full
from paraboloid.passes import trees


class Opaque(Loss):
    """Any differentiable ``fn(f, y) -> scalar`` as a loss whose samples may be coupled.

    The whole batch counts as one sample: `sample_losses` is [1], the factor is 1, the output-Hessian (by autograd) is
    that of the value itself and need not be positive semi-definite.  Several batches add up only if
    ``fn.reduction == "sum"``: nothing else tells how the value divides.
    """

    def __init__(self, fn: Callable[[Tensor, Tensor], Tensor]):
        if not callable(fn):
            raise TypeError(f"loss_fn is a {type(fn).__name__}; expected a torch loss module, a pb.Loss or a callable.")
        self.fn = fn
        self.reduction = "sum" if getattr(fn, "reduction", None) == "sum" else "whole"

    def sample_losses(self, f, y):
        value = self.fn(f, y)
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the loss returned {found}; expected a tensor with one element, the reduced loss.")
        return value.reshape(1)

    def normalizer(self, f, y):
        return 1.0

    def root_columns(self, f):
        raise NotImplementedError(_COUPLED)

    def hessian_root(self, f, y):
        raise NotImplementedError(_COUPLED)

    def sample_gradients(self, f: Tensor, y: Tensor) -> tuple[Tensor, float]:
        """The output gradient of each sample's own loss ``fn(f[n:n+1], y[n:n+1])``, of f's shape, and the factor a such
        that the value is a times the sum of those losses.

        Raises ValueError where the value is neither their sum nor their mean.
        """
        with torch.enable_grad():
            f = full(f).requires_grad_()
            losses = torch.cat([self.sample_losses(f[n : n + 1], _of_sample(y, n)) for n in range(len(f))])
            (gradients,) = torch.autograd.grad(losses.sum(), f)
            value = self.sample_losses(f, y)
        value, total, scale = (v.detach().item() for v in (value, losses.sum(), losses.abs().sum()))
        factor = 1.0 if abs(value - total) <= 1e-4 * scale else 1 / len(f)
        if abs(value - factor * total) > 1e-4 * factor * scale:
            raise ValueError(f"the loss is a plain callable that gives {value:.6g} for the batch and {total:.6g} as "
                             f"the sum over its {len(f)} samples; expected a sum or a mean over samples. Subclass "
                             "pb.Loss and give its sample_losses.")  # fmt: skip
        return gradients, factor

    def check(self, f, y):
        pass


def _of_sample(y: Any, n: int) -> Any:
    """The target of one sample, of a tensor or of several."""
    return trees.mapped(lambda t: t[n : n + 1], y)


_COUPLED = (
    "the loss is a plain callable, whose output-Hessian may couple samples, so it has no root per sample; use a torch "
    "loss module or subclass pb.Loss."
)
