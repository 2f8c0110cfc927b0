"""A callable known only by its value: enough for matrix-free operators on whole batches."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from paraboloid.losses.loss import Loss


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

    def check(self, f, y):
        pass


_COUPLED = (
    "the loss is a plain callable, whose output-Hessian may couple samples, so it has no root per sample; use a torch "
    "loss module or subclass pb.Loss."
)
