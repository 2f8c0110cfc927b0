"""Cross-entropy over classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paraboloid.losses.leading_root import LeadingRoot, largest
from paraboloid.losses.loss import FROM_TORCH, Loss, NoTargets, check_lengths, check_not_negative, check_reduction, full
from paraboloid.passes.memory import CACHED

MANY = 2048  # classes from which labels are drawn by the inverse of their distribution


class CrossEntropy(Loss):
    """`torch.nn.CrossEntropyLoss`: class indices [N, ...] or probabilities [N, C, ...], outputs [N, C, ...].

    With q the (smoothed) target distribution and w the class weights, l = -sum_c q_c w_c log softmax(f)_c, the gradient
    is W softmax(f) - q w and the Hessian W (diag(p) - p p^T), where W = sum_c q_c w_c (0 where ignored).
    """

    exact_root = True

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ):
        self.weight, self.ignore_index, self.label_smoothing = weight, ignore_index, label_smoothing
        self.reduction = check_reduction(reduction)

    def _indices(self, f: Tensor, y: Tensor) -> bool:
        return not (y.is_floating_point() and y.shape == f.shape)

    def _weight(self, f: Tensor) -> Tensor | None:
        return None if self.weight is None else self.weight.to(f)

    def value(self, f, y):
        reduction = "sum" if self.reduction == "batchmean" else self.reduction
        value = F.cross_entropy(
            f, class_indices(y), self._weight(f), ignore_index=self.ignore_index, reduction=reduction,
            label_smoothing=self.label_smoothing,
        )  # fmt: skip
        return value / len(f) if self.reduction == "batchmean" else value

    def sample_losses(self, f, y):
        losses = F.cross_entropy(
            f, class_indices(y), self._weight(f), ignore_index=self.ignore_index, reduction="none",
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
        y = class_indices(y)
        kept = y != self.ignore_index
        total = float(kept.sum() if self.weight is None else self.weight.to(y.device)[y[kept].long()].sum())
        if total <= 0:
            raise NoTargets(f"every target is ignored (ignore_index={self.ignore_index}) or has zero class weight, so "
                            "the mean loss is 0/0; leave such batches out or use reduction='sum'.")  # fmt: skip
        return total

    def _weighted_targets(self, f: Tensor, y: Tensor) -> Tensor:
        """q w, [N, C, ...]: the smoothed target distribution times the class weights, zero where ignored."""
        classes = f.shape[1]
        if self._indices(f, y):
            y = class_indices(y)
            ignored = y == self.ignore_index
            q = torch.zeros_like(f).scatter_(1, y.masked_fill(ignored, 0).long().unsqueeze(1), 1.0)
        else:
            ignored, q = None, y.to(f)
        q = q * (1 - self.label_smoothing) + self.label_smoothing / classes
        if self.weight is not None:
            q = q * self.weight.to(f).view(-1, *[1] * (f.dim() - 2))
        return q if ignored is None else q.masked_fill(ignored.unsqueeze(1), 0.0)

    def gradient(self, f, y):
        f = full(f)
        if self.weight is None and not self.label_smoothing and self._indices(f, y):  # q is one at a class
            y, g = class_indices(y).unsqueeze(1), f.softmax(1)
            ignored = y == self.ignore_index
            g.scatter_add_(1, y.masked_fill(ignored, 0).long(), g.new_full((1,), -1.0).expand(y.shape))
            return g.masked_fill_(ignored, 0.0)
        q = self._weighted_targets(f, y)
        return q.sum(1, keepdim=True) * f.softmax(1) - q

    def _mass(self, f: Tensor, y: Tensor) -> Tensor:
        """W = sum_c q_c w_c, [N, 1, ...], without forming q when the targets are class indices."""
        if not self._indices(f, y):
            return self._weighted_targets(f, y).sum(1, keepdim=True)
        y = class_indices(y)
        ignored = y == self.ignore_index
        if self.weight is None:
            return (~ignored).to(f.dtype).unsqueeze(1)
        w = self.weight.to(f)
        mass = (1 - self.label_smoothing) * w[y.masked_fill(ignored, 0).long()] + self.label_smoothing * w.mean()
        return mass.masked_fill(ignored, 0.0).unsqueeze(1)

    def hessian_product(self, f, y, u):
        return _hessian_product(*self._at(f, y), u)

    def curvature_at(self, f, y):
        own = type(self).hessian_product is CrossEntropy.hessian_product
        if not own or type(self).curvature_product is not Loss.curvature_product or self.psd != "raise":
            return super().curvature_at(f, y)
        return partial(_hessian_product, *self._at(f, y))

    def _at(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The probabilities, the surest class and W, of each position."""
        axis, f = 1 - f.dim(), full(f)
        return f.softmax(axis), f.argmax(axis, keepdim=True), self._mass(f, y)

    def root_columns(self, f):
        return f[0].numel() // f.shape[1] * max(f.shape[1] - 1, 1)

    def hessian_root(self, f, y):
        """C - 1 columns per position: the closed-form Cholesky factor of diag(p) - p p^T, which has rank C - 1.

        Column j is sqrt(p_j r_j / r_{j-1}) (e_j - sum_{i>j} p_i / r_j e_i) with r_j = sum_{i>j} p_i.
        """
        f = full(f)
        p = f.softmax(1).reshape(len(f), f.shape[1], -1)  # [N C T]
        scale = self._mass(f, y).sqrt().reshape(len(f), 1, -1)
        for column in _zero(p) if f.shape[1] == 1 else _cholesky_columns(p, scale):
            for t in range(p.shape[2]):
                if p.shape[2] == 1:
                    yield column.view_as(f)
                else:
                    alone = torch.zeros_like(column)
                    alone[:, :, t] = column[:, :, t]
                    yield alone.view_as(f)

    def leading_root(self, f, y, tol):
        """The columns of `hessian_root` with the classes in the order of their probability, position by position.

        What is left after the classes of a set are eliminated is r (diag(p/r) - (p/r)(p/r)^T) over the others, whose
        probabilities sum to r: the same matrix again for the remaining mass, so that few columns take most of it.
        """
        if f.shape[1] == 1 or type(self).hessian_root is not CrossEntropy.hessian_root:
            return super().leading_root(f, y, tol)
        f = full(f)
        p, classes = f.softmax(1).reshape(len(f), f.shape[1], -1).sort(1, descending=True)  # [N C T]
        factor = _Cholesky.of(p, self._mass(f, y).sqrt().reshape(len(f), 1, -1))
        T = p.shape[2]
        order = largest(factor.squares().reshape(len(f), -1), tol)

        def placed(factor: _Cholesky, classes: Tensor, place: Tensor) -> Tensor:
            """Column `place` of each sample."""
            j, t = (place // T).unsqueeze(1), place % T
            at = t.view(-1, 1, 1).expand(-1, factor.p.shape[1], 1)
            column = torch.zeros_like(factor.p[:, :, 0])
            column.scatter_(1, classes.gather(2, at)[:, :, 0], factor.column(j, at))
            if T > 1:
                column = torch.zeros_like(factor.p).scatter_(2, at, column.unsqueeze(2))
            return column.view(-1, *f.shape[1:])

        columns = (placed(factor, classes, place) for place in order.kept.T)

        def of(n: Tensor) -> Callable[[Tensor], Tensor]:
            mine, its_classes = _Cholesky(*(t[n] for t in factor)), classes[n]
            return mine.by_class(its_classes) if T == 1 else partial(placed, mine, its_classes)

        own = order.own(of)
        return LeadingRoot(columns, order.count, order.left, order.total, own)

    def sampled_gradients(self, f, y, samples, generator):
        f = full(f)
        by_class = f.movedim(1, -1)  # as language models have it in memory: nothing is copied then
        p = by_class.softmax(-1).movedim(-1, 1) if by_class.is_contiguous() else f.softmax(1)
        scale = (self._mass(f, y) / samples).sqrt()
        flat = p.movedim(1, -1).reshape(-1, f.shape[1])
        less, unscaled = -torch.ones_like(p[:, :1]), f.device.type == "cpu" and bool((scale == 1).all())
        for left in reversed(range(samples)):
            label = _drawn(flat, generator).view(len(f), 1, *f.shape[2:])
            found = p.scatter_add(1, label, less) if left else p.scatter_add_(1, label, less)  # p is needed no more
            yield found if unscaled else found.mul_(scale)

    def check(self, f, y):
        check_lengths(f, y)
        if f.dim() < 2:
            raise ValueError(f"cross-entropy needs outputs [N, classes, ...]; found shape {tuple(f.shape)}.")
        if self.weight is not None and self.weight.shape != (f.shape[1],):
            raise ValueError(f"class weights have length {len(self.weight)}; expected {f.shape[1]}.")
        check_not_negative(weight=self.weight)
        if not self._indices(f, y):
            if (y < 0).any():
                raise ValueError(f"cross-entropy targets of the output's shape are probabilities; found {y.min():.4g}, "
                                 "expected none below zero.")  # fmt: skip
            return
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise ValueError(f"cross-entropy targets have dtype {y.dtype} and shape {tuple(y.shape)}; expected int64 "
                             f"class indices or probabilities of shape {tuple(f.shape)}.")  # fmt: skip
        if y.shape != f.shape[:1] + f.shape[2:]:
            raise ValueError(f"cross-entropy targets have shape {tuple(y.shape)} for outputs {tuple(f.shape)}; "
                             f"expected {tuple(f.shape[:1] + f.shape[2:])}.")  # fmt: skip
        y = class_indices(y)
        wrong = (y < 0) | (y >= f.shape[1])
        if wrong.any() and (wrong := wrong & (y != self.ignore_index)).any():
            where = wrong.nonzero()[0].tolist()
            raise ValueError(f"target {int(y[tuple(where)])} at index {where if len(where) > 1 else where[0]} is out "
                             f"of range; expected class indices 0..{f.shape[1] - 1} for {f.shape[1]} outputs"
                             f" (or ignore_index={self.ignore_index}).")  # fmt: skip


def _hessian_product(p: Tensor, surest: Tensor, mass: Tensor, u: Tensor) -> Tensor:
    """W (diag(p) - p p^T) u, for p [N, C, ...] and u with any leading axes.

    H 1 = 0: less its value at the surest class, whose p rounds to 1, u leaves the others' p their digits.
    """
    axis, leading = 1 - p.dim(), u.shape[: u.dim() - p.dim()]
    u = u - u.gather(axis, surest.expand(*leading, *surest.shape) if leading else surest)
    pu = p * u
    return mass * (pu - p * pu.sum(axis, keepdim=True))


def class_indices(y: Tensor) -> Tensor:
    """Targets of int64, as torch's loss takes them: of uint8 too, which as an index would be a mask.

    Raises ValueError for other integers; floating-point targets are returned as they are.
    """
    if y.dtype == torch.uint8:
        return y.long()
    if y.dtype in (torch.int8, torch.int16, torch.int32):
        raise ValueError(f"class targets have dtype {y.dtype}; expected torch.int64 (or torch.uint8), as torch's "
                         "losses take them. Convert them by `targets.long()`.")  # fmt: skip
    return y


def _drawn(p: Tensor, generator: torch.Generator) -> Tensor:
    """A class for each row of p [rows, C], with those probabilities."""
    rows, C = p.shape
    if C <= MANY:
        return torch.multinomial(p, 1, generator=generator)[:, 0]
    cumulative = p.cumsum(1)  # one number drawn for a row; multinomial draws one for each class
    u = torch.rand(rows, 1, dtype=p.dtype, device=p.device, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, u, right=True)[:, 0].clamp_(max=C - 1)


def _zero(p: Tensor) -> Iterator[Tensor]:
    yield torch.zeros_like(p)


class _Cholesky(NamedTuple):
    """Cholesky factor of diag(p) - p p^T over axis 1 of p [N C T], times scale: column j is diagonal_j at class j, and
    down_j p_i / r_j at the classes i > j, with r_j = sum_{i>j} p_i."""

    p: Tensor
    diagonal: Tensor  # [N C-1 T]
    down: Tensor
    rest: Tensor  # r, 1 where it underflowed

    @staticmethod
    def of(p: Tensor, scale: Tensor) -> _Cholesky:
        tail = p.flip(1).cumsum(1).flip(1)  # tail_j = p_j + r_j
        below = tail.masked_fill(tail == 0, 1.0)  # for quotients: where all that is left underflowed, they are 0
        rest = tail[:, 1:]
        # Quotients of at most 1 only: rest * tail underflows long before its quotient with p is negligible.
        down = (rest * (p[:, :-1] / below[:, :-1])).sqrt_().mul_(-scale)
        diagonal = (p[:, :-1] * (rest / below[:, :-1])).sqrt_().mul_(scale)
        return _Cholesky(p, diagonal, down, below[:, 1:])

    def squares(self) -> Tensor:
        """Squared norms of the columns, [N C-1 T]."""
        after = self.p.double().square().flip(1).cumsum(1).flip(1)[:, 1:].sqrt() / self.rest
        return self.diagonal.double().square() + (self.down * after).square()

    def column(self, j: Tensor, at: Tensor) -> Tensor:
        """Column j [N, 1] of each sample at its own position, `at` [N, C, 1]; [N, C]."""

        def here(t: Tensor) -> Tensor:
            return t.gather(2, at[:, : t.shape[1]])[:, :, 0].gather(1, j)

        column = self.p.gather(2, at)[:, :, 0] / here(self.rest) * here(self.down)
        column.masked_fill_(torch.arange(self.p.shape[1], device=j.device) <= j, 0.0)
        return column.scatter_(1, j, here(self.diagonal))

    def by_class(self, classes: Tensor) -> Callable[[Tensor], Tensor]:
        """j [N] -> column j of each sample at its only position, its classes [N C 1] in their own order; [N, C]."""
        classes = classes[:, :, 0]
        p = torch.empty_like(self.p[:, :, 0]).scatter_(1, classes, self.p[:, :, 0])
        place = torch.empty_like(classes).scatter_(1, classes, torch.arange(p.shape[1], device=p.device).expand_as(p))
        along = (self.down / self.rest)[:, :, 0]

        def column(j: Tensor) -> Tensor:
            j = j.unsqueeze(1)
            found = (p * along.gather(1, j)).mul_(place > j)
            return found.scatter_(1, classes.gather(1, j), self.diagonal[:, :, 0].gather(1, j))

        return column


def _cholesky_columns(p: Tensor, scale: Tensor) -> Iterator[Tensor]:
    """The C - 1 columns [N C T] of the factor, as many at a time as fit into the cache."""
    C, factor = p.shape[1], _Cholesky.of(p, scale)
    step, classes = CACHED.count(p.nbytes, device=p.device), torch.arange(C, device=p.device)
    for start in range(0, C - 1, step):
        j = slice(start, min(start + step, C - 1))
        columns = p / factor.rest[:, j].transpose(0, 1).unsqueeze(2)
        columns.mul_(factor.down[:, j].transpose(0, 1).unsqueeze(2))  # [j N C T]
        above = classes <= classes[j].unsqueeze(1)
        columns.masked_fill_(above[:, None, :, None], 0.0)
        columns.diagonal(start, 0, 2).copy_(factor.diagonal[:, j].movedim(1, -1))
        yield from columns


FROM_TORCH[nn.CrossEntropyLoss] = lambda m: CrossEntropy(m.weight, m.ignore_index, m.label_smoothing, m.reduction)
