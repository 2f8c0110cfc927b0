"""Losses: value, gradient and curvature in the model's output, for the loss per sample and as the user reduces it.

Every loss is a sum over samples of an *unreduced* loss l_n(f_n, y_n), divided by a normalizer:

    value = sum_n l_n / normalizer,        l_n = sum of sample n's elements under ``reduction="none"``.

`gradient`, `hessian_product`, `hessian_root` and `sampled_gradients` are those of the unreduced sum: multiply by
``1 / normalizer`` (the factor a) for the loss as reduced.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REDUCTIONS = ("mean", "sum", "batchmean")


class Loss:
    """A loss that is convex in the output and separates over samples (axis 0 of the output).

    Subclasses give `sample_losses`, `normalizer`, `gradient`, `hessian_product`, `hessian_root`, `root_columns`,
    `sampled_gradients` and `check`.  ``loss(f, y)`` is the reduced value, differentiable, so a `Loss` trains a model as
    a torch loss does; ``2 * loss`` and ``loss + other`` are losses too.
    """

    reduction: str = "mean"

    def __call__(self, f: Tensor, y: Tensor) -> Tensor:
        return self.value(f, y)

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """The loss as reduced, a differentiable scalar."""
        return self.sample_losses(f, y).sum() / self.normalizer(f, y)

    def sample_losses(self, f: Tensor, y: Tensor) -> Tensor:
        """Unreduced loss of each sample, [N]: the sum of its elements, ignored elements counting zero."""
        raise NotImplementedError

    def normalizer(self, f: Tensor, y: Tensor) -> float:
        """What the reduction divides the summed loss by (1 for a sum); adds up over batches."""
        raise NotImplementedError

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """Gradient of sum_n l_n in the output, shape of f."""
        raise NotImplementedError

    def hessian_product(self, f: Tensor, y: Tensor, u: Tensor) -> Tensor:
        """H u for the output-Hessian H of sum_n l_n; u has the shape of f, with any leading axes."""
        raise NotImplementedError

    def root_columns(self, f: Tensor) -> int:
        """Number of vectors that `hessian_root` yields."""
        raise NotImplementedError

    def hessian_root(self, f: Tensor, y: Tensor) -> Iterator[Tensor]:
        """Vectors s_v of f's shape with sum_v s_v[n] s_v[n]^T = H_n exactly, for every sample n."""
        raise NotImplementedError

    def sampled_gradients(self, f: Tensor, y: Tensor, samples: int, generator: torch.Generator) -> Iterator[Tensor]:
        """`samples` random vectors of f's shape with E[sum_v s_v[n] s_v[n]^T] = H_n: output gradients at labels drawn
        from the model's own predictive distribution, divided by sqrt(samples) (Monte Carlo Fisher)."""
        raise NotImplementedError

    def check(self, f: Tensor, y: Tensor) -> None:
        """Raise ValueError where output and target do not fit this loss."""
        raise NotImplementedError

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
        for torch_class, build in _FROM_TORCH.items():
            if isinstance(module, torch_class) and type(module).forward is torch_class.forward:
                return build(module)
        raise TypeError(
            f"the loss {_name(module)} has no known output-Hessian; expected one of "
            f"{[c.__name__ for c in _FROM_TORCH]} or a pb.Loss. Subclass pb.Loss to add your own."
        )


def _name(thing: object) -> str:
    return getattr(thing, "__name__", None) or type(thing).__name__


def _check_reduction(reduction: str) -> str:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; expected one of {REDUCTIONS} (per-sample values come from "
                         "pb.statistics, not from reduction='none').")  # fmt: skip
    return reduction


def _check_lengths(f: Tensor, y: Tensor) -> None:
    if f.dim() == 0 or len(f) == 0:
        raise ValueError(f"the model's output has shape {tuple(f.shape)}; expected axis 0 to be the N >= 1 samples.")
    if y.dim() == 0 or len(y) != len(f):
        raise ValueError(f"the output has {len(f)} samples but the targets have shape {tuple(y.shape)}; expected the "
                         "same length along axis 0.")  # fmt: skip
    if y.device != f.device:
        raise ValueError(f"the output is on {f.device} but the targets are on {y.device}; move the batch to the model.")


def _full(f: Tensor) -> Tensor:
    """Detached output in at least float32: softmax and sums of a half-precision output are taken in float32."""
    f = f.detach()
    return f.float() if f.dtype in (torch.float16, torch.bfloat16) else f


class CrossEntropy(Loss):
    """`torch.nn.CrossEntropyLoss`: class indices [N, ...] or probabilities [N, C, ...], outputs [N, C, ...].

    With q the (smoothed) target distribution and w the class weights, l = -sum_c q_c w_c log softmax(f)_c, the gradient
    is W softmax(f) - q w and the Hessian W (diag(p) - p p^T), where W = sum_c q_c w_c (0 where ignored).
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ):
        self.weight, self.ignore_index, self.label_smoothing = weight, ignore_index, label_smoothing
        self.reduction = _check_reduction(reduction)

    def _indices(self, f: Tensor, y: Tensor) -> bool:
        return not (y.is_floating_point() and y.shape == f.shape)

    def _weight(self, f: Tensor) -> Tensor | None:
        return None if self.weight is None else self.weight.to(f)

    def value(self, f, y):
        reduction = "sum" if self.reduction == "batchmean" else self.reduction
        value = F.cross_entropy(
            f, y, self._weight(f), ignore_index=self.ignore_index, reduction=reduction,
            label_smoothing=self.label_smoothing,
        )  # fmt: skip
        return value / len(f) if self.reduction == "batchmean" else value

    def sample_losses(self, f, y):
        losses = F.cross_entropy(
            f, y, self._weight(f), ignore_index=self.ignore_index, reduction="none",
            label_smoothing=self.label_smoothing,
        )  # fmt: skip
        return losses.flatten(1).sum(1) if losses.dim() > 1 else losses

    def normalizer(self, f, y):
        if self.reduction == "sum":
            return 1.0
        if self.reduction == "batchmean":
            return float(len(f))
        if not self._indices(f, y):
            return f.numel() / f.shape[1]
        kept = y[y != self.ignore_index]
        total = float(len(kept)) if self.weight is None else float(self.weight.to(y.device)[kept].sum())
        if total <= 0:
            raise ValueError(f"every target is ignored (ignore_index={self.ignore_index}) or has zero class weight, so "
                             "the mean loss is 0/0; leave such batches out or use reduction='sum'.")  # fmt: skip
        return total

    def _weighted_targets(self, f: Tensor, y: Tensor) -> Tensor:
        """q w, [N, C, ...]: the smoothed target distribution times the class weights, zero where ignored."""
        classes = f.shape[1]
        if self._indices(f, y):
            ignored = y == self.ignore_index
            q = torch.zeros_like(f).scatter_(1, y.masked_fill(ignored, 0).unsqueeze(1), 1.0)
        else:
            ignored, q = None, y.to(f)
        q = q * (1 - self.label_smoothing) + self.label_smoothing / classes
        if self.weight is not None:
            q = q * self.weight.to(f).view(-1, *[1] * (f.dim() - 2))
        return q if ignored is None else q.masked_fill(ignored.unsqueeze(1), 0.0)

    def gradient(self, f, y):
        f = _full(f)
        q = self._weighted_targets(f, y)
        return q.sum(1, keepdim=True) * f.softmax(1) - q

    def _mass(self, f: Tensor, y: Tensor) -> Tensor:
        """W = sum_c q_c w_c, [N, 1, ...], without forming q when the targets are class indices."""
        if not self._indices(f, y):
            return self._weighted_targets(f, y).sum(1, keepdim=True)
        ignored = y == self.ignore_index
        if self.weight is None:
            return (~ignored).to(f.dtype).unsqueeze(1)
        w = self.weight.to(f)
        mass = (1 - self.label_smoothing) * w[y.masked_fill(ignored, 0)] + self.label_smoothing * w.mean()
        return mass.masked_fill(ignored, 0.0).unsqueeze(1)

    def hessian_product(self, f, y, u):
        axis = 1 - f.dim()
        f = _full(f)
        p = f.softmax(axis)
        pu = p * u
        return self._mass(f, y) * (pu - p * pu.sum(axis, keepdim=True))

    def root_columns(self, f):
        return f[0].numel() // f.shape[1] * max(f.shape[1] - 1, 1)

    def hessian_root(self, f, y):
        """C - 1 columns per position: the closed-form Cholesky factor of diag(p) - p p^T, which has rank C - 1.

        Column j is sqrt(p_j r_j / r_{j-1}) (e_j - sum_{i>j} p_i / r_j e_i) with r_j = sum_{i>j} p_i.
        """
        f = _full(f)
        p = f.softmax(1).reshape(len(f), f.shape[1], -1)  # [N C T]
        scale = self._mass(f, y).sqrt().reshape(len(f), 1, -1)
        tail = p.flip(1).cumsum(1).flip(1)  # tail_j = p_j + r_j
        for j in range(max(f.shape[1] - 1, 1)):
            column = torch.zeros_like(p)
            if f.shape[1] > 1:
                rest = tail[:, j + 1]
                column[:, j] = (p[:, j] * (rest / tail[:, j])).sqrt()
                column[:, j + 1 :] = -p[:, j + 1 :] * (p[:, j] / (rest * tail[:, j])).sqrt().unsqueeze(1)
                column = torch.nan_to_num(column, nan=0.0, posinf=0.0, neginf=0.0)  # 0/0 where all the tail underflowed
            column *= scale
            for t in range(p.shape[2]):
                if p.shape[2] == 1:
                    yield column.view_as(f)
                else:
                    alone = torch.zeros_like(column)
                    alone[:, :, t] = column[:, :, t]
                    yield alone.view_as(f)

    def sampled_gradients(self, f, y, samples, generator):
        f = _full(f)
        p, scale = f.softmax(1), (self._mass(f, y) / samples).sqrt()
        flat = p.movedim(1, -1).reshape(-1, f.shape[1])
        for _ in range(samples):
            label = torch.multinomial(flat, 1, generator=generator).view(len(f), 1, *f.shape[2:])
            yield scale * (p - torch.zeros_like(p).scatter_(1, label, 1.0))

    def check(self, f, y):
        _check_lengths(f, y)
        if f.dim() < 2:
            raise ValueError(f"cross-entropy needs outputs [N, classes, ...]; found shape {tuple(f.shape)}.")
        if not self._indices(f, y):
            return
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise ValueError(f"cross-entropy targets have dtype {y.dtype} and shape {tuple(y.shape)}; expected int64 "
                             f"class indices or probabilities of shape {tuple(f.shape)}.")  # fmt: skip
        if y.shape != f.shape[:1] + f.shape[2:]:
            raise ValueError(f"cross-entropy targets have shape {tuple(y.shape)} for outputs {tuple(f.shape)}; expected "
                             f"{tuple(f.shape[:1] + f.shape[2:])}.")  # fmt: skip
        wrong = ((y < 0) | (y >= f.shape[1])) & (y != self.ignore_index)
        if wrong.any():
            where = wrong.nonzero()[0].tolist()
            raise ValueError(f"target {int(y[tuple(where)])} at index {where if len(where) > 1 else where[0]} is out of "
                             f"range; expected class indices 0..{f.shape[1] - 1} for {f.shape[1]} outputs"
                             f" (or ignore_index={self.ignore_index}).")  # fmt: skip
        if self.weight is not None and len(self.weight) != f.shape[1]:
            raise ValueError(f"class weights have length {len(self.weight)}; expected {f.shape[1]}.")


class _Elementwise(Loss):
    """Losses whose Hessian is diagonal in the output elements: one root column per element of a sample."""

    def _curvature(self, f: Tensor, y: Tensor) -> Tensor:
        """Diagonal of the output-Hessian of the unreduced loss, shape of f."""
        raise NotImplementedError

    def normalizer(self, f, y):
        return {"sum": 1.0, "mean": float(f.numel()), "batchmean": float(len(f))}[self.reduction]

    def hessian_product(self, f, y, u):
        return self._curvature(_full(f), y) * u

    def root_columns(self, f):
        return f[0].numel()

    def hessian_root(self, f, y):
        root = self._curvature(_full(f), y).sqrt().reshape(len(f), -1)
        for j in range(root.shape[1]):
            column = torch.zeros_like(root)
            column[:, j] = root[:, j]
            yield column.view_as(f)

    def check(self, f, y):
        _check_lengths(f, y)
        if f.shape != y.shape:
            raise ValueError(f"{type(self).__name__} needs targets of the output's shape {tuple(f.shape)}; found "
                             f"{tuple(y.shape)}.")  # fmt: skip
        if not y.is_floating_point():
            raise ValueError(f"{type(self).__name__} needs floating-point targets; found {y.dtype}.")


class MSE(_Elementwise):
    """`torch.nn.MSELoss`: l_n = ||f_n - y_n||^2, H = 2 I.  Sampled labels are those of N(f, I / 2)."""

    def __init__(self, reduction: str = "mean"):
        self.reduction = _check_reduction(reduction)

    def sample_losses(self, f, y):
        return (f - y).square().reshape(len(f), -1).sum(1)

    def gradient(self, f, y):
        return 2 * (_full(f) - y)

    def _curvature(self, f, y):
        return torch.full_like(f, 2.0)

    def sampled_gradients(self, f, y, samples, generator):
        f = _full(f)
        for _ in range(samples):
            noise = torch.randn(f.shape, generator=generator, dtype=f.dtype, device=f.device)
            yield (2 / samples) ** 0.5 * noise


class BCEWithLogits(_Elementwise):
    """`torch.nn.BCEWithLogitsLoss`, soft labels, `weight` and `pos_weight` included.

    With c = weight (pos_weight y + 1 - y), H = diag(c sigmoid(f) (1 - sigmoid(f))).
    """

    def __init__(self, weight: Tensor | None = None, pos_weight: Tensor | None = None, reduction: str = "mean"):
        self.weight, self.pos_weight = weight, pos_weight
        self.reduction = _check_reduction(reduction)

    def _options(self, f: Tensor) -> dict[str, Tensor | None]:
        return {
            k: None if t is None else t.to(f) for k, t in (("weight", self.weight), ("pos_weight", self.pos_weight))
        }

    def _mass(self, f: Tensor, y: Tensor) -> Tensor:
        o = self._options(f)
        mass = torch.ones_like(f) if o["pos_weight"] is None else 1 + (o["pos_weight"] - 1) * y
        return mass if o["weight"] is None else mass * o["weight"]

    def sample_losses(self, f, y):
        losses = F.binary_cross_entropy_with_logits(f, y.to(f), reduction="none", **self._options(f))
        return losses.reshape(len(f), -1).sum(1)

    def gradient(self, f, y):
        f, y = _full(f), y.to(_full(f))
        o = self._options(f)
        positive = y if o["pos_weight"] is None else o["pos_weight"] * y
        gradient = (positive + 1 - y) * f.sigmoid() - positive
        return gradient if o["weight"] is None else gradient * o["weight"]

    def _curvature(self, f, y):
        p = f.sigmoid()
        return self._mass(f, y.to(f)) * p * (1 - p)

    def sampled_gradients(self, f, y, samples, generator):
        f = _full(f)
        p, scale = f.sigmoid(), (self._mass(f, y.to(f)) / samples).sqrt()
        for _ in range(samples):
            yield scale * (p - torch.bernoulli(p, generator=generator))

    def check(self, f, y):
        super().check(f, y)
        if ((y < 0) | (y > 1)).any():
            raise ValueError(f"BCEWithLogits needs targets in [0, 1]; found {y.min():.4g} to {y.max():.4g}.")


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
        self.losses, self.reduction = losses, losses[0].reduction

    def sample_losses(self, f, y):
        return sum(loss.sample_losses(f, y) for loss in self.losses)

    def normalizer(self, f, y):
        values = [loss.normalizer(f, y) for loss in self.losses]
        if any(v != values[0] for v in values):
            raise ValueError(f"the summed losses divide by different numbers {values}; give them the same reduction, for "
                             "example reduction='batchmean'.")  # fmt: skip
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


_FROM_TORCH = {
    nn.CrossEntropyLoss: lambda m: CrossEntropy(m.weight, m.ignore_index, m.label_smoothing, m.reduction),
    nn.MSELoss: lambda m: MSE(m.reduction),
    nn.BCEWithLogitsLoss: lambda m: BCEWithLogits(m.weight, m.pos_weight, m.reduction),
}
