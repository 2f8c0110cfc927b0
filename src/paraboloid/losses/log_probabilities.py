"""Losses of log-probabilities: linear in the output, so that the curvature lies in the LogSoftmax in front of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paraboloid.losses.cross_entropy import CrossEntropy, class_indices
from paraboloid.losses.loss import FROM_TORCH, Loss, check_lengths, check_reduction, full


class NLL(CrossEntropy):
    """`torch.nn.NLLLoss` of log-probabilities f [N, C, ...]: class indices, class weights, ignore_index.

    l = -w_y f_y is linear in f, so its Hessian is zero.  The curvature is the Fisher information of the labels instead,
    W diag(exp f): pulled back through the LogSoftmax that made f, it is cross-entropy's GGN of the logits.
    Raises ValueError for outputs that are no log-probabilities.
    """

    exact_root = False

    def __init__(self, weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean"):
        super().__init__(weight, ignore_index, 0.0, reduction)

    def value(self, f, y):
        reduction = "sum" if self.reduction == "batchmean" else self.reduction
        value = F.nll_loss(f, class_indices(y), self._weight(f), ignore_index=self.ignore_index, reduction=reduction)
        return value / len(f) if self.reduction == "batchmean" else value

    def sample_losses(self, f, y):
        losses = F.nll_loss(f, class_indices(y), self._weight(f), ignore_index=self.ignore_index, reduction="none")
        return losses.flatten(1).sum(1) if losses.dim() > 1 else losses

    def gradient(self, f, y):
        return -self._weighted_targets(full(f), y)

    def hessian_product(self, f, y, u):
        return torch.zeros_like(u, dtype=full(f).dtype)

    def curvature_product(self, f, y, u):
        f = full(f)
        return self._mass(f, y) * f.exp() * u

    def root_columns(self, f):
        return f[0].numel()

    def hessian_root(self, f, y):
        f = full(f)
        return _columns((self._mass(f, y) * f.exp()).sqrt())

    def sampled_gradients(self, f, y, samples, generator):
        f = full(f)
        p, scale = f.softmax(1).movedim(1, -1).reshape(-1, f.shape[1]), (self._mass(f, y) / samples).sqrt()
        for _ in range(samples):
            label = torch.multinomial(p, 1, generator=generator).view(len(f), 1, *f.shape[2:])
            yield -scale * torch.zeros_like(f).scatter_(1, label, 1.0)

    def check(self, f, y):
        super().check(f, y)
        if y.is_floating_point():
            raise ValueError(f"NLL needs int64 class indices; found {y.dtype} of shape {tuple(y.shape)}.")
        check_normalised(self, f, 1)


class KLDiv(Loss):
    """`torch.nn.KLDivLoss` of log-probabilities f and targets of the same shape (logarithms with `log_target`).

    l = sum y (log y - f), so the Hessian is zero; the curvature is the Fisher information, as in `NLL`:
    diag(exp f) times the targets' sum, along axis 1.
    """

    def __init__(self, log_target: bool = False, reduction: str = "mean"):
        self.log_target = log_target
        self.reduction = check_reduction(reduction)

    def sample_losses(self, f, y):
        losses = F.kl_div(f, y.to(f), reduction="none", log_target=self.log_target)
        return losses.reshape(len(f), -1).sum(1)

    def normalizer(self, f, y):
        return {"sum": 1.0, "mean": float(f.numel()), "batchmean": float(len(f))}[self.reduction]

    def predictive(self, f: Tensor) -> Tensor:
        """The probabilities [N, C, ...] that an output, possibly a linearised one, stands for."""
        return f.softmax(1)

    def _targets(self, f: Tensor, y: Tensor) -> Tensor:
        return y.to(f).exp() if self.log_target else y.to(f)

    def gradient(self, f, y):
        return -self._targets(full(f), y)

    def hessian_product(self, f, y, u):
        return torch.zeros_like(u, dtype=full(f).dtype)

    def _curvature(self, f: Tensor, y: Tensor) -> Tensor:
        return self._targets(f, y).sum(1, keepdim=True) * f.exp()

    def curvature_product(self, f, y, u):
        return self._curvature(full(f), y) * u

    def hessian_root(self, f, y):
        return _columns(self._curvature(full(f), y).sqrt())

    def sampled_gradients(self, f, y, samples, generator):
        f = full(f)
        scale = (self._targets(f, y).sum(1, keepdim=True) / samples).sqrt()
        p = f.softmax(1).movedim(1, -1).reshape(-1, f.shape[1])
        for _ in range(samples):
            label = torch.multinomial(p, 1, generator=generator).view(len(f), 1, *f.shape[2:])
            yield -scale * torch.zeros_like(f).scatter_(1, label, 1.0)

    def check(self, f, y):
        check_lengths(f, y)
        if f.dim() < 2 or f.shape != y.shape or not y.is_floating_point():
            raise ValueError(f"KLDiv needs outputs [N, classes, ...] and floating-point targets of their shape; found "
                             f"{tuple(f.shape)} and {tuple(y.shape)} of {y.dtype}.")  # fmt: skip
        if not self.log_target and (y < 0).any():
            raise ValueError(f"KLDiv targets are probabilities; found {y.min():.4g}, expected none below zero.")
        check_normalised(self, f, 1)


def _columns(root: Tensor):
    """The diagonal root [N, ...], one column for each element of a sample."""
    flat = root.reshape(len(root), -1)
    for j in range(flat.shape[1]):
        column = torch.zeros_like(flat)
        column[:, j] = flat[:, j]
        yield column.view_as(root)


@torch.no_grad()
def check_normalised(loss: Loss, f: Tensor, axis: int) -> None:
    """Raise ValueError where f does not hold log-probabilities along an axis."""
    total = full(f).logsumexp(axis)
    worst = float(total.abs().max())
    if not worst < 1e3 * torch.finfo(f.dtype).eps ** 0.5:
        raise ValueError(
            f"{type(loss).__name__} takes log-probabilities, whose exponentials add up to one along axis {axis}; found "
            f"sums up to exp({float(total.max()):.4g}). End the model with nn.LogSoftmax(dim={axis}), or give logits "
            "to nn.CrossEntropyLoss."
        )


FROM_TORCH[nn.NLLLoss] = lambda m: NLL(m.weight, m.ignore_index, m.reduction)
FROM_TORCH[nn.KLDivLoss] = lambda m: KLDiv(m.log_target, m.reduction)
