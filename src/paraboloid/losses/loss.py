"""What a loss is: the class that every loss, and a user's own, derives from; its multiples and sums."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from paraboloid.losses.leading_root import LeadingRoot, of_columns

REDUCTIONS = ("mean", "sum", "batchmean")
FROM_TORCH: dict[type[nn.Module], Callable[[Any], Loss]] = {}  # torch class -> the Loss of such a module


TOLERANCE = 1e-6  # relative size of negative eigenvalues of an output-Hessian that count as rounding


class NoTargets(ValueError):
    """Every target of a batch is ignored: its mean is 0/0, though it adds nothing to the sum over several batches."""


class Loss:
    """A loss that separates over samples (axis 0 of the output); the class to derive your own from.

        class Huberised(pb.Loss):
            def sample_losses(self, f, y):
                return ((f - y).square() + 1).sqrt().flatten(1).sum(1)

    `sample_losses` is all that is needed: gradient, Hessian and its root come from autograd in output space (the root
    by an eigen-decomposition of each sample's Hessian).  Give any of them in closed form to be faster.  What else may
    be given:

    sample_targets   draws labels from the model's predictive distribution; without it, quantities that sample labels
                     ("kfac", "diag_ggn_mc") raise NotImplementedError
    normalizer       what the reduction divides by, if not by the number of samples
    psd              what `hessian_root` does where the output-Hessian is indefinite (the loss is not convex in the
                     output): "raise" a ValueError, or "clip" the negative eigenvalues to zero
    check            raises ValueError for targets that do not fit

    With ``loss(f, y)``, the differentiable reduced value, a `Loss` trains a model as a torch loss does; ``2 * loss``
    and ``loss + other`` are losses too.

    Two matrices belong to a loss.  `hessian_product` is its exact second derivative.  `curvature_product` is the
    positive semi-definite one that `hessian_root` is a root of, from which the generalised Gauss-Newton matrix is made:
    the same for a convex loss; else the clipped Hessian, or the Fisher information where a loss says so
    (`GaussianNLL`).
    """

    reduction: str = "mean"
    """"sum" divides by nothing, however many batches there are; else normalizers add up."""
    psd: str = "raise"
    """What `hessian_root` does where the Hessian is indefinite: "raise" or "clip"."""
    exact_root: bool = False
    """Whether `hessian_root` is known to be a root of the exact Hessian, whatever f and y are."""

    def __call__(self, f: Tensor, y: Tensor) -> Tensor:
        value = self.value(f, y)
        for hook in tuple(self._hooks.values()):
            hook(f, y, value)
        return value

    @property
    def _hooks(self) -> dict[int, Callable[[Tensor, Tensor, Tensor], None]]:
        return self.__dict__.get("_called", {})

    def register_hook(self, hook: Callable[[Tensor, Tensor, Tensor], None]) -> RemovableHandle:
        """``hook(f, y, value)`` after every call ``loss(f, y)``; the handle's `remove()` takes it off."""
        self.__dict__.setdefault("_called", OrderedDict())
        handle = RemovableHandle(self.__dict__["_called"])
        self.__dict__["_called"][handle.id] = hook
        return handle

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_called"}

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """The loss as reduced, a differentiable scalar."""
        return self.sample_losses(f, y).sum() / self.normalizer(f, y)

    def sample_losses(self, f: Tensor, y: Tensor) -> Tensor:
        """Unreduced loss of each sample, [N]: the sum of its elements, ignored elements counting zero."""
        raise NotImplementedError(f"{type(self).__name__} has no `sample_losses`; expected a method that returns the "
                                  "loss of each sample, [N].")  # fmt: skip

    def normalizer(self, f: Tensor, y: Tensor) -> float:
        """What the reduction divides the summed loss by: 1 for "sum", else a number that adds up over batches.

        The number of samples, unless a subclass counts otherwise.
        """
        return 1.0 if self.reduction == "sum" else float(len(f))

    @property
    def terms(self) -> list[Loss]:
        """The losses that this one is a sum of, each with a normalizer of its own; most are a single term."""
        return [self]

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """Gradient of sum_n l_n in the output, shape of f."""
        with torch.enable_grad():
            f = full(f).requires_grad_()
            return torch.autograd.grad(self.sample_losses(f, y).sum(), f)[0]

    def exact_gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """The same without the guards that torch's loss has (`BCE`): what the Hessian is the derivative of."""
        return self.gradient(f, y)

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

    def curvature_product(self, f: Tensor, y: Tensor, u: Tensor) -> Tensor:
        """sum_v s_v (s_v . u) per sample, for the vectors s_v of `hessian_root`; H u itself unless psd is "clip"."""
        if self.psd == "raise":
            return self.hessian_product(f, y, u)
        root = torch.stack(list(self.hessian_root(f, y))).flatten(2)  # [V N C]
        flat = u.to(root).reshape(-1, len(f), root.shape[2])
        return torch.einsum("vnc,vnd,knd->knc", root, root, flat).reshape(u.shape)

    def curvature_at(self, f: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        """u -> curvature_product(f, y, u), again and again; a loss may keep what it makes of f and y alone."""
        return partial(self.curvature_product, f, y)

    def root_columns(self, f: Tensor) -> int:
        """Number of vectors that `hessian_root` yields."""
        return f[0].numel()

    def hessian_root(self, f: Tensor, y: Tensor) -> Iterator[Tensor]:
        """Vectors s_v of f's shape with sum_v s_v[n] s_v[n]^T = H_n, exactly (see `psd`), for every sample n."""
        if self.psd not in ("raise", "clip"):
            raise ValueError(f"{type(self).__name__}.psd is {self.psd!r}; expected 'raise' or 'clip'.")
        f = full(f)
        units = torch.eye(f[0].numel(), dtype=f.dtype, device=f.device).view(-1, 1, *f.shape[1:]).expand(-1, *f.shape)
        hessians = self.hessian_product(f, y, units).reshape(len(units), len(f), -1).transpose(0, 1)  # [N, C, C]
        values, vectors = torch.linalg.eigh((hessians + hessians.mT) / 2)
        if self.psd == "raise":
            scale = values.abs().amax(1, keepdim=True)
            if (values < -TOLERANCE * (scale + TOLERANCE * scale.max())).any():
                raise ValueError(
                    f"the output-Hessian has the eigenvalue {values.min():.4g}; expected a loss that is convex in the "
                    f"output, which alone has a real root. Set psd = 'clip' on {type(self).__name__} to replace "
                    "negative eigenvalues by zero, or take a quantity of the exact Hessian (diag_hessian, pb.Hessian)."
                )
        root = vectors * values.clamp(min=0).sqrt().unsqueeze(1)
        return iter(root.permute(2, 0, 1).reshape(-1, *f.shape))

    def leading_root(self, f: Tensor, y: Tensor, tol: float) -> LeadingRoot:
        """Each sample's own largest vectors of `hessian_root`, as few as leave out at most `tol` of the trace of all
        H_n together."""
        return of_columns(self.hessian_root(f, y), self.hessian_root(f, y), tol)

    def sample_targets(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """Labels drawn from the predictive distribution that the output f stands for, as targets of this loss."""
        raise NotImplementedError(
            f"{type(self).__name__} does not say how to draw labels from the model's predictive distribution; expected "
            "a `sample_targets` method. Use a quantity that takes the exact output-Hessian instead."
        )

    def sampled_gradients(self, f: Tensor, y: Tensor, samples: int, generator: torch.Generator) -> Iterator[Tensor]:
        """`samples` random vectors of f's shape with E[sum_v s_v[n] s_v[n]^T] the curvature of sample n: the output
        gradients at labels from `sample_targets`, divided by sqrt(samples) (Monte Carlo Fisher)."""
        targets = [self.sample_targets(full(f), generator) for _ in range(samples)]
        return (self.gradient(f, drawn) / samples**0.5 for drawn in targets)

    def check(self, f: Tensor, y: Tensor) -> None:
        """Raise ValueError where output and target do not fit this loss, or its samples are not separate."""
        check_lengths(f, y)
        with torch.no_grad():
            each, first = self.sample_losses(full(f), y), self.sample_losses(full(f[:1]), y[:1])
        if each.shape != (len(f),):
            raise ValueError(f"{type(self).__name__}.sample_losses returned shape {tuple(each.shape)} for outputs "
                             f"{tuple(f.shape)}; expected one number per sample, [{len(f)}].")  # fmt: skip
        if not torch.allclose(each[:1], first, rtol=1e-3, atol=1e-6, equal_nan=True):
            raise ValueError(f"{type(self).__name__}: the loss of sample 0 is {float(each[0]):.6g} in the batch and "
                             f"{float(first[0]):.6g} alone; expected a loss that separates over samples and leaves "
                             "the division by their number to `normalizer`.")  # fmt: skip

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


LossFunction = Loss | Callable[..., Any]  # what users give: a torch loss module, a `Loss`, or any callable


class Scaled(Loss):
    """scale * loss: the unreduced loss is scaled, the normalizer is the loss's own unless another one is given."""

    def __init__(self, loss: Loss, scale: float, normalizer: float | None = None):
        if not scale > 0:
            raise ValueError(f"a loss is multiplied by {scale}; expected a positive number, so that it stays convex.")
        self.loss, self.scale, self.divisor = loss, scale, normalizer
        self.reduction = loss.reduction if normalizer is None else "sum"
        self.exact_root = loss.exact_root

    @property
    def terms(self):
        own = self.loss.terms
        return [self] if len(own) == 1 else [Scaled(term, self.scale) for term in own]

    def sample_losses(self, f, y):
        return self.scale * self.loss.sample_losses(f, y)

    def normalizer(self, f, y):
        return self.loss.normalizer(f, y) if self.divisor is None else self.divisor

    def gradient(self, f, y):
        return self.scale * self.loss.gradient(f, y)

    def exact_gradient(self, f, y):
        return self.scale * self.loss.exact_gradient(f, y)

    def hessian_product(self, f, y, u):
        return self.scale * self.loss.hessian_product(f, y, u)

    def curvature_product(self, f, y, u):
        return self.curvature_at(f, y)(u)

    def curvature_at(self, f, y):
        own = self.loss.curvature_at(f, y)
        return lambda u: self.scale * own(u)

    def root_columns(self, f):
        return self.loss.root_columns(f)

    def hessian_root(self, f, y):
        return (self.scale**0.5 * s for s in self.loss.hessian_root(f, y))

    def leading_root(self, f, y, tol):
        own = self.loss.leading_root(f, y, tol)
        columns = (self.scale**0.5 * s for s in own.columns)
        own = own._replace(columns=columns, left=self.scale * own.left, total=self.scale * own.total)
        if (each := own.own) is None:
            return own

        def of(n: Tensor) -> Callable[[Tensor], Tensor]:
            columns = each.of(n)
            return lambda k: self.scale**0.5 * columns(k)

        return own._replace(own=each._replace(left=self.scale * each.left, of=of))

    def sampled_gradients(self, f, y, samples, generator):
        return (self.scale**0.5 * s for s in self.loss.sampled_gradients(f, y, samples, generator))

    def check(self, f, y):
        self.loss.check(f, y)


class Sum(Loss):
    """loss + other, on the same output and target; each term keeps the factor of its own reduction.

    Where all terms divide by the same number m, the unreduced loss is the sum of theirs and its normalizer is m.  Where
    they differ (cross-entropy's mean over N targets, squared error's over N C elements, a "sum" over nothing), the
    loss counts as a mean over the N samples: l_n = N sum_i l_{i,n} / m_i and its normalizer is N, so that the mean of
    l_n is the loss as reduced.
    """

    def __init__(self, *losses: Loss):
        self.losses = [term for loss in losses for term in loss.terms]
        self.exact_root = all(loss.exact_root for loss in self.losses)
        kinds = {loss.reduction for loss in self.losses}
        self.reduction = kinds.pop() if len(kinds) == 1 else "mixed"

    @property
    def terms(self):
        return self.losses

    def weights(self, f, y) -> list[float]:
        """What each term's unreduced loss is multiplied by in this one's: [1, 1, ...], or N / m_i where they differ."""
        each = [loss.normalizer(f, y) for loss in self.losses]
        return [1.0] * len(each) if len(set(each)) == 1 else [len(f) / m for m in each]

    def normalizer(self, f, y):
        each = {loss.normalizer(f, y) for loss in self.losses}
        return each.pop() if len(each) == 1 else float(len(f))

    def _combined(self, f, y, method: str, *args) -> Any:
        weighted = zip(self.weights(f, y), self.losses, strict=True)
        return sum(w * getattr(loss, method)(f, y, *args) for w, loss in weighted)

    def sample_losses(self, f, y):
        return self._combined(f, y, "sample_losses")

    def gradient(self, f, y):
        return self._combined(f, y, "gradient")

    def exact_gradient(self, f, y):
        return self._combined(f, y, "exact_gradient")

    def hessian_product(self, f, y, u):
        return self._combined(f, y, "hessian_product", u)

    def curvature_product(self, f, y, u):
        return self.curvature_at(f, y)(u)

    def curvature_at(self, f, y):
        each = [(w, loss.curvature_at(f, y)) for w, loss in zip(self.weights(f, y), self.losses, strict=True)]
        return lambda u: sum(w * own(u) for w, own in each)

    def root_columns(self, f):
        return sum(loss.root_columns(f) for loss in self.losses)

    def hessian_root(self, f, y):
        for w, loss in zip(self.weights(f, y), self.losses, strict=True):
            for s in loss.hessian_root(f, y):
                yield s if w == 1 else w**0.5 * s

    def sampled_gradients(self, f, y, samples, generator):
        """Each vector is a sum with random signs over the terms: cross terms vanish in expectation."""
        roots = [w**0.5 for w in self.weights(f, y)]
        streams = [loss.sampled_gradients(f, y, samples, generator) for loss in self.losses]
        for parts in zip(*streams, strict=True):
            signs = torch.randint(2, (len(parts),), generator=generator, device=f.device).mul(2).sub(1)
            yield sum(sign * root * part for sign, root, part in zip(signs, roots, parts, strict=True))

    def check(self, f, y):
        for loss in self.losses:
            loss.check(f, y)


def settled(loss: Loss, normalizers: Sequence[float], samples: int) -> Sum:
    """The same loss on all of several batches together, whose terms divide by the given numbers: on each batch its
    unreduced loss and normalizer are those of the big one."""
    unit = normalizers[0] if len(set(normalizers)) == 1 else float(samples)
    return Sum(*(Scaled(t, unit / m, normalizer=unit) for t, m in zip(loss.terms, normalizers, strict=True)))


def _name(thing: object) -> str:
    return getattr(thing, "__name__", None) or type(thing).__name__


def check_reduction(reduction: str) -> str:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; expected one of {REDUCTIONS} (per-sample values come from "
                         "pb.statistics, not from reduction='none').")  # fmt: skip
    return reduction


def check_lengths(f: Tensor, y: Tensor) -> None:
    if not isinstance(y, Tensor):
        raise ValueError(
            f"the targets are a {type(y).__name__}; expected one tensor with the samples along axis 0, as losses with "
            "quantities per sample take it. Stack them, [N, ...], to be taken apart in the sample_losses of a pb.Loss; "
            "pb.GGN and pb.Hessian take callables of any targets."
        )
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


def check_not_negative(**options: Tensor | None) -> None:
    """Raise ValueError for a negative weight: with it the loss is not convex and its curvature has no real root."""
    for name, value in options.items():
        if value is not None and (value < 0).any():
            raise ValueError(f"{name} has the entry {value.min():.4g}; expected none below zero.")
