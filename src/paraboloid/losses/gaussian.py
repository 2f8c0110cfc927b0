"""A Gaussian whose variance is learned, or given."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from paraboloid.losses.elementwise import Elementwise
from paraboloid.losses.loss import FROM_TORCH, check_lengths, check_reduction, full


class GaussianNLL(Elementwise):
    """Negative log-likelihood of N(mean, variance): l = sum (log v + (m - y)^2 / v) / 2 over the elements of a sample.

    `torch.nn.GaussianNLLLoss` takes the variance as a third argument.  Here it is one of these:

    learned (variance=None)  the model's output carries it behind the mean along axis 1: [N, 2 C, ...] for targets
                             [N, C, ...] (or [N, 2, ...] for targets [N, ...]), or [N, C + 1, ...] where the C elements
                             share it; ``torch.cat([mean, variance], 1)``.  With log_variance=True the output carries
                             its logarithm, which needs no softplus and is better conditioned
    given (a number or a tensor that broadcasts to the output)  the output is the mean

    As torch does, variances below `eps` count as `eps`, and their derivatives are those at `eps`; `full` adds the
    constant log(2 pi) / 2; a "mean" divides by the number of targets' elements.

    With a learned variance the exact Hessian is indefinite.  `hessian_product` is exact (pb.Hessian, diag_hessian); the
    curvature of everything Gauss-Newton is the Fisher information, the Hessian's mean over y ~ N(m, v):
    diag(1/v, 1/(2 v^2)) in (m, v), and diag(1/v, 1/2) in (m, log v); C times that in a shared variance.
    """

    def __init__(
        self,
        variance: float | Tensor | None = None,
        log_variance: bool = False,
        full: bool = False,
        eps: float = 1e-6,
        reduction: str = "mean",
    ):
        if variance is not None and not (torch.as_tensor(variance) > 0).all():
            raise ValueError(f"variance is {variance}; expected positive numbers, or None for a learned one.")
        self.variance, self.log_variance, self.full, self.eps = variance, log_variance, full, eps
        self.reduction = check_reduction(reduction)
        self.exact_root = variance is not None

    def _parts(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and targets, of shapes that broadcast to the mean's."""
        if self.variance is not None:
            v = torch.as_tensor(self.variance, dtype=f.dtype, device=f.device)
            return f, v, y.to(f)
        y = (y.unsqueeze(1) if y.dim() == f.dim() - 1 else y).to(f)
        m, v = f[:, : y.shape[1]], f[:, y.shape[1] :]
        v = v.exp() if self.log_variance else v
        return m, v + (v.clamp(min=self.eps) - v).detach(), y  # clamped in value, not in derivative

    def normalizer(self, f, y):
        return {"sum": 1.0, "mean": float(y.numel()), "batchmean": float(len(f))}[self.reduction]

    def sample_losses(self, f, y):
        m, v, y = self._parts(f, y)
        losses = (v.log() + (m - y).square() / v) / 2
        if self.full:
            losses = losses + math.log(2 * math.pi) / 2
        return losses.expand_as(m).reshape(len(f), -1).sum(1)

    def _join(self, along_mean: Tensor, along_variance: Tensor, v: Tensor) -> Tensor:
        """Two halves of an output-shaped tensor; the second is summed where the elements share one variance."""
        if along_variance.shape[1 - v.dim()] != v.shape[1]:
            along_variance = along_variance.sum(1 - v.dim(), keepdim=True)
        return torch.cat([along_mean, along_variance], 1 - v.dim())

    def gradient(self, f, y):
        m, v, y = self._parts(full(f), y)
        r = m - y
        if self.variance is not None:
            return r / v
        along_variance = 1 - r.square() / v if self.log_variance else (1 - r.square() / v) / v
        return self._join(r / v, along_variance / 2, v)

    def _curvature(self, f, y):
        m, v, _ = self._parts(f, y)
        if self.variance is not None:
            return (1 / v).expand_as(f)
        along_variance = torch.full_like(m, 0.5) if self.log_variance else (0.5 / v.square()).expand_as(m)
        return self._join((1 / v).expand_as(m), along_variance, v)

    def hessian_product(self, f, y, u):
        if self.variance is not None:
            return super().hessian_product(f, y, u)
        m, v, y = self._parts(full(f), y)
        r, size = m - y, m.shape[1]
        axis = 1 - f.dim()
        um, uv = u.narrow(axis, 0, size), u.narrow(axis, size, v.shape[1])
        if self.log_variance:
            mixed, second = -r / v, r.square() / (2 * v)
        else:
            mixed, second = -r / v.square(), r.square() / v**3 - 0.5 / v.square()
        return self._join(um / v + mixed * uv, mixed * um + second * uv, v)

    def sampled_gradients(self, f, y, samples, generator):
        f = full(f)
        m, v, _ = self._parts(f, y)
        for _ in range(samples):
            noise = torch.randn(m.shape, generator=generator, dtype=f.dtype, device=f.device)
            yield self.gradient(f, m + v.sqrt() * noise) / samples**0.5

    def check(self, f, y):
        check_lengths(f, y)
        if not y.is_floating_point():
            raise ValueError(f"GaussianNLL needs floating-point targets; found {y.dtype}.")
        if self.variance is not None:
            if f.shape != y.shape:
                raise ValueError(f"GaussianNLL with a given variance needs targets of the output's shape "
                                 f"{tuple(f.shape)}; found {tuple(y.shape)}.")  # fmt: skip
            shape = torch.as_tensor(self.variance).shape
            if len(shape) > f.dim() or any(a not in (1, b) for a, b in zip(shape[::-1], f.shape[::-1], strict=False)):
                raise ValueError(f"variance has shape {tuple(shape)}, which does not broadcast to the output "
                                 f"{tuple(f.shape)}; expected a number or such a shape.")  # fmt: skip
            return
        whole = tuple(y.shape[:1] + (y.shape[1:] if y.dim() == f.dim() else (1, *y.shape[1:])))
        fits = f.dim() > 1 and len(whole) == f.dim() and whole[2:] == tuple(f.shape[2:])
        if not fits or f.shape[1] not in (2 * whole[1], whole[1] + 1):
            raise ValueError("GaussianNLL with a learned variance needs outputs [N, 2 C, ...] (mean, then variance) "
                             f"or [N, C + 1, ...] for targets [N, C, ...]; found {tuple(f.shape)} for "
                             f"{tuple(y.shape)}. Give variance= where the output is the mean alone.")  # fmt: skip
        if not self.log_variance and (f[:, whole[1] :] < 0).any():
            raise ValueError(f"GaussianNLL found the variance {f[:, whole[1] :].min():.4g} behind the mean along axis "
                             "1; expected none below zero. Add a softplus or exp to the model, or use "
                             "pb.losses.GaussianNLL(log_variance=True).")  # fmt: skip


FROM_TORCH[nn.GaussianNLLLoss] = lambda m: GaussianNLL(full=m.full, eps=m.eps, reduction=m.reduction)
