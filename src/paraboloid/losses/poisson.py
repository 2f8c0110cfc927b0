"""Counts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from paraboloid.losses.elementwise import Elementwise
from paraboloid.losses.loss import FROM_TORCH, check_lengths, check_reduction, full


class PoissonNLL(Elementwise):
    """`torch.nn.PoissonNLLLoss`: counts y >= 0 of the output's shape, of any real or integer type.

    The output is the logarithm of the rate (log_input=True): l = exp(f) - y f and H = diag(exp f), the Fisher
    information too.  Or it is the rate itself: l = f - y log(f + eps) and H = diag(y / (f + eps)^2), which depends on
    the counts and is *not* the Fisher information; the curvature is H all the same, and sampled vectors estimate it
    with random signs on its root instead of labels.  `full` adds Stirling's term, a constant.
    """

    exact_root = True

    def __init__(self, log_input: bool = True, full: bool = False, eps: float = 1e-8, reduction: str = "mean"):
        self.log_input, self.full, self.eps = log_input, full, eps
        self.reduction = check_reduction(reduction)

    def sample_losses(self, f, y):
        losses = F.poisson_nll_loss(
            f, y.to(f), log_input=self.log_input, full=self.full, eps=self.eps, reduction="none"
        )  # fmt: skip
        return losses.reshape(len(f), -1).sum(1)

    def gradient(self, f, y):
        f = full(f)
        return f.exp() - y if self.log_input else 1 - y / (f + self.eps)

    def _curvature(self, f, y):
        return f.exp() if self.log_input else y.to(f) / (f + self.eps).square()

    def sampled_gradients(self, f, y, samples, generator):
        f = full(f)
        rate = f.exp()
        for _ in range(samples):
            if self.log_input:
                drawn = rate - torch.poisson(rate, generator=generator)
            else:
                signs = torch.randint(2, f.shape, generator=generator, device=f.device).mul(2).sub(1)
                drawn = signs * self._curvature(f, y).sqrt()
            yield drawn / samples**0.5

    def check(self, f, y):
        check_lengths(f, y)
        if f.shape != y.shape or y.is_complex() or y.dtype == torch.bool:
            raise ValueError(f"PoissonNLL needs counts of the output's shape {tuple(f.shape)}; found {tuple(y.shape)} "
                             f"of {y.dtype}.")  # fmt: skip
        if (y < 0).any():
            raise ValueError(f"PoissonNLL needs counts >= 0; found {y.min():.4g}.")
        if not self.log_input and (f + self.eps <= 0).any():
            raise ValueError(f"PoissonNLL(log_input=False) needs positive rates; found the output {f.min():.4g}. Add a "
                             "softplus or exp to the model, or let it return the log rate.")  # fmt: skip


FROM_TORCH[nn.PoissonNLLLoss] = lambda m: PoissonNLL(m.log_input, m.full, m.eps, m.reduction)
