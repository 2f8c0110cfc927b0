"""What a loss is, and the algebra of losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

REDUCTIONS = ("mean", "sum", "batchmean")
FROM_TORCH: dict[type[nn.Module], Callable[[Any], Loss]] = {}  # torch class -> the Loss of such a module


class NoTargets(ValueError):
    """Every target of a batch is ignored: its mean is 0/0, though it adds nothing to the sum over several batches."""


class Loss:
    """A loss that is convex in the output and separates over samples (axis 0 of the output).

    A subclass gives `sample_losses`; what else it gives replaces the general form here, which asks autograd.  With
    ``loss(f, y)``, the differentiable reduced value, a `Loss` trains a model as a torch loss does; ``2 * loss`` and
    ``loss + other`` are losses too.
    """

    reduction: str = "mean"  # "sum" divides by nothing however many batches there are; else normalizers add up

    def __call__(self, f: Tensor, y: Tensor) -> Tensor:
        return self.value(f, y)

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """The loss as reduced, a differentiable scalar."""
        return self.sample_losses(f, y).sum() / self.normalizer(f, y)

    def sample_losses(self, f: Tensor, y: Tensor) -> Tensor:
        """Unreduced loss of each sample, [N]: the sum of its elements, ignored elements counting zero."""
        raise NotImplementedError

    def normalizer(self, f: Tensor, y: Tensor) -> float:
        """What the reduction divides the summed loss by: 1 for "sum", else a number that adds up over batches.

        The number of samples, unless a subclass counts otherwise.
        """
        return 1.0 if self.reduction == "sum" else float(len(f))

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """Gradient of sum_n l_n in the output, shape of f."""
        with torch.enable_grad():
            f = full(f).requires_grad_()
            return torch.autograd.grad(self.sample_losses(f, y).sum(), f)[0]

    def hessian_product(self, f: Tensor, y: Tensor, u: Tensor) -> Tensor:
        """H u for the output-Hessian H of sum_n l_n; u has the shape of f, with any leading axes."""
        with torch.enable_grad():
            f = full(f).requires_grad_()
            (g,) = torch.autograd.grad(self.sample_losses(f, y).sum(), f, create_graph=True)
            if not g.requires_grad:  # linear in f
                return torch.zeros_like(u, dtype=f.dtype)
            columns = u.to(f.dtype).reshape(-1, *f.shape)
            products = [torch.autograd.grad(g, f, c, retain_graph=True, materialize_grads=True)[0] for c in columns]
        return torch.stack(products).view(u.shape)

    def root_columns(self, f: Tensor) -> int:
        """Number of vectors that `hessian_root` yields."""
        return f[0].numel()

    def hessian_root(self, f: Tensor, y: Tensor) -> Iterator[Tensor]:
        """Vectors s_v of f's shape with sum_v s_v[n] s_v[n]^T = H_n exactly, for every sample n."""
        f = full(f)
        units = torch.eye(f[0].numel(), dtype=f.dtype, device=f.device).view(-1, 1, *f.shape[1:]).expand(-1, *f.shape)
        hessians = self.hessian_product(f, y, units).reshape(len(units), len(f), -1).transpose(0, 1)  # [N, C, C]
        values, vectors = torch.linalg.eigh(hessians)
        if (values < -1e-6 * values.abs().max()).any():
            raise ValueError(f"the output-Hessian has the eigenvalue {values.min():.4g}; expected a loss that is "
                             "convex in the output, which alone has a real root.")  # fmt: skip
        root = vectors * values.clamp(min=0).sqrt().unsqueeze(1)
        return iter(root.permute(2, 0, 1).reshape(-1, *f.shape))

    def sampled_gradients(self, f: Tensor, y: Tensor, samples: int, generator: torch.Generator) -> Iterator[Tensor]:
        """`samples` random vectors of f's shape with E[sum_v s_v[n] s_v[n]^T] = H_n: output gradients at labels drawn
        from the model's own predictive distribution, divided by sqrt(samples) (Monte Carlo Fisher)."""
        raise NotImplementedError(
            f"{type(self).__name__} does not say how to draw labels from the model's predictive distribution; expected "
            "a `sampled_gradients` method. Use a quantity that takes the exact output-Hessian instead."
        )

    def check(self, f: Tensor, y: Tensor) -> None:
        """Raise ValueError where output and target do not fit this loss."""
        check_lengths(f, y)

    def __mul__(self, scale: float) -> Loss:
        return Scaled(self, float(scale))

    __rmul__ = __mul__

    def __add__(self, other: Loss) -> Loss:
        return Sum(self, other) if isinstance(other, Loss) else NotImplemented

    @staticmethod
    def from_torch(module: object) -> Loss:
        """The `Loss` that equals a torch loss module, with all its options; a `Loss` is returned as it is.

        Raises ValueError for ``reduction="none"`` and TypeError for anything without a known output-Hessian.
        """
        if isinstance(module, Loss):
            return module
        for torch_class, build in FROM_TORCH.items():
            if isinstance(module, torch_class) and type(module).forward is torch_class.forward:
                return build(module)
        raise TypeError(
            f"the loss {_name(module)} is not one that paraboloid knows; expected one of "
            f"{[c.__name__ for c in FROM_TORCH]} or a pb.Loss. Subclass pb.Loss to add your own."
        )


def _name(thing: object) -> str:
    return getattr(thing, "__name__", None) or type(thing).__name__


def check_reduction(reduction: str) -> str:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; expected one of {REDUCTIONS} (per-sample values come from "
                         "pb.statistics, not from reduction='none').")  # fmt: skip
    return reduction


def check_lengths(f: Tensor, y: Tensor) -> None:
    if f.dim() == 0 or len(f) == 0:
        raise ValueError(f"the model's output has shape {tuple(f.shape)}; expected axis 0 to be the N >= 1 samples.")
    if y.dim() == 0 or len(y) != len(f):
        raise ValueError(f"the output has {len(f)} samples but the targets have shape {tuple(y.shape)}; expected the "
                         "same length along axis 0.")  # fmt: skip
    if y.device != f.device:
        raise ValueError(f"the output is on {f.device} but the targets are on {y.device}; move the batch to the model.")


def full(f: Tensor) -> Tensor:
    """Detached output in at least float32: softmax and sums of a half-precision output are taken in float32."""
    f = f.detach()
    return f.float() if f.dtype in (torch.float16, torch.bfloat16) else f


class Scaled(Loss):
    """scale * loss: the unreduced loss is scaled, the normalizer is the loss's own."""

    def __init__(self, loss: Loss, scale: float):
        if not scale > 0:
            raise ValueError(f"a loss is multiplied by {scale}; expected a positive number, so that it stays convex.")
        self.loss, self.scale, self.reduction = loss, scale, loss.reduction

    def sample_losses(self, f, y):
        return self.scale * self.loss.sample_losses(f, y)

    def normalizer(self, f, y):
        return self.loss.normalizer(f, y)

    def gradient(self, f, y):
        return self.scale * self.loss.gradient(f, y)

    def hessian_product(self, f, y, u):
        return self.scale * self.loss.hessian_product(f, y, u)

    def root_columns(self, f):
        return self.loss.root_columns(f)

    def hessian_root(self, f, y):
        return (self.scale**0.5 * s for s in self.loss.hessian_root(f, y))

    def sampled_gradients(self, f, y, samples, generator):
        return (self.scale**0.5 * s for s in self.loss.sampled_gradients(f, y, samples, generator))

    def check(self, f, y):
        self.loss.check(f, y)


class Sum(Loss):
    """loss + other, on the same output and target; both must be normalized alike, so that one factor a exists."""

    def __init__(self, *losses: Loss):
        if len({loss.reduction == "sum" for loss in losses}) > 1:
            raise ValueError(f"the summed losses have the reductions {[loss.reduction for loss in losses]}; expected "
                             "all of them to be 'sum' or none.")  # fmt: skip
        self.losses, self.reduction = losses, losses[0].reduction

    def sample_losses(self, f, y):
        return sum(loss.sample_losses(f, y) for loss in self.losses)

    def normalizer(self, f, y):
        values = [loss.normalizer(f, y) for loss in self.losses]
        if any(v != values[0] for v in values):
            raise ValueError(f"the summed losses divide by different numbers {values}; give them the same reduction, "
                             "for example reduction='batchmean'.")  # fmt: skip
        return values[0]

    def gradient(self, f, y):
        return sum(loss.gradient(f, y) for loss in self.losses)

    def hessian_product(self, f, y, u):
        return sum(loss.hessian_product(f, y, u) for loss in self.losses)

    def root_columns(self, f):
        return sum(loss.root_columns(f) for loss in self.losses)

    def hessian_root(self, f, y):
        for loss in self.losses:
            yield from loss.hessian_root(f, y)

    def sampled_gradients(self, f, y, samples, generator):
        """Each vector is a sum with random signs over the losses: cross terms vanish in expectation."""
        streams = [loss.sampled_gradients(f, y, samples, generator) for loss in self.losses]
        for parts in zip(*streams, strict=True):
            signs = torch.randint(2, (len(parts),), generator=generator, device=f.device).mul(2).sub(1)
            yield sum(sign * part for sign, part in zip(signs, parts, strict=True))

    def check(self, f, y):
        for loss in self.losses:
            loss.check(f, y)
