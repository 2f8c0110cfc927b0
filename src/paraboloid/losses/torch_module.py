"""Other loss modules of torch, known by the losses of the elements that they sum: curvature by autograd."""

from __future__ import annotations

import copy

import torch
from torch import nn

from paraboloid.losses.elementwise import Elementwise
from paraboloid.losses.loss import FROM_TORCH, Loss, check_lengths, check_reduction, full


class TorchLoss(Loss):
    """A torch loss module `m(f, y)` whose unreduced losses have the samples on axis 0.

    Its "mean" divides by the number of unreduced losses.  Where the loss is not smooth, derivatives are autograd's.
    It says nothing of a predictive distribution: quantities that sample labels raise NotImplementedError.
    """

    def __init__(self, module: nn.Module):
        self.reduction = check_reduction(str(module.reduction))
        self.module = copy.copy(module)
        self.module.__dict__["reduction"] = "none"

    def _unreduced(self, f, y):
        return type(self.module).forward(self.module, f, y)  # without the hooks that the module may carry

    def sample_losses(self, f, y):
        return self._unreduced(f, y).reshape(len(f), -1).sum(1)

    def normalizer(self, f, y):
        if self.reduction == "mean":
            return float(self._unreduced(f.detach(), y).numel())
        return 1.0 if self.reduction == "sum" else float(len(f))


class TorchElementwise(TorchLoss, Elementwise):
    """A torch loss of each element apart, convex in the output: the Hessian is a diagonal."""

    def _unreduced(self, f, y):
        return super()._unreduced(f, y.to(f))  # outputs in half precision are measured in float32

    def normalizer(self, f, y):
        return Elementwise.normalizer(self, f, y)

    def _curvature(self, f, y):
        with torch.enable_grad():
            f = full(f).requires_grad_()
            (g,) = torch.autograd.grad(self._unreduced(f, y).sum(), f, create_graph=True)
            if not g.requires_grad:
                return torch.zeros_like(g)
            (d,) = torch.autograd.grad(g.sum(), f)
        return d.clamp(min=0)

    def check(self, f, y):
        check_lengths(f, y)
        Elementwise.check(self, f, y)


class PiecewiseLinear(TorchElementwise):
    """A torch loss whose second derivative is zero wherever it exists: first-order quantities and the Hessian of the
    network; what is made of a root of the output-Hessian would be zero, and raises NotImplementedError."""

    def curvature_product(self, f, y, u):
        raise NotImplementedError(self._flat)

    def hessian_root(self, f, y):
        raise NotImplementedError(self._flat)

    @property
    def _flat(self) -> str:
        return (
            f"{type(self.module).__name__} is piecewise linear, so that its curvature in the output is zero, and the "
            "generalised Gauss-Newton matrix too. Use nn.HuberLoss or nn.SmoothL1Loss, or a quantity of the first "
            "order; the exact Hessian (pb.Hessian, 'diag_hessian') works."
        )


FROM_TORCH |= dict.fromkeys((nn.SmoothL1Loss, nn.HuberLoss, nn.SoftMarginLoss), TorchElementwise)
FROM_TORCH |= dict.fromkeys((nn.L1Loss,), PiecewiseLinear)
FROM_TORCH |= dict.fromkeys((nn.MultiLabelSoftMarginLoss,), TorchLoss)
